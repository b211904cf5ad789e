"""A step that monitors sample: compared with fp32 at once, for all of them together."""

import contextlib
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl

from lightning_mixprec import ranks
from lightning_mixprec.engine.sharding import is_any_sharded
from lightning_mixprec.errors import TraceLeftError, one_line
from lightning_mixprec.evidence.comparison import Comparison, Recorded, Wanted
from lightning_mixprec.evidence.findings import Findings, Gathered, Measured, is_at_stake
from lightning_mixprec.evidence.instruments.memory import parts_with_room
from lightning_mixprec.evidence.instruments.probe import layers_of, own_parameters
from lightning_mixprec.evidence.replay import Halving
from lightning_mixprec.evidence.run_formats import RunFormats
from lightning_mixprec.evidence.step_window import KeptBatch
from lightning_mixprec.planning.agreement import Agreement


class SampledStep:
    """A step, replayed as soon as this is made; its findings arrive in the background.

    Costs a copy of the weights, a forward and backward in fp32, and for agreement another one in the run's formats with
    a second set of gradients. If that does not fit into memory it is tried once more on half of the batch. Where there
    is no room for all gradients of sharded weights, those of a part of the layers are kept, in rotation.

    Args:
        module: The LightningModule in training, just before the step.
        formats: The formats of the run.
        batch: The batch, on the device.
        place: Which step it is: step, epoch and batch_idx.
        wanted: What to find out.
        turn: How many samples were taken before.

    Attributes:
        part: Which part of the layers it looks at, and why; empty if at all that were wanted.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        formats: RunFormats,
        batch: Any,
        place: dict[str, int],
        wanted: Wanted,
        turn: int = 0,
    ) -> None:
        self.part = ""
        self._module, self._formats, self._wanted = module, formats, self._as_fits(module, wanted, turn)
        self._findings = Findings(list(self._wanted.looked_at(module)), place, own=formats.own)
        self._kept = KeptBatch(batch, place["batch_idx"], None)
        self._gathered = Gathered(self._measured(batch), module.device, formats.scale)
        self._is_read = False

    def _as_fits(self, module: pl.LightningModule, wanted: Wanted, turn: int) -> Wanted:
        """What is wanted, of as many layers as there is room for the gradients of."""
        if not is_any_sharded(module):
            return wanted
        owned, looked_at = own_parameters(module, layers_of(module)), wanted.looked_at(module)
        with_weights = {layer: owned[layer] for layer in looked_at if owned[layer]}
        parts = parts_with_room(module, module.device, with_weights)
        if len(parts) == 1:
            return wanted
        part = parts[turn % len(parts)]
        self.part = (
            f"memory has room for the gradients of {len(part)} of {len(with_weights)} layers beside the run: samples "
            f"look at them in turn, in {len(parts)} parts"
        )
        return replace(wanted, only=tuple(dict.fromkeys((*part, *wanted.layers))), kept=part)

    def findings(self) -> Findings:
        """The findings. Waits until they have arrived."""
        if not self._is_read:
            found, wanted, self._is_read = self._findings, self._wanted, True
            measured, scale = self._gathered.read()
            if measured.ranks < ranks.count():
                self._tell_all(found)
            found.read(measured, scale, wanted.layers, agreement=wanted.agreement)
            self._look_up_dtypes()
            self._look_for_noise()
        return self._findings

    def _look_for_noise(self) -> None:
        """Leaves gradients that are rounding noise in fp32, too, out of the agreement, if some may be."""
        found, agreement = self._findings, self._findings.agreement
        if agreement is None or not agreement.is_doubtful:
            return
        wanted = Wanted(agreement=True, only=self._wanted.only, kept=self._wanted.kept)

        def in_fp32_again() -> Agreement:
            return Comparison(self._module, self._formats, self._kept, wanted).self_agreement()

        found.agreement = self._formats.noise.taken_out_of(agreement, in_fp32_again)
        found.noise = [layer for layer in agreement.layers if layer not in found.agreement.layers]

    def _look_up_dtypes(self) -> None:
        """Has the step run in the run's formats if something seems to be lost in layers of unknown dtypes.

        Statistics of an output whose parts turn out to have different dtypes are passed over: they were counted
        together.
        """
        found, formats, own = self._findings, self._formats, self._findings.own
        measured = found.weights.keys() | found.gradients.keys()
        unknown = [layer for layer in found.layers if layer in measured and layer not in own.outputs]
        at_stake = any(is_at_stake(layer, found, formats.precision_of(layer).region) for layer in unknown)
        if not at_stake or own is not formats.own:  # else formats have changed since
            return
        with contextlib.suppress(Exception):  # then they are taken for what the layer computes in
            Comparison(self._module, formats, self._kept, Wanted(kept=self._wanted.kept), own).run_in(None, found.scale)
        found.losses.clear()  # they were for other dtypes
        for layer in unknown:
            if own.is_several(layer):
                found.gradients.pop(layer, None)
                found.outputs.pop(layer, None)
            own.outputs.setdefault(layer, {})

    def _tell_all(self, found: Findings) -> None:
        """Tells all ranks why the batch of one was left out: the first rank alone speaks and writes."""
        rank, problem = ranks.first_found(None if found.is_complete else found.problem)
        found.is_complete = False
        found.problem = None if problem is None else ranks.told_by(rank, problem)

    def _measured(self, batch: Any) -> Measured:
        found, halving = self._findings, Halving(self._module, batch)
        try:
            measured = halving.run(self._compared)
            found.is_complete, found.problem = True, halving.shortage or self.part or None
            return measured
        except TraceLeftError:
            raise
        except Exception as error:  # a monitor ends no run
            found.problem = one_line(error)
        return Measured.nothing(len(found.layers), len(self._wanted.layers), statistics=self._wanted.statistics)

    def _compared(self, batch: Any) -> Measured:
        """The step in the run's formats, where that is wanted, and then in fp32."""
        wanted, found = self._wanted, self._findings
        kept = self._kept._replace(batch=batch)
        comparison = Comparison(self._module, self._formats, kept, wanted, found.own if wanted.statistics else None)
        low = Recorded()
        if wanted.agreement or wanted.layers:
            low = comparison.run_in(None, self._formats.scale, wanted.layers)
        energies = comparison.run_reference(low.calls, wanted.layers)
        found.flops, found.too_large = comparison.flops, low.too_large
        found.not_compared, found.not_observed = comparison.not_compared, comparison.not_observed
        found.not_in_fp32 = list(self._formats.not_in_fp32)
        return comparison.measured(low.replayed, energies, statistics=wanted.statistics)
