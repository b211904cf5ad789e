"""Trials on a captured batch: how its step would agree with fp32 if some layers computed in other formats."""

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mixprec import ranks
from lightning_mixprec.evidence.instruments.flops import FlopCount
from lightning_mixprec.evidence.instruments.probe import agreement, layers_of, own_parameters
from lightning_mixprec.evidence.outcomes import KeptBatch
from lightning_mixprec.evidence.replay import Replayed, StepReplay
from lightning_mixprec.evidence.run_formats import PluginFormats
from lightning_mixprec.numerics.similarity import cosine_of
from lightning_mixprec.planning.agreement import Agreement, LayerAgreement
from lightning_mixprec.planning.promotions import Promotion
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.policy.policy import PrecisionPolicy

_NO_LOSS = -1.0
_LEAST_SHARE = 0.1


class TrialFormats(PluginFormats):
    """The formats of a run under a policy that is tried, and fp32 for the reference.

    Args:
        plugin: The plugin of the run.
        policy: The policy.
    """

    def __init__(self, plugin: PerLayerPrecision, policy: PrecisionPolicy) -> None:
        super().__init__(plugin)
        self._policy = policy

    def low(self) -> contextlib.AbstractContextManager[Any]:
        """Everything within computes as the policy says."""
        return self._plugin.trial_context(self._policy)


class Trial:
    """A batch whose step is run in fp32 once, and in other formats as often as asked for; nothing of the run changes.

    All ranks have to try together: each runs its own batch, and the answer is the same on all.

    Args:
        module: The LightningModule in training, between steps.
        plugin: Its precision plugin.
        kept: The batch, on the device.
        policy_with: The policy in which layers are promoted.
        usual_loss: How large losses have been; a difference that is small beside a tenth of it is small.
        counts: Whether to count flops, which takes as long as the step itself where steps are short.

    Attributes:
        is_possible: Whether the step is finite in fp32, on all ranks, and could be run.
        flops: What each layer's own matrix products take in this step; empty if they were not counted.
        problem: What went wrong on this rank, if something did.
        passes: How many steps were run.
        loss_size: The largest loss of the step in fp32, without its sign.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        plugin: PerLayerPrecision,
        kept: KeptBatch,
        policy_with: Callable[[Mapping[str, Promotion]], PrecisionPolicy],
        usual_loss: float = 0.0,
        *,
        counts: bool = True,
    ) -> None:
        self._module, self._plugin, self._kept, self._policy_with = module, plugin, kept, policy_with
        self._device, self._counts = module.device, counts
        self._layers = layers_of(module)
        self._owned = own_parameters(module, self._layers)
        self.problem: str | None = None
        self.passes = 0
        self.flops: dict[str, int] = {}
        self._reference = self._tried(self._run_reference)
        is_bad = self._reference is None or not bool(_are_finite(self._reference))
        self.is_possible = not ranks.is_any(is_bad, self._device)
        if not self.is_possible:
            self.problem = ranks.first_told(self.problem)
        losses = self._reference.losses if self._reference is not None and self.is_possible else []
        sizes = torch.stack([torch.zeros((), device=self._device), *(loss.float().sum().abs() for loss in losses)])
        largest = sizes.amax()
        ranks.take_largest([largest])
        self.loss_size = largest.item()
        self._least_loss = _LEAST_SHARE * max(usual_loss, self.loss_size)

    def run(self, promoted: Mapping[str, Promotion], scale: float) -> Agreement:
        """How the step agrees with fp32.

        Args:
            promoted: Promotions by layer; the others compute as the user's policy says.
            scale: The loss scale.
        """
        return self._agreement(partial(self._run_with, promoted, scale), scale)

    def run_as_is(self, scale: float) -> Agreement:
        """How the step agrees with fp32 in the formats in force."""
        return self._agreement(partial(self._run, PluginFormats(self._plugin), scale), scale)

    def _agreement(self, run: Callable[[], Replayed], scale: float) -> Agreement:
        assert self._reference is not None
        return self._compared(self._tried(run), self._reference, scale)

    def _run_with(self, promoted: Mapping[str, Promotion], scale: float) -> Replayed:
        return self._run(TrialFormats(self._plugin, self._policy_with(promoted)), scale)

    def _run(self, formats: PluginFormats, scale: float) -> Replayed:
        self.passes += 1
        kept, replay = self._kept, StepReplay(self._module, formats, self._device)
        with replay.opened() as stand_ins:
            return replay.run(stand_ins, kept.batch, kept.batch_idx, scale=scale, random=kept.random)

    def _run_reference(self) -> Replayed:
        self.passes += 1
        replay = StepReplay(self._module, PluginFormats(self._plugin), self._device)
        kept, count = self._kept, FlopCount(self._layers) if self._counts else None
        with replay.opened(reference=True) as stand_ins, count or contextlib.nullcontext():
            replayed = replay.run(stand_ins, kept.batch, kept.batch_idx, random=kept.random)
        self.flops = count.flops if count is not None else {}
        return replayed

    def _tried(self, run: Callable[[], Replayed]) -> Replayed | None:
        try:
            return run()
        except Exception as error:  # a callback that watches ends no run, and the other ranks wait
            self.problem = f"{type(error).__name__}: {error}".splitlines()[0]
            return None

    def _compared(self, tried: Replayed | None, reference: Replayed, scale: float) -> Agreement:
        low = tried if tried is not None else Replayed()
        parts = agreement(self._owned, low.gradients, reference.gradients).to(self._device)
        is_bad = torch.tensor(tried is None, device=self._device) | ~_are_finite(low).to(self._device)
        largest = torch.stack(
            [is_bad.double(), _largest_gap(low.losses, reference.losses, self._least_loss).to(self._device)]
        )
        ranks.add_up([parts])
        ranks.take_largest([largest])
        failed, gap = largest.tolist()
        return Agreement(not failed, math.nan if gap == _NO_LOSS else gap, self._by_layer(parts.cpu(), scale))

    def _by_layer(self, parts: Tensor, scale: float) -> dict[str, LayerAgreement]:
        cosines = cosine_of(parts).tolist()
        norms = parts[:, 1:].sqrt() / torch.tensor([scale, 1.0], dtype=parts.dtype)
        largest = norms[:, 0].max().item() if len(norms) else 0.0
        return {
            name: LayerAgreement(cosine, low / reference, low / largest if largest else 0.0)
            for name, cosine, (low, reference) in zip(self._layers, cosines, norms.tolist(), strict=True)
            if reference
        }


def _are_finite(replayed: Replayed) -> Tensor:
    """Whether losses and gradients are finite; on the device."""
    values = [*replayed.losses, *replayed.gradients.values()]
    dense = [value.coalesce().values() if value.is_sparse else value for value in values]
    return torch.stack([torch.isfinite(value).all() for value in dense]).all() if dense else torch.tensor(True)


def _largest_gap(low: list[Tensor], reference: list[Tensor], least: float) -> Tensor:
    if not reference:
        return torch.tensor(_NO_LOSS, dtype=torch.float64)
    if len(low) != len(reference):
        return torch.tensor(math.inf, dtype=torch.float64)
    ours, theirs = (torch.stack([loss.double().sum() for loss in losses]) for losses in (low, reference))
    gaps = torch.where(ours == theirs, 0.0, (ours - theirs).abs() / theirs.abs().clamp(min=least))
    return gaps.nan_to_num(nan=math.inf).amax()
