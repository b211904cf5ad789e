"""Arguments lent to a layer in its own format, and what the layer writes into them, taken back."""

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_mixprec.engine.casting import Casts, cast
from lightning_mixprec.engine.objects import mapped
from lightning_mixprec.engine.parts import (
    ATOMS,
    PLAIN,
    attributes_of,
    is_mutable,
    items_of,
    parts_of,
    set_attributes,
    set_item,
)

_ABSENT = object()
_NOT_LENT_IN_GRAPHS = {*ATOMS, *PLAIN}
"""Dynamo would compile anew for each list, as it does for another identity."""


def lend(
    args: tuple[Any, ...], kwargs: dict[str, Any], casts: Casts
) -> tuple[tuple[Any, ...], dict[str, Any], "Loan | None"]:
    """The arguments of a call as a layer gets them, and the loan that ends with the call, if it could write to them.

    Args:
        args: what the layer is called with.
        kwargs: what the layer is called with by name.
        casts: which dtype becomes which on the way in.
    """
    lent_args, lent_kwargs = cast((args, kwargs), casts)
    for part in (*args, *kwargs.values()):
        if not isinstance(part, Tensor) and type(part) not in (_NOT_LENT_IN_GRAPHS if is_compiling() else ATOMS):
            given, lent = (*args, *kwargs.values()), (*lent_args, *lent_kwargs.values())
            return lent_args, lent_kwargs, Loan(list(zip(given, lent, strict=True)))
    return lent_args, lent_kwargs, None


class Loan:
    """The objects that a layer is called with: as the caller has them, and as the layer gets them.

    An object with tensors in another format is lent as a copy, everything else as it is. What the layer puts into an
    object (a key-value cache, a batch that collects features) or writes to a tensor in it is in the caller's when the
    call has ended, in the caller's format: nothing that the layer keeps there is lost. Compiled code that keeps a graph
    is the exception: what it writes to a tensor in such an object, or to a list or dict that was cast, stays there.

    Args:
        pairs: each argument as given and as lent.
    """

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._lent: list[tuple[Any, Any, _State]] = []
        seen: set[int] = set()
        waiting = [pair for pair in pairs if not isinstance(pair[0], Tensor)]
        while waiting:
            given, lent = waiting.pop()
            if id(given) in seen:
                continue
            seen.add(id(given))
            if is_mutable(given):
                self._lent.append((given, lent, _State(lent)))
            for part, lent_part in zip(parts_of(given), parts_of(lent), strict=False):
                if not isinstance(part, Tensor):
                    if type(part) not in ATOMS:
                        waiting.append((part, lent_part))
                elif lent_part is not part:
                    self._tensors.append((part, lent_part))

    def end(self, result: Any, back: Casts) -> Any:
        """Takes back what the layer wrote.

        Args:
            result: what the layer returned.
            back: which dtype becomes which on the way back.

        Returns:
            The result, with the caller's own objects where the layer handed on what it was lent.
        """
        for given, lent in self._tensors:
            if _may_be_written(given, lent):
                given.copy_(lent)
        own = {id(lent): given for given, lent, _ in self._lent if lent is not given}
        for given, lent, before in self._lent:
            before.take_back(given, lent, lambda part: cast(mapped(part, self._own, own), back))
        return mapped(result, _itself, own) if own else result

    def _own(self, tensor: Tensor) -> Tensor:
        """The caller's tensor, for one that was lent in its place."""
        for given, lent in self._tensors:
            if lent is tensor:
                return given
        return tensor


class _State:
    """The parts of an object at one time."""

    items: Sequence[Any] = ()
    named: Mapping[Any, Any] = {}
    attributes: Mapping[str, Any] = {}

    def __init__(self, value: Any) -> None:
        if isinstance(value, dict):
            self.named = dict(items_of(value))
        elif isinstance(value, (list, deque, set)):
            self.items = list(value)
        if type(value) not in PLAIN:
            self.attributes = dict(attributes_of(value))

    def is_of(self, value: Any) -> bool:
        """True if a list or a dict is still in this state; of others it is not said."""
        if type(value) is dict:
            return len(value) == len(self.named) and not _changed(self.named, value)
        return type(value) is list and _is_same(self.items, value)

    def take_back(self, given: Any, lent: Any, own: Callable[[Any], Any]) -> None:
        """Makes an object what the one lent in its place, or it itself, has become since it was in this state."""
        if self.is_of(lent):
            return
        now = _State(lent)
        if not _is_same(self.items, now.items):
            mine = self.items if given is lent else [] if isinstance(given, set) else list(given)
            were = {id(item): each for item, each in zip(self.items, mine, strict=False)}
            items = [were[id(item)] if id(item) in were else own(item) for item in now.items]
            given.clear()
            given.update(items) if isinstance(given, set) else given.extend(items)
        for key in _changed(self.named, now.named):
            set_item(given, key, own(now.named[key]))
        for key in self.named:
            if key not in now.named and key in given:
                (OrderedDict if isinstance(given, OrderedDict) else dict).__delitem__(given, key)
        if self.attributes or now.attributes:
            changed = {name: own(now.attributes[name]) for name in _changed(self.attributes, now.attributes)}
            gone = [name for name in self.attributes if name not in now.attributes] if given is not lent else []
            if changed or gone:
                set_attributes(given, changed, gone)


def _may_be_written(given: Tensor, lent: Tensor) -> bool:
    """True if a copy was written to. Where writes are not counted, what is exact and outside a graph is taken back."""
    if is_compiling() or lent.is_inference():
        return lent.itemsize > given.itemsize and not torch.is_grad_enabled()
    return lent._version > 0


def _is_same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def _changed(before: Mapping[Any, Any], now: Mapping[Any, Any]) -> list[Any]:
    return [key for key, part in now.items() if before.get(key, _ABSENT) is not part]


def _itself(tensor: Tensor) -> Tensor:
    return tensor
