"""SIGTERM, Ctrl-C and SIGHUP: save and leave."""

import contextlib
import gc
import os
import signal
import threading
import types
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
EXIT_CODE = 128 + signal.SIGTERM  # 143 tells a launcher that the run was stopped, not finished


AGAIN_SECONDS = 0.05


class Preempted(BaseException):
    """Raised inside `Preemption.interruptible` sections; not an Exception, so that nothing swallows it on the way.

    Attributes:
      exit_code: 143 after SIGTERM, 130 after Ctrl-C, 129 after SIGHUP.
    """

    def __init__(self, signum: int = signal.SIGTERM):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Preemption:
    """Turns the first of SIGNALS into a flag that the loop reads between steps.

    The loop marks as interruptible what may take long and does not change the state (waiting for data, compiling,
    evaluating): there the signal raises at once. Without a handler the process would end and save nothing.

    Signals that come later change nothing, as launchers may send several; but Ctrl-C then ends the process at once. A
    signal that the process was started to ignore (SIGHUP by nohup) stays ignored.

    Args:
      alone: no other process takes part in the run. Otherwise the loop's steps are never interrupted, as the others
        would wait for this process in the next step; all stop at the step they agree on (processes.StopConsensus).

    Attributes:
      requested: number of the signal that came, or 0.
    """

    def __init__(self, *, alone: bool = True):
        self.requested = 0
        self._alone = alone
        self._interruptible = False
        self._repeated = False  # the next signal is the first one, sent again
        self._previous = {
            number: signal.signal(number, self._on_signal)
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }

    def _on_signal(self, signum: int, frame) -> None:
        if self._repeated:
            self._repeated = False
            self._raise_unless_swallowed(frame)
            return
        if self.requested:
            if signum == signal.SIGINT:
                os.write(2, b"\ninterrupted again: left without saving\n")  # safe in a handler
                os._exit(128 + signum)
            return
        self.requested = signum
        self._raise_unless_swallowed(frame)

    def _raise_unless_swallowed(self, frame: types.FrameType | None) -> None:
        """What a callback of the garbage collector raises is printed and forgotten; JAX has one, and it may be running.

        So there the handler is called again a moment later, until it is over.
        """
        if not self._interruptible:
            return
        if _is_in(frame, {getattr(callback, "__code__", None) for callback in gc.callbacks}):
            threading.Timer(AGAIN_SECONDS, self._again).start()
            return
        self._interruptible = False
        raise Preempted(self.requested)

    def _again(self) -> None:
        self._repeated = True
        signal.pthread_kill(threading.main_thread().ident, self.requested)

    @contextlib.contextmanager
    def interruptible(self, *, in_loop: bool = False) -> Iterator[None]:
        """Within the block a signal raises Preempted at once, also if it came before.

        Args:
          in_loop: the block is part of a training step; with several processes it is then not interruptible.
        """
        if in_loop and not self._alone:
            yield
            return
        self._interruptible = True
        try:
            if self.requested:
                raise Preempted(self.requested)
            yield
        finally:
            self._interruptible = False

    def close(self) -> None:
        """Restores the handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _is_in(frame: types.FrameType | None, functions: set[types.CodeType | None]) -> bool:
    """Whether a frame is one of these functions', or was called by one."""
    while frame is not None:
        if frame.f_code in functions:
            return True
        frame = frame.f_back
    return False
