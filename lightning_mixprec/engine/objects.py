"""Objects that hold tensors, whatever their class: a walk through them, and others like them with other tensors.

The parts of an object are its items, if it is a tuple, list, dict, set or deque or of a class made of one, and its
attributes, in ``__dict__`` or in slots. Reading and rebuilding them runs no code of the object's class: a property, a
``__getattr__`` or a ``__setitem__`` of its own has no say, and the object itself is never written to.

Modules, functions, classes, iterators, and what belongs to torch (but for distributions), Lightning, numpy or the
standard library have no parts: they are handed on as they are. A walk ends after ``MOST_OBJECTS``.
"""

import copy
import functools
import sys
import weakref
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_mixprec.errors import SupportError

MOST_OBJECTS = 20_000
"""The most objects and containers that one walk goes through."""

Change = Callable[[Tensor], Tensor]
"""What becomes of a tensor; itself if nothing does."""

_ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)
Done = list[tuple[Tensor, Tensor]]
"""Pairs of a tensor that was changed and what it became."""

_PLAIN = (tuple, list, dict)
_CONTAINERS = (tuple, list, dict, set, frozenset, deque)
_OPEN = (object, *_CONTAINERS, SimpleNamespace)
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


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in their order.

    >>> [len(tensor) for tensor in tensors_in({"x": torch.ones(2), "rest": SimpleNamespace(y=torch.ones(3))})]
    [2, 3]
    """
    if isinstance(value, Tensor):
        yield value
        return
    seen = {id(value)}
    within = [iter(_parts(value))]
    while within:
        for part in within[-1]:
            if isinstance(part, Tensor):
                yield part
            elif type(part) not in _ATOMS and id(part) not in seen and len(seen) < MOST_OBJECTS:
                seen.add(id(part))
                within.append(iter(_parts(part)))
                break
        else:
            within.pop()


def named_tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value, in their order, each with where it is as one would write it.

    What a class keeps in private is not written: the tensors of a ``UserDict`` are its items.

    >>> [where for where, _ in named_tensors([{"x": torch.ones(2), "rest": SimpleNamespace(y=torch.ones(3))}])]
    ["[0]['x']", "[0]['rest'].y"]
    """
    if isinstance(value, Tensor):
        yield "", value
        return
    seen = {id(value)}
    within = [("", iter(_labelled(value)))]
    while within:
        above, parts = within[-1]
        for label, part in parts:
            if isinstance(part, Tensor):
                yield above + label, part
            elif type(part) not in _ATOMS and id(part) not in seen and len(seen) < MOST_OBJECTS:
                seen.add(id(part))
                within.append((above if label.startswith("._") else above + label, iter(_labelled(part))))
                break
        else:
            within.pop()


def mapped(value: Any, change: Change) -> Any:
    """A value with other tensors.

    What has another tensor somewhere in it is an object of its own class, as like the given one as can be; all else is
    handed on itself. What occurs several times stays one, and what refers to itself still does.

    Args:
        value: anything.
        change: what becomes of a tensor; itself if nothing does.

    Raises:
        SupportError: an object with a tensor to change in it cannot be copied.

    >>> mapped((torch.ones(1), [torch.zeros(1)]), lambda tensor: tensor + 1)
    (tensor([2.]), [tensor([1.])])
    """
    done: Done = []
    try:
        return _mapped_tree(value, change, done, set())[0]
    except _NoTreeError:
        return _Rewriting(change, done)(value)


def rebuilt(value: Any) -> Any:
    """A value in containers and objects of its own, with the same tensors: what is taken out of one stays in it."""
    return _Rewriting(lambda tensor: tensor, [], renews=True)(value)


def copied(value: Any) -> Any:
    """A copy of a value, in containers and objects of its own, with tensors of its own that are outside the graph."""
    return _Rewriting(_copied_tensor, [], renews=True, copies=True)(value)


def _changed(tensor: Tensor, change: Change, done: Done) -> Tensor:
    # Attention tells by identity that query, key and value are one tensor.
    for old, new in done:
        if old is tensor:
            return new
    new = change(tensor)
    if new is not tensor:
        done.append((tensor, new))
    return new


class _NoTreeError(Exception):
    """An object that is no plain container, or one that is met twice."""


def _mapped_tree(value: Any, change: Change, done: Done, seen: set[int]) -> tuple[Any, bool]:
    """The usual case, for what runs at every call: a tree of tuples, lists and dicts; and whether it changed."""
    if isinstance(value, Tensor):
        new = _changed(value, change, done)
        return new, new is not value
    cls = type(value)
    if cls in _ATOMS or not value and cls in _CONTAINERS:
        return value, False
    if cls not in _PLAIN and not _has_parts(value):
        return value, False
    if cls not in _PLAIN or id(value) in seen:
        raise _NoTreeError
    seen.add(id(value))
    results = [_mapped_tree(part, change, done, seen) for part in (value.values() if cls is dict else value)]
    if not any(changed for _, changed in results):
        return value, False
    parts = [part for part, _ in results]
    return dict(zip(value, parts, strict=True)) if cls is dict else cls(parts), True


class _Rewriting:
    """The making of one value that is like another but has other tensors.

    Args:
        change: what becomes of a tensor; itself if nothing does.
        done: what became of tensors so far.
        renews: True to rebuild every object that has parts, whether a tensor in it changes or not.
        copies: True to copy objects without parts, too, if they can be.
    """

    def __init__(self, change: Change, done: Done, renews: bool = False, copies: bool = False) -> None:
        self._change = change
        self._done = done
        self._renews = renews
        self._copies = copies
        self._new: dict[int, Any] = {}
        self._made_later: set[int] = set()

    def __call__(self, value: Any) -> Any:
        """The value with other tensors."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        changing = self._changing(value)
        if not changing:
            return value
        # All are there before any is filled, so that they can refer to one another.
        for old in changing:
            if isinstance(old, (tuple, frozenset)):
                self._made_later.add(id(old))
            else:
                self._new[id(old)] = _empty_like(old)
        for old in changing:
            if id(old) not in self._made_later:
                self._fill(self._new[id(old)], old)
        return self._built(value)

    def _tensor(self, tensor: Tensor) -> Tensor:
        return _changed(tensor, self._change, self._done)

    def _changing(self, value: Any) -> list[Any]:
        """The objects that change: those with a tensor that does, and from there all that hold them."""
        holders: dict[int, list[Any]] = {id(value): []}
        waiting, changing = [value], []
        while waiting and len(holders) < MOST_OBJECTS:
            holder = waiting.pop()
            changes = self._renews and _has_parts(holder)
            if self._copies and not changes:
                self._new[id(holder)] = _copied_object(holder)
            for part in _parts(holder):
                if isinstance(part, Tensor):
                    changes |= self._tensor(part) is not part
                elif type(part) not in _ATOMS:
                    if id(part) not in holders:
                        holders[id(part)] = []
                        waiting.append(part)
                    holders[id(part)].append(holder)
            if changes:
                changing.append(holder)
        found: dict[int, Any] = {}
        while changing:
            holder = changing.pop()
            if id(holder) not in found:
                found[id(holder)] = holder
                changing += holders[id(holder)]
        return list(found.values())

    def _built(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if type(value) in _ATOMS:
            return value
        if type(value) is weakref.ref and id(value()) in self._new:
            return weakref.ref(self._new[id(value())])
        if id(value) in self._made_later and id(value) not in self._new:
            self._new[id(value)] = _made_of(value, [self._built(item) for item in value])
            self._fill_attributes(self._new[id(value)], value)
        return self._new.get(id(value), value)

    def _fill(self, new: Any, value: Any) -> None:
        if isinstance(value, dict):
            dict.update(new, {key: self._built(item) for key, item in dict.items(value)})
            if _is_its_own_dict(value):
                new.__dict__ = new
        elif isinstance(value, (list, deque)):
            new.clear()
            new.extend([self._built(item) for item in value])
        elif isinstance(value, set):
            new.clear()
            new.update([self._built(item) for item in value])
        self._fill_attributes(new, value)

    def _fill_attributes(self, new: Any, value: Any) -> None:
        if type(value) not in _CONTAINERS:
            _set_attributes(new, {name: self._built(part) for name, part in _attributes(value)})


def _copied_tensor(tensor: Tensor) -> Tensor:
    if type(tensor) is not Tensor:
        return _copied_object(tensor)  # type: ignore[no-any-return]
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _copied_object(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:
        return value.detach().clone() if isinstance(value, Tensor) else value


def _parts(value: Any) -> Iterable[Any]:
    cls = type(value)
    if cls is tuple or cls is list:
        return value  # type: ignore[no-any-return]
    if cls is dict:
        return value.values()  # type: ignore[no-any-return]
    return [part for _, part in _labelled(value)]


def _labelled(value: Any) -> list[tuple[str, Any]]:
    """The parts of an object, each with what is written behind the object to get at it."""
    if isinstance(value, dict):
        items = [(f"[{key!r}]", item) for key, item in dict.items(value)]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = [(f".{name}", item) for name, item in zip(value._fields, value, strict=False)]
    elif isinstance(value, _CONTAINERS):
        items = [(f"[{place}]", item) for place, item in enumerate(value)]
    else:
        items = []
    is_wrapper = isinstance(value, (UserDict, UserList))
    return items + [
        ("._data" if is_wrapper and name == "data" else f".{name}", part) for name, part in _attributes(value)
    ]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    has_dict, slots = _layout(type(value))
    found = []
    for name in slots:
        part = getattr(value, name, _ABSENT)
        if part is not _ABSENT:
            found.append((name, part))
    if has_dict and not _is_its_own_dict(value):
        found += value.__dict__.items()
    return found


def _is_its_own_dict(value: Any) -> bool:
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


def _has_parts(value: Any) -> bool:
    return isinstance(value, _CONTAINERS) or _layout(type(value)) != (False, ())


def _is_open(cls: type) -> bool:
    return all(
        base in _OPEN or base.__module__.startswith(_OPEN_MODULES) or base.__module__.partition(".")[0] not in _CLOSED
        for base in cls.__mro__
    )


def _made_of(value: Any, items: list[Any]) -> Any:
    """A tuple or frozenset of other items."""
    cls: Any = type(value)
    if cls is tuple or isinstance(value, frozenset) or cls.__module__ == "torch.return_types":
        return cls(items)
    return cls._make(items) if hasattr(cls, "_make") else tuple.__new__(cls, items)


def _empty_like(value: Any) -> Any:
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


def _set_attributes(new: Any, attributes: dict[str, Any]) -> None:
    """Sets attributes past the class: a frozen one refuses its own."""
    has_dict, slots = _layout(type(new))
    for name in slots:
        if name in attributes:
            object.__setattr__(new, name, attributes.pop(name))
    if has_dict:
        new.__dict__.update(attributes)
