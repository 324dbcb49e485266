"""A limit on the time that code of a file's author may take: templates, patterns."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager

_HAS_TIMER = hasattr(signal, "SIGVTALRM")


class OverTimeError(Exception):
    """It took longer than allowed."""


@contextmanager
def within(seconds: float) -> Generator[None]:
    """Stop what runs inside the block after so many seconds of this process's time.

    Python's own loops and regular expressions are stopped, no library's. Other threads than the
    main one, and systems without such a timer (Windows), have no limit.

    Raises:
        OverTimeError: If it took longer.
    """
    if not _HAS_TIMER or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _stop(*_: object) -> None:
    raise OverTimeError
