"""The project's commands in processes of their own, as a user starts them: on one device, whatever the tests use."""

import contextlib
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_module(module: str, *arguments, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """`python -m module arguments` to its end, with its output as text; options are those of subprocess.run."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=one_device(),
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )


def start_module(module: str, *arguments, **options) -> subprocess.Popen:
    """Starts `python -m module arguments`; options are those of subprocess.Popen."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=one_device(), text=True, **options)


def one_device() -> dict[str, str]:
    """This process's environment without its eight simulated devices, and TensorFlow's log of errors only.

    The compiler optimises a little: commands train for many steps, which without any are over twice as slow.
    """
    return {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=1", "TF_CPP_MIN_LOG_LEVEL": "3"}


def assert_one_line_error(finished: subprocess.CompletedProcess, message: str) -> None:
    """The command ended with exit code 1, one line "error: ..." that holds the message, last, and no traceback."""
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert finished.returncode == 1 and len(errors) == 1 and message in errors[0], finished.stderr
    assert finished.stderr.splitlines()[-1] == errors[0] and "Traceback" not in finished.stderr, finished.stderr


def children(pid: int) -> list[int]:
    """Process ids of a running process's children."""
    found = []
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found
