"""Stagnation: weights that an optimizer step leaves as they were although they have a gradient."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mixprec import ranks
from lightning_mixprec.engine.sharding import is_sharded
from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.numerics.flat_batches import local_part, sample


class StagnationCheck:
    """Compares a sample of the weights before and after the optimizer steps of one batch.

    Says nothing of weights whose step was skipped.

    Args:
        owned: Names of parameters by layer.
        max_elements: How many elements of a parameter are compared; None for all.
    """

    def __init__(self, owned: Mapping[str, Sequence[str]], max_elements: int | None) -> None:
        self._layer_of = {name: layer for layer, names in owned.items() for name in names}
        self._max_elements = max_elements
        self._before: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = {}
        self._may_be_skipped = False
        self._transfer: Transfer | None = None
        self._layers: list[str] = []

    @property
    def has_stepped(self) -> bool:
        """True if an optimizer has stepped, or is about to."""
        return bool(self._before)

    def before(
        self, model: nn.Module, optimizer: Optimizer, found_inf: Tensor | None, *, may_be_skipped: bool = False
    ) -> None:
        """Notes the weights that an optimizer is about to change, and which have a gradient.

        Args:
            model: The model.
            optimizer: The optimizer.
            found_inf: The flag that the step will be skipped; None if there is none, or not yet.
            may_be_skipped: Whether the step may be skipped although there is no flag.
        """
        own = {id(param) for group in optimizer.param_groups for param in group["params"]}
        self._may_be_skipped |= may_be_skipped
        known = ((name, param) for name, param in model.named_parameters() if name in self._layer_of)  # one may be new
        trained = {name: param for name, param in known if param.requires_grad and id(param) in own}
        for name, param in trained.items():
            if param.grad is not None and name not in self._before and not param.grad.is_sparse:
                has_gradient = self._sampled(param.grad) != 0
                if found_inf is not None:
                    has_gradient &= (found_inf == 0).to(param.device)
                self._before[name] = (param, self._sampled(param).clone(), has_gradient)

    def after(self) -> None:
        """Compares, at the end of the batch."""
        self._layers = list(dict.fromkeys(self._layer_of[name] for name in self._before))
        row = {layer: index for index, layer in enumerate(self._layers)}
        device = next((param.device for param, _, _ in self._before.values()), torch.device("cpu"))
        counts = torch.zeros(len(self._layers), 2, dtype=torch.int64, device=device)
        for name, (param, weights, has_gradient) in self._before.items():
            stays = has_gradient & (self._sampled(param) == weights)
            counts[row[self._layer_of[name]]] += torch.stack([stays.sum(), has_gradient.sum()])
        if any(is_sharded(param) for param, _, _ in self._before.values()):
            ranks.add_up([counts])
        self._before.clear()
        self._transfer = Transfer([counts])

    def rates(self) -> dict[str, float]:
        """By layer, the share of its weights with a gradient that did not change. Waits until it has arrived."""
        assert self._transfer is not None
        counts = self._transfer.get()[0].tolist()
        if self._may_be_skipped and all(stays == has_gradient for stays, has_gradient in counts):
            return {}
        return {
            layer: stays / has_gradient
            for layer, (stays, has_gradient) in zip(self._layers, counts, strict=True)
            if has_gradient
        }

    def _sampled(self, tensor: Tensor) -> Tensor:
        return sample([local_part(tensor.detach()).reshape(-1)], self._max_elements)[0]
