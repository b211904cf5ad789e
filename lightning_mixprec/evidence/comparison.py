"""A sampled step, studied: replayed in fp32 and, where asked for, in the run's own formats. Shared by all monitors."""

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mixprec import ranks
from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.evidence.instruments.flops import FlopCount
from lightning_mixprec.evidence.instruments.probe import (
    CallRecorder,
    LayerCall,
    Observer,
    agreement,
    layers_of,
    own_parameters,
    shadow,
    weight_gradients,
)
from lightning_mixprec.evidence.replay import Replayed, StepReplay, halved, is_out_of_memory
from lightning_mixprec.evidence.run_formats import RunFormats
from lightning_mixprec.numerics.exponents import BINS, Histogram
from lightning_mixprec.numerics.similarity import cosine_of, decibels

_NO_LOSS = -1.0
_LEAST_SCALE = 2.0**-149


@dataclass(frozen=True)
class Wanted:
    """What monitors want of a sampled step.

    Attributes:
        statistics: Histograms of outputs, gradients and weight gradients in fp32.
        agreement: Losses and weight gradients in the run's formats against fp32.
        layers: The layers whose output is compared with fp32, as far as ``max_bytes`` reach.
        max_elements: How many elements of a tensor statistics look at; None for all.
        max_bytes: Memory for the inputs and outputs of ``layers``.
        flops: The arithmetic of each layer's own matrix products. Counting takes as long as the step where steps are
            short.
    """

    statistics: bool = False
    agreement: bool = False
    layers: tuple[str, ...] = ()
    max_elements: int | None = None
    max_bytes: int = 0
    flops: bool = False

    def __or__(self, other: "Wanted") -> "Wanted":
        """What either wants."""
        unbounded = None in [each.max_elements for each in (self, other) if each.statistics]
        return Wanted(
            self.statistics or other.statistics,
            self.agreement or other.agreement,
            tuple(dict.fromkeys(self.layers + other.layers)),
            None if unbounded else max(self.max_elements or 0, other.max_elements or 0),
            max(self.max_bytes, other.max_bytes),
            self.flops or other.flops,
        )


@dataclass
class Findings:
    """What a study found, on the host, over all ranks.

    Attributes:
        place: Which step this is about: ``step`` (optimizer steps taken before), ``epoch``, ``batch_idx``.
        layers: The names of all layers, in the model's order.
        scale: The loss scale during the step; one that stock Lightning has halved to 0 counts as fp32's least number.
        outputs: In fp32, statistics of what each layer computed.
        gradients: In fp32, unscaled, statistics of the gradients that arrived at each layer's output.
        weights: In fp32, unscaled, statistics of the gradients of each layer's own weights.
        loss_gap: Largest ``|L_low - L_fp32| / |L_fp32|`` of the step's losses; NaN without a loss that goes backward
            through Lightning; None if that was not asked for.
        cosines: By layer with weights, the cosine between their gradients in the run's formats and in fp32; NaN if one
            of them is not finite.
        sqnr_db: By layer, of those that were compared.
        flops: By layer what its own matrix products take in forward, of the batch of this rank.
        too_large: Layers whose input and output would not have fitted.
        problem: What went wrong, if something did, on this rank; if its batch was left out, on the first such rank.
        is_complete: Whether the batches of all ranks, or half of them, were studied.
        is_any: Whether that of some rank was.
    """

    place: dict[str, int]
    layers: list[str]
    scale: float = 1.0
    outputs: dict[str, Histogram] = field(default_factory=dict)
    gradients: dict[str, Histogram] = field(default_factory=dict)
    weights: dict[str, Histogram] = field(default_factory=dict)
    loss_gap: float | None = None
    cosines: dict[str, float] = field(default_factory=dict)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    too_large: list[str] = field(default_factory=list)
    problem: str | None = None
    is_complete: bool = False
    is_any: bool = False


class Study:
    """A sampled step, replayed as soon as this is made; its findings arrive in the background.

    Costs a copy of the weights, a forward and backward in fp32, and for agreement another one in the run's formats with
    a second set of gradients. If that does not fit into memory it is tried once more on half of the batch.

    Args:
        module: The LightningModule in training, just before the step.
        formats: The formats of the run.
        batch: The batch, on the device.
        place: Which step it is: step, epoch and batch_idx.
        wanted: What to find out.
    """

    def __init__(
        self, module: pl.LightningModule, formats: RunFormats, batch: Any, place: dict[str, int], wanted: Wanted
    ) -> None:
        self.batch_idx, self.wanted = place["batch_idx"], wanted
        self._layers = layers_of(module)
        self._owned = own_parameters(module, self._layers)
        self._findings = Findings(place, list(self._layers))
        self._device = module.device
        self._replay = StepReplay(module, formats, self._device)
        self._sums, self._maxima = self._studied(batch)
        ranks.add_up([self._sums])
        ranks.take_largest([self._maxima])
        scale = formats.scale
        scale = scale.detach().double() if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64)
        self._transfer: Transfer | None = Transfer([self._sums, self._maxima, scale])

    def findings(self) -> Findings:
        """What was found. Waits until it has arrived."""
        if self._transfer is not None:
            sums, maxima, scale = self._transfer.get()
            self._transfer = None
            self._findings.scale = max(scale.item(), _LEAST_SCALE)
            self._read(sums, maxima)
        return self._findings

    def _tell_all(self, found: Findings) -> None:
        """Tells all ranks why the batch of one was left out: the first rank alone speaks and writes."""
        rank, problem = ranks.first_found(None if found.is_complete else found.problem)
        found.is_complete = False
        found.problem = f"{problem}, on rank {rank}" if ranks.are_many() else problem

    def _read(self, sums: Tensor, maxima: Tensor) -> None:
        wanted, found, layers = self.wanted, self._findings, self._findings.layers
        tables, parts, energies, ranks_studied = sums.split(self._sizes())
        found.is_any = bool(ranks_studied > 0)
        if ranks_studied < ranks.count():
            self._tell_all(found)
        if wanted.statistics:
            shape = (3, len(layers))
            rows = Histogram.from_tensors(tables.view(*shape, -1), maxima[:-1].view(*shape))
            for kind, name in enumerate(("outputs", "gradients", "weights")):
                of_kind = rows.select(kind)
                seen = of_kind.elements.nonzero().flatten().tolist()
                setattr(found, name, {layers[row]: of_kind.select(row) for row in seen})
        if wanted.agreement:
            gap = maxima[-1].item()
            found.loss_gap = math.nan if gap == _NO_LOSS else gap
            cosines = cosine_of(parts.view(-1, 3)).tolist()
            has_gradient = (parts.view(-1, 3)[:, 2] != 0).tolist()
            found.cosines = {
                layer: cosine for layer, cosine, has in zip(layers, cosines, has_gradient, strict=True) if has
            }
        signal, noise = energies.view(-1, 2).unbind(-1)
        was_compared = ((signal != 0) | (noise != 0)).tolist()
        ratios = decibels(signal, noise).tolist()
        for layer, ratio, was in zip(wanted.layers, ratios, was_compared, strict=True):
            if was:
                found.sqnr_db[layer] = ratio

    def _sizes(self) -> list[int]:
        layers = len(self._layers)
        tables = 3 * layers * (BINS + 6) if self.wanted.statistics else 0
        return [tables, 3 * layers, 2 * len(self.wanted.layers), 1]

    def _studied(self, batch: Any) -> tuple[Tensor, Tensor]:
        for is_halved in (False, True):
            try:
                sums, maxima = self._measured(halved(batch) if is_halved else batch)
                self._findings.is_complete = True
                return sums, maxima
            except Exception as error:  # a monitor ends no run
                self._findings.problem = f"{type(error).__name__}: {error}".splitlines()[0]
                if self._replay.is_shared or not is_out_of_memory(error):
                    break
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        maxima = torch.zeros(3 * len(self._layers) if self.wanted.statistics else 0)
        return self._joined([torch.zeros(sum(self._sizes()))]), self._joined([maxima, torch.tensor(_NO_LOSS)])

    def _measured(self, batch: Any) -> tuple[Tensor, Tensor]:
        low, calls = self._in_run_formats(batch)
        observer = Observer(self._layers, self.wanted.max_elements) if self.wanted.statistics else None
        with self._replay.opened(reference=True) as stand_ins:
            energies = [shadow(calls.pop(name)) if name in calls else torch.zeros(2) for name in self.wanted.layers]
            count = FlopCount(self._layers) if self.wanted.flops else None
            with observer or contextlib.nullcontext(), count or contextlib.nullcontext():
                reference = self._replay.run(stand_ins, batch, self.batch_idx)
        self._findings.flops = count.flops if count is not None else {}
        sums = [agreement(self._owned, low.gradients, reference.gradients), *energies, torch.ones(1)]
        maxima = [_largest_gap(low.losses, reference.losses)]
        if observer is not None:
            weights = weight_gradients(self._owned, reference.gradients, self.wanted.max_elements)
            tables = [each.tensors() for each in (observer.outputs(), observer.gradients(), weights)]
            sums = [*(table for table, _ in tables), *sums]
            maxima = [*(largest for _, largest in tables), *maxima]
        return self._joined(sums), self._joined(maxima)

    def _in_run_formats(self, batch: Any) -> tuple[Replayed, dict[str, LayerCall]]:
        if not (self.wanted.agreement or self.wanted.layers):
            return Replayed(), {}
        chosen = {name: self._layers[name] for name in self.wanted.layers}
        recorder = CallRecorder(chosen, self._device, self.wanted.max_bytes)
        with self._replay.opened() as stand_ins, recorder:
            low = self._replay.run(stand_ins, batch, self.batch_idx, scale=self._replay.formats.scale)
        self._findings.too_large = recorder.too_large
        return low, recorder.calls

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        flat = [tensor.detach().to(self._device, torch.float64, non_blocking=True).reshape(-1) for tensor in tensors]
        return torch.cat(flat)


def _largest_gap(low: list[Tensor], reference: list[Tensor]) -> Tensor:
    gaps = [(a.double() - b.double()).abs() / b.double().abs() for a, b in zip(low, reference, strict=False)]
    # Neither differs if both are 0; a loss that is not finite differs by infinity.
    both_zero = [(a == 0) & (b == 0) for a, b in zip(low, reference, strict=False)]
    known = [gap.masked_fill(is_zero, 0.0) for gap, is_zero in zip(gaps, both_zero, strict=True)]
    return torch.stack(known).nan_to_num(nan=math.inf).amax() if known else torch.tensor(_NO_LOSS)
