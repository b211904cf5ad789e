"""Trials on a captured batch: how its step would agree with fp32 if some layers computed in other formats."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from lightning_mixprec import ranks
from lightning_mixprec.errors import OtherRankError, TraceLeftError, one_line
from lightning_mixprec.evidence.comparison import Comparison, is_finite
from lightning_mixprec.evidence.findings import SHORT, Findings, Gathered, Measured, describe
from lightning_mixprec.evidence.instruments.lockstep import Lockstep
from lightning_mixprec.evidence.instruments.memory import is_out_of_memory
from lightning_mixprec.evidence.run_formats import PluginFormats, TrialFormats
from lightning_mixprec.numerics.rates import headroom
from lightning_mixprec.planning.agreement import Agreement
from lightning_mixprec.planning.promotions import Promotion
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.policy.policy import PrecisionPolicy

T = TypeVar("T")

_LEAST_SHARE = 0.1
_ROOM_BITS = 2


class Trials:
    """A batch whose step is run in fp32 once, if it was not yet, and in other formats as often as asked for.

    All ranks have to try together: each runs its own batch, and the answer is the same on all.

    Args:
        comparison: The batch, with the formats of a run under :class:`PerLayerPrecision`.
        plugin: The precision plugin of the run.
        policy_with: The policy in which layers are promoted.
        usual_loss: How large losses have been; a difference that is small beside a tenth of it is small.

    Attributes:
        is_possible: Whether the step is finite in fp32, on all ranks, and could be run.
        problem: What went wrong on this rank, if something did.
        passes: How many steps were run, those that statistics took left out.
        loss_size: The largest loss of the step in fp32, without its sign.
    """

    def __init__(
        self,
        comparison: Comparison,
        plugin: PerLayerPrecision,
        policy_with: Callable[[Mapping[str, Promotion]], PrecisionPolicy],
        usual_loss: float = 0.0,
    ) -> None:
        self._comparison, self._plugin, self._policy_with = comparison, plugin, policy_with
        self.problem: str | None = None
        self._lockstep, self._replays = Lockstep(comparison.module), 0
        self.passes = 1
        self._in_fp32: Agreement | None = None
        if comparison.reference is None:
            self._tried(comparison.run_reference)
        reference, device = comparison.reference, comparison.device
        is_bad = reference is None or not bool(is_finite(reference))
        self.is_possible = not ranks.is_any(is_bad, device)
        if not self.is_possible:
            self.problem = ranks.first_told(self.problem)
        losses = reference.losses if reference is not None and self.is_possible else []
        largest = torch.stack([torch.zeros((), device=device), *(loss.float().sum().abs() for loss in losses)]).amax()
        ranks.take_largest([largest])
        self.loss_size = largest.item()
        self._least_loss = _LEAST_SHARE * max(usual_loss, self.loss_size)

    @property
    def flops(self) -> dict[str, int]:
        """By layer, the flops of its own matrix products in this step; empty if they were not counted."""
        return self._comparison.flops

    def run(self, promoted: Mapping[str, Promotion], scale: float) -> Agreement:
        """Agreement of the step with fp32.

        Args:
            promoted: Promotions by layer; the others compute as the user's policy says.
            scale: The loss scale.
        """
        return self._agreement(scale, lambda: TrialFormats(self._plugin, self._policy_with(promoted)), is_trial=True)

    def run_as_is(self, scale: float) -> Agreement:
        """Agreement of the step with fp32 in the formats in force."""
        return self._agreement(scale, lambda: PluginFormats(self._plugin))

    def _agreement(self, scale: float, formats: Callable[[], PluginFormats], *, is_trial: bool = False) -> Agreement:
        """Agreement in some formats; a trial that raises, unless memory ran out, has found that they do not do."""
        self.passes += 1
        comparison, least = self._comparison, self._least_loss
        told = self._tried(
            lambda: comparison.measured(comparison.run_in(formats(), scale).replayed, least_loss=least),
            is_trial=is_trial,
        )
        if told is None:
            told = Measured.nothing(len(comparison.layers))
            told.is_bad += 1
        measured, scale = self._gathered(told, scale)
        found = measured.agreement(list(comparison.layers), scale)
        if found.is_doubtful and self._in_fp32 is None:
            self.passes += 1
            self._in_fp32 = comparison.self_agreement()
        return found if self._in_fp32 is None else found.without_noise(self._in_fp32)

    def statistics(self, scale: float, compared: Sequence[str] = ()) -> Findings:
        """Statistics of the step in fp32, which have to be among what was wanted.

        Args:
            scale: The loss scale.
            compared: Layers whose output in the formats in force is to be compared with fp32's; takes another replay.
        """
        comparison, energies = self._comparison, torch.zeros(len(compared), 2)
        if compared:
            seen = self._tried(lambda: comparison.energies(comparison.run_in(None, scale, compared).calls, compared))
            energies = energies if seen is None else seen
        told = self._tried(lambda: comparison.measured(energies=energies, statistics=True))
        if told is None:
            told = Measured.nothing(len(comparison.layers), len(compared), statistics=True)
        found = Findings(list(comparison.layers))
        found.read(*self._gathered(told, scale), compared)
        return found

    def told_of(self, layers: Sequence[str], scale: float) -> dict[str, Any]:
        """By layer what it loses in the format that it has in the run, in short; plain values for the history."""
        if not layers:
            return {}
        formats, found = PluginFormats(self._plugin), self.statistics(scale, [name for name in layers if name])
        told: dict[str, Any] = {}
        for name in layers:
            if name in found.weights or name in found.gradients:
                values: Mapping[str, Any] = describe(name, found, formats.precision_of(name).region)
                told[name] = {key: values[key] for key in SHORT}
            if name in found.sqnr_db:
                told.setdefault(name, {})["sqnr_db"] = found.sqnr_db[name]
        return told

    def has_room(self, scale: float, formats: Mapping[str, str]) -> bool:
        """True if outputs stay two bits below the largest values of formats; the loss scale sees to gradients."""
        found = self.statistics(scale)
        known = {name: format for name, format in formats.items() if name in found.outputs}
        return found.is_any and all(
            headroom(found.outputs[name], format) >= _ROOM_BITS for name, format in known.items()
        )

    def _gathered(self, told: Measured, scale: float) -> tuple[Measured, float]:
        return Gathered(told, self._comparison.device, scale).read()

    def _tried(self, run: Callable[[], T], *, is_trial: bool = False) -> T | None:
        self._replays += 1
        try:
            with self._lockstep.attempt(f"{self._replays}"):
                return run()
        except TraceLeftError:
            raise
        except Exception as error:  # a callback that watches ends no run, and the other ranks wait
            if not is_trial or is_out_of_memory(error) or isinstance(error, OtherRankError):
                self.problem = one_line(error)
            return None
