"""Runs every evaluation whose data are there, one after the other, and writes one page of their scores.

    python -m evaluation.all --checkpoint=RUN_OR_FILE --data=ROOT --out=DIR [--only=NAME,NAME] [--demo]

ROOT holds the data sets under the names that docs/evaluations.md lists: classes, imagenet, davis, VOC2012 and so on.
What is found, and what is not and where it was looked for, is said first. Each evaluation is a process of its own, with
its output in DIR/NAME/log.txt; one that fails does not keep the others from being made. DIR/all.md and all.json have
all scores beside the papers', and are written anew after each evaluation. Started again, the command makes what is
missing: a finished evaluation is not made again, and one that was cut off goes on where its own command goes on.
"""

import argparse
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

from evaluation.all import found, page
from vivi_jax import command_line, files, lock
from vivi_jax.checkpoint import local_copy, manifest

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOG = logging.getLogger("evaluation.all")  # __name__ is that of a script


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("evaluation.all", __doc__)
    parser.add_argument("--checkpoint", required=True, help="run directory, or file of weights")
    parser.add_argument("--data", required=True, help="folder that holds the data sets' folders")
    parser.add_argument("--out", required=True, help="folder for results and the page")
    parser.add_argument("--only", default="", help=f"names with commas, of {', '.join(found.EVALUATIONS)}")
    parser.add_argument("--demo", action="store_true", help="the small form of each, for a try on a laptop")
    command_line.run_parser(run, parser, argv, remote=["checkpoint"])


def run(options: argparse.Namespace) -> None:
    """Makes what is missing, and prints the page; exits with 1 if an evaluation failed."""
    about = {"checkpoint": options.checkpoint, "data": options.data, "demo": options.demo}
    options.checkpoint = local_copy(options.checkpoint)  # once, as the run may go on meanwhile
    plan = found.plan(options.data, options.checkpoint, only=options.only, demo=options.demo)
    for name, folder in plan.found.items():
        _LOG.info("found: %s in %s", name, folder)
    for name, why in plan.left_out.items():
        _LOG.info("left out: %s, %s", name, why)
    out = pathlib.Path(options.out)
    with lock.hold(out, option="--out"):
        identity = weights(options.checkpoint) | {"data": os.path.realpath(options.data), "demo": options.demo}
        files.claim(out / "evaluation.json", identity, option="--out")
        rows = before(out, plan)
        for number, (name, folder) in enumerate(plan.found.items(), 1):
            text = page.write(out, about, list(rows.values()))
            if rows[name]["state"] == "done":
                _LOG.info("%d of %d, %s: already done", number, len(plan.found), name)
                continue
            _LOG.info("%d of %d, %s: begins, see %s", number, len(plan.found), name, out / name / "log.txt")
            words = found.command(name, checkpoint=options.checkpoint, data=folder, out=out / name, demo=options.demo)
            rows[name] = made(name, words, folder, out / name)
            _LOG.info("%s: %s", name, page.in_a_line(rows[name]))
        text = page.write(out, about, list(rows.values()))
    print(text)
    if failed := [name for name, row in rows.items() if row["state"] == "failed"]:
        sys.exit(f"error: {len(failed)} of {len(plan.found)} evaluations failed: {', '.join(failed)}; see {out}/all.md")


def weights(checkpoint: str) -> dict:
    """What says that a checkpoint is another one: a run's newest step, or a file's content."""
    path = pathlib.Path(checkpoint)
    identity: dict = {"checkpoint": os.path.realpath(path)}
    if path.is_file():
        return identity | {"sha256": files.sha256(path)}
    return identity | {"step": max(manifest.steps(path / "checkpoints"), default=None)}


def before(out: pathlib.Path, plan: found.Plan) -> dict[str, dict]:
    """The rows of the page as earlier starts left them; what one with another --only has done is done."""
    rows = {name: {"name": name, "state": "to do", "why": "not yet made"} for name in plan.found}
    rows |= {name: {"name": name, "state": "left out", "why": why} for name, why in plan.left_out.items()}
    done = {name: out / name / "done.json" for name in rows}
    return rows | {name: json.loads(path.read_text()) for name, path in done.items() if path.is_file()}


def made(name: str, words: list[str], data: pathlib.Path, folder: pathlib.Path) -> dict:
    """Runs the command of an evaluation, and returns its row."""
    evaluation, start = found.EVALUATIONS[name], time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with open(log, "a", errors="backslashreplace") as file:
        file.write(f"\n$ python -m {' '.join(words)}\n")
        file.flush()
        begins = file.tell()
        code = ended_with([sys.executable, "-m", *words], file)
    row = {"name": name, "state": "failed", "data": str(data), "log": str(log)}
    if code:
        return row | {"why": reason(log, begins, code)}
    try:
        result = json.loads((folder / evaluation.result).read_text())
        scores, note = evaluation.scores(result), evaluation.note(result)
    except (OSError, ValueError, KeyError) as error:
        return row | {"why": f"its command ended well and left no score ({error!r})"}
    row |= {"state": "done", "scores": scores, "note": note, "seconds": time.monotonic() - start}
    files.write_json(folder / "done.json", row)
    return row


def ended_with(command: list[str], log) -> int:
    """The exit code of a process; a signal to us goes to it, and ends us with a run's exit code once it has ended.

    It has a session of its own, so that a terminal's Ctrl-C does not reach it twice.
    """
    came: list[int] = []
    code = 0
    process: subprocess.Popen | None = None

    def on_signal(number: int, _) -> None:
        came.append(number)
        if process:
            process.send_signal(number)

    # One that we were started to ignore, as by nohup, stays ignored.
    before_us = {n: signal.signal(n, on_signal) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        if not came:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            if came:  # while it was started
                process.send_signal(came[-1])
            code = process.wait()
    finally:
        for number, handler in before_us.items():
            signal.signal(number, handler)
    if came:
        print(f"stopped by {signal.Signals(came[0]).name}; run the same command again, it goes on", file=sys.stderr)
        sys.exit(128 + came[0])
    return code


def reason(log: pathlib.Path, begins: int, code: int) -> str:
    """The last line that a command has written, of its errors if there are any."""
    with open(log, "rb") as file:
        file.seek(begins)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {code}"])[-1]


if __name__ == "__main__":
    main()
