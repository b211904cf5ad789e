"""Stagnation: weights that an optimizer step leaves as they were although they have a gradient.

Of weights whose lost bits an optimizer keeps, what counts is the weight with these bits. Those that are rounded at
random are passed over: most steps leave one as it was, and none is lost in the mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mixprec import ranks
from lightning_mixprec.engine.sharding import is_sharded
from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.numerics.flat_batches import local_part, on_device, sample
from lightning_mixprec.optim.kept_weights import is_narrow, keeping_in
from lightning_mixprec.optim.low_precision import LowPrecisionOptimizer
from lightning_mixprec.records.advice import STILL_SAMPLES


class Stagnating(NamedTuple):
    """What is known of a layer's weights.

    Attributes:
        rate: Of those with a gradient, the share that the step did not change.
        still: Of those in 16 bits that had a gradient at each of the latest
            :data:`~lightning_mixprec.records.advice.STILL_SAMPLES` sampled steps, the share that has not changed since
            the first of them; None until there were as many.
    """

    rate: float
    still: float | None


class StillWeights:
    """The weights in 16 bits that have not changed at the latest sampled steps, though they had a gradient at each."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, Tensor, Tensor, Tensor]] = {}

    def add(self, name: str, weights: Tensor, has_gradient: Tensor, stays: Tensor) -> Tensor | None:
        """Takes in a step of a parameter; how many of its weights stand still, and of how many, if that is known.

        Args:
            name: The parameter's.
            weights: A sample of it before the step.
            has_gradient: Which of these have a gradient.
            stays: Which of those the step has not changed.
        """
        known = self._known.get(name)
        if known is None or known[1].shape != weights.shape or known[1].dtype != weights.dtype:
            known = (0, weights, torch.ones_like(has_gradient), torch.ones_like(stays))
        count, first, had, stayed = known
        had, stayed = had & has_gradient, stayed & stays & (first == weights)
        self._known[name] = (count + 1, first, had, stayed)
        if count + 1 < STILL_SAMPLES:
            return None
        del self._known[name]
        return torch.stack([stayed.sum(), had.sum()])

    def forget_others(self, names: Mapping[str, Any]) -> None:
        """Begins anew for parameters that were not among those of a step."""
        self._known = {name: known for name, known in self._known.items() if name in names}


class StagnationCheck:
    """Compares a sample of the weights before and after the optimizer steps of one batch.

    Says nothing of weights whose step was skipped, or whose learning rate is 0.

    Args:
        owned: Names of parameters by layer.
        max_elements: How many elements of a parameter are compared; None for all.
        still: What is known of earlier sampled steps.
    """

    def __init__(
        self, owned: Mapping[str, Sequence[str]], max_elements: int | None, still: StillWeights | None = None
    ) -> None:
        self._layer_of = {name: layer for layer, names in owned.items() for name in names}
        self._max_elements = max_elements
        self._still = still
        self._before: dict[str, tuple[nn.Parameter, Optimizer, Tensor, Tensor]] = {}
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
        group_of = {id(param): group for group in optimizer.param_groups for param in group["params"]}
        self._may_be_skipped |= may_be_skipped
        known = ((name, param) for name, param in model.named_parameters() if name in self._layer_of)  # one may be new
        for name, param in known:
            group = group_of.get(id(param))
            if group is None or not param.requires_grad or param.grad is None or param.grad.is_sparse:
                continue
            if name in self._before or _is_rounded_at_random(param, optimizer, group):
                continue
            has_gradient = self._sampled(param.grad) != 0
            for is_step in _conditions(group, found_inf):
                if is_step is not True:
                    has_gradient &= is_step.to(has_gradient.device) if isinstance(is_step, Tensor) else is_step
            self._before[name] = (param, optimizer, self._weights(param, optimizer), has_gradient)

    def after(self) -> None:
        """Compares, at the end of the batch."""
        self._layers = list(dict.fromkeys(self._layer_of[name] for name in self._before))
        row = {layer: index for index, layer in enumerate(self._layers)}
        device = next((param.device for param, *_ in self._before.values()), torch.device("cpu"))
        counts = torch.zeros(len(self._layers), 4, dtype=torch.int64, device=device)
        places: list[int] = []
        sums: list[Tensor] = []
        for name, (param, optimizer, weights, has_gradient) in self._before.items():
            stays = has_gradient & (self._weights(param, optimizer) == weights)
            places.append(row[self._layer_of[name]])
            sums += [stays.sum().to(device), has_gradient.sum().to(device)]
            if self._still is not None and is_narrow(param):
                still = self._still.add(name, weights, has_gradient, stays)
                if still is not None:
                    counts[places[-1], 2:] += still
        if sums:  # of whole numbers: in whatever order a device adds them up
            counts[:, :2].index_add_(0, on_device(places, device), torch.stack(sums).view(-1, 2))
        if self._still is not None:
            self._still.forget_others(self._before)
        if any(is_sharded(param) for param, *_ in self._before.values()):
            ranks.add_up([counts])
        self._before.clear()
        self._transfer = Transfer([counts])

    def rates(self) -> dict[str, Stagnating]:
        """By layer what is known of its weights. Waits until it has arrived."""
        assert self._transfer is not None
        counts = self._transfer.get()[0].tolist()
        if self._may_be_skipped and all(stays == has_gradient for stays, has_gradient, *_ in counts):
            return {}
        return {
            layer: Stagnating(stays / has_gradient, still / had if had else None)
            for layer, (stays, has_gradient, still, had) in zip(self._layers, counts, strict=True)
            if has_gradient
        }

    def _sampled(self, tensor: Tensor) -> Tensor:
        return sample([local_part(tensor.detach()).reshape(-1)], self._max_elements)[0]

    def _weights(self, param: Tensor, optimizer: Optimizer) -> Tensor:
        """A copy of a sample of a weight, with the bits that the optimizer keeps of it, in fp32 if it may keep some."""
        stored, state = self._sampled(param), optimizer.state.get(param, {})
        if not (is_narrow(param) and isinstance(optimizer, LowPrecisionOptimizer)):
            return stored.clone()
        found = keeping_in(state)
        if found is None or found[1] != param.dtype:
            return stored.to(torch.float32)
        return found[0].widened(stored, [self._sampled(state[key]) for key in found[0].dtypes])


def _is_rounded_at_random(param: Tensor, optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    return isinstance(optimizer, LowPrecisionOptimizer) and is_narrow(param) and group["weights"] == "stochastic"


def _conditions(group: Mapping[str, Any], found_inf: Tensor | None) -> list[Tensor | bool]:
    """What has to be true for a step to be one; nobody waits for what is on a device."""
    rate = group.get("lr")
    is_on: list[Tensor | bool] = [] if rate is None else [rate != 0]
    return is_on if found_inf is None else [*is_on, found_inf == 0]
