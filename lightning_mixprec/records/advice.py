"""Symptoms: one limit and one sentence for each, whoever tells of it.

A monitor warns, the report alerts and prints, ``diagnose`` answers in these words and at these limits. The controller
acts at limits of its own where telling costs a line and a move costs speed; they stand beside those at which is told.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lightning_mixprec.records.words import also, named, policy_hint, quoted, sentence


class Advice(NamedTuple):
    """A symptom in words; as a string, one line without a full stop.

    Attributes:
        seen: What was seen, with numbers.
        do: What to do; empty if there is nothing.
        joint: What stands between the two.
    """

    seen: str
    do: str = ""
    joint: str = "; "

    def __str__(self) -> str:
        """Both in one line."""
        return f"{self.seen}{self.joint}{self.do}" if self.do else self.seen


class Use(Protocol):
    """Facts about a format that advice depends on, as the table of formats has them."""

    @property
    def for_range(self) -> str | None:
        """The format to promote to where numbers are out of range."""

    @property
    def needs_scaling(self) -> bool:
        """True if gradients need a loss scale."""


_WIDE = ("fp32", "fp64")


# Gradients that do not point where fp32's do

MIN_COSINE = 0.99
"""The least cosine between a layer's gradient and fp32's. Healthy fp16 runs stay above: small models above 0.999, a
ResNet-18 begins at 0.992."""

MIN_COSINE_IF_COARSE = 0.9
"""The same where some layer computes in a coarser format than fp16. bf16 rounds 8 times as coarsely, and harmless
rounding takes from the cosine by the square of that: a healthy ResNet-18 begins at 0.95."""

MIN_COSINE_TO_ACT = 0.97
"""The least that the controller leaves alone, in fp16. A healthy ResNet-18 begins at 0.992, close to where is told; a
line costs nothing, a move costs speed."""


def min_cosine(*, is_coarse: bool) -> float:
    """The least cosine between a layer's gradient and fp32's that nobody is told of."""
    return MIN_COSINE_IF_COARSE if is_coarse else MIN_COSINE


def min_cosine_to_act(*, is_coarse: bool) -> float:
    """The least cosine between a layer's gradient and fp32's that the controller leaves alone."""
    return min(MIN_COSINE_TO_ACT, min_cosine(is_coarse=is_coarse))


def gradient(layer: str, cosine: float, limit: float, others: Sequence[str], noisy: "Advice | None") -> Advice:
    """A layer whose gradient is off.

    Args:
        layer: The layer.
        cosine: Between its gradient and fp32's.
        limit: The least that it may be.
        others: Layers of which the same is to be said.
        noisy: What is to be said of a layer whose output is noise, if there is one: the cause, most likely.
    """
    seen = (
        f"the gradient of layer {layer!r}{also(others)} no longer points where fp32's does "
        f"(cosine {cosine:.3f}, the limit is {limit:g})"
    )
    if noisy is not None:
        return Advice(seen, sentence(str(noisy)).removesuffix("."), ". ")
    do = "If its SQNR is low compute it in fp32, else the layers between it and the loss"
    return Advice(seen, f"{do}; {policy_hint(layer, 'fp32')}", ". ")


# Outputs that are noise

NOISE_DB = 10.0
"""Below this signal-to-quantization-noise ratio an output has hardly a digit of fp32's."""


def noise(layer: str, decibels: float, format: str, use: Use, others: Sequence[str] = ()) -> Advice:
    """A layer whose output is noise.

    Args:
        layer: The layer.
        decibels: Signal-to-quantization-noise ratio of its output against fp32.
        format: What it computes in.
        use: What that is promoted to.
        others: Layers of which the same is to be said.
    """
    wider = "" if use.for_range in (None, *_WIDE) else f", or in {use.for_range} if {format}'s range is too small"
    seen = f"the output of {quoted(layer)}{also(others)} is noise (SQNR {decibels:.1f} dB)"
    return Advice(seen, f"compute that in fp32{wider}; {policy_hint(layer, 'fp32')}", ": ")


def causes(noisy: Sequence[str]) -> list[str]:
    """The layers among those whose outputs are noise that hold none of the others: a container's is that of its parts.

    >>> causes(["model.1", "model", "model.10"])
    ['model.1', 'model.10']
    """
    return [layer for layer in noisy if not any(other.startswith(f"{layer}.") for other in noisy)]


# Losses that are not fp32's

MAX_LOSS_GAP = 0.05
"""The largest ``|L_low - L_fp32| / |L_fp32|`` that nobody is told of; healthy runs stay below 0.02."""

MAX_LOSS_GAP_TO_ACT = 0.5
"""The largest that the controller leaves alone. Gradients decide: where they agree the run learns as in fp32, even if
the loss that it prints is off by percents, as one that has come down to next to nothing is in bf16."""


def loss_gap(gap: float) -> Advice:
    """A loss that is off."""
    seen = f"the loss differs from fp32's by {gap:.1%} (healthy is below 2 %)"
    return Advice(seen, "compute the loss in fp32 (layers: '', recurse: false) and see which layers have a low SQNR")


# Gradients that vanish

MAX_UNDERFLOW = 0.1
"""The largest share of a layer's gradient that may round to zero without a word."""

STARVED = 0.5
"""The share of its gradient without which a layer does not learn: the report calls more than that an error, the
controller feeds the layer first, and a loss scale that costs it is no remedy for an overflow."""


def largest_scale(losses: Iterable[Mapping[str, Any]]) -> float:
    """The largest loss scale at which no layer overflows; formats that need one are among their own ``what_if``."""
    scaled = [each["what_if"][each["format"]] for each in losses if each["format"] in each["what_if"]]
    return min((same["best_scale"] for same in scaled), default=math.inf)


def underflow(
    layer: str, losses: Mapping[str, Any], scale: float, others: Sequence[str], use: Use, largest: float
) -> Advice:
    """A layer whose gradient vanishes.

    Args:
        layer: The layer.
        losses: ``format``, ``underflow_rate`` and ``what_if`` of it, as in
            :class:`~lightning_mixprec.records.samples.Losses`.
        scale: The loss scale.
        others: Layers of which the same is to be said.
        use: What its format is promoted to.
        largest: The largest loss scale at which no layer overflows.
    """
    format, rate = losses["format"], losses["underflow_rate"]
    share = f"{rate:.0%} of the gradient of layer {layer!r}{also(others)}"
    seen = f"{share} vanish in {format} at a loss scale of {scale:.8g}"
    same, other = losses["what_if"].get(format), losses["what_if"].get(use.for_range)
    best = same["best_scale"] if use.needs_scaling and same is not None and same["fits"] else None
    if best is not None and min(best, largest) > scale:
        kept = "it" if best <= largest else "more of it"
        keeping = f"a loss scale of {min(best, largest):.8g} would keep {kept}"
        return Advice(seen, f"{keeping}: raise init_scale, or compute it in {use.for_range}")
    wider = use.for_range if use.for_range is not None and other and other["underflow_rate"] < rate else "fp32"
    return Advice(seen, f"compute it in {wider}, {policy_hint(layer, wider)}")


def worst_operand(operands: Mapping[str, Any]) -> tuple[float, str]:
    """The largest rate of a layer's operands, as in :class:`~lightning_mixprec.records.samples.Operands`, and whose.

    >>> worst_operand({"format": "fp8", "scaling": "row", "input": 0.25, "weight": 0.5})
    (0.5, 'weight')
    """
    return max((rate, name) for name, rate in operands.items() if name not in ("format", "scaling"))


def narrow_operand(layer: str, operands: Mapping[str, Any], others: Sequence[str]) -> Advice:
    """A layer of whose products in 8 bits an operand vanishes.

    Args:
        layer: The layer.
        operands: The rates of its operands, as in :class:`~lightning_mixprec.records.samples.Operands`.
        others: Layers of which the same is to be said.
    """
    rate, worst = worst_operand(operands)
    is_by_row = operands["scaling"] == "row"
    of = "the largest of each row" if is_by_row else "its largest"
    seen = f"{rate:.0%} of the {worst} of layer {layer!r}{also(others)} vanish in {operands['format']}, scaled by {of}"
    by_row = "" if is_by_row else "scale it by row (scaling: row), or "
    return Advice(seen, f"{by_row}compute it in bf16, {policy_hint(layer, 'bf16')}")


# Values out of range

MIN_HEADROOM_BITS = 1.0
"""The least number of bits by which values may grow before they overflow."""


def headroom(layer: str, bits: float, format: str, use: Use) -> Advice:
    """A layer with values that overflow its format, or nearly do."""
    wider = "fp32" if use.for_range in (None, *_WIDE) else f"{use.for_range}, which has more range"
    if bits < 0:
        seen = f"{named(layer)} has values that are {2**-bits:.3g} times too large for {format}"
        return Advice(seen, f"compute it in {wider}")
    seen = f"{named(layer)} has values that overflow {format} if they grow {2**bits:.1f} times"
    return Advice(seen, f"watch it, or compute it in {wider}")


def overflow(cause: Mapping[str, Any], *, is_search: bool = True) -> Advice:
    """A step that failed.

    Args:
        cause: Why, as :class:`~lightning_mixprec.records.events.Cause` has it.
        is_search: Whether the run searches for its loss scale.
    """
    verdict, layer, detail = cause["verdict"], cause["layer"], cause.get("detail", "")
    if verdict == "data":
        return Advice(f"the batch itself is not finite ({detail})", "clean the data: no format helps")
    if verdict == "scale":
        scale, smaller = cause["loss_scale"], cause["smaller_scale"]
        seen = f"the gradients overflow at a loss scale of {scale:g} and fit at {smaller:g}"
        search = "the search for the scale, which accuses no layer"
        return Advice(seen, search if is_search else "lower the loss scale, which is fixed", ": ")
    where = f"the {cause['direction']} of {named(layer)} ({cause['op']})"
    if verdict == "model":
        seen = f"{where} is not finite in fp32 either{f' ({detail})' if detail else ''}: not a matter of precision"
        return Advice(seen, "look for a division by zero, a log of zero or weights that diverged; no format helps")
    value, fits, raised = cause["value"], cause["fits"], cause.get("raised")
    if cause["op"] is None:
        seen = f"the step raises {raised} in {named(layer)}, in {cause['format']} and not in fp32"
    else:
        seen = f"{where} overflows in {cause['format']}{'' if value is None else f', where fp32 has {value:.3g}'}"
        seen += f", and the step raises {raised}" if raised else ""
    which = repr(layer) if layer else "the LightningModule's own operations (layers: '', recurse: false)"
    do = f"compute {which}, and where it goes, in {fits or 'fp32'}"
    return Advice(seen, f"{fits} holds it: {do}" if fits else do)


# Weights that do not move

MAX_STAGNATION = 0.5
"""The largest share of a layer's weights with a gradient that an optimizer step may leave as they were."""


def stagnation(layer: str, rate: float) -> Advice:
    """A layer whose weights do not move."""
    seen = f"an optimizer step left {rate:.0%} of the weights of {quoted(layer)} as they were"
    return Advice(
        seen, "its updates are smaller than the weights' last bit: store them in fp32, or raise the learning rate"
    )


STILL_SAMPLES = 3
"""At how many sampled steps in a row a weight in 16 bits has to have a gradient, and not to move, to count as still."""


def still(layer: str, rate: float, others: Sequence[str] = ()) -> Advice:
    """A layer whose weights are stored in 16 bits and have not moved for several sampled steps.

    Args:
        layer: The layer.
        rate: Of its weights that had a gradient at each of them, the share that did not move.
        others: Layers of which the same is to be said.
    """
    seen = (
        f"{rate:.0%} of the weights of layer {quoted(layer)}{also(others)} have not moved for {STILL_SAMPLES} sampled "
        "steps although their gradient is not zero"
    )
    return Advice(
        seen,
        "16 bits cannot hold their updates: store it in fp32, or train it with lightning_mixprec.optim.AdamW or SGD, "
        "which keep what is lost (weights='exact')",
    )
