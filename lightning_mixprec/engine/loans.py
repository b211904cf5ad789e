"""Arguments lent to a layer in its own format, and what the layer writes into them, taken back."""

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_mixprec.engine.casting import Casts, cast
from lightning_mixprec.engine.objects import NoTreeError, mapped
from lightning_mixprec.engine.parts import (
    ATOMS,
    PLAIN,
    attributes_of,
    has_parts,
    is_mutable,
    items_of,
    parts_of,
    set_attributes,
    set_item,
)

Pairs = list[tuple[Tensor, Tensor]]
"""Tensors as they were given and as they were lent."""

_ABSENT = object()
_NOTHING: Mapping[Any, Any] = {}
_ATOMS, _PLAIN = frozenset(ATOMS), frozenset(PLAIN)
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
    if not is_compiling():
        try:
            return _lent_plainly(args, kwargs, casts)
        except NoTreeError:
            pass
    lent_args, lent_kwargs = cast((args, kwargs), casts)
    for part in (*args, *kwargs.values()):
        if not isinstance(part, Tensor) and type(part) not in (_NOT_LENT_IN_GRAPHS if is_compiling() else ATOMS):
            given, lent = (*args, *kwargs.values()), (*lent_args, *lent_kwargs.values())
            return lent_args, lent_kwargs, Loan.of(list(zip(given, lent, strict=True)))
    return lent_args, lent_kwargs, None


def _lent_plainly(
    args: tuple[Any, ...], kwargs: dict[str, Any], casts: Casts
) -> tuple[tuple[Any, ...], dict[str, Any], "Loan | None"]:
    """As :func:`lend`, the usual case in one walk, for what runs at every call: trees of tuples, lists and dicts."""
    loan, seen = Loan(), set[int]()
    done: Pairs = []
    lent_args = [part if isinstance(part, Tensor) else _lent(part, casts, loan, seen) for part in args]
    lent_kwargs = kwargs
    if kwargs:
        lent_kwargs = {
            name: part if isinstance(part, Tensor) else _lent(part, casts, loan, seen) for name, part in kwargs.items()
        }
    known = loan.tensors
    for place, part in enumerate(lent_args):
        if isinstance(part, Tensor):
            lent_args[place] = _lent_tensor(part, casts, known, done)
    for name, part in lent_kwargs.items():
        if isinstance(part, Tensor):
            lent_kwargs[name] = _lent_tensor(part, casts, known, done)
    return tuple(lent_args), lent_kwargs, loan if loan.lent else None


def _lent_tensor(tensor: Tensor, casts: Casts, known: Pairs, done: Pairs) -> Tensor:
    target = casts.get(tensor.dtype)
    if target is None:
        return tensor
    for pairs in (known, done):  # attention tells by identity that query, key and value are one tensor
        for given, lent in pairs:
            if given is tensor:
                return lent
    new = tensor.to(target)
    done.append((tensor, new))
    return new


def _lent(value: Any, casts: Casts, loan: "Loan", seen: set[int]) -> Any:
    """A value in a call's arguments as the layer gets it, noted in the loan."""
    cls = type(value)
    if cls is Tensor or isinstance(value, Tensor):
        return _lent_tensor(value, casts, [], loan.tensors)
    if cls in _ATOMS:
        return value
    if cls not in _PLAIN:
        if has_parts(value):
            raise NoTreeError
        return value
    if id(value) in seen:
        raise NoTreeError
    seen.add(id(value))
    if cls is dict:
        parts = {key: _lent(part, casts, loan, seen) for key, part in value.items()}
        changes = any(map(is_not, parts.values(), value.values()))
        loan.lent.append((value, parts if changes else value, _State(named=dict(parts) if changes else parts)))
        return parts if changes else value
    items = [_lent(part, casts, loan, seen) for part in value]
    changes = any(map(is_not, items, value))
    if cls is tuple:
        return tuple(items) if changes else value
    loan.lent.append((value, items if changes else value, _State(items.copy() if changes else items)))
    return items if changes else value


class Loan:
    """The objects that a layer is called with: as the caller has them, and as the layer gets them.

    An object with tensors in another format is lent as a copy, everything else as it is. What the layer puts into an
    object (a key-value cache, a batch that collects features) or writes to a tensor in it is in the caller's when the
    call has ended, in the caller's format: nothing that the layer keeps there is lost. Compiled code that keeps a graph
    is the exception: what it writes to a tensor in such an object, or to a list or dict that was cast, stays there.

    Attributes:
        tensors: the tensors in objects that were lent in another format, each as given and as lent.
        lent: the objects that the layer may write to, as given and as lent, and what was in them then.
    """

    def __init__(self) -> None:
        self.tensors: Pairs = []
        self.lent: list[tuple[Any, Any, _State]] = []

    @classmethod
    def of(cls, pairs: list[tuple[Any, Any]]) -> "Loan":
        """The loan of arguments of any class, each as given and as lent."""
        loan, seen = cls(), set[int]()
        waiting = [pair for pair in pairs if not isinstance(pair[0], Tensor)]
        while waiting:
            given, lent = waiting.pop()
            if id(given) in seen:
                continue
            seen.add(id(given))
            if is_mutable(given):
                loan.lent.append((given, lent, _State.of(lent)))
            for part, lent_part in zip(parts_of(given), parts_of(lent), strict=False):
                if not isinstance(part, Tensor):
                    if type(part) not in ATOMS:
                        waiting.append((part, lent_part))
                elif lent_part is not part:
                    loan.tensors.append((part, lent_part))
        return loan

    def end(self, result: Any, back: Casts) -> Any:
        """Takes back what the layer wrote.

        Args:
            result: what the layer returned.
            back: which dtype becomes which on the way back.

        Returns:
            The result, with the caller's own objects where the layer handed on what it was lent.
        """
        for given, lent in self.tensors:
            if _may_be_written(given, lent):
                given.copy_(lent)
        is_as_lent = all(before.is_of(lent) for _, lent, before in self.lent)
        if is_as_lent and isinstance(result, Tensor):
            return result
        own = {id(lent): given for given, lent, _ in self.lent if lent is not given}
        for given, lent, before in self.lent:
            before.take_back(given, lent, lambda part: cast(mapped(part, self._own, own), back))
        return mapped(result, _itself, own) if own else result

    def _own(self, tensor: Tensor) -> Tensor:
        """The caller's tensor, for one that was lent in its place."""
        for given, lent in self.tensors:
            if lent is tensor:
                return given
        return tensor


class _State:
    """The parts of an object at one time: of a list, deque or set its items, of a dict those by name; attributes."""

    def __init__(
        self,
        items: Sequence[Any] = (),
        named: Mapping[Any, Any] = _NOTHING,
        attributes: Mapping[str, Any] = _NOTHING,
    ) -> None:
        self.items, self.named, self.attributes = items, named, attributes

    @classmethod
    def of(cls, value: Any) -> "_State":
        """The present state of an object."""
        named = dict(items_of(value)) if isinstance(value, dict) else {}
        items = list(value) if isinstance(value, (list, deque, set)) else []
        return cls(items, named, dict(attributes_of(value)) if type(value) not in PLAIN else {})

    def is_of(self, value: Any) -> bool:
        """True if a list or a dict is still in this state; of others it is not said."""
        if type(value) is dict:
            return len(value) == len(self.named) and not _changed(self.named, value)
        return type(value) is list and _is_same(self.items, value)

    def take_back(self, given: Any, lent: Any, own: Callable[[Any], Any]) -> None:
        """Makes an object what the one lent in its place, or it itself, has become since it was in this state."""
        if self.is_of(lent):
            return
        now = _State.of(lent)
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
