"""Ends a run that no longer moves, so that a launcher can start it again. Needs no JAX."""

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Iterator

EXIT_CODE = 75  # EX_TEMPFAIL: the launchers start the run again
PHASE = 4  # restoring, compiling, evaluating, the last save and the summary may take so many times a step's limit
SCORING = 24  # and scoring a repeat on its whole test set: 12 hours, where a step may take half of one
_GRACE_SECONDS = 60.0


class Watchdog:
    """Ends the process, with all threads' stacks on stderr and exit code 75, where something takes too long.

    A process that is alive but stuck would keep all others in a collective for ever, unnoticed by JAX and scheduler.
    A thread of Python looks at the clock. If it cannot, as native code does not give Python back, faulthandler ends the
    process a minute later, with exit code 1.

    Args:
      seconds: limit of a step; 0: none.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._deadline, self._what = math.inf, ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds:
            self._thread.start()

    def expect(self, what: str) -> None:
        """From now on `what`, one step, must end within the limit: by another call, or `close`."""
        self._deadline, self._what = time.monotonic() + self._seconds, what

    @contextlib.contextmanager
    def phase(self, what: str, times: float = PHASE) -> Iterator[None]:
        """The block must end within so many times the limit; behind it nothing is expected until the next call."""
        self._deadline, self._what = time.monotonic() + times * self._seconds, what
        try:
            yield
        finally:
            self._deadline = math.inf

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            left = self._deadline - time.monotonic()
            if left < 0:
                self._end()
            if math.isfinite(left):
                faulthandler.dump_traceback_later(left + _GRACE_SECONDS, exit=True)
            else:
                faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        print(
            f"error: no end of {self._what} within its limit (config.run.watchdog_seconds={self._seconds:g}); all "
            f"threads are below. Exit code {EXIT_CODE}: the same command goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_CODE)

    def close(self) -> None:
        """Nothing is expected any more."""
        if self._thread.is_alive():
            self._closed.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def watched(seconds: float, what: str, times: float = PHASE) -> Iterator[None]:
    """The block, which follows the steps of a run, as a phase of a watchdog of its own."""
    with contextlib.closing(Watchdog(seconds)) as watchdog, watchdog.phase(what, times):
        yield
