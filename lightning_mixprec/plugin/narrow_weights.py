"""Weights that rules store in 16 bits: what they lose is handed to optimizers, lent to who averages, and given back."""

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mixprec.engine.apply import Attachment
from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.flat_batches import local_part
from lightning_mixprec.optim.checkpoint_files import full_weights
from lightning_mixprec.optim.gradients import params_of
from lightning_mixprec.optim.kept_weights import is_narrow, keeping_in
from lightning_mixprec.optim.loaded_states import widened
from lightning_mixprec.optim.low_precision import LowPrecisionOptimizer
from lightning_mixprec.plugin.notices import warn_of_narrow_weights
from lightning_mixprec.policy.assignment import Assignment


class NarrowWeights:
    """Who keeps the bits that a run's weights lose by being stored in 16 bits.

    Args:
        model: The model.
        attachment: What stores its weights.
        assignment: In which format.
        optimizers: Those of the run.
    """

    def __init__(
        self, model: pl.LightningModule, attachment: Attachment, assignment: Assignment, optimizers: list[Optimizer]
    ) -> None:
        self._model, self._attachment, self._assignment = model, attachment, assignment
        self._optimizers = optimizers
        self._keepers = [each for each in optimizers if isinstance(each, LowPrecisionOptimizer)]
        self._owners: dict[Tensor, Optimizer] = {}
        self._groups = -1

    def hand_over(self) -> None:
        """Gives optimizers what their weights have lost, those that were added to them since the last time."""
        groups = sum(len(each.param_groups) for each in self._optimizers)
        if groups == self._groups:
            return
        self._groups = groups
        owners = {param: each for each in self._optimizers for param in params_of(each)}
        added, self._owners = owners.keys() - self._owners.keys(), owners
        for weight, wide in self._attachment.lossy_weights():
            if weight in added:
                self._give(weight, wide, owners[weight])
        names: dict[Tensor, str] = {param: name for name, param in self._model.named_parameters()}
        for keeper in self._keepers:
            keeper.name_weights(names)
            if any(local_part(param) is not param for param in params_of(keeper)):
                keeper.complete_states()
        warn_of_narrow_weights(self._model, self._assignment, self._optimizers, added)

    def _give(self, weight: Tensor, wide: Tensor, owner: Optimizer) -> None:
        # What a checkpoint has loaded since is not to be overwritten.
        stored = local_part(weight.detach())
        is_still_it = torch.equal(wide.to(stored), stored)
        is_known = keeping_in(owner.state.get(weight, {})) is not None
        if isinstance(owner, LowPrecisionOptimizer) and is_still_it and not is_known:
            owner.set_weight(weight, wide)
        self._attachment.take(weight)

    def restore(self, weights: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> None:
        """Gives weights in fp32 the bits that a checkpoint's optimizers kept, where theirs now keeps none.

        Args:
            weights: The weights of the checkpoint, which the model has loaded.
            states: The states of its optimizers.
        """
        params = {
            name: param
            for name, param in self._model.named_parameters()
            if param.dtype == torch.float32 and not isinstance(self._owners.get(param), LowPrecisionOptimizer)
            if name in weights and is_narrow(weights[name])
        }
        full = full_weights({"state_dict": weights, "optimizer_states": states}) if params else {}
        for name, param in params.items():
            with torch.no_grad():
                local_part(param).copy_(local_part(full[name]))

    def give_back(self) -> None:
        """Gives weights that are stored in fp32 again the bits that were kept of them."""
        for keeper in self._keepers:
            keeper.give_back()

    @contextlib.contextmanager
    def full(self) -> Generator[None, None, None]:
        """Weights that rules store in 16 bits are in fp32 within, with all their bits; what is written is kept."""
        weights = self._attachment.narrowed_weights()
        _check_whole(weights)
        stored = [weight.data for weight in weights]
        try:
            for weight in weights:
                weight.data = self._full(weight)
            yield
        finally:
            for weight, data in zip(weights, stored, strict=True):
                now, weight.data = weight.data, data
                if now is not data and not _same_bits(now, self._full(weight)):
                    self._write(weight, now)

    def _full(self, weight: Tensor) -> Tensor:
        owner = self._owners.get(weight)
        full = widened(weight, {} if owner is None else owner.state.get(weight, {}))
        lost = self._attachment.lost_of(weight)
        return full if lost is None else torch.where(lost.to(weight) == weight.detach(), lost.to(full), full)

    def _write(self, weight: Tensor, wide: Tensor) -> None:
        owner = self._owners.get(weight)
        if isinstance(owner, LowPrecisionOptimizer):
            owner.set_weight(weight, wide)
        else:
            weight.data.copy_(wide)
        self._attachment.take(weight)
        if not _same_bits(wide, self._full(weight)):
            self._attachment.keep(weight, wide)


def _check_whole(weights: Sequence[Tensor]) -> None:
    if any(local_part(weight) is not weight for weight in weights):
        raise SupportError(
            "weights stored in 16 bits are sharded, and full_weights lends whole ones alone; read them by "
            "lightning_mixprec.optim.fp32_state_dict(model, optimizer)"
        )


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.int32), second.view(torch.int32))
