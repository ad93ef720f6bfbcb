"""The whole path once, on rendered videos: every step is a command of its own that you can run on your videos.

Started again, it goes on where it was; a finished demo is only reported. `rm -r runs/demo` starts from nothing.
"""

import argparse
import json
import pathlib
import signal
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the network and of the order of data")
    parser.add_argument("--out", default="runs/demo", help="folder for everything the demo writes")
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    run, export, folder = out / "run", out / "encoder.safetensors", out / "huggingface"
    start = time.time()

    step(
        "1/5 Rendering 480 short videos: 10 kinds of object, told apart by shape alone",
        "input_pipeline.synthetic",
        f"--out={out / 'videos'}",
        "--videos=480",
        "--seed=0",
    )
    for split in ("train", "test"):
        step(
            f"2/5 Preparing the {split} videos: frames, shots, index",
            "input_pipeline.prepare",
            f"--videos={out / 'videos' / split}",
            f"--out={out / 'store' / split}",
            "--short_side=96",
            "--labels=folder",
        )
    step(
        "3/5 Pretraining VITO without labels; k-NN on held-out videos before and after",
        "vivi_jax.main",
        "--config=configs/vito.py:demo",
        f"--workdir={run}",
        f"--config.seed={arguments.seed}",
        f"--config.data.path={out / 'store' / 'train'}",
        f"--config.evaluation.dataset={out / 'store'}",
    )
    step(
        "4/5 Exporting the encoder under torchvision's names",
        "vivi_jax.export",
        f"--checkpoint={run}",
        "--format=torchvision",
        f"--out={export}",
    )
    step(
        "4/5 The same as a folder for the Hugging Face Hub, with a model card",
        "vivi_jax.export",
        f"--checkpoint={run}",
        "--format=huggingface",
        "--licence=apache-2.0",
        f"--out={folder}",
    )
    step("5/5 Writing the report", "evaluation.report", f"--checkpoint={run}")

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["knn_top1"] for line in lines if "knn_top1" in line]
    summary = {
        "knn_top1_untrained": accuracy[0],
        "knn_top1_trained": accuracy[-1],
        "seconds": round(time.time() - start, 1),
        "seed": arguments.seed,
        "checkpoint": json.loads((run / "summary.json").read_text())["checkpoint"],
        "export": str(export),
        "hub_folder": str(folder),
        "report": str(run / "report.html"),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"\nk-NN top-1 on held-out videos: {accuracy[0]:.1%} untrained, {accuracy[-1]:.1%} after pretraining "
        f"(chance 10 %), {summary['seconds']:.0f} s in all"
    )
    for name in ("checkpoint", "export", "hub_folder", "report"):
        print(f"  {name:10} {summary[name]}")
    print(f"  {'figures':10} {out / 'summary.json'}")


def step(title: str, module: str, *arguments: str) -> None:
    """Runs one command of the project, shown so that it can be copied; its failure is the demo's."""
    print(f"\n== {title}\n   python -m {module} {' '.join(arguments)}", flush=True)
    child = subprocess.Popen([sys.executable, "-m", module, *arguments])
    code, interrupted = None, False
    while code is None:
        try:
            code = child.wait()
        except KeyboardInterrupt:  # which the terminal sent to the child too: training saves, then ends
            interrupted = True
    if interrupted:
        print("interrupted; start the demo again, it goes on", file=sys.stderr)
        sys.exit(code if code > 0 else 128 + signal.SIGINT)
    if code:
        sys.exit(f"error: the command above ended with exit code {code}; mend what it says and start the demo again")


if __name__ == "__main__":
    main()
