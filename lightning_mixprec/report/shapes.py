"""The shapes of the rows that a report is made from; a row of another shape is passed over."""

from typing import Annotated, Any, Literal

from typing_extensions import NotRequired, TypedDict

from lightning_mixprec.numerics.formats import FORMATS
from lightning_mixprec.records.schema import Count

Number = float | None
FormatName = Annotated[str, FORMATS.__contains__]
Described = tuple[str, str, int | None, str, FormatName, str, str]
"""A layer: name, type, number of own parameters, param, compute, output, rule."""


class Run(TypedDict):
    """What ``PrecisionReport`` tells when a run begins."""

    environment: dict[str, str]
    layers: list[Described]
    watched: NotRequired[list[str]]


class Curve(TypedDict):
    """Some batches in a row."""

    steps: list[Count]
    loss: list[Number]
    scale: list[Number]
    skipped: list[int | None]
    infinite: NotRequired[list[Count]]


Entry = TypedDict("Entry", {"step": Count, "layer": str, "from": str, "to": str, "reason": str})
"""An entry of the plugin's history."""


class Change(TypedDict):
    """A change of the policy."""

    layers: list[Described]
    history: list[Entry]


class Counted(TypedDict):
    """A histogram by binary exponent."""

    lowest: int
    counts: list[Count]
    zeros: Count


class Histograms(TypedDict):
    """Those of one layer."""

    gradient: Counted | None
    output: Counted | None


class Sample(TypedDict):
    """A sampled step; of a layer format, underflow, subnormals, headroom, the output's headroom, best scale in fp16."""

    layers: dict[str, tuple[str, Number, Number, Number, Number, Number]]
    histograms: dict[str, Histograms]
    loss_scale: float
    flops: NotRequired[dict[str, Count]]


class End(TypedDict):
    """How a run ended."""

    state: Literal["finished", "failed", "stopped"]
    message: str


class Overflow(TypedDict):
    """An event of ``OverflowMonitor``."""

    verdict: Literal["precision", "scale", "data", "model"]
    layer: str | None
    direction: str | None
    format: str | None
    fits: str | None
    message: str


class Underflow(TypedDict):
    """A layer at a sample of ``UnderflowMonitor``, or whether its weights moved."""

    layer: str
    format: NotRequired[str]
    underflow_rate: NotRequired[Number]
    headroom_bits: NotRequired[Number]
    output_headroom_bits: NotRequired[Number]
    stagnation_rate: NotRequired[Number]


class Fidelity(TypedDict):
    """A layer at a sample of ``FidelityMonitor``, or the loss."""

    layer: NotRequired[str]
    grad_cosine: NotRequired[Number]
    sqnr_db: NotRequired[Number]
    loss_gap: NotRequired[Number]


REPORT: dict[str, Any] = {"run": Run, "curve": Curve, "change": Change, "sample": Sample, "end": End}
"""The rows of ``PrecisionReport``, by the key that holds what they tell."""

MONITORS: dict[str, Any] = {"overflow": Overflow, "underflow": Underflow, "fidelity": Fidelity}
"""The rows of other monitors."""
