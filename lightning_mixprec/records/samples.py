"""The records of sampled steps: rows of ``UnderflowMonitor`` and ``FidelityMonitor``, and their ``latest``."""

from typing_extensions import Never, NotRequired, TypedDict

# Underflow


class WhatIf(TypedDict):
    """A layer's gradient and output in another format than its own."""

    underflow_rate: float
    overflow_rate: float
    best_scale: float
    fits: bool


class Losses(TypedDict):
    """Losses of a layer's gradient in its format; ``UnderflowMonitor`` explains each."""

    format: str
    underflow_rate: float
    subnormal_share: float
    headroom_bits: float
    flow_underflow_rate: float | None
    flow_subnormal_share: float | None
    flow_headroom_bits: float | None
    output_headroom_bits: float | None
    what_if: dict[str, WhatIf]


class Operands(TypedDict):
    """Of the operands of products in 8 bits, the share that rounds to zero after scaling; none where it is not cast."""

    format: str
    scaling: str
    input: NotRequired[float]
    weight: NotRequired[float]
    gradient: NotRequired[float]


class Stagnation(TypedDict):
    """The share of a layer's weights that an optimizer step did not change."""

    stagnation_rate: float | None


class KnownLosses(Losses, Stagnation):
    """The latest of a layer; ``operands`` if its products are in 8 bits."""

    operands: NotRequired[Operands]


class KnownStagnation(Stagnation):
    """The latest of a layer of which only the optimizer's step is known."""

    underflow_rate: NotRequired[Never]


class UnderflowRow(Losses):
    """A layer at a sampled step; ``threshold`` if it is not :data:`~lightning_mixprec.records.advice.MAX_UNDERFLOW`."""

    layer: str
    loss_scale: float
    threshold: NotRequired[float]
    operands: NotRequired[Operands]


class StagnationRow(Stagnation):
    """A layer after a sampled step.

    ``still_rate``, where weights are stored in 16 bits and it was the last of
    :data:`~lightning_mixprec.records.advice.STILL_SAMPLES` sampled steps: of those with a gradient at each, the share
    that has not moved.
    """

    layer: str
    still_rate: NotRequired[float]


class NotObservedRow(TypedDict):
    """The layers of which statistics of a sampled step lack something, and the reasons."""

    not_observed: dict[str, str]


# Fidelity


class Closeness(TypedDict):
    """A layer's distance from fp32: its output's SQNR and its gradient's cosine, as far as they were measured."""

    sqnr_db: float | None
    grad_cosine: float | None


class Fidelity(TypedDict):
    """The latest of a run: how far its loss and its layers are from fp32."""

    loss_gap: float
    layers: dict[str, Closeness]


class ClosenessRow(Closeness):
    """A layer at a sampled step."""

    layer: str


class LossRow(TypedDict):
    """The loss at a sampled step; ``min_cosine`` and ``max_loss_gap`` where other limits than the usual ones hold.

    ``is_noise`` if it is zero but for rounding.

    Of the layers whose turn it was, some were not compared: those that ``max_bytes`` left out (``too_large``), and
    those whose call could not be recorded or run again, each with the reason (``not_compared``). The own operations of
    others were left in the run's format where everything else computed in fp32 (``not_in_fp32``).
    """

    loss_gap: float
    loss_scale: float
    too_large: list[str]
    not_compared: NotRequired[dict[str, str]]
    not_in_fp32: NotRequired[list[str]]
    min_cosine: NotRequired[float]
    max_loss_gap: NotRequired[float]
    is_noise: NotRequired[bool]
