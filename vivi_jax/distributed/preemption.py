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

    The loop marks as interruptible what may take long and does not change the state (waiting for data, compiling,
    evaluating): there the signal raises at once. Without a handler the process would end and save nothing.

    Args:
      alone: no other process takes part in the run. Otherwise the loop's steps are never interrupted, as the others
        would wait for this process in the next step; all stop at the step they agree on (processes.StopConsensus).
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
        """Within the block SIGTERM raises Preempted at once, also if it came before.

        Args:
          in_loop: the block is part of a training step; with several processes it is then not interruptible.
        """
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
        """Restores the handler of SIGTERM that was there before."""
        signal.signal(signal.SIGTERM, self._previous)


def rearm_watchdog(seconds: float) -> None:
    """Ends the process with all threads' stacks on stderr unless called again within `seconds` (0: never).

    A process that is alive but stuck would keep all others in a collective for ever, unnoticed by JAX and scheduler.
    """
    if seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)


def stop_watchdog() -> None:
    """Disarms the watchdog."""
    faulthandler.cancel_dump_traceback_later()
