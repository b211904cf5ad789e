"""Casts of the floating tensors in whatever a module takes or returns."""

import copy
import dataclasses
from collections import UserDict, UserList
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Casts = Mapping[torch.dtype, torch.dtype]
"""Which dtype becomes which; a dtype that is no key is left alone."""

FLOATING = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)
"""The dtypes whose values a cast keeps; block scales and packed formats mean nothing by themselves."""

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
    caller's is never written to.

    Args:
        value: anything.
        casts: which dtype becomes which.

    >>> pair = (torch.ones(1), [torch.ones(1).half()])
    >>> cast(pair, {torch.float16: torch.float32})
    (tensor([1.]), [tensor([1.])])
    >>> cast(pair, {torch.float64: torch.float32}) is pair
    True
    """
    if isinstance(value, Tensor):
        target = casts.get(value.dtype)
        return value if target is None else value.to(target)
    if isinstance(value, _ATOMS):
        return value
    if isinstance(value, tuple):
        return _cast_tuple(value, casts)
    if isinstance(value, (list, UserList)):
        return _cast_list(value, casts)
    if isinstance(value, (dict, UserDict)):
        return _cast_dict(value, casts)
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, torch.nn.Module)):
        return _with_attributes(value, None, _changed_fields(value, casts))
    return value


def first_floating(value: Any) -> Tensor | None:
    """The first real floating tensor in nested containers, in their order, or ``None``."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    for item in _items(value):
        found = first_floating(item)
        if found is not None:
            return found
    return None


def holds_dtype(value: Any, dtype: torch.dtype) -> bool:
    """Whether a tensor in nested containers has this dtype."""
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


def _cast_tuple(value: tuple[Any, ...], casts: Casts) -> Any:
    items = [cast(item, casts) for item in value]
    if _all_same(items, value):
        return value
    cls = type(value)
    if cls is tuple:
        return tuple(items)
    if hasattr(cls, "n_sequence_fields"):
        return cls(items)
    if hasattr(cls, "_make"):
        return cls._make(items)
    new = tuple.__new__(cls, items)
    if hasattr(value, "__dict__"):
        new.__dict__.update(value.__dict__)
    return new


def _cast_list(value: Any, casts: Casts) -> Any:
    items = [cast(item, casts) for item in value]
    if _all_same(items, value):
        return value
    if type(value) is list:
        return items
    new = copy.copy(value)
    new[:] = items
    return new


def _cast_dict(value: Any, casts: Casts) -> Any:
    items = {key: cast(item, casts) for key, item in value.items()}
    attributes = {}
    if dataclasses.is_dataclass(type(value)):
        recast = {id(value[key]): item for key, item in items.items()}
        attributes = _changed_fields(value, casts, recast)
    changed = {key: item for key, item in items.items() if item is not value[key]}
    if not changed and not attributes:
        return value
    return items if type(value) is dict else _with_attributes(value, changed, attributes)


def _changed_fields(value: Any, casts: Casts, recast: Mapping[int, Any] | None = None) -> dict[str, Any]:
    """The fields whose value changes; a value that is also an item becomes what the item became."""
    changed = {}
    for field in dataclasses.fields(value):
        old = getattr(value, field.name, None)
        new = recast[id(old)] if recast and id(old) in recast else cast(old, casts)
        if new is not old:
            changed[field.name] = new
    return changed


def _with_attributes(value: Any, items: Mapping[Any, Any] | None, attributes: Mapping[str, Any]) -> Any:
    if not items and not attributes:
        return value
    new = copy.copy(value)
    for key, item in (items or {}).items():
        new[key] = item
    for name, attribute in attributes.items():
        # A frozen dataclass refuses its own setattr, and only the copy that is handed on is written to.
        object.__setattr__(new, name, attribute)
    return new


def _all_same(items: list[Any], value: Iterable[Any]) -> bool:
    return all(new is old for new, old in zip(items, value, strict=True))
