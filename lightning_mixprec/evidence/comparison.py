"""One comparer: the step of one batch in fp32, run once, and other formats and loss scales compared with it.

What is asked of a batch is asked of one fp32 replay: statistics and flops are taken while it runs, gradients and losses
are kept for every comparison that follows. Numbers stay on the device until all ranks have added theirs.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_mixprec.engine.lent_shards import gathered
from lightning_mixprec.engine.sharding import held_by_earlier_rank
from lightning_mixprec.errors import TraceLeftError
from lightning_mixprec.evidence.findings import Gathered, Measured
from lightning_mixprec.evidence.half_only import in_fp32
from lightning_mixprec.evidence.instruments.flops import FlopCount
from lightning_mixprec.evidence.instruments.noise import loss_gap, round_otherwise, size_of_terms
from lightning_mixprec.evidence.instruments.operands import OperandObserver
from lightning_mixprec.evidence.instruments.own_dtypes import DtypeRecorder, OwnDtypes
from lightning_mixprec.evidence.instruments.probe import (
    CallRecorder,
    LayerCall,
    computed_again,
    gradient_dots,
    layers_of,
    leaving_out,
    own_parameters,
    weight_gradients,
)
from lightning_mixprec.evidence.instruments.sandbox import Sandbox
from lightning_mixprec.evidence.replay import Replayed, StepReplay
from lightning_mixprec.evidence.run_formats import Formats
from lightning_mixprec.evidence.step_window import KeptBatch
from lightning_mixprec.numerics.finite import all_finite
from lightning_mixprec.numerics.formats import is_scaling_needed
from lightning_mixprec.planning.agreement import Agreement

MAX_ELEMENTS = 16384
"""Elements of a tensor that statistics look at, unless a user says how many."""

MAX_BYTES = 256 * 2**20
"""Memory for the inputs and outputs of layers that are compared, unless a user says how much."""


@dataclass(frozen=True)
class Wanted:
    """The questions to be asked of a batch.

    Attributes:
        statistics: Histograms of outputs, gradients and weight gradients in fp32.
        agreement: Losses and weight gradients in other formats against fp32.
        layers: The layers whose output is compared with fp32, as far as ``max_bytes`` reach.
        max_elements: How many elements of a tensor statistics look at; None for all.
        max_bytes: Memory for the inputs and outputs of ``layers``.
        flops: The arithmetic of each layer's own matrix products. Counting may take as long as the step.
        only: The layers that statistics and agreement are of; None for all.
        kept: The layers whose weights' gradients are kept; None for all.
    """

    statistics: bool = False
    agreement: bool = False
    layers: tuple[str, ...] = ()
    max_elements: int | None = None
    max_bytes: int = 0
    flops: bool = False
    only: tuple[str, ...] | None = None
    kept: tuple[str, ...] | None = None

    def __or__(self, other: "Wanted") -> "Wanted":
        """All that either asks."""
        looking = [each for each in (self, other) if each.statistics or each.agreement]
        unbounded = None in [each.max_elements for each in looking if each.statistics]
        some = [each.only for each in looking if each.only is not None]
        only = tuple(dict.fromkeys(name for names in some for name in names))
        return Wanted(
            self.statistics or other.statistics,
            self.agreement or other.agreement,
            tuple(dict.fromkeys(self.layers + other.layers)),
            None if unbounded else max(self.max_elements or 0, other.max_elements or 0),
            max(self.max_bytes, other.max_bytes),
            self.flops or other.flops,
            only if some and len(some) == len(looking) else None,
        )

    def looked_at(self, module: nn.Module) -> dict[str, nn.Module]:
        """The layers of a model that statistics and agreement are of, in the model's order."""
        every = layers_of(module)
        chosen = every.keys() if self.only is None else set(self.only)
        return {name: layer for name, layer in every.items() if name in chosen}


@dataclass(frozen=True)
class Recorded:
    """The step in other formats.

    Attributes:
        replayed: Its losses and gradients; None if it was not run.
        calls: The recorded calls of layers that are compared.
        too_large: Those of the layers whose call would not have fitted.
    """

    replayed: Replayed | None = None
    calls: dict[str, LayerCall] = field(default_factory=dict)
    too_large: list[str] = field(default_factory=list)


class Comparison:
    """One batch, whose step is run in fp32 once and in other formats as often as asked for; nothing of the run changes.

    Costs a copy of the weights while a step runs, and the gradients of the fp32 step and of another one.

    Args:
        module: The LightningModule in training, between steps.
        formats: The formats of the run.
        kept: The batch, on the device.
        wanted: What is to be asked of it.
        own: What is known of the dtypes that layers' own numbers have in the run's formats; gets what more is found.
        replay: How to replay a batch; None for a training step.

    Attributes:
        module: The module.
        layers: The modules by name, in the model's order, as far as they are looked at.
        device: The device they are on.
        reference: The step in fp32, once it was run.
        flops: By layer what its own matrix products take in forward; empty until they were counted.
        not_compared: By layer the reason that its output could not be compared, though that was asked for.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        formats: Formats,
        kept: KeptBatch,
        wanted: Wanted,
        own: OwnDtypes | None = None,
        replay: StepReplay | None = None,
    ) -> None:
        self.layers, self.device = wanted.looked_at(module), module.device
        self._every = layers_of(module)
        self.reference: Replayed | None = None
        self.flops: dict[str, int] = {}
        self.not_compared: dict[str, str] = {}
        self.module, self._formats, self._kept, self._wanted = module, formats, kept, wanted
        elsewhere = held_by_earlier_rank(module)
        owned = own_parameters(module, self._every)
        self._all_owned = {layer: [name for name in names if name not in elsewhere] for layer, names in owned.items()}
        self._owned = {name: self._all_owned[name] for name in self.layers}
        kept_names = None if wanted.kept is None else {name for layer in wanted.kept for name in owned[layer]}
        self._replay = replay or StepReplay(module, formats, module.device, kept_names)
        self._own = own
        self._size_of_terms: Tensor | None = None
        self._observer: OperandObserver | None = None
        self._statistics: tuple[Tensor, Tensor, Tensor] | None = None

    def run_in(self, formats: Formats | None, scale: float | Tensor, compared: Sequence[str] = ()) -> Recorded:
        """Runs the step in other formats than fp32.

        Args:
            formats: The step computes in their ``low``; None for the run's.
            scale: The loss scale.
            compared: The layers whose first call is recorded, as far as ``max_bytes`` reach.
        """
        replay = self._replay if formats is None else self._replay.in_formats(formats)
        recorder = CallRecorder({name: self._every[name] for name in compared}, self.device, self._wanted.max_bytes)
        own = self._own if formats is None else None
        dtypes = contextlib.nullcontext() if own is None else DtypeRecorder(self._every, own)
        with replay.opened() as stand_ins, recorder, dtypes:
            kept = self._kept
            replayed = replay.run(stand_ins, kept.batch, kept.batch_idx, scale=scale, random=kept.random)
        self.not_compared |= recorder.left_out
        return Recorded(replayed, recorder.calls, recorder.too_large)

    def run_reference(
        self,
        calls: dict[str, LayerCall] | None = None,
        compared: Sequence[str] = (),
        run: Callable[[Sandbox], Replayed] | None = None,
    ) -> Tensor:
        """Runs the step in fp32, once, and before it the recorded calls of layers.

        Args:
            calls: The recorded calls.
            compared: The layers that are compared.
            run: Runs the step inside a sandbox, where more is to be seen of it than was wanted.

        Returns:
            The :meth:`energies` of the compared layers.
        """
        assert self.reference is None, "one reference per batch"
        energies = torch.zeros(len(compared), 2, dtype=torch.float64, device=self.device)

        def observed(stand_ins: Sandbox) -> None:
            self._take_energies(energies, calls or {}, compared)
            self.reference = self._observed(stand_ins, run or self._run)

        in_fp32(self._replay, observed)
        return energies

    def _observed(self, stand_ins: Sandbox, run: Callable[[Sandbox], Replayed]) -> Replayed:
        """The step in fp32, and what is to be seen of it."""
        wanted, scale = self._wanted, self._reference_scale if run == self._run else 1.0
        if wanted.statistics:
            assigned = {name: self._formats.precision_of(name) for name in self.layers}
            self._observer = OperandObserver(self.layers, assigned, wanted.max_elements, self._own, scale, self._every)
        count = FlopCount(self._every) if wanted.flops else None
        with self._observer or contextlib.nullcontext(), count or contextlib.nullcontext():
            replayed = run(stand_ins)
        if wanted.agreement:
            self._size_of_terms = size_of_terms(self._all_owned, stand_ins.parameters, replayed.gradients)
        self.flops = count.flops if count is not None else {}
        return replayed

    @property
    def not_observed(self) -> dict[str, str]:
        """By layer the reason that statistics lack something of it."""
        return {} if self._observer is None else self._observer.left_out

    def energies(self, calls: dict[str, LayerCall], compared: Sequence[str]) -> Tensor:
        """Runs recorded calls again in fp32, these layers alone.

        Returns:
            Energies of the outputs and of their errors: fp64 [compared, 2]; zeros for a layer that was not recorded, or
            could not be run again.
        """
        energies = torch.zeros(len(compared), 2, dtype=torch.float64, device=self.device)
        with self._replay.opened(reference=True):
            self._take_energies(energies, calls, compared)
        return energies

    def measured(
        self,
        low: Replayed | None = None,
        energies: Tensor | None = None,
        *,
        least_loss: float = 0.0,
        statistics: bool = False,
    ) -> Measured:
        """This rank's numbers.

        Args:
            low: What the step came to in other formats; None if that is not compared.
            energies: Of layers that are compared.
            least_loss: What a loss counts for at least, where its gap is a part of it.
            statistics: Whether those of the reference are among them.
        """
        assert self.reference is not None
        has_loss = torch.tensor(float(bool(self.reference.losses)))
        told = replace(Measured.nothing(len(self.layers)), ranks=torch.ones(()), has_loss=has_loss)
        if energies is not None:
            told.energies = energies
        if low is not None:
            told.dots = gradient_dots(self._owned, low.gradients, self.reference.gradients)
            told.gap = loss_gap(low.losses, self.reference.losses, least_loss)
            least = least_loss if self._size_of_terms is None else self._size_of_terms.clamp(min=least_loss)
            told.weighed_gap = loss_gap(low.losses, self.reference.losses, least)
            told.is_bad = ~is_finite(low)
        if statistics:
            told.tables, told.amax, told.operands = self._counted()
        return told

    def self_agreement(self) -> Agreement:
        """Agreement of fp32 with itself if all is rounded otherwise; of no layer if it cannot be run. All ranks ask."""

        def run(stand_ins: Sandbox) -> Replayed:
            return self._run(stand_ins, times=round_otherwise(stand_ins.parameters.values()))

        told = Measured.nothing(len(self.layers))
        try:
            if self.reference is None:
                self.run_reference()
            told = self.measured(in_fp32(self._replay, run))
        except TraceLeftError:
            raise
        except Exception:
            told.is_bad += 1
        return Gathered(told, self.device, 1.0).read()[0].agreement(list(self.layers), 1.0)

    def _run(self, stand_ins: Sandbox, times: float = 1.0) -> Replayed:
        kept, scale = self._kept, self._reference_scale * times
        replayed = self._replay.run(stand_ins, kept.batch, kept.batch_idx, scale=scale, random=kept.random)
        if self._formats.not_in_fp32 or times != 1:
            replayed.gradients = {name: each / scale for name, each in replayed.gradients.items()}
        return replayed

    @property
    def _reference_scale(self) -> float | Tensor:
        """The loss scale of the step in fp32: 1, unless gradients go through layers that compute in fp16 there, too."""
        needs = is_scaling_needed({self._formats.precision_of(layer).region for layer in self._formats.not_in_fp32})
        return self._formats.scale if needs else 1.0

    def _counted(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._statistics is None:
            assert self._observer is not None and self.reference is not None
            weights = weight_gradients(self._owned, self.reference.gradients, self._wanted.max_elements)
            kinds = [each.tensors() for each in (self._observer.outputs(), self._observer.gradients(), weights)]
            tables, amax = (torch.stack([part.to(self.device) for part in parts]) for parts in zip(*kinds, strict=True))
            self._statistics = tables, amax, self._observer.counts(self.device)
        return self._statistics

    def _take_energies(self, energies: Tensor, calls: dict[str, LayerCall], compared: Sequence[str]) -> None:
        for row, name in enumerate(compared):
            call = calls.pop(name, None)  # and lets go of it
            if name in self._formats.not_in_fp32:
                self.not_compared[name] = self._formats.not_in_fp32[name]
                continue
            with leaving_out(name, self.not_compared), gathered(self.module, self.layers[name]):
                if call is not None:
                    energies[row] = computed_again(call)


def is_finite(replayed: Replayed) -> Tensor:
    """True, on the device, if losses and gradients are finite."""
    # Of a sparse gradient the sums of what falls on one element count.
    gradients = [each.coalesce() if each.is_sparse else each for each in replayed.gradients.values()]
    return all_finite([*replayed.losses, *gradients])
