"""Objects that hold tensors, whatever their class: a walk through them, and others like them with other tensors.

The object itself is never written to; what has no parts (see ``parts``) is handed on as it is, and a walk ends after
``MOST_OBJECTS``.
"""

import copy
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from lightning_mixprec.engine.parts import (
    ATOMS,
    CONTAINERS,
    PLAIN,
    attributes_of,
    empty_like,
    has_parts,
    is_its_own_dict,
    items_of,
    labelled_parts_of,
    made_of,
    parts_of,
    set_attributes,
    set_item,
)
from lightning_mixprec.errors import SupportError

MOST_OBJECTS = 20_000
"""The most objects and containers that one walk goes through."""

Change = Callable[[Tensor], Tensor]
"""What becomes of a tensor; itself if nothing does."""

Done = list[tuple[Tensor, Tensor]]
"""Pairs of a tensor that was changed and what it became."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, in their order.

    >>> import torch
    >>> [len(tensor) for tensor in tensors_in({"x": torch.ones(2), "rest": [1, (torch.ones(3),)]})]
    [2, 3]
    """
    if isinstance(value, Tensor):
        yield value
        return
    seen: set[int] = set()
    _is_new(value, seen)
    within = [iter(parts_of(value))]
    while within:
        for part in within[-1]:
            if isinstance(part, Tensor):
                yield part
            elif type(part) not in ATOMS and _is_new(part, seen):
                within.append(iter(parts_of(part)))
                break
        else:
            within.pop()


def _is_new(value: Any, seen: set[int]) -> bool:
    """True of an object that a walk has not met, and notes it. Compiled code meets each plain container anew."""
    if is_compiling() and type(value) in PLAIN:  # Dynamo compiles anew for another identity, or knows none
        return True
    if id(value) in seen or len(seen) >= MOST_OBJECTS:
        return False
    seen.add(id(value))
    return True


def named_tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value, in their order, each with where it is as one would write it.

    What a class keeps in private is not written: the tensors of a ``UserDict`` are its items.

    >>> import torch
    >>> [where for where, _ in named_tensors([{"x": torch.ones(2)}, torch.distributions.Normal(0.0, 1.0)])]
    ["[0]['x']", '[1].loc', '[1].scale']
    """
    if isinstance(value, Tensor):
        yield "", value
        return
    seen = {id(value)}
    within = [("", iter(labelled_parts_of(value)))]
    while within:
        above, parts = within[-1]
        for label, part in parts:
            if isinstance(part, Tensor):
                yield above + label, part
            elif type(part) not in ATOMS and id(part) not in seen and len(seen) < MOST_OBJECTS:
                seen.add(id(part))
                within.append((above if label.startswith("._") else above + label, iter(labelled_parts_of(part))))
                break
        else:
            within.pop()


def mapped(value: Any, change: Change, known: Mapping[int, Any] | None = None) -> Any:
    """A value with other tensors.

    What has another tensor somewhere in it is an object of its own class, as like the given one as can be; all else is
    handed on itself. What occurs several times stays one, and what refers to itself still does.

    Args:
        value: anything.
        change: what becomes of a tensor; itself if nothing does.
        known: what stands for certain objects, by their ids.

    Raises:
        SupportError: an object with a tensor to change in it cannot be copied.

    >>> import torch
    >>> mapped((torch.ones(1), [torch.zeros(1)]), lambda tensor: tensor + 1)
    (tensor([2.]), [tensor([1.])])
    """
    if known and id(value) in known:
        return known[id(value)]
    done: Done = []
    try:
        return _mapped_tree(value, change, done, set(known or ()))[0]
    except NoTreeError:
        return _Rewriting(change, done, known)(value)


def rebuilt(value: Any, change: Change = lambda tensor: tensor) -> Any:
    """A value in containers and objects of its own, with the same tensors: what is taken out of one stays in it.

    Args:
        value: anything.
        change: what becomes of a tensor; itself if nothing does.
    """
    return _Rewriting(change, [], None, renews=True)(value)


def copied(value: Any) -> Any:
    """A copy of a value, in containers and objects of its own, with tensors of its own that are outside the graph.

    Args:
        value: anything.

    Raises:
        SupportError: there is a generator in it, or another iterator that cannot be copied.
    """
    return _Rewriting(_copied_tensor, [], None, renews=True, copies=True)(value)


def _changed(tensor: Tensor, change: Change, done: Done) -> Tensor:
    # Attention tells by identity that query, key and value are one tensor.
    for old, new in done:
        if old is tensor:
            return new
    new = change(tensor)
    if new is not tensor:
        done.append((tensor, new))
    return new


class NoTreeError(Exception):
    """An object that is no plain container, or one that is met twice."""


def _mapped_tree(value: Any, change: Change, done: Done, seen: set[int]) -> tuple[Any, bool]:
    """The usual case, for what runs at every call: a tree of tuples, lists and dicts; and whether it changed."""
    if isinstance(value, Tensor):
        new = _changed(value, change, done)
        return new, new is not value
    cls = type(value)
    if cls in ATOMS or not value and cls in CONTAINERS:
        return value, False
    if cls not in PLAIN:
        if has_parts(value):
            raise NoTreeError
        return value, False
    if not is_compiling():  # Dynamo compiles anew for another identity
        if id(value) in seen:
            raise NoTreeError
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
        known: what stands for certain objects, by their ids.
        renews: True to rebuild every object that has parts, whether a tensor in it changes or not.
        copies: True to copy objects without parts, too, if they can be.
    """

    def __init__(
        self,
        change: Change,
        done: Done,
        known: Mapping[int, Any] | None,
        renews: bool = False,
        copies: bool = False,
    ) -> None:
        self._change = change
        self._done = done
        self._renews = renews
        self._copies = copies
        self._known = known or {}
        self._new: dict[int, Any] = {**self._known}
        self._made_later: set[int] = set()

    def __call__(self, value: Any) -> Any:
        """The value with other tensors."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        changing = [] if id(value) in self._known else self._changing(value)
        if not changing:
            return self._new.get(id(value), value)
        # All are there before any is filled, so that they can refer to one another.
        for old in changing:
            if isinstance(old, (tuple, frozenset)):
                self._made_later.add(id(old))
            else:
                self._new[id(old)] = empty_like(old)
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
            changes = self._renews and has_parts(holder)
            if self._copies and not changes:
                self._new[id(holder)] = _copied_object(holder)
            for part in parts_of(holder):
                if isinstance(part, Tensor):
                    changes |= self._tensor(part) is not part
                elif id(part) in self._known:
                    changes = True
                elif type(part) not in ATOMS:
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
        if type(value) in ATOMS:
            return value
        if type(value) is weakref.ref and id(value()) in self._new:
            return weakref.ref(self._new[id(value())])
        if id(value) in self._made_later and id(value) not in self._new:
            self._new[id(value)] = made_of(value, [self._built(item) for item in value])
            self._fill_attributes(self._new[id(value)], value)
        return self._new.get(id(value), value)

    def _fill(self, new: Any, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in items_of(value):
                set_item(new, key, self._built(item))
            if is_its_own_dict(value):
                new.__dict__ = new
        elif isinstance(value, (list, deque)):
            new.clear()
            new.extend([self._built(item) for item in value])
        elif isinstance(value, set):
            new.clear()
            new.update([self._built(item) for item in value])
        self._fill_attributes(new, value)

    def _fill_attributes(self, new: Any, value: Any) -> None:
        if type(value) not in CONTAINERS:
            set_attributes(new, {name: self._built(part) for name, part in attributes_of(value)})


def _copied_tensor(tensor: Tensor) -> Tensor:
    if type(tensor) is not Tensor:
        return _copied_object(tensor)  # type: ignore[no-any-return]
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _copied_object(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception as error:
        if isinstance(value, Iterator):
            raise SupportError(
                f"a {type(value).__name__} can be gone through only once, so what is given one cannot be run again; "
                "give a list instead"
            ) from error
        return value.detach().clone() if isinstance(value, Tensor) else value
