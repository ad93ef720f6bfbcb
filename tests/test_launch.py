"""The launchers: checked files, recorded calls of gcloud, kubectl, sbatch and sky, and runs that are told to leave.

The cloud's commands are stand-ins on PATH that write down how they were called; ssh runs the command in a folder that
plays the host. Nothing here can reach a cloud.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install -e '.[development]'")
import yaml  # noqa: E402

from helpers import launch_schemas  # noqa: E402
from vivi_jax.distributed import preemption, watchdog  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
FLAGS = ["--config=configs/vito.py", "--config.data.path=/mnt/b/a store", '--config.note="$HOME\\']
RECORD = '#!/usr/bin/env bash\nprintf "%s\\0" "$(basename "$0")" "$@" >>"$CALLS"; printf "\\n" >>"$CALLS"\n'
# gcloud, for as far as the launcher uses it. CLOUD/state and CLOUD/queue: states of the TPU and of the queued request;
# CLOUD/fail: exit code of the next create.
GCLOUD = (
    RECORD
    + """
state="$CLOUD/state" host="$CLOUD/host"
case "$3 $4" in
  "tpu-vm create" | "queued-resources create")
    if [ -f "$CLOUD/fail" ]; then
      code="$(cat "$CLOUD/fail")"; rm "$CLOUD/fail"
      echo "ERROR: (gcloud) FAILED_PRECONDITION: reservation r has expired" >&2; exit "$code"
    fi
    mkdir -p "$host"; echo READY >"$state" ;;
  "queued-resources describe") cat "$CLOUD/queue" 2>/dev/null || echo ACTIVE ;;
  "tpu-vm describe")
    [ -f "$state" ] || { echo "ERROR: NOT_FOUND: no such TPU" >&2; exit 1; }
    cat "$state" ;;
  "tpu-vm scp") cp "$5" "$host/vivi_jax.tgz" ;;
  "tpu-vm ssh")
    for argument in "$@"; do
      [[ "$argument" != --command=* ]] || HOME="$host" bash -c "cd; ${argument#--command=}"
    done ;;
  "tpu-vm delete" | "queued-resources delete") rm -f "$state" ;;
esac
"""
)
# In the place of .venv/bin/python: keeps its promise to save and leave with 143, and ends on the second start.
TRAINER = """#!/usr/bin/env bash
printf "%s\\n" "$@" >>"$CLOUD/flags"
echo start >>"$CLOUD/starts"
[ "$(wc -l <"$CLOUD/starts")" -lt 2 ] || { echo "ended"; exit 0; }
trap 'echo saved >>"$CLOUD/saved"; exit 143' TERM
echo "a step"
for _ in $(seq 400); do sleep 0.05; done
exit 1
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A folder with stand-ins on PATH; calls(cloud) has what they were called with."""
    folder = tmp_path / "cloud"
    folder.mkdir()
    for name in ("gcloud", "kubectl", "sky", "sbatch", "srun", "scancel", "scontrol", "docker", "sudo", "gcsfuse"):
        write_command(folder / name, GCLOUD if name == "gcloud" else RECORD)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(folder / "calls"))
    monkeypatch.setenv("CLOUD", str(folder))
    monkeypatch.setenv("PYTHON", sys.executable)
    return folder


def write_command(path, text):
    path.write_text(text)
    path.chmod(0o755)


def calls(cloud):
    path = cloud / "calls"
    return [line.split("\0")[:-1] for line in path.read_text().splitlines()] if path.exists() else []


def launch(script, *arguments, cwd=ROOT, **options):
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments], cwd=cwd, text=True, capture_output=True, timeout=60, **options
    )


def copy_of_the_project(folder):
    """A clone with what the launchers need, and an environment in which the trainer stands for Python."""
    shutil.copytree(ROOT / "launch", folder / "launch")
    for name in ("setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv/bin").mkdir(parents=True)
    write_command(folder / ".venv/bin/python", TRAINER)
    pinned = b"".join((folder / name).read_bytes() for name in ("setup.py", "constraints.txt"))
    stamp = subprocess.run(["cksum"], input=pinned, capture_output=True).stdout.decode().strip()
    (folder / ".venv/installed").write_text("".join(f"{extras} {stamp}\n" for extras in ("[tpu]", "[cuda]")))
    return folder


# --- the files --------------------------------------------------------------------------------------------------------


def test_scripts_pass_shellcheck():
    shellcheck = shutil.which(
        "shellcheck", path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install -e '.[development]'")
    assert len(SCRIPTS) >= 12
    done = subprocess.run([shellcheck, *map(str, SCRIPTS)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("options", [[], ["--spot", "--bucket=b", "--account=trainer", "--topology=2x2x4"]])
def test_the_jobset_is_valid_and_carries_the_flags(cloud, options):
    done = launch("gke.sh", "up", "vito", "--image=r/v:1", *options, "--dry_run", "--", *FLAGS)
    assert done.returncode == 0, done.stderr
    command, rendered = done.stdout.split("\n", 1)
    assert command == "+ kubectl apply -f -" and calls(cloud) == []
    jobset = yaml.safe_load(rendered)
    jsonschema.validate(jobset, launch_schemas.JOBSET)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert pod["containers"][0]["args"] == FLAGS and job["parallelism"] == job["completions"] == 4
    assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == ("volumes" in pod) == bool(options)
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [preemption.EXIT_CODE]
    if options:
        assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
        assert pod["containers"][0]["volumeMounts"][0]["mountPath"] == "/mnt/b"


def test_the_skypilot_file_is_valid_and_passes_the_flags_on(cloud, tmp_path):
    task = yaml.safe_load((ROOT / "launch/sky.yaml").read_text())
    jsonschema.validate(task, launch_schemas.SKYPILOT)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [preemption.EXIT_CODE, watchdog.EXIT_CODE]
    assert launch("sky.sh", "vito", "--nodes=2", "--spot", "--bucket=gs://b", "--", *FLAGS).returncode == 0
    call = calls(cloud)[0]
    assert call[:3] == ["sky", "jobs", "launch"] and "--use-spot" in call and call[call.index("--num-nodes") + 1] == "2"
    task = yaml.safe_load(pathlib.Path(call[-1]).read_text())
    jsonschema.validate(task, launch_schemas.SKYPILOT)
    assert task["file_mounts"]["/data"]["source"] == "gs://b"
    # On a node: the flags as they were, and where the processes meet.
    node = tmp_path / "node"
    (node / ".venv/bin").mkdir(parents=True)
    write_command(node / ".venv/bin/python", '#!/usr/bin/env bash\nprintf "%s\\n" "$@"; env | grep ^JAX_ | sort\n')
    flags = call[call.index("--env") + 1].removeprefix("FLAGS=")
    ran = subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=node,
        capture_output=True,
        text=True,
        env={
            "PATH": os.environ["PATH"],
            "FLAGS": flags,
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": "1",
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        },
    )
    assert ran.stdout.splitlines() == [
        "-m",
        "vivi_jax.main",
        *FLAGS,
        "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476",
        "JAX_NUM_PROCESSES=2",
        "JAX_PROCESS_ID=1",
    ]


def test_the_container_file_copies_what_there_is_and_pins_the_same_beam(cloud):
    text = (ROOT / "launch/Dockerfile").read_text()
    instructions = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in instructions} <= {"ARG", "FROM", "WORKDIR", "COPY", "ENV", "RUN", "ENTRYPOINT"}
    stages = [line.split() for line in instructions if line.startswith("FROM")]
    assert [stage[3] for stage in stages] == ["sdk", "base", "cpu", "cuda", "tpu", "beam"]
    for line in instructions:
        if line.startswith("COPY") and "--from" not in line:
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    beam = re.search(r"apache/beam_python\${PYTHON}_sdk:([\d.]+)", text)[1]
    assert f"apache-beam=={beam}\n" in (ROOT / "constraints.txt").read_text()
    assert launch("image.sh", "tpu", "r/v:1").returncode == 0
    assert calls(cloud) == [
        [
            "docker",
            "build",
            "--file=launch/Dockerfile",
            "--target=tpu",
            f"--build-arg=PYTHON={sys.version_info[0]}.{sys.version_info[1]}",
            "--tag=r/v:1",
            ".",
        ],
        ["docker", "push", "r/v:1"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["dataflow", "prepare", "--project=p", "--region=r", "--bucket=b", "--spot"],
        ["flink", "prepare", "--master=h:8081"],
        ["spark", "curate", "--master=h:8099"],
    ],
)
def test_beam_knows_the_options_it_is_given(cloud, options):
    done = launch("beam.sh", *options, "--image=r/b:1", "--dry_run", "--", "--videos=gs://b/a b", "--out=gs://b/s")
    assert done.returncode == 0, done.stderr
    environment, command = done.stdout.splitlines()
    assert environment == r"+ bash launch/environment.sh \[dataflow\] "
    assert r"--videos=gs://b/a\ b --out=gs://b/s --runner=" in command
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install -e '.[beam]'")
    from input_pipeline.preparation import beam_runner

    beam_runner.parse(
        ["--runner=" + command.split("--runner=")[1].split()[0], *command.split("--runner=")[1].split()[1:]]
    )


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("tpu_vm.sh", ["up"], "usage: bash launch/tpu_vm.sh"),
        ("tpu_vm.sh", ["up", "n", "--", "x"], "--zone=VALUE is missing"),
        ("tpu_vm.sh", ["run", "n", "--zone=z"], "no flags for python -m vivi_jax.main"),
        ("tpu_vm.sh", ["fly", "n", "--zone=z"], "unknown command fly"),
        ("tpu_vm.sh", ["up", "n", "--zne=z"], "unknown option --zne; there are --zone --type"),
        ("gke.sh", ["up", "n", "--", "x"], "--image=VALUE is missing"),
        ("gke.sh", ["up", "N_1", "--image=i", "--", "x"], "the name N_1 must be of a-z"),
        ("gke.sh", ["up", "n", "--image=i", "--topology=3x3", "--", "x"], "3x3 has 9 chips, which hosts of 4 "),
        ("slurm.sh", ["train"], "unexpected argument train"),
        ("slurm.sh", [], "no flags for python -m vivi_jax.main"),
        ("sky.sh", ["n"], "no flags"),
        ("image.sh", ["arm", "t"], "unknown kind of image arm"),
        ("beam.sh", ["dataflow", "prepare", "--image=i", "--", "x"], "--project=VALUE is missing"),
        ("beam.sh", ["ray", "prepare", "--image=i", "--", "x"], "unknown runner ray"),
    ],
)
def test_one_clear_line(cloud, script, arguments, message):
    done = launch(script, *arguments)
    assert done.returncode == 2 and calls(cloud) == []
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ") and message in done.stderr


@pytest.mark.parametrize("queued", [[], ["--queued", "--reserved"]])
def test_a_failed_create_passes_gclouds_words_and_code_on(cloud, queued):
    (cloud / "fail").write_text("3")
    done = launch("tpu_vm.sh", "up", "n", "--zone=z", *queued, "--", "x")
    assert done.returncode == 3 and len(calls(cloud)) == 1  # nothing more is tried
    assert done.stderr.splitlines() == [
        "ERROR: (gcloud) FAILED_PRECONDITION: reservation r has expired",
        "error: n was not created (gcloud's exit code 3; what it said is above)",
    ]


def test_a_queued_request_that_fails_is_the_end(cloud):
    (cloud / "queue").write_text("FAILED\n")
    done = launch("tpu_vm.sh", "up", "n", "--zone=z", "--queued", "--reserved", "--", "x")
    assert done.returncode == 1 and [call[4] for call in calls(cloud)] == ["create", "describe", "describe"]
    assert done.stderr.splitlines()[-1] == (
        "error: the queued request n is FAILED, as above; delete it, and ask for what there is"
    )


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("tpu_vm.sh", ["up", "n", "--zone=z", "--queued", "--spot", "--bucket=b"]),
        ("slurm.sh", ["--nodes=2"]),
        ("sky.sh", ["n", "--spot"]),
        ("gke.sh", ["up", "n", "--image=i"]),
    ],
)
def test_dry_runs_call_nothing(cloud, script, arguments):
    done = launch(script, *arguments, "--dry_run", "--", *FLAGS)
    assert done.returncode == 0 and done.stdout.startswith(("+", "#")) and calls(cloud) == []


def test_commands_of_a_tpu_vm(cloud):
    for arguments in (
        ["create", "n", "--zone=z", "--project=p", "--type=v5litepod-16", "--spot"],
        ["create", "n", "--zone=z", "--queued", "--reserved"],
        ["delete", "n", "--zone=z", "--queued"],
    ):
        assert launch("tpu_vm.sh", *arguments).returncode == 0
    tpus = ["gcloud", "compute", "tpus"]
    assert calls(cloud) == [
        [
            *tpus,
            "tpu-vm",
            "create",
            "n",
            "--version=v2-alpha-tpuv5-lite",
            "--accelerator-type=v5litepod-16",
            "--spot",
            "--zone=z",
            "--project=p",
        ],
        [
            *tpus,
            "queued-resources",
            "create",
            "n",
            "--node-id=n",
            "--runtime-version=v2-alpha-tpuv5-lite",
            "--accelerator-type=v5litepod-8",
            "--reserved",
            "--zone=z",
        ],
        [*tpus, "queued-resources", "describe", "n", "--format=value(state.state)", "--zone=z"],
        [*tpus, "queued-resources", "delete", "n", "--force", "--quiet", "--zone=z"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["preempted", "told to leave"])
def test_a_tpu_vm_runs_to_the_end_through_an_interruption(cloud, end):
    """One command: made, pushed to, started; taken away or told to leave, it is made and started again."""
    copy_of_the_project(cloud / "host/vivi_jax")
    watching = subprocess.Popen(
        ["bash", "launch/tpu_vm.sh", "up", "n", "--zone=z", "--poll=0.2", "--", *FLAGS],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: "a step" in (cloud / "host/vivi_jax.log").read_text())
    assert launch("tpu_vm.sh", "run", "n", "--zone=z", "--", "x", env=os.environ | {"PATIENCE": "0"}).stdout.endswith(
        "already running\n"
    )
    if end == "preempted":
        (cloud / "fail").write_text("1")  # there is no room at first
        (cloud / "state").write_text("PREEMPTED\n")
    assert launch("tpu_vm.sh", "stop", "n", "--zone=z").returncode == 0
    output, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0, output
    assert (cloud / "starts").read_text() == "start\nstart\n" and (cloud / "saved").read_text() == "saved\n"
    assert (cloud / "flags").read_text().splitlines() == ["-m", "vivi_jax.main", *FLAGS] * 2
    made = [call[4] for call in calls(cloud) if call[4] in ("create", "delete", "scp")]
    assert made == ["create", "scp"] + (["delete", "create"] * 2 + ["scp"] if end == "preempted" else [])
    assert "exit 0" in output and ("was preempted; making it again" in output) == (end == "preempted")


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except FileNotFoundError:
            pass
        time.sleep(0.02)
    raise AssertionError("it did not come about")


def test_slurm_is_asked_for_a_process_per_gpu(cloud, tmp_path):
    project = copy_of_the_project(tmp_path / "project")
    done = launch("slurm.sh", "--nodes=2", "--gpus=4", "--partition=gpu", "--", *FLAGS, cwd=project)
    assert done.returncode == 0, done.stderr
    assert calls(cloud) == [
        [
            "sbatch",
            "--nodes=2",
            "--ntasks-per-node=4",
            "--gpus-per-node=4",
            "--cpus-per-task=12",
            "--time=24:00:00",
            "--partition=gpu",
            "launch/slurm_job.sh",
            *FLAGS,
        ]
    ]
    head = [line for line in (ROOT / "launch/slurm_job.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:TERM@300", "#SBATCH --open-mode=append"} <= set(head)


@pytest.mark.slow
def test_a_slurm_job_saves_is_queued_again_and_ends(cloud, tmp_path):
    project = copy_of_the_project(tmp_path / "project")
    write_command(cloud / "srun", RECORD + 'shift 2; echo $$ >"$CLOUD/srun.pid"; exec "$@"\n')
    write_command(cloud / "scancel", RECORD + 'kill -TERM "$(cat "$CLOUD/srun.pid")"\n')
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_ID": "7"}
    script = shutil.copy(ROOT / "launch/slurm_job.sh", tmp_path / "spooled")  # Slurm runs a copy
    job = subprocess.Popen(["bash", script, *FLAGS], env=environment)
    wait_for(lambda: (cloud / "starts").exists() and (cloud / "srun.pid").exists())
    time.sleep(0.2)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == preemption.EXIT_CODE == 143
    assert (cloud / "saved").read_text() == "saved\n"
    assert calls(cloud)[1:] == [["scancel", "--signal=TERM", "7"], ["scontrol", "requeue", "7"]]
    assert subprocess.run(["bash", script, *FLAGS], env=environment, timeout=30).returncode == 0
    assert [call[0] for call in calls(cloud)] == ["srun", "scancel", "scontrol", "srun"]
    assert (cloud / "flags").read_text().splitlines() == ["-m", "vivi_jax.main", *FLAGS] * 2


@pytest.mark.parametrize(
    "code, hangs, again",
    [(4, 0, False), (130, 0, False), (75, 0, True), (134, 9, True), (75, 10, False), (134, 10, False)],
)
def test_a_slurm_job_that_hung_or_lost_a_process_is_queued_again_some_times_and_one_that_failed_is_not(
    cloud, tmp_path, code, hangs, again
):
    """However often it was preempted before."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/slurm-7.hangs").write_text("75\n" * hangs)
    write_command(cloud / "srun", RECORD + f"exit {code}\n")
    job = subprocess.run(
        ["bash", str(ROOT / "launch/slurm_job.sh"), *FLAGS],
        env=os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "30"},
    )
    assert job.returncode == code and [call[0] for call in calls(cloud)] == ["srun", *["scontrol"] * again]


@pytest.mark.slow
def test_a_tpu_vm_that_hung_is_started_again_on_all_hosts_and_not_for_ever(cloud):
    copy_of_the_project(cloud / "host/vivi_jax")
    for code, starts, end in ((watchdog.EXIT_CODE, 3, 0), (134, 3, 0), (75, 20, 75)):
        trainer = f'echo start >>"$CLOUD/starts"\n[ "$(wc -l <"$CLOUD/starts")" -lt {starts} ] || exit 0\nexit {code}\n'
        write_command(cloud / "host/vivi_jax/.venv/bin/python", f"#!/usr/bin/env bash\n{trainer}")
        done = launch("tpu_vm.sh", "up", "n", "--zone=z", "--poll=0.1", "--", *FLAGS)
        assert done.returncode == end, done.stdout + done.stderr
        assert (cloud / "starts").read_text() == "start\n" * min(starts, 11)
        (cloud / "starts").unlink()


@pytest.mark.slow
def test_the_cloud_has_no_python_that_is_too_old(cloud, tmp_path):
    found = subprocess.run(["bash", "launch/python.sh"], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == sys.executable
    version = json.loads(
        subprocess.run(
            [found.stdout.strip(), "-c", "import sys; print(list(sys.version_info[:2]))"],
            capture_output=True,
            text=True,
        ).stdout
    )
    assert version >= [3, 11]


def test_ctrl_c_in_the_demo_waits_for_what_its_command_saves(tmp_path):
    child = "import signal, time, pathlib, sys\ntry:\n  pathlib.Path('runs').touch(); time.sleep(60)\n"
    child += "except KeyboardInterrupt:\n  time.sleep(1); pathlib.Path('saved').touch(); sys.exit(130)\n"
    (tmp_path / "trainer.py").write_text(child)
    demo = subprocess.Popen(
        [sys.executable, "-c", "import demo; demo.step('Training', 'trainer')"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'launch'}"},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for((tmp_path / "runs").exists)
    os.killpg(demo.pid, signal.SIGINT)  # as a terminal does
    assert demo.communicate(timeout=30)[1] == "interrupted; start the demo again, it goes on\n"
    assert demo.returncode == 130 and (tmp_path / "saved").exists()
