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
      memory_mb: address space of the decoding process, MiB; some 450 of it are the libraries'.
      cpu_s: CPU time per file, seconds.
      wall_s: wall time per file, seconds.
    """

    def __init__(self, *, memory_mb: int, cpu_s: int, wall_s: float):
        self._limits = {"memory_mb": memory_mb, "cpu_s": cpu_s, "wall_s": wall_s}
        self._start()

    def _start(self) -> None:
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

        A file is at fault if the decoder refuses it, reaches the limits of memory or CPU time, or crashes (SIGSEGV and
        the like) twice. It may be good if the process was killed by another (SIGKILL or SIGTERM below our limits, as a
        system does that runs out of memory), or if the wall time passed without the CPU time, as on a busy machine.

        Returns:
          {"status": "ok", "reason": "", **what it returns} or {"status": "refused", "reason": str}, with "retry": True
          where another try may go well.

        Raises:
          OSError: the frames could not be written.
          DataError: the decoder process cannot be started, or was closed; or its libraries alone take memory_mb.
        """
        row = self._decode(path, frame_file, function, settings)
        if row["status"] == "crashed":  # a fault of memory or disk would not come twice
            row = self._decode(path, frame_file, function, settings)
        if row["status"] == "crashed":
            return _refused(f"crashed the decoder, twice: {row['signal']}")
        return row

    def _decode(self, path: str, frame_file: str, function: str, settings: dict) -> dict:
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
            code = self._server.wait()
            if code >= 0:
                raise DataError(f"the decoder process ended with code {code} at {path}; what is above says why") from e
            self.close()
            self._start()
            return _refused(_killed(code), retry=True)
        if row["status"] == "unwritable":
            raise OSError(row["errno"], os.strerror(row["errno"]), frame_file)
        if row["status"] == "no room":  # every file would be refused, or crash the decoder
            raise DataError(
                f"memory_mb={self._limits['memory_mb']}: the decoder takes {row['taken_mb']} MiB before it opens a "
                f"file; give {row['taken_mb'] + 512} or more"
            )
        return row

    def close(self) -> None:
        """Ends the decoder process, and a file it is at."""
        with contextlib.suppress(BrokenPipeError):  # of a request that a dead process did not read
            self._requests.close()
        self._server.wait()
        self._answers.close()


def _killed(code: int) -> str:
    return f"killed from outside: the decoder process was ended by {signal.Signals(-code).name}"


def _serve() -> None:
    """Answers requests, one JSON line each, until the parent closes the pipe or dies."""
    cv2.setNumThreads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a decoder prints must not end up among the answers
    for line in iter(sys.stdin.buffer.readline, b""):
        print(json.dumps(_decode_in_child(**json.loads(line))), file=answers, flush=True)


def _decode_in_child(function: str, video: str, frame_file: str, settings: dict, limits: dict) -> dict:
    if (taken_mb := _address_space_mb()) >= limits["memory_mb"]:
        return {"status": "no room", "taken_mb": taken_mb}
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
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and not timed_out:
        return json.loads(answer)
    if code == -signal.SIGXCPU or usage.ru_utime + usage.ru_stime >= limits["cpu_s"]:
        return _refused(f"too slow: more than {limits['cpu_s']} s of CPU time")
    if timed_out:
        return _refused(f"too slow: more than {limits['wall_s']} s", retry=True)
    if code in (-signal.SIGKILL, -signal.SIGTERM):
        return _refused(_killed(code), retry=True)
    return {"status": "crashed", "signal": signal.Signals(-code).name if code < 0 else f"exit code {code}"}


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


def _address_space_mb() -> int:
    """What this process takes of the address space, MiB; 0 where the system does not say."""
    try:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() >> 20
    except OSError:
        return 0


def _memory_left() -> bool:
    """Whether a picture's worth of memory can still be had; where it cannot, FFmpeg may call a good file damaged."""
    try:
        mmap.mmap(-1, 2**24).close()
        return True
    except OSError:
        return False


def _refused(reason: str, *, retry: bool = False) -> dict:
    return {"status": "refused", "reason": reason} | ({"retry": True} if retry else {})


if __name__ == "__main__":
    _serve()
