"""What a checkpoint keeps of the callbacks: shapes of plain values, written as types, and whether a value has one.

A record is a ``TypedDict``: it needs the keys that are read again, and may have more, so that checkpoints of earlier
and of later releases can be read.
"""

import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, NewType, Union, get_args, get_origin

from typing_extensions import Never, NotRequired, TypedDict, get_type_hints, is_typeddict

from lightning_mixprec.policy.controller import ControllerState

_LARGEST = 2**63
"""What counters and steps stay below; larger ones have no float."""

Count = NewType("Count", int)
"""How many, or the number of a step: from 0 on."""

Kind = Literal["promote", "demote", "scale", "restore"]
Shapes = Mapping[str, Any]
"""By attribute of a callback, the shape of what a checkpoint keeps of it."""


class Event(TypedDict):
    """A diagnosed overflow."""

    step: Count
    epoch: NotRequired[Count]
    batch_idx: NotRequired[Count]
    layer: str | None
    direction: Literal["forward", "backward"] | None
    verdict: Literal["precision", "scale", "data", "model"]
    op: str | None
    format: str | None
    value: float | None
    fits: str | None
    loss_scale: NotRequired[float]
    smaller_scale: NotRequired[float | None]
    detail: NotRequired[str]
    message: NotRequired[str]
    rank: NotRequired[Count]


class WhatIf(TypedDict):
    """What another format would do to a layer."""

    underflow_rate: float
    overflow_rate: float
    best_scale: float
    fits: bool


class Losses(TypedDict):
    """What a layer's format loses of its gradient."""

    format: str
    underflow_rate: float
    subnormal_share: float
    headroom_bits: float
    flow_underflow_rate: float | None
    flow_subnormal_share: float | None
    flow_headroom_bits: float | None
    output_headroom_bits: float | None
    stagnation_rate: float | None
    what_if: dict[str, WhatIf]


class Stagnation(TypedDict):
    """A layer of which only the optimizer's step is known."""

    stagnation_rate: float | None
    underflow_rate: NotRequired[Never]


class Closeness(TypedDict):
    """How far a layer is from fp32."""

    sqnr_db: float | None
    grad_cosine: float | None


class Fidelity(TypedDict):
    """How far a step is from fp32."""

    loss_gap: float
    layers: dict[str, Closeness]


class Came(TypedDict):
    """A phase that came."""

    phase: Count
    at: str
    step: Count
    epoch: NotRequired[Count]
    change: str


class Looks(TypedDict):
    """What a phase that waits for a plateau has seen."""

    best: float | None
    looks: Count


class Made(TypedDict):
    """A decision that was made."""

    step: Count
    kind: Kind
    moves: list[tuple[str, str, str]]
    scale: float | None
    restores: NotRequired[bool]
    reason: str
    evidence: NotRequired[dict[str, Any]]


class Pending(TypedDict):
    """A decision that is not carried out yet, whole."""

    kind: Kind
    moves: list[tuple[str, str, str]]
    promoted: dict[str, str]
    scale: float | None
    reason: str
    evidence: dict[str, Any]
    restores: NotRequired[bool]


class Steered(TypedDict):
    """What the controller of a run goes on from; ``copy`` holds tensors and is checked where they are taken over."""

    base: dict[str, Any]
    in_force: dict[str, Any] | None
    flops: dict[str, Count]
    controller: ControllerState
    pending: Pending | None
    copy: NotRequired[Any]


def has_shape(value: object, shape: Any) -> bool:
    """Whether a plain value is what a type says; numbers may be whole, and tuples may be lists.

    Args:
        value: Anything.
        shape: A plain type, a list, mapping or tuple of shapes, a union, a ``Literal``, a ``TypedDict``, or a dataclass
            for a mapping that has its fields.

    >>> has_shape([{"best": None, "looks": 2}], list[Looks]), has_shape([{"best": None, "looks": "2"}], list[Looks])
    (True, False)
    """
    kind, parts = get_origin(shape), get_args(shape)
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
    hints = get_type_hints(shape)
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
