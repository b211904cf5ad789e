"""What an object is made of: its parts, read and set without its class.

The parts of an object are its items, if it is a tuple, list, dict, set or deque or of a class made of one, and its
attributes, in ``__dict__`` or in slots. Reading and setting them runs no code of the object's class: a property, a
``__getattr__`` or a ``__setitem__`` of its own has no say, and a frozen one can be copied.

Modules, functions, classes, iterators, and what belongs to torch (but for distributions), Lightning, numpy or the
standard library have no parts.
"""

import copy
import functools
import sys
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch.compiler import is_compiling

from lightning_mixprec.errors import SupportError

ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)
PLAIN = (tuple, list, dict)
CONTAINERS = (tuple, list, dict, set, frozenset, deque)
_OPEN = (object, *CONTAINERS, SimpleNamespace)
_OPEN_MODULES = (
    "abc",
    "argparse",
    "collections",
    "collections.abc",
    "typing",
    "torch.distributions",
    "torch.return_types",
)
_CLOSED = sys.stdlib_module_names | {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "numpy"}
_ABSENT = object()


def parts_of(value: Any) -> Iterable[Any]:
    """The items and attributes of an object, in their order."""
    cls = type(value)
    if cls is tuple or cls is list:
        return value  # type: ignore[no-any-return]
    if cls is dict:
        return value.values()  # type: ignore[no-any-return]
    return [part for _, part in labelled_parts_of(value)]


def labelled_parts_of(value: Any) -> list[tuple[str, Any]]:
    """The parts of an object, each with what is written behind the object to get at it."""
    if isinstance(value, dict):
        items = [(f"[{key!r}]", item) for key, item in items_of(value)]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = [(f".{name}", item) for name, item in zip(value._fields, value, strict=False)]
    elif isinstance(value, CONTAINERS):
        items = [(f"[{place}]", item) for place, item in enumerate(value)]
    else:
        items = []
    is_wrapper = isinstance(value, (UserDict, UserList))
    return items + [
        ("._data" if is_wrapper and name == "data" else f".{name}", part) for name, part in attributes_of(value)
    ]


def attributes_of(value: Any) -> list[tuple[str, Any]]:
    """The attributes of an object by name, in slots and in ``__dict__``."""
    if type(value) in CONTAINERS:
        return []
    has_dict, slots = _layout(type(value))
    found = []
    for name in slots:
        part = getattr(value, name, _ABSENT)
        if part is not _ABSENT:
            found.append((name, part))
    if has_dict and not is_its_own_dict(value):
        found += value.__dict__.items()
    return found


def is_its_own_dict(value: Any) -> bool:
    """True for dicts whose items are their attributes. Dynamo compares no ``__dict__`` by identity."""
    return isinstance(value, dict) and not is_compiling() and getattr(value, "__dict__", None) is value


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _layout(cls: type) -> tuple[bool, tuple[str, ...]]:
    """True if objects of a class have attributes in ``__dict__``, and the names of those in slots."""
    return _known_layout(cls)


@functools.lru_cache(maxsize=1024)
def _known_layout(cls: type) -> tuple[bool, tuple[str, ...]]:
    if not _is_open(cls):
        return False, ()
    slots = []
    for base in cls.__mro__:
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            is_private = name.startswith("__") and not name.endswith("__")
            slots.append(f"_{base.__name__.lstrip('_')}{name}" if is_private else name)
    return cls.__dictoffset__ != 0, tuple(name for name in slots if name not in ("__dict__", "__weakref__"))


def items_of(value: dict[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """The items of a dict, in its order, past the class."""
    return OrderedDict.items(value) if isinstance(value, OrderedDict) else dict.items(value)


def set_item(value: dict[Any, Any], key: Any, item: Any) -> None:
    """Sets an item past the class; an OrderedDict keeps its order outside of the dict that it is."""
    if isinstance(value, OrderedDict):
        OrderedDict.__setitem__(value, key, item)
    else:
        dict.__setitem__(value, key, item)


def is_mutable(value: Any) -> bool:
    """True for objects whose parts can be replaced."""
    return has_parts(value) and not isinstance(value, (tuple, frozenset))


def has_parts(value: Any) -> bool:
    """True for containers, and for objects of classes whose attributes are looked at."""
    return isinstance(value, CONTAINERS) or _layout(type(value)) != (False, ())


def _is_open(cls: type) -> bool:
    return all(
        base in _OPEN or base.__module__.startswith(_OPEN_MODULES) or base.__module__.partition(".")[0] not in _CLOSED
        for base in cls.__mro__
    )


def made_of(value: Any, items: list[Any]) -> Any:
    """A tuple or frozenset of other items."""
    cls: Any = type(value)
    if cls is tuple or isinstance(value, frozenset) or cls.__module__ == "torch.return_types":
        return cls(items)
    return cls._make(items) if hasattr(cls, "_make") else tuple.__new__(cls, items)


def empty_like(value: Any) -> Any:
    """An object of the same class whose parts are still to be set."""
    try:
        if isinstance(value, (defaultdict, deque, set, SimpleNamespace)):
            return copy.copy(value)
        return next(base for base in (OrderedDict, dict, list, object) if isinstance(value, base)).__new__(type(value))
    except TypeError:
        pass  # of a class that is made otherwise, as those written in C
    try:
        return copy.copy(value)
    except Exception as error:
        cls = type(value)
        raise SupportError(
            f"a {cls.__qualname__} holds floating tensors that a layer is to get in another format, and it cannot "
            f"be copied ({type(error).__name__}: {error}); give the class a __copy__, or pass the layer tensors"
        ) from error


def set_attributes(value: Any, attributes: dict[str, Any], gone: Iterable[str] = ()) -> None:
    """Sets attributes past the class, which may be frozen, and deletes those that are gone."""
    has_dict, slots = _layout(type(value))
    for name in slots:
        if name in attributes:
            object.__setattr__(value, name, attributes.pop(name))
    if has_dict:
        value.__dict__.update(attributes)
    for name in gone:
        object.__delattr__(value, name)
