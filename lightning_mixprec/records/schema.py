"""Whether a plain value, read from a file, has the shape that a type says."""

import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin

from typing_extensions import NotRequired, get_type_hints, is_typeddict

_LARGEST = 2**63
"""What counters and steps stay below; larger ones have no float."""

Count = NewType("Count", int)
"""How many, or the number of a step: from 0 on."""

Shapes = Mapping[str, Any]
"""Shapes by name."""


def has_shape(value: object, shape: Any) -> bool:
    """Whether a plain value is what a type says; numbers may be whole, and tuples may be lists.

    Args:
        value: Anything.
        shape: A plain type, a list, mapping or tuple of shapes, a union, a ``Literal``, an
            ``Annotated`` with a test, a ``TypedDict``, or a dataclass for a mapping that has its fields.

    >>> has_shape([("a", 2)], list[tuple[str, Count]]), has_shape([("a", -2)], list[tuple[str, Count]])
    (True, False)
    """
    kind, parts = get_origin(shape), get_args(shape)
    if kind is NotRequired:
        return has_shape(value, parts[0])
    if kind is Annotated:
        return has_shape(value, parts[0]) and parts[1](value)
    if kind in (Union, types.UnionType):
        return any(has_shape(value, part) for part in parts)
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind is list:
        return isinstance(value, list) and all(has_shape(each, parts[0]) for each in value)
    if kind is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(parts) and all(map(has_shape, value, parts))
    if kind is dict:
        named, held = parts
        return isinstance(value, dict) and all(has_shape(key, named) and has_shape(value[key], held) for key in value)
    return _is_record(value, shape) if is_typeddict(shape) or is_dataclass(shape) else _is_scalar(value, shape)


def _is_record(value: object, shape: Any) -> bool:
    hints = get_type_hints(shape, include_extras=True)
    needed = shape.__required_keys__ if is_typeddict(shape) else hints.keys()
    return (
        isinstance(value, dict)
        and needed <= value.keys()
        and all(has_shape(value[key], hint) for key, hint in hints.items() if key in value)
    )


def _is_scalar(value: object, shape: Any) -> bool:
    if shape is Count:
        return _is_scalar(value, int) and value >= 0  # type: ignore[operator]
    if shape is int:
        return type(value) is int and -_LARGEST < value < _LARGEST
    if shape is float:
        return type(value) is float or _is_scalar(value, int)
    return shape is Any or type(value) is shape
