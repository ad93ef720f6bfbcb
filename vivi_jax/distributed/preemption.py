"""SIGTERM: save and leave. Also the watchdog that ends a run which no longer moves."""

import contextlib
import faulthandler
import signal
from collections.abc import Iterator

EXIT_CODE = 143  # 128 + SIGTERM: tells a launcher that the run was stopped, not finished


class Preempted(BaseException):
    """Raised inside `Preemption.interruptible` sections; not an Exception, so that nothing swallows it on the way."""


class Preemption:
    """Turns SIGTERM into a flag that the loop reads between steps.

    The loop marks what may take long and leaves the state alone (waiting for data, compiling, evaluating) as
    interruptible: there the signal raises at once. Without a handler the process would die and save nothing.

    Args:
      alone: no other process takes part in the run. Else the loop's steps are never interrupted: the others would wait
        for this process in the next one. All stop together at the step they agree on (processes.StopConsensus).
    """

    def __init__(self, *, alone: bool = True):
        self.requested = False
        self._alone = alone
        self._interruptible = False
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, signum, frame) -> None:
        self.requested = True
        if self._interruptible:
            self._interruptible = False
            raise Preempted

    @contextlib.contextmanager
    def interruptible(self, *, in_loop: bool = False) -> Iterator[None]:
        if in_loop and not self._alone:
            yield
            return
        self._interruptible = True
        try:
            if self.requested:
                raise Preempted
            yield
        finally:
            self._interruptible = False

    def close(self) -> None:
        signal.signal(signal.SIGTERM, self._previous)


def rearm_watchdog(seconds: float) -> None:
    """Ends the process with all threads' stacks on stderr unless called again within `seconds` (0: never).

    A peer that is alive but stuck hangs all others for ever in a collective; neither JAX nor the scheduler sees it.
    """
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)


def stop_watchdog() -> None:
    faulthandler.cancel_dump_traceback_later()
