"""The records of ``PrecisionReport``: how a run began, its batches, changes of its policy, samples, its end."""

from typing import Literal, NamedTuple

from typing_extensions import NotRequired, TypedDict

from lightning_mixprec.records.changes import MoveInShort
from lightning_mixprec.records.schema import Count


class DescribedLayer(NamedTuple):
    """A layer: the number of its own parameters (None if not known), its formats, and the rule that decided.

    ``output`` is empty for as computed.
    """

    name: str
    type_name: str
    parameters: int | None
    param: str
    compute: str
    output: str
    rule: str


class Run(TypedDict):
    """A run that begins, or goes on from a checkpoint.

    Keys:
        environment: On what it computes, and by which versions.
        layers: The layers, in the model's order.
        watched: The callbacks of this package, by class.
        counts_skipped: Whether skipped steps are among those that the run counts, as under Lightning's own plugins.
    """

    environment: dict[str, str]
    layers: list[DescribedLayer]
    watched: NotRequired[list[str]]
    counts_skipped: NotRequired[bool]


class Curve(TypedDict):
    """Some batches in a row, in columns of one length; ``infinite`` are places of losses that were not finite."""

    steps: list[Count]
    loss: list[float | None]
    scale: list[float | None]
    skipped: list[int | None]
    infinite: NotRequired[list[Count]]


class Change(TypedDict):
    """A change of the policy: the layers that differ, and what is new in the history."""

    layers: list[DescribedLayer]
    history: list[MoveInShort]


class CountedExponents(TypedDict):
    """A histogram by binary exponent, from the lowest that occurs."""

    lowest: int
    counts: list[Count]
    zeros: Count


class Histograms(TypedDict):
    """Those of one layer."""

    gradient: CountedExponents | None
    output: CountedExponents | None


class SampledLayer(NamedTuple):
    """A layer at a sample; ``best_scale`` is the loss scale that would suit it best in fp16."""

    format: str
    underflow_rate: float | None
    subnormal_share: float | None
    headroom_bits: float | None
    output_headroom_bits: float | None
    best_scale: float | None


class Sample(TypedDict):
    """A sampled step; ``flops`` by layer of its own matrix products, once."""

    layers: dict[str, SampledLayer]
    histograms: dict[str, Histograms]
    loss_scale: float
    flops: NotRequired[dict[str, Count]]


State = Literal["finished", "failed", "stopped"]


class End(TypedDict):
    """The end of a run; the message is that of an exception."""

    state: State
    message: str
