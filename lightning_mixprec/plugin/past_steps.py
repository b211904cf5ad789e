"""Optimizer steps that go past the plugin, so that nobody unscales, guards or counts them: noticed, and told once."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_mixprec import ranks
from lightning_mixprec.optim.gradients import params_of
from lightning_mixprec.optim.loss_scaling import LossScaler

_FIRST_LOOKS = 8


class PastSteps:
    """Watches a run's weights for steps that the plugin does not take.

    torch calls a hook before an optimizer's ``step``, whoever calls it. What an optimizer does in other methods shows
    in the weights' counts of writes, which are looked at in manual optimization until the plugin takes a step; weights
    have to have been written to in eight batches without one.

    Args:
        optimizers: The optimizers of the run.
        scaler: Decides about the steps that the plugin takes.
    """

    def __init__(self, optimizers: Sequence[Optimizer], scaler: LossScaler) -> None:
        params = [params_of(each) for each in optimizers]
        self._weights = {id(param) for each in params for param in each}
        self._first: list[Tensor] = [each[0] for each in params if each]
        self._scaler = scaler
        self._writes, self._written_in = 0, 0
        self._steps, self._is_told = 0, False
        self.is_inside = False
        """True while the plugin takes a step."""
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Stops watching."""
        self._hook.remove()

    def begin_own(self) -> None:
        """The plugin is about to take a step."""
        self.is_inside = True
        self._steps += 1

    def end_own(self) -> None:
        """The plugin has taken it."""
        self.is_inside = False

    def begin_batch(self) -> None:
        """A training step of manual optimization is about to be run."""
        self._writes = self._count_writes()

    def end_batch(self) -> None:
        """It has been run."""
        self._written_in += self._count_writes() != self._writes and not self._steps
        if self._written_in >= _FIRST_LOOKS:
            self._tell("The optimizer")

    def _count_writes(self) -> int:
        if self._steps or not self._is_watching or ranks.are_many():  # to gather weights is to write to them
            return self._writes
        return sum(param._version for param in self._first)

    @property
    def _is_watching(self) -> bool:
        return not self._is_told and (self._scaler.is_active or self._scaler.guards)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self.is_inside or not self._is_watching:
            return
        if any(id(param) in self._weights for param in params_of(optimizer)):
            self._tell(type(optimizer).__name__)

    def _tell(self, who: str) -> None:
        if not self._is_watching:
            return
        self._is_told = True
        scaled = "its gradients stay multiplied by the loss scale, " if self._scaler.is_active else ""
        instead = ", or compute in bf16, where nothing has to be unscaled" if self._scaler.is_active else ""
        rank_zero_warn(
            f"{who} steps past the precision plugin, by a method of its own or by step() of what self.optimizers() "
            f"wraps: {scaled}nobody looks for infinities in them, and its steps are not counted. Call step() of what "
            f"self.optimizers() returns{instead}."
        )
