"""Stand-ins for what cannot be put back once a step has used it: iterators, files, queues, threads, other processes.

A step that asks one for something gets an error instead, so that nothing is taken from the object, nothing is written
to it, and nobody waits for it. Other threads go on with the object itself.

A lock may be taken; what the step leaves locked or unlocked is put back. A logger is asked for its name and its folder,
and logs nothing.
"""

import copy
import io
import itertools
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

_LIVE = {"threading", "queue", "_queue", "multiprocessing", "concurrent", "subprocess", "asyncio", "_asyncio"}
_LIVE |= {"socket", "_socket", "selectors", "ssl", "_ssl"}
_COPIED: tuple[type, ...] = (
    *map(type, map(iter, ([], (), "", b"", range(0), set(), {}, {0: 0}.values(), {0: 0}.items()))),
    *(type(reversed([])), itertools.count),
)
_LOCKS: tuple[type, ...] = (type(threading.Lock()), type(threading.RLock()))
_TOLD = (str, int, float, type(None), os.PathLike)
_SILENT = {"write", "writelines", "flush"}
LOCK_SECONDS = 10.0
"""How long a step waits in a replay for a lock that somebody else holds."""

_OPERATORS: tuple[str, ...]
_OPERATORS = ("call", "iter", "next", "len", "getitem", "setitem", "delitem", "contains", "reversed", "enter", "exit")
_OPERATORS += ("aiter", "anext", "await", "aenter", "aexit", "setattr", "delattr", "reduce_ex", "deepcopy", "copy")


def is_live(type_of_value: type) -> bool:
    """True for threads, queues, processes, sockets and signals: what waits, or what others are at work on."""
    return any(each.__module__.partition(".")[0] in _LIVE for each in type_of_value.__mro__)


def is_consumed(type_of_value: type) -> bool:
    """True for iterators, generators and files."""
    return issubclass(type_of_value, (Iterator, AsyncIterator, Coroutine, io.IOBase))


def is_taken_from(type_of_value: type) -> bool:
    """True for what is consumed, and for queues: what a step takes from one is gone."""
    queues = {"queue", "_queue", "multiprocessing", "asyncio"}
    return is_consumed(type_of_value) or any(
        each.__module__.partition(".")[0] in queues and "Queue" in each.__name__ for each in type_of_value.__mro__
    )


def copied(value: Any) -> Any | None:
    """A copy of an iterator that stands where it does; None for one that cannot be copied without being used."""
    return copy.copy(value) if type(value) in _COPIED else None


def refusal(value: Any, refused: Callable[[], Exception]) -> Any:
    """A stand-in that answers whatever this thread asks it for with an error.

    Files take what is written to them, and nothing is written.

    Args:
        value: The object that it stands in for.
        refused: Called when it is asked; gives the error.
    """
    owner = threading.get_ident()

    def asked(name: str) -> Any:
        if threading.get_ident() != owner:
            return getattr(value, name)
        if isinstance(value, io.IOBase) and name in _SILENT:
            return lambda *args, **kwargs: None
        raise refused()

    def operator(name: str) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: asked(name)(*args, **kwargs)

    members: dict[str, Any] = {name: operator(name) for name in (f"__{each}__" for each in _OPERATORS)}
    members["__getattr__"] = lambda self, name: asked(name)
    members["__class__"] = property(lambda self: type(value))
    return type("Refusal", (), members)()


def is_lock(type_of_value: type) -> bool:
    """True for the locks that Python has built in."""
    return issubclass(type_of_value, _LOCKS)


class LentLock:
    """A lock as a step has it in a replay: it is waited for a while, not for ever, and is as it was at the end.

    Args:
        lock: The lock itself, which other threads go on with.
        refused: Called when it has been waited for in vain; gives the error.
    """

    def __init__(self, lock: Any, refused: Callable[[], Exception]) -> None:
        self._lock, self._refused = lock, refused
        self._owner, self._taken = threading.get_ident(), 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Takes the lock."""
        if threading.get_ident() != self._owner:
            return bool(self._lock.acquire(blocking, timeout))
        is_patient = blocking and not 0 <= timeout <= LOCK_SECONDS
        is_taken = self._lock.acquire(blocking, LOCK_SECONDS if is_patient else timeout)
        if is_patient and not is_taken:
            raise self._refused()
        self._taken += is_taken
        return bool(is_taken)

    def release(self) -> None:
        """Lets go of the lock."""
        self._lock.release()
        self._taken -= threading.get_ident() == self._owner

    def put_back(self) -> None:
        """Lets go of what the step has taken, and takes what it let go of."""
        while self._taken > 0:
            self.release()
        while self._taken < 0 and self.acquire(False):
            pass
        if self._taken:
            raise RuntimeError("the step let go of a lock that another thread has taken since")

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


class Quiet:
    """Stands in for a logger, or what it writes with: says what it is and where, and takes whatever it is given.

    Args:
        original: The logger, whose plain attributes (name, version, folder) are read; nothing of it is called.
    """

    __class__ = property(lambda self: type(self._original))

    def __init__(self, original: Any) -> None:
        vars(self)["_original"] = original

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._original, name)
        return value if isinstance(value, _TOLD) else Quiet(value)

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    def __getitem__(self, key: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass
