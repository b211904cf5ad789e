"""An end to replays that wait: for an item that does not come, or a lock, while training stands still.

A timer of the process asks now and then where the main thread is. If it is twice at the same place and has computed
nothing in between, it waits, and gets an error. Not ended are waits that no signal gets into (for a device, in C), and
none at all where several ranks train, where somebody else has set the process's alarm, in other threads than the main
one, and where there are no such timers (Windows).
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from lightning_mixprec import ranks

SECONDS = 30.0
"""Seconds between two looks."""

_LEAST_WORK = 1e-3


@contextlib.contextmanager
def ended(refused: Callable[[str], Exception]) -> Iterator[None]:
    """Within, a wait without end becomes an error.

    Args:
        refused: Gives the error; it is told where the wait was.
    """
    if not _is_possible():
        yield
        return
    before = signal.signal(signal.SIGALRM, _Looks(refused))
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_possible() -> bool:
    return (
        hasattr(signal, "setitimer")
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        and signal.getitimer(signal.ITIMER_REAL)[0] == 0
        and not ranks.are_many()
    )


class _Looks:
    """Looks at the main thread, as the handler of the alarm."""

    def __init__(self, refused: Callable[[str], Exception]) -> None:
        self._refused = refused
        self._seen: tuple[int, int] | None = None
        self._worked = 0.0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Raises if the thread is where it was and has done nothing since."""
        if frame is None:
            return
        place, worked = (id(frame), frame.f_lasti), time.thread_time()
        if place == self._seen and worked - self._worked < _LEAST_WORK:
            file = os.path.basename(frame.f_code.co_filename)
            raise self._refused(f"{frame.f_code.co_name} in {file}, line {frame.f_lineno}")
        self._seen, self._worked = place, worked
