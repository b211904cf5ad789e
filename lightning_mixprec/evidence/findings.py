"""Findings about a batch: measured by each rank, read on the host; and what they say of a layer in its format."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_mixprec import ranks
from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.evidence.instruments.noise import NO_LOSS
from lightning_mixprec.evidence.instruments.operands import OPERANDS
from lightning_mixprec.evidence.instruments.own_dtypes import OwnDtypes
from lightning_mixprec.numerics.exponents import BINS, Histogram
from lightning_mixprec.numerics.flat_batches import moved_to
from lightning_mixprec.numerics.formats import format_of, get_format, is_wider, low_precision_formats
from lightning_mixprec.numerics.rates import best_scale, fits, headroom, overflow_rate, subnormal_share, underflow_rate
from lightning_mixprec.numerics.similarity import cosine_of, decibels
from lightning_mixprec.planning.agreement import Agreement, LayerAgreement
from lightning_mixprec.records.advice import MIN_HEADROOM_BITS
from lightning_mixprec.records.samples import Losses, WhatIf

SHORT = ("underflow_rate", "subnormal_share", "headroom_bits", "output_headroom_bits")
"""The keys of :func:`describe` that a decision and the report show of a layer."""


_LEAST_SCALE = 2.0**-149


@dataclass
class Measured:
    """Numbers of a comparison: of one rank, on its device, or of all ranks, on the host. All in fp64.

    Attributes:
        tables: Counts of outputs, gradients and weight gradients: [3, layers, columns]; [0] if not wanted. Added up.
        dots: Of each layer's weight gradients: [layers, 3] of (low x fp32, low x low, fp32 x fp32). Added up.
        energies: Of the outputs of compared layers and of their errors: [compared, 2]. Added up.
        operands: Of 8-bit products, what rounds to zero, of how many: [layers, 3, 2]; [0] if not wanted. Added up.
        ranks: On how many ranks this was measured. Added up.
        amax: Largest values to ``tables``: [3, layers]; [0] if not wanted. The largest counts.
        gap: The loss gap, ``NO_LOSS`` without a loss. The largest counts.
        weighed_gap: The same, as a part of no less than what the loss is made of. The largest counts.
        is_bad: 1 if a loss or a gradient in low precision is not finite, or it could not be run. The largest counts.
        has_loss: 1 if a loss went backward through Lightning, which scales it. The largest counts.
    """

    tables: Tensor
    dots: Tensor
    energies: Tensor
    operands: Tensor
    ranks: Tensor
    amax: Tensor
    gap: Tensor
    weighed_gap: Tensor
    is_bad: Tensor
    has_loss: Tensor

    @property
    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parts that are added up over ranks, and those of which the largest counts."""
        added = [self.tables, self.dots, self.energies, self.operands, self.ranks]
        return added, [self.amax, self.gap, self.weighed_gap, self.is_bad, self.has_loss]

    @classmethod
    def nothing(cls, layers: int, compared: int = 0, *, statistics: bool = False) -> "Measured":
        """The numbers of a rank that measured nothing."""
        return cls(
            tables=torch.zeros(3, layers, BINS + 6) if statistics else torch.zeros(0),
            dots=torch.zeros(layers, 3),
            energies=torch.zeros(compared, 2),
            operands=torch.zeros(layers, len(OPERANDS), 2) if statistics else torch.zeros(0),
            ranks=torch.zeros(()),
            amax=torch.zeros(3, layers) if statistics else torch.zeros(0),
            gap=torch.tensor(NO_LOSS),
            weighed_gap=torch.tensor(NO_LOSS),
            is_bad=torch.zeros(()),
            has_loss=torch.zeros(()),
        )

    def agreement(self, layers: Sequence[str], scale: float) -> Agreement:
        """Reads what arrived on the host.

        Args:
            layers: The names of the layers.
            scale: The loss scale of the step.
        """
        gap, weighed = (math.nan if each == NO_LOSS else each.item() for each in (self.gap, self.weighed_gap))
        cosines = cosine_of(self.dots).tolist()
        norms = self.dots[:, 1:].sqrt() / torch.tensor([scale, 1.0], dtype=self.dots.dtype)
        largest, in_fp32 = norms.amax(0).tolist() if len(norms) else (0.0, 0.0)
        by_layer = {
            name: LayerAgreement(cosine, low / reference, low / largest if largest else 0.0, reference / in_fp32)
            for name, cosine, (low, reference) in zip(layers, cosines, norms.tolist(), strict=True)
            if reference
        }
        return Agreement(not self.is_bad.item(), gap, by_layer, weighed)


class Gathered:
    """Numbers of all ranks, on their way to the host. All ranks make this together.

    Args:
        measured: This rank's.
        device: Where ranks put them together.
        scale: The loss scale; it may be on the device.
    """

    def __init__(self, measured: Measured, device: torch.device, scale: float | Tensor) -> None:
        self._shapes = [[each.shape for each in group] for group in measured.parts]
        added, largest = (
            torch.cat([moved_to(device, each.detach(), torch.float64).reshape(-1) for each in group])
            for group in measured.parts
        )
        ranks.add_up([added])
        ranks.take_largest([largest])
        scale = scale.detach().double() if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64)
        self._transfer = Transfer([added, largest, scale])

    def read(self) -> tuple[Measured, float]:
        """The numbers of all ranks, and the loss scale as their gradients have it. Waits until they have arrived.

        It is 1 where no rank's loss went backward through Lightning. One that stock Lightning has halved to 0 counts as
        fp32's least number.
        """
        *flat, scale = self._transfer.get()
        groups = [
            [part.view(shape) for part, shape in zip(each.split([s.numel() for s in shapes]), shapes, strict=True)]
            for each, shapes in zip(flat, self._shapes, strict=True)
        ]
        measured = Measured(*[*groups[0], *groups[1]])
        is_scaled = bool(measured.has_loss) or not measured.ranks
        return measured, max(scale.item(), _LEAST_SCALE) if is_scaled else 1.0


@dataclass
class Findings:
    """Answers to what was wanted of a batch.

    Attributes:
        layers: The names of all layers, in the model's order.
        place: Which step this is about: ``step`` (optimizer steps taken before), ``epoch``, ``batch_idx``.
        scale: The loss scale during the step.
        outputs: In fp32, statistics of what each layer computed.
        gradients: In fp32, unscaled, statistics of the gradients that arrived at each layer's output.
        weights: In fp32, unscaled, statistics of the gradients of each layer's own weights.
        operands: By layer and operand of its products in 8 bits, the share that rounds to zero after scaling.
        agreement: How the step agrees with fp32; None if that was not wanted.
        noise: The layers that were left out of it, because their gradient is rounding noise in fp32, too.
        own: The dtypes that layers' own numbers have in the run's formats, as far as they are known.
        sqnr_db: By layer, of those that were compared.
        flops: By layer what its own matrix products take in forward, of the batch of this rank.
        too_large: Layers whose input and output would not have fitted.
        not_compared: By layer the reason that its output could not be compared on this rank.
        not_in_fp32: The layers whose own operations were left in the run's format, as they fail in fp32.
        not_observed: By layer the reason that statistics of this rank lack something of it.
        problem: What went wrong, if something did, on this rank; if its batch was left out, on the first such rank.
        is_complete: Whether the batches of all ranks, or half of them, were looked at.
        is_any: Whether that of some rank was.
        losses: What :func:`describe` has told of layers in formats.
    """

    layers: list[str]
    place: dict[str, int] = field(default_factory=dict)
    scale: float = 1.0
    outputs: dict[str, Histogram] = field(default_factory=dict)
    gradients: dict[str, Histogram] = field(default_factory=dict)
    weights: dict[str, Histogram] = field(default_factory=dict)
    operands: dict[str, dict[str, float]] = field(default_factory=dict)
    agreement: Agreement | None = None
    noise: list[str] = field(default_factory=list)
    own: OwnDtypes = field(default_factory=OwnDtypes)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    too_large: list[str] = field(default_factory=list)
    not_compared: dict[str, str] = field(default_factory=dict)
    not_in_fp32: list[str] = field(default_factory=list)
    not_observed: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    is_complete: bool = False
    is_any: bool = False
    losses: dict[tuple[str, str], Losses] = field(default_factory=dict)

    def read(self, measured: Measured, scale: float, compared: Sequence[str] = (), *, agreement: bool = False) -> None:
        """Takes over the numbers of all ranks.

        Args:
            measured: The numbers.
            scale: The loss scale.
            compared: The layers that the energies are of.
            agreement: Whether losses and gradients were compared.
        """
        self.scale, self.is_any = scale, bool(measured.ranks > 0)
        if measured.tables.numel():
            rows = Histogram.from_tensors(measured.tables, measured.amax)
            for kind, statistics in enumerate((self.outputs, self.gradients, self.weights)):
                of_kind = rows.select(kind)
                seen = of_kind.elements.nonzero().flatten().tolist()
                statistics.update({self.layers[row]: of_kind.select(row) for row in seen})
            self._read_operands(measured)
        if agreement:
            self.agreement = measured.agreement(self.layers, scale)
        signal, noise = measured.energies.unbind(-1)
        was_compared = ((signal != 0) | (noise != 0)).tolist()
        ratios = zip(compared, decibels(signal, noise).tolist(), was_compared, strict=True)
        self.sqnr_db = {layer: ratio for layer, ratio, was in ratios if was}

    def _read_operands(self, measured: Measured) -> None:
        for layer, counts in zip(self.layers, measured.operands.tolist(), strict=True):
            rates = {each: lost / of for each, (lost, of) in zip(OPERANDS, counts, strict=True) if of}
            if rates:
                self.operands[layer] = rates


def describe(layer: str, found: Findings, format: str) -> Losses:
    """Rates and headroom of a layer that computes in a format, of each number in the wider one that it may have."""
    losses, output = _losses_of(layer, found, format), found.outputs.get(layer)
    if not losses["what_if"]:
        numbers = [each[layer] for each in (found.weights, found.gradients) if layer in each]
        losses["what_if"] = {
            name: _what_if(name, numbers, output, found.scale)
            for name in low_precision_formats()
            if name != losses["format"] or get_format(name).use.needs_scaling
        }
    return losses


def is_at_stake(layer: str, found: Findings, format: str) -> bool:
    """True if something of a layer's numbers is lost, or nearly out of range."""
    losses = _losses_of(layer, found, format)
    rates = losses["underflow_rate"], losses["flow_underflow_rate"]
    bits = losses["headroom_bits"], losses["flow_headroom_bits"], losses["output_headroom_bits"]
    return any(map(bool, rates)) or any(each is not None and each < MIN_HEADROOM_BITS for each in bits)


def _losses_of(layer: str, found: Findings, format: str) -> Losses:
    """What :func:`describe` tells, without other formats; found out once, as several monitors ask."""
    if (layer, format) in found.losses:
        return found.losses[layer, format]
    flow = found.gradients.get(layer)
    own = found.weights.get(layer, flow)
    output = found.outputs.get(layer)
    assert own is not None
    format_of_output = _own_format(format, found.own.of_output(layer))
    format_of_own = _own_format(format, found.own.weights.get(layer)) if layer in found.weights else format_of_output
    lost, subnormal, bits = _losses(own, format_of_own, found.scale)
    flow_lost, flow_subnormal, flow_bits = (None,) * 3 if flow is None else _losses(flow, format_of_output, found.scale)
    losses: Losses = {
        "format": format_of_own,
        "underflow_rate": lost,
        "subnormal_share": subnormal,
        "headroom_bits": bits,
        "flow_underflow_rate": flow_lost,
        "flow_subnormal_share": flow_subnormal,
        "flow_headroom_bits": flow_bits,
        "output_headroom_bits": None if output is None else headroom(output, format_of_output),
        "what_if": {},
    }
    return found.losses.setdefault((layer, format), losses)


def _own_format(format: str, dtype: torch.dtype | None) -> str:
    own = None if dtype is None else format_of(dtype)
    return own if own is not None and is_wider(own, format) else format


def _losses(gradient: Histogram, format: str, scale: float) -> tuple[float, float, float]:
    """Underflow rate, subnormal share and headroom."""
    return (
        underflow_rate(gradient, format, scale, direction="backward").middle,
        subnormal_share(gradient, format, scale, direction="backward").middle,
        headroom(gradient, format, scale, direction="backward"),
    )


def _what_if(format: str, gradients: Sequence[Histogram], output: Histogram | None, scale: float) -> WhatIf:
    use = get_format(format).use
    scale = scale if use.needs_scaling or use.scales_itself else 1.0
    outputs = 0.0 if output is None else overflow_rate(output, format).middle
    overflows = [overflow_rate(each, format, scale, direction="backward").middle for each in gradients]
    return {
        "underflow_rate": underflow_rate(gradients[0], format, scale, direction="backward").middle,
        "overflow_rate": max(outputs, *overflows),
        "best_scale": min(best_scale(each, format, direction="backward") for each in gradients),
        "fits": outputs == 0 and all(fits(each, format, direction="backward") for each in gradients),
    }
