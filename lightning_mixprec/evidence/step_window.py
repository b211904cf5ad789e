"""The batches of an optimizer step, kept until its outcome is known: finite or not, and at which loss scale."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mixprec import ranks
from lightning_mixprec.engine.objects import rebuilt, tensors_in
from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.evidence.instruments.restoring.attributes import replaced
from lightning_mixprec.evidence.instruments.restoring.contents import version_of
from lightning_mixprec.evidence.instruments.sandbox import RandomState
from lightning_mixprec.evidence.run_formats import RunFormats
from lightning_mixprec.optim.gradients import scalar

MOST_BATCHES = 8
_FIRST_LOOKS, _LOOKS_EVERY = 8, 64


class KeptBatch(NamedTuple):
    """A batch and what is needed to replay it: its index, and the random numbers unless the step uses none."""

    batch: Any
    batch_idx: int
    random: RandomState | None


class RandomUse:
    """Records the random numbers that steps begin with, as long as steps use any.

    The first eight steps and every 64th are looked at. Recording costs more than all else that is kept of a step.

    Args:
        device: The device of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._steps = self._without = 0
        self._looked_at: RandomState | None = None

    def begin(self) -> RandomState | None:
        """The random numbers that a step begins with; None if steps use none."""
        looks = self._steps < _FIRST_LOOKS or self._steps % _LOOKS_EVERY == 0
        self._steps += 1
        if not looks and self._without >= _FIRST_LOOKS:
            return None
        state = RandomState(self._device, others=False)
        self._looked_at = state if looks else None
        return state

    def end(self) -> None:
        """Looks whether the step used any."""
        if self._looked_at is not None:
            used_none = self._looked_at.is_same(RandomState(self._device, others=False))
            self._without = self._without + 1 if used_none else 0
            self._looked_at = None


@dataclass(frozen=True)
class Made:
    """What a module's own hook has set in the module for a batch.

    Attributes:
        module: The module.
        values: The attributes that the hook set anew, by name.
    """

    module: nn.Module
    values: Mapping[str, Any]

    def in_place(self) -> contextlib.AbstractContextManager[None]:
        """The module has these attributes within, and its present ones after."""
        return replaced(vars(self.module), self.values)


class BatchUse:
    """Keeps batches as they come, whatever their steps do to them.

    A step takes things out of its batch, which is therefore kept in containers of its own, and may write to its
    tensors, which are copied only in the first eight steps, and from then on if one has ever been written to. A write
    is known by a tensor's version: nothing is read.
    """

    def __init__(self) -> None:
        self._steps, self._copies = 0, False
        self._versions: list[tuple[Tensor, int]] = []

    def begin(self, batch: Any) -> Any:
        """The batch to keep of a step that begins; the batch itself if it cannot be rebuilt."""
        copies = self._copies or self._steps < _FIRST_LOOKS
        self._steps += 1
        self._versions = [] if self._copies else [(tensor, version_of(tensor)) for tensor in tensors_in(batch)]
        try:
            return rebuilt(batch, _own) if copies else rebuilt(batch)
        except Exception:  # a monitor ends no run
            return batch

    def end(self) -> None:
        """Looks whether the step wrote to the batch."""
        self._copies = self._copies or any(version_of(tensor) != version for tensor, version in self._versions)
        self._versions = []


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


class Outcome(NamedTuple):
    """The outcome of a step.

    Attributes:
        loss_is_bad: Whether a loss was not finite.
        skipped: How many optimizer steps were skipped.
        scale: The loss scale of the step.
    """

    loss_is_bad: bool
    skipped: int
    scale: float

    @property
    def is_bad(self) -> bool:
        """True where there is something to be explained."""
        return self.loss_is_bad or self.skipped > 0


@dataclass
class StepWindow:
    """The time between two optimizer steps: up to eight batches, and the numbers that tell if the step failed.

    Attributes:
        formats: The formats of the run.
        device: The device of the run.
        is_automatic: Whether an optimizer steps once, however often it evaluates the loss.
        batches: The batches, the latest last.
        made: What the module's hook made for each of them.
        step: Optimizer steps taken before.
        steps: Optimizer steps tried.
        age: Batches that have begun since the last one of these.
    """

    formats: RunFormats
    device: torch.device
    is_automatic: bool
    batches: list[KeptBatch] = field(default_factory=list)
    made: list[Made | None] = field(default_factory=list)
    step: int = 0
    steps: int = 0
    age: int = 0
    _losses: list[Tensor] = field(default_factory=list)
    _flags: list[Tensor] = field(default_factory=list)
    _scale: float | Tensor = 1.0
    _flag_comes_later: bool = False

    def add_batch(self, batch: Any, batch_idx: int, random: RandomState | None, made: Made | None = None) -> None:
        """Keeps a batch, to which nobody writes any more, and the random numbers that its step begins with."""
        self.batches = [*self.batches, KeptBatch(batch, batch_idx, random)][-MOST_BATCHES:]
        self.made = [*self.made, made][-MOST_BATCHES:]

    def prepared(self, place: int = -1) -> contextlib.AbstractContextManager[None]:
        """The module is within as its hook prepared it for one of the batches."""
        made = self.made[place] if self.made else None
        return contextlib.nullcontext() if made is None else made.in_place()

    def add_loss(self, loss: Tensor) -> None:
        """Notes a loss that goes backward."""
        kept = loss.detach()
        self._losses.append(kept.clone() if self.is_late else kept)  # CUDA graphs write the next one to the same place

    def add_step(self, optimizer: Optimizer, step: int) -> None:
        """Notes the flag of non-finite gradients of an optimizer that is about to step, and the scale.

        Args:
            optimizer: The optimizer.
            step: Optimizer steps taken so far.
        """
        if not self.steps:
            scale = self.formats.scale
            self.step, self._scale = step, scale.clone() if isinstance(scale, Tensor) else scale
        self.steps = 1 if self.is_automatic else self.steps + 1
        flag = self.formats.found_inf(optimizer)
        if flag is not None:
            self._flags.append(flag)
        else:
            self._flag_comes_later = self.formats.is_guarded

    def begin_anew(self) -> None:
        """Has the last batch's step taken once more, from the random numbers that it began with."""
        self._losses.clear()
        if (random := self.batches[-1].random) is not None:
            random.restore()

    @property
    def is_known_before_step(self) -> bool:
        """True where the outcome can be read before the optimizer steps, without waiting for a device."""
        return not self.is_late and not self._flag_comes_later

    @property
    def is_late(self) -> bool:
        """True where reading the outcome would wait for a device."""
        return self.device.type != "cpu"

    def read(self) -> Outcome:
        """The outcome, where nothing has to be waited for."""
        loss_is_bad = any(not math.isfinite(loss.item()) for loss in self._losses)
        skipped = sum(flag.item() > 0 for flag in self._flags)
        skipped = min(max(skipped, int(self._scale_fell())), self.steps)
        # Where steps are guarded all ranks skip together; a loss on one rank is no reason to act without the others.
        asks = skipped > 0 or not self.formats.is_guarded
        if (asks or loss_is_bad) and ranks.are_many():
            loss_is_bad = asks and ranks.is_any(loss_is_bad, self.device)
        return Outcome(loss_is_bad, skipped, float(self._scale))

    def send(self) -> Transfer:
        """The outcome on its way to the host, for :func:`received`."""
        zero = scalar(0.0, self.device)
        losses = torch.stack([zero, *(loss.float().sum() for loss in self._losses)]).sum()
        loss_is_bad = (~torch.isfinite(losses)).to(zero)
        if ranks.are_many() and not self.formats.is_guarded:
            ranks.take_largest([loss_is_bad])
        skipped = torch.stack([zero, *((flag > 0).to(zero) for flag in self._flags)]).sum()
        fell = self._scale_fell()
        if isinstance(fell, Tensor):
            skipped = torch.maximum(skipped, fell.to(zero)).clamp(max=self.steps)
        scale = self._scale.to(zero) if isinstance(self._scale, Tensor) else scalar(self._scale, self.device)
        return Transfer([torch.stack([loss_is_bad, skipped, scale])])

    def _scale_fell(self) -> bool | Tensor:
        """True if a stock scaler whose flag cannot be read has lowered its scale since."""
        if not self._flag_comes_later:
            return False
        now = self.formats.scale
        return now < self._scale if isinstance(now, Tensor) else False


def received(transfer: Transfer) -> Outcome:
    """The outcome that :meth:`StepWindow.send` sent. Waits until it has arrived."""
    loss_is_bad, skipped, scale = transfer.get()[0].tolist()
    return Outcome(loss_is_bad > 0, int(skipped), scale)
