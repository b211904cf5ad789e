"""Shapes of plain values, written as types, and the one check of a value that was read against its shape."""

import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from typing_extensions import NotRequired, TypedDict, get_type_hints, is_typeddict

from lightning_mixprec.errors import MixPrecError

Count = Annotated[int, range(2**63).__contains__]
"""A number of things, or that of a step."""

Tally = Annotated[int, range(2**31).__contains__]
"""A count that a device holds in 32 bits."""


class Place(TypedDict):
    """The batch that a record is about: optimizer steps taken before it, its epoch, its index."""

    step: Count
    epoch: NotRequired[Count]
    batch_idx: NotRequired[Count]


class Named(Mapping[str, Any]):
    """A base for dataclasses whose fields are read as attributes or, as in a dict, by name."""

    def __getitem__(self, name: str) -> Any:
        if name not in vars(self):
            raise KeyError(name)
        return vars(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))


Shapes = Mapping[str, Any]
"""Shapes by name."""

_WHOLE = range(1 - 2**63, 2**63)
"""Larger numbers have no place in a tensor."""


def matches(value: object, shape: Any, *, in_json: bool = False) -> bool:
    """True if a plain value is what a type says; numbers may be whole, and tuples may be lists.

    Args:
        value: Anything.
        shape: A plain type, a list, mapping or tuple of shapes, a union, a ``Literal``, an ``Annotated`` with a test, a
            ``TypedDict`` or a dataclass for a mapping that has its fields, or a ``NamedTuple`` for a list of its
            fields' values.
        in_json: Whether null stands for a number that is not finite.

    >>> matches([("a", 2)], list[tuple[str, Count]]), matches([("a", -2)], list[tuple[str, Count]])
    (True, False)
    """
    annotated: Any = Annotated

    def all_match(values: Iterable[object], shapes: Iterable[Any]) -> bool:
        return all(matches(each, part, in_json=in_json) for each, part in zip(values, shapes, strict=True))

    kind, parts = get_origin(shape), get_args(shape)
    if kind is annotated:
        return matches(value, parts[0], in_json=in_json) and bool(parts[1](value))
    if kind in (Union, types.UnionType):
        return any(matches(value, part, in_json=in_json) for part in parts)
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind is list:
        return isinstance(value, list) and all_match(value, [parts[0]] * len(value))
    if kind in (dict, Mapping):
        return isinstance(value, dict) and all(all_match(pair, parts) for pair in value.items())
    if kind is tuple or hasattr(shape, "_fields"):
        parts = parts or tuple(_hints(shape).values())
        parts = parts[:1] * len(value) if parts[-1] is ... and isinstance(value, (list, tuple)) else parts
        return isinstance(value, (list, tuple)) and len(value) == len(parts) and all_match(value, parts)
    if is_typeddict(shape) or is_dataclass(shape):
        hints = _hints(shape)
        needed = shape.__required_keys__ if is_typeddict(shape) else hints.keys()
        if not isinstance(value, dict) or not needed <= value.keys():
            return False
        known = [key for key in hints if key in value]
        return all_match([value[key] for key in known], [hints[key] for key in known])
    return _is_scalar(value, shape) or (in_json and shape is float and value is None)


@functools.cache
def _hints(shape: Any) -> dict[str, Any]:
    hints = get_type_hints(shape, include_extras=True)
    optional: Any = NotRequired
    return {key: get_args(hint)[0] if get_origin(hint) is optional else hint for key, hint in hints.items()}


def _is_scalar(value: object, shape: Any) -> bool:
    if shape is int:
        return type(value) is int and value in _WHOLE
    if shape is float:
        return type(value) is float or _is_scalar(value, int)
    return shape is Any or type(value) is shape


def check_plain(value: object, path: str) -> None:
    """Checks that a checkpoint can keep a value: numbers, strings, None, and lists and mappings of them.

    Args:
        value: Anything.
        path: Where it stands, for the error.

    Raises:
        MixPrecError: It is something else; one line that says where.
    """
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if type(key) is not str:
                raise MixPrecError(f"{path} has the key {key!r}; plain mappings have strings as keys.")
            check_plain(entry, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for place, entry in enumerate(value):
            check_plain(entry, f"{path}[{place}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise MixPrecError(
            f"{path} is a {type(value).__name__}, which a checkpoint could not keep; write plain numbers, strings, "
            "lists and mappings."
        )


def is_plain(value: object) -> bool:
    """True if a checkpoint can keep a value, as :func:`check_plain` says."""
    try:
        check_plain(value, "value")
    except MixPrecError:
        return False
    return True
