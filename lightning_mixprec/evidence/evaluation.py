"""Validation that is not finite: noticed without waiting for the device, and replayed as a training step is."""

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_mixprec.engine.objects import tensors_in
from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.evidence.comparison import Wanted
from lightning_mixprec.evidence.diagnosis import Judge
from lightning_mixprec.evidence.failures import Found
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import Formats
from lightning_mixprec.evidence.step_window import KeptBatch

_MOST_WAITING = 4


class Seen(NamedTuple):
    """A batch of validation.

    Attributes:
        kept: The batch.
        loader: Which data loader it is of.
        names: What was looked at.
        bad: Which of these were not finite.
        arriving: Whether one of these was finite before.
    """

    kept: KeptBatch
    loader: int
    names: list[str]
    bad: Tensor
    arriving: Transfer


class EvaluationWatch:
    """Finds the first batch of a validation with outputs or logged values that are not finite.

    At most four batches are kept, those that the device is at work on. Values that are not finite in fp32 either
    (:meth:`acquit`) are not looked at again.
    """

    def __init__(self) -> None:
        self._acquitted: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        self._waiting: deque[Seen] = deque()
        self._found: Seen | None = None
        self._last: Seen | None = None

    def add(self, kept: KeptBatch, loader: int, values: Mapping[str, Tensor]) -> None:
        """Looks at a batch's outputs and at what is logged so far."""
        looked_at = {name: value for name, value in values.items() if name not in self._acquitted}
        if self._found is not None or not looked_at:
            return
        names = list(looked_at)
        bad = ~torch.isfinite(torch.stack([_total(value) for value in looked_at.values()]))
        is_new = bad & ~self._last.bad if self._last is not None and self._last.names == names else bad
        self._last = Seen(kept, loader, names, bad, Transfer([is_new.any()]))
        self._waiting.append(self._last)
        while self._waiting and (self._waiting[0].arriving.is_ready or len(self._waiting) > _MOST_WAITING):
            self._read()

    def finish(self) -> Seen | None:
        """The batch, if there was one; the next validation begins."""
        while self._waiting:
            self._read()
        found = self._found
        self._begin()
        return found

    def acquit(self, seen: Seen) -> None:
        """Takes note that what was not finite is not a matter of precision."""
        self._acquitted.update(name for name, is_bad in zip(seen.names, seen.bad.tolist(), strict=True) if is_bad)

    def _read(self) -> None:
        seen = self._waiting.popleft()
        if self._found is None and seen.arriving.get()[0]:
            self._found = seen
            self._waiting.clear()


def values_of(trainer: pl.Trainer, outputs: Any) -> dict[str, Tensor]:
    """What a batch's validation_step returned and what is logged so far, by name; floating-point tensors."""
    results: Mapping[str, Any] = trainer._results or {}
    values = {name: result.value for name, result in results.items()}
    values |= {f"output {place}": tensor for place, tensor in enumerate(tensors_in(outputs))}
    return {name: each for name, each in values.items() if isinstance(each, Tensor) and each.is_floating_point()}


def diagnosed_evaluation(
    module: pl.LightningModule, formats: Formats, seen: Seen, wanted: Wanted | None = None
) -> Found | None:
    """Says which layer made a batch of validation not finite; None if it was not for want of precision.

    For a single rank, where a validation ends.

    Args:
        module: The LightningModule, in the mode of its evaluation.
        formats: In which formats it computes then.
        seen: The batch.
        wanted: As for :func:`~lightning_mixprec.evidence.failures.diagnosed`.
    """
    replay = EvaluationReplay(module, formats, module.device, seen.loader)
    try:
        replay.look_at_what_is_finite(seen.kept)
    except Exception:  # without a reference there is nothing to say, and a callback that watches ends no run
        return None
    judge = Judge(replay, seen.kept, 1.0, wanted)
    diagnosis = judge.judge()
    if diagnosis is None or diagnosis.cause["verdict"] != "precision":
        return None
    message = f"in validation, {diagnosis.cause['message']}"
    return Found(0, seen.kept, replace(diagnosis, cause={**diagnosis.cause, "message": message}), judge.comparison)


class EvaluationReplay(StepReplay):
    """Replays the validation step of a LightningModule; what it returns and logs is in the place of losses.

    Args:
        module: The LightningModule, in the mode of its evaluation.
        formats: In which formats it computes.
        device: The device it is on.
        loader: The data loader that batches are of.
    """

    def __init__(self, module: pl.LightningModule, formats: Formats, device: torch.device, loader: int) -> None:
        super().__init__(module, formats, device)
        self._loader = loader
        self._looked_at: list[bool] | None = None

    def look_at_what_is_finite(self, kept: KeptBatch) -> None:
        """Looks from now on at those values alone that are finite in fp32."""
        with self.opened(reference=True) as stand_ins:
            values = self.run(stand_ins, kept.batch, kept.batch_idx).losses
            self._looked_at = [bool(torch.isfinite(value)) for value in values]

    def _take(self, step: Any, batch: Any, batch_idx: int) -> None:
        logged: list[Any] = []
        vars(self.module)["log"] = lambda name, value, *args, **kwargs: logged.append(value)
        vars(self.module)["log_dict"] = lambda values, *args, **kwargs: logged.extend(values.values())
        with torch.no_grad():
            output = validation_output(self.module, batch, batch_idx, self._loader)
            values = [_size(tensor) for tensor in tensors_in([output, logged]) if tensor.is_floating_point()]
        looked_at = self._looked_at or [True] * len(values)
        step.replayed.losses += [each for each, is_looked_at in zip(values, looked_at, strict=True) if is_looked_at]


def validation_output(module: pl.LightningModule, batch: Any, batch_idx: int, loader: int) -> Any:
    """What a module's validation_step returns, given the arguments that it takes, as Lightning gives them.

    Args:
        module: The LightningModule.
        batch: The batch.
        batch_idx: Its index; a step that takes it may call it anything.
        loader: Which data loader it is of, for a step that asks for ``dataloader_idx``.
    """
    step, given = module.validation_step, [batch]
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        given.append(batch_idx)
    if is_param_in_hook_signature(step, "dataloader_idx"):
        given.append(loader)
    return step(*given)


def _total(value: Tensor) -> Tensor:
    """A number that is finite if all of a tensor are."""
    return (value if value.dtype == torch.float64 else value.float()).sum().double()


def _size(value: Tensor) -> Tensor:
    return value.detach().float() if not value.dim() else value.detach().float().abs().mean()
