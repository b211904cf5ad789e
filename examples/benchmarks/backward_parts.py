"""What the rounding of backward does to the weights' gradient, layer by layer: a term that sensitivities might have.

The backward part of a layer and format is the relative squared error of the weights' gradient that its backward makes,
from the fp32 gradient at its output: the error of its own weights' gradient, and the relative error of the gradient
that it hands on times the squared gradient of the weights before it, both as a share of the squared gradient of all
weights. Like sensitivities these add up.
"""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mixprec import PrecisionPolicy
from lightning_mixprec.engine.border_plan import Site, survey
from lightning_mixprec.engine.objects import copied, mapped, tensors_in
from lightning_mixprec.evidence.instruments.sandbox import RandomState
from lightning_mixprec.evidence.measuring.one_layer import in_format, unchanged
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import PolicyFormats
from lightning_mixprec.planning.sensitivity import Sensitivities

REFERENCE = "fp32"

Parts = dict[tuple[str, str], float]


class Calls:
    """Keeps while a step runs what each layer is called with, and the gradients that arrive at its outputs."""

    def __init__(self, sites: Sequence[Site], device: torch.device) -> None:
        self.sites, self.device = sites, device
        self.calls: list[tuple[Site, Any, RandomState, dict[int, Tensor]]] = []
        self._open: dict[str, list[tuple[Any, RandomState]]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "Calls":
        for site in self.sites:
            self._handles.append(site.module.register_forward_pre_hook(partial(self._before, site), with_kwargs=True))
            self._handles.append(site.module.register_forward_hook(partial(self._after, site)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, site: Site, module: nn.Module, args: Any, kwargs: Any) -> None:
        kept = copied((args, kwargs)), RandomState(self.device, others=False)
        self._open.setdefault(site.name, []).append(kept)

    def _after(self, site: Site, module: nn.Module, args: Any, output: Any) -> None:
        given, random_numbers = self._open[site.name].pop()
        gradients: dict[int, Tensor] = {}
        for place, tensor in enumerate(floating(output)):
            if tensor.requires_grad:
                tensor.register_hook(partial(gradients.__setitem__, place))
        self.calls.append((site, given, random_numbers, gradients))


def floating(value: Any) -> list[Tensor]:
    """Return the floating tensors in something."""
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def gradients_of(call: Any, format: str, base: Any, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of a call's own weights and inputs, in a format, from those that arrived at its outputs."""
    site, given, random_numbers, arrived = call
    inputs = [each.detach().clone().requires_grad_() for each in floating(given)]
    own = [param for part in site.parts for param in part.parameters(recurse=False) if param.requires_grad]
    fresh = iter(inputs)
    args, kwargs = mapped(given, lambda each: next(fresh).clone() if each.is_floating_point() else each)
    random_numbers.restore()
    with unchanged(site.module), in_format(site, format, base, device):
        outputs = floating(site.module.forward(*args, **kwargs))
        ends = [(outputs[place], gradient.to(outputs[place].dtype)) for place, gradient in arrived.items()]
        ends = [each for each in ends if each[0].requires_grad]
        if not ends or not (own or inputs):
            return [], []
        with torch.autocast(device.type, enabled=False):
            made, given_back = zip(*ends, strict=True)
            found = torch.autograd.grad(made, [*own, *inputs], given_back, allow_unused=True)
    whole = [torch.zeros_like(one) if each is None else each for one, each in zip([*own, *inputs], found, strict=True)]
    return [each.double() for each in whole[: len(own)]], [each.double() for each in whole[len(own) :]]


def parts_of_batch(model: Any, batch: Any, sensitivities: Sensitivities) -> Parts:
    """Return the backward parts of layers and formats on a batch."""
    base = PrecisionPolicy(REFERENCE).resolve(model)
    offers = {
        name: [format for format, offer in offers.items() if offer.problem is None and format != REFERENCE]
        for layers, offers in zip(sensitivities.variables, sensitivities.offers, strict=True)
        for name in layers
    }
    replay = StepReplay(model, PolicyFormats(model, REFERENCE, model.device, 1.0), model.device)
    calls = Calls([site for site in survey(model) if site.name], model.device)
    parts: Parts = {}
    with replay.opened(reference=True) as stand_ins:
        with calls:
            replayed = replay.run(stand_ins, batch, 0, random=RandomState(model.device))
        square = {name: float(each.double().square().sum()) for name, each in replayed.gradients.items()}
        everything, before = sum(square.values()), 0.0
        for call in calls.calls:
            site = call[0]
            names = [name for name in square if name.rpartition(".")[0] == site.name]
            own, handed = gradients_of(call, REFERENCE, base, model.device)
            for format in offers.get(site.name, []):
                own_low, handed_low = gradients_of(call, format, base, model.device)
                part = error(own_low, own) + relative(handed_low, handed) * before
                key = site.name, format
                parts[key] = parts.get(key, 0.0) + part / everything
            before += sum(square.pop(name) for name in names)
    return parts


def error(low: Sequence[Tensor], wide: Sequence[Tensor]) -> float:
    """Return the sum of squared differences."""
    return sum(float((one - other).square().sum()) for one, other in zip(low, wide, strict=True))


def relative(low: Sequence[Tensor], wide: Sequence[Tensor]) -> float:
    """Return the sum of squared differences as a share of the sum of squares."""
    whole = sum(float(each.square().sum()) for each in wide)
    return error(low, wide) / whole if whole else 0.0


def summed(parts: Sequence[Parts], formats: Mapping[str, str]) -> float:
    """Return the mean over batches of what the layers' formats come to."""
    return statistics.fmean(sum(each.get(item, 0.0) for item in formats.items()) for each in parts)
