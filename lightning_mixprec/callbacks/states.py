"""What a checkpoint keeps of the callbacks: shapes of plain values, written as types.

A record is a ``TypedDict``: it needs the keys that are read again, and may have more, so that checkpoints of earlier
and of later releases can be read.
"""

from typing import Any, Literal

from typing_extensions import Never, NotRequired, TypedDict

from lightning_mixprec.planning.controller_state import ControllerState
from lightning_mixprec.records.schema import Count

Kind = Literal["promote", "demote", "scale", "restore"]


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
