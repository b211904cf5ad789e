"""Casts of the floating tensors in whatever a module takes or returns."""

import copy
import dataclasses
from collections import UserDict, UserList
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mixprec.numerics.formats import stored_dtypes

Casts = Mapping[torch.dtype, torch.dtype]
"""Casts by dtype: a key becomes its value; any other dtype is left alone."""

FLOATING = (*stored_dtypes(), torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
"""The dtypes whose values a cast keeps; block scales and packed formats mean nothing by themselves."""

Done = list[tuple[Tensor, Tensor]]
"""Pairs of a tensor that was cast and its cast."""

_ATOMS = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)


def all_to(dtype: torch.dtype) -> Casts:
    """The casts of every floating dtype to one."""
    return {other: dtype for other in FLOATING if other != dtype}


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """Casts every real floating tensor in nested containers; what does not change is handed back itself.

    >>> cast_floating({"x": torch.ones(1), "label": torch.ones(1, dtype=torch.int64)}, torch.bfloat16)
    {'x': tensor([1.], dtype=torch.bfloat16), 'label': tensor([1])}
    """
    return cast(value, all_to(dtype))


def cast(value: Any, casts: Casts) -> Any:
    """Casts the tensors in nested containers by their dtype.

    Goes through tuples (named, packed sequences and torch's return types included), lists, dicts, their subclasses and
    dataclasses. A container is rebuilt only if a tensor in it changed, and then with its own class and attributes; the
    caller's is never written to. A tensor that occurs several times stays one tensor.

    Args:
        value: anything.
        casts: which dtype becomes which.

    >>> pair = (torch.ones(1), [torch.ones(1).half()])
    >>> cast(pair, {torch.float16: torch.float32})
    (tensor([1.]), [tensor([1.])])
    >>> cast(pair, {torch.float64: torch.float32}) is pair
    True
    """
    return _cast(value, casts, [])[0]


def _cast(value: Any, casts: Casts, done: Done) -> tuple[Any, bool]:
    """The value as cast, and whether it changed; Dynamo compares no tuples by identity."""
    if isinstance(value, Tensor):
        target = casts.get(value.dtype)
        if target is None:
            return value, False
        # Attention tells by identity that query, key and value are one tensor; Dynamo knows no id().
        for old, new in done:
            if old is value:
                return new, True
        done.append((value, value.to(target)))
        return done[-1][1], True
    if isinstance(value, _ATOMS):
        return value, False
    if isinstance(value, (tuple, list, UserList)):
        return _cast_sequence(value, casts, done)
    if isinstance(value, (dict, UserDict)):
        return _cast_dict(value, casts, done)
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, torch.nn.Module)):
        changed = _changed_fields(value, casts, done)
        return (_with_changes(value, {}, changed), True) if changed else (value, False)
    return value, False


def first_floating(value: Any) -> Tensor | None:
    """The first real floating tensor in nested containers, in their order, or ``None``."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    for item in _items(value):
        found = first_floating(item)
        if found is not None:
            return found
    return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers, in their order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for item in _items(value):
            yield from tensors_in(item)


def holds_dtype(value: Any, dtype: torch.dtype) -> bool:
    """True if a tensor in nested containers has this dtype."""
    if isinstance(value, Tensor):
        return value.dtype == dtype
    return any(holds_dtype(item, dtype) for item in _items(value))


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, _ATOMS):
        return ()
    if isinstance(value, (tuple, list, UserList)):
        return value
    if isinstance(value, (dict, UserDict)):
        return value.values()
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, torch.nn.Module)):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return ()


def _cast_sequence(value: Any, casts: Casts, done: Done) -> tuple[Any, bool]:
    results = [_cast(item, casts, done) for item in value]
    if not any(changed for _, changed in results):
        return value, False
    items = [item for item, _ in results]
    if type(value) is list:
        return items, True
    if isinstance(value, tuple):
        return _rebuilt_tuple(value, items), True
    new = copy.copy(value)
    new[:] = items
    return new, True


def _rebuilt_tuple(value: tuple[Any, ...], items: list[Any]) -> Any:
    cls: Any = type(value)
    if cls is tuple:
        return tuple(items)
    if cls.__module__ == "torch.return_types":
        return cls(items)
    if hasattr(cls, "_make"):
        return cls._make(items)
    new = tuple.__new__(cls, items)
    if hasattr(value, "__dict__"):
        new.__dict__.update(value.__dict__)
    return new


def _cast_dict(value: Any, casts: Casts, done: Done) -> tuple[Any, bool]:
    results = {key: _cast(item, casts, done) for key, item in value.items()}
    items = {key: item for key, (item, changed) in results.items() if changed}
    fields = {}
    if dataclasses.is_dataclass(type(value)):
        # A field that is an item too becomes what the item became.
        recast = {id(value[key]): item for key, item in items.items()}
        fields = _changed_fields(value, casts, done, recast)
    if not items and not fields:
        return value, False
    if type(value) is dict:
        return {key: item for key, (item, _) in results.items()}, True
    return _with_changes(value, items, fields), True


def _changed_fields(value: Any, casts: Casts, done: Done, recast: Mapping[int, Any] | None = None) -> dict[str, Any]:
    fields = {}
    for field in dataclasses.fields(value):
        old = getattr(value, field.name, None)
        if recast and id(old) in recast:
            fields[field.name] = recast[id(old)]
            continue
        new, changed = _cast(old, casts, done)
        if changed:
            fields[field.name] = new
    return fields


def _with_changes(value: Any, items: Mapping[Any, Any], fields: Mapping[str, Any]) -> Any:
    new = copy.copy(value)
    for key, item in items.items():
        new[key] = item
    for name, field in fields.items():
        # A frozen dataclass refuses its own setattr, and only the copy that is handed on is written to.
        object.__setattr__(new, name, field)
    return new
