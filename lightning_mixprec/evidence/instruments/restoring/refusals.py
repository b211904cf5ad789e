"""Stand-ins for what cannot be put back once a step has used it: iterators, files, queues, threads, other processes.

A step that asks one for something gets an error instead, so that nothing is taken from the object, nothing is written
to it, and nobody waits for it. Other threads go on with the object itself.
"""

import copy
import io
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

_LIVE = {"threading", "queue", "_queue", "multiprocessing", "concurrent", "subprocess", "asyncio", "_asyncio"}
_LIVE |= {"socket", "_socket", "selectors", "ssl", "_ssl"}
_COPIED: tuple[type, ...] = (
    *map(type, map(iter, ([], (), "", b"", range(0), set(), {}, {0: 0}.values(), {0: 0}.items()))),
    *(type(reversed([])), itertools.count),
)
_SILENT = {"write", "writelines", "flush"}
_OPERATORS: tuple[str, ...]
_OPERATORS = ("call", "iter", "next", "len", "getitem", "setitem", "delitem", "contains", "reversed", "enter", "exit")
_OPERATORS += ("aiter", "anext", "await", "aenter", "aexit", "setattr", "delattr", "reduce_ex", "deepcopy", "copy")


def is_live(type_of_value: type) -> bool:
    """True for threads, queues, processes, sockets and signals: what waits, or what others are at work on."""
    return any(each.__module__.partition(".")[0] in _LIVE for each in type_of_value.__mro__)


def is_consumed(type_of_value: type) -> bool:
    """True for iterators, generators and files."""
    return issubclass(type_of_value, (Iterator, AsyncIterator, Coroutine, io.IOBase))


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
