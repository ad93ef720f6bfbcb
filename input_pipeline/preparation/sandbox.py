"""Runs functions of video.py on hostile files: each in a child process with limits on memory, CPU time and wall time.

A file from the wild can crash a decoder, hang it, or make it ask for all memory. So a small server process, with the
libraries loaded and no threads, forks once per file: that costs milliseconds, a new interpreter 0.3 s.

    prepare's thread: Sandbox.decode --request--> server: _serve --fork--> _decode_in_child: limits, video.py
                                    <----row-----                <-pipe---
"""

import contextlib
import json
import mmap
import os
import pathlib
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from typing import NoReturn

import av.subtitles.stream
import av.subtitles.subtitle  # noqa: F401  PyAV loads these two late; here they are loaded once, before the forks
import cv2

from input_pipeline.preparation import video
from vivi_jax.errors import DataError

_FUNCTIONS = {"decode_file": video.decode_file, "decode_head": video.decode_head}


class Sandbox:
    """One decoder process; decodes one file at a time. Make one per thread.

    Args:
      memory_mb: address space of the decoding process, MiB; some 400 of it are the libraries'.
      cpu_s: CPU time per file, seconds.
      wall_s: wall time per file, seconds.
    """

    def __init__(self, *, memory_mb: int, cpu_s: int, wall_s: float):
        self._limits = {"memory_mb": memory_mb, "cpu_s": cpu_s, "wall_s": wall_s}
        root = pathlib.Path(__file__).resolve().parents[2]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._server = subprocess.Popen(
            [sys.executable, "-m", "input_pipeline.preparation.sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the parent
            env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self._server.stdin and self._server.stdout  # they are pipes
        self._requests, self._answers = self._server.stdin, self._server.stdout

    def decode(self, path: str, frame_file: str, *, function: str = "decode_file", **settings) -> dict:
        """Runs a function of video.py, as decode_file(path, frame_file, **settings), within the limits.

        Returns:
          {"status": "ok", "reason": "", **what it returns} or {"status": "refused", "reason": str}.

        Raises:
          OSError: the frames could not be written.
          DataError: the decoder process was ended from outside, as by a system that runs out of memory.
        """
        request = {
            "function": function,
            "video": path,
            "frame_file": frame_file,
            "settings": settings,
            "limits": self._limits,
        }
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
            row = json.loads(self._answers.readline())
        except (BrokenPipeError, ValueError) as e:
            raise DataError(_ended(path, self._server.wait())) from e
        if row["status"] == "ended":
            raise DataError(_ended(path, row["code"]))
        if row["status"] == "unwritable":
            raise OSError(row["errno"], os.strerror(row["errno"]), frame_file)
        return row

    def close(self) -> None:
        """Ends the decoder process, and a file it is at."""
        with contextlib.suppress(BrokenPipeError):  # of a request that a dead process did not read
            self._requests.close()
        self._server.wait()
        self._answers.close()


def _ended(path: str, code: int) -> str:
    if code >= 0:
        return f"the decoder process ended with code {code} at {path}; what is above says why"
    return (
        f"the decoder process was ended by {signal.Signals(-code).name} at {path}, which is no fault of the video: a "
        "system that runs out of memory does so; what is done is kept: run the same command again, with fewer workers "
        "if memory is short"
    )


def _serve() -> None:
    """Answers requests, one JSON line each, until the parent closes the pipe or dies."""
    cv2.setNumThreads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a decoder prints must not end up among the answers
    for line in iter(sys.stdin.buffer.readline, b""):
        print(json.dumps(_decode_in_child(**json.loads(line))), file=answers, flush=True)


def _decode_in_child(function: str, video: str, frame_file: str, settings: dict, limits: dict) -> dict:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(function, video, frame_file, settings, limits, writer)
    os.close(writer)
    answer, deadline, timed_out = b"", time.monotonic() + limits["wall_s"], False
    while True:
        ready, _, _ = select.select([reader, sys.stdin], [], [], max(0.0, deadline - time.monotonic()))
        if reader in ready:
            chunk = os.read(reader, 1 << 16)
            if not chunk:
                break  # the child is done, or dead
            answer += chunk
        else:
            os.kill(child, signal.SIGKILL)
            if ready:  # end of stdin: the parent is gone
                sys.exit()
            timed_out = True
            break
    os.close(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if timed_out:
        return _refused(f"too slow: more than {limits['wall_s']} s")
    if code == 0:
        return json.loads(answer)
    if code in (-signal.SIGKILL, -signal.SIGTERM):  # from outside: the file may be good
        return {"status": "ended", "code": code}
    if code == -signal.SIGXCPU:
        return _refused(f"too slow: more than {limits['cpu_s']} s of CPU time")
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return _refused(f"crashed the decoder: {name}")


def _child(function: str, path: str, frame_file: str, settings: dict, limits: dict, writer: int) -> NoReturn:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_mb"] << 20,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1))
    too_large = f"too large: more than {limits['memory_mb']} MiB of memory"
    try:
        row = {"status": "ok", "reason": ""} | _FUNCTIONS[function](path, frame_file, **settings)
    except video.Refused as e:
        row = _refused(str(e) if _memory_left() else too_large)
    except MemoryError:
        row = _refused(too_large)
    except OSError as e:
        row = {"status": "unwritable", "errno": e.errno}
    except Exception as e:  # ours or PyAV's; one odd file must not stop a preparation of millions
        traceback.print_exc()
        row = _refused(f"unexpected error: {e!r}")
    answer = json.dumps(row).encode()
    with contextlib.suppress(BrokenPipeError):  # whoever asked is gone
        while answer:
            answer = answer[os.write(writer, answer) :]
    os._exit(0)


def _memory_left() -> bool:
    """Whether a picture's worth of memory can still be had; where it cannot, FFmpeg may call a good file damaged."""
    try:
        mmap.mmap(-1, 2**24).close()
        return True
    except OSError:
        return False


def _refused(reason: str) -> dict:
    return {"status": "refused", "reason": reason}


if __name__ == "__main__":
    _serve()
