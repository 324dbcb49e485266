"""An end that was asked for from outside: SIGTERM and SIGHUP become an exception.

So what is open is closed, workers are ended and the command says in a line what happened. Nothing
depends on it: a killed process leaves the same resumable state.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

GRACE_S = 2.0
"""How long threads that are still busy are waited for as the process ends."""
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class TerminatedError(BaseException):
    """The process was asked to end. No Exception, so that nothing mistakes it for a fault."""

    def __init__(self, number: int) -> None:
        """Keep the signal's number."""
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number
        """The exit code that shells show for it."""


@contextmanager
def raised() -> Generator[None]:
    """Raise TerminatedError in the main thread where SIGTERM or SIGHUP comes.

    A signal that the process was started to ignore, as under `nohup`, stays ignored.
    """
    with kept():
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, _raise)
        yield


@contextmanager
def kept() -> Generator[None]:
    """Put the handlers of SIGTERM and SIGHUP back that a library may set."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _raise(number: int, _frame: FrameType | None) -> NoReturn:
    for own in _SIGNALS:
        signal.signal(own, signal.SIG_DFL)  # a second one ends what does not come to an end
    raise TerminatedError(number)


def leave(code: int) -> NoReturn:
    """End this process now, though a thread of it may still be busy with a run."""
    ends = time.monotonic() + GRACE_S
    others = [
        thread
        for thread in threading.enumerate()
        if thread is not threading.current_thread() and not thread.daemon
    ]
    for thread in others:
        thread.join(max(0.0, ends - time.monotonic()))
    if any(thread.is_alive() for thread in others):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
