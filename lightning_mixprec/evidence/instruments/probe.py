"""Probes on the layers of a model while one step runs: samples of outputs and gradients, recorded calls to compare.

Everything here is for single, chosen steps: hooks are put on the modules when an observation begins and taken off when
it ends, and nothing waits for the device.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from lightning_mixprec.engine.casting import cast
from lightning_mixprec.engine.objects import tensors_in
from lightning_mixprec.evidence.instruments.memory import bytes_of
from lightning_mixprec.evidence.instruments.own_dtypes import OwnDtypes, OwnTensors, hookable
from lightning_mixprec.evidence.instruments.sandbox import RandomState, sandbox
from lightning_mixprec.numerics.exponents import Histogram, histograms
from lightning_mixprec.numerics.flat_batches import flatten, on_device, sample
from lightning_mixprec.numerics.formats import half_dtypes
from lightning_mixprec.numerics.similarity import dots
from lightning_mixprec.policy.module_names import walk


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by their first names, wrappers left out.

    >>> shared = nn.Linear(2, 2)
    >>> list(layers_of(nn.Sequential(shared, nn.ReLU(), shared)))
    ['', '0', '1']
    """
    first: dict[int, str] = {}
    return {name: module for name, module, _ in walk(model) if first.setdefault(id(module), name) == name}


class Observer:
    """Samples the outputs of all layers and the gradients that arrive at them while a step runs.

    A tensor that a container hands on from a layer inside it is that layer's alone. Keeps at most ``max_elements``
    elements of a tensor, so its memory is bounded by the number of layer calls.

    Args:
        layers: The modules by name.
        max_elements: How many elements of a tensor are looked at; None for all.
        own: The dtypes that a layer's output has in low precision; of parts with different ones the wider are left out.
    """

    def __init__(self, layers: Mapping[str, nn.Module], max_elements: int | None, own: OwnDtypes | None = None) -> None:
        self._layers, self._own = layers, own or OwnDtypes()
        self._max_elements = max_elements
        self._handles: list[RemovableHandle] = []
        self._tensors = OwnTensors()
        self._outputs: dict[str, list[_Sample]] = {}
        self._gradients: dict[str, list[_Sample]] = {}

    def __enter__(self) -> "Observer":
        for name, module in hookable(self._layers).items():
            self._handles.append(module.register_forward_hook(partial(self._on_output, name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def outputs(self) -> Histogram:
        """Statistics of what each layer computed, a row per layer, on the device."""
        return self._rows(self._outputs)

    def gradients(self) -> Histogram:
        """Statistics of the gradients that arrived at each layer's output, a row per layer, on the device."""
        return self._rows(self._gradients)

    def _rows(self, samples: Mapping[str, list["_Sample"]]) -> Histogram:
        groups = [samples.get(name, []) for name in self._layers]
        rows = histograms([[each.elements for each in group] for group in groups])
        zero = torch.zeros((), device=rows.amax.device)
        amax = torch.stack([torch.stack([zero, *(each.amax for each in group)]).amax() for group in groups]).double()
        return replace(rows, amax=torch.where(amax.isfinite(), torch.maximum(amax, rows.amax), rows.amax))

    def _on_output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        is_recomputed = torch._C._current_graph_task_id() != -1
        for place, tensor in self._tensors.among(output):
            if self._own.is_wider_than_others(name, place):
                continue
            if not is_recomputed:
                self._outputs.setdefault(name, []).append(_sampled(tensor, self._max_elements))
            if tensor.requires_grad:
                tensor.register_hook(partial(self._on_gradient, name))

    def _on_gradient(self, name: str, gradient: Tensor) -> None:
        self._gradients.setdefault(name, []).append(_sampled(gradient, self._max_elements))


class LayerCall(NamedTuple):
    """One call of a layer: what it was given and what it gave, and the random numbers it began with."""

    module: nn.Module
    device: torch.device
    args: Any
    kwargs: Any
    output: list[Tensor]
    random: RandomState


class CallRecorder:
    """Records the first call of a few layers while a step runs, to compute it again.

    Args:
        layers: The modules by name.
        device: The device they run on.
        max_bytes: Calls that would take more than what is left of this are left out.
    """

    def __init__(self, layers: Mapping[str, nn.Module], device: torch.device, max_bytes: int) -> None:
        self._layers, self._device = layers, device
        self._bytes_left = max_bytes
        self._handles: list[RemovableHandle] = []
        self._begun: dict[str, tuple[Any, Any, RandomState]] = {}
        self.calls: dict[str, LayerCall] = {}
        self.too_large: list[str] = []

    def __enter__(self) -> "CallRecorder":
        for name, module in hookable(self._layers).items():
            begin, end = partial(self._begin, name), partial(self._end, name)
            self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(end))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._begun.clear()

    def _begin(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if name in self._begun or name in self.calls or name in self.too_large:
            return
        size = sum(map(bytes_of, tensors_in((args, kwargs))))
        if size > self._bytes_left:
            self.too_large.append(name)
            return
        self._bytes_left -= size
        self._begun[name] = (*_detached((args, kwargs)), RandomState(self._device, others=False))

    def _end(self, name: str, module: nn.Module, arrived: Any, result: Any) -> None:
        begun = self._begun.pop(name, None)
        if begun is None:
            return
        floating = [tensor for tensor in tensors_in(result) if tensor.is_floating_point()]
        size = sum(map(bytes_of, floating))
        if size > self._bytes_left:
            self.too_large.append(name)
            return
        self._bytes_left -= size
        args, kwargs, state = begun
        output = [tensor.detach().clone() for tensor in floating]
        self.calls[name] = LayerCall(self._layers[name], self._device, args, kwargs, output, state)


@torch.no_grad()
def computed_again(call: LayerCall) -> Tensor:
    """Computes a recorded call again, in whatever formats now are in force, and compares.

    Same layer, same input, same random numbers, and no trace is left: neither in the layer nor in the random numbers.
    Input that came in 16 bits is cast to fp32.

    Args:
        call: The recorded call.

    Returns:
        Energy of what is computed now, and of the difference to what was recorded: fp64 [2] on the device. Their ratio
        is the signal-to-quantization-noise ratio.
    """
    args, kwargs = cast_to_fp32((call.args, call.kwargs))
    with sandbox(call.module, call.device):
        call.random.restore()
        output = call.module(*args, **kwargs)
    reference = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    energies = [
        torch.stack([wide.double().square().sum(), (wide.double() - low.double()).square().sum()])
        for wide, low in zip(reference, call.output, strict=False)
        if wide.shape == low.shape
    ]
    return torch.stack(energies).sum(0) if energies else torch.full((2,), float("nan"), dtype=torch.float64)


def cast_to_fp32(value: Any) -> Any:
    """Casts the 16-bit tensors in nested containers to fp32; wider ones stay."""
    return cast(value, dict.fromkeys(half_dtypes(), torch.float32))


def own_parameters(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The names of each layer's own parameters in ``model.named_parameters()``; a shared one is the first layer's.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> own_parameters(model, layers_of(model))
    {'': [], '0': ['0.weight'], '1': []}
    """
    left = {id(param): name for name, param in model.named_parameters()}
    return {
        layer: [left.pop(id(param)) for param in module._parameters.values() if id(param) in left]
        for layer, module in layers.items()
    }


def gradient_dots(
    owned: Mapping[str, Sequence[str]], low: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> Tensor:
    """Dot products of two gradients of each layer's weights, of which cosines are made.

    Args:
        owned: Names of parameters by layer.
        low: Gradients by name.
        reference: Gradients by name, on the same device.

    Returns:
        fp64 [layers, 3] of (low x reference, low x low, reference x reference); zeros where there is no gradient.
    """
    rows: list[int] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for row, names in enumerate(owned.values()):
        for name in names:
            if name in low and name in reference:
                rows.append(row)
                pairs.append((_dense(low[name]), _dense(reference[name])))
    if not pairs:
        return torch.zeros(len(owned), 3, dtype=torch.float64)
    parts = dots([each for each, _ in pairs], [each for _, each in pairs])
    total = torch.zeros(len(owned), 3, dtype=torch.float64, device=parts.device)
    return total.index_add_(0, on_device(rows, parts.device), parts)


def weight_gradients(
    owned: Mapping[str, Sequence[str]], gradients: Mapping[str, Tensor], max_elements: int | None
) -> Histogram:
    """Statistics of the gradients of each layer's own weights, a row per layer, on the device."""
    groups = [[gradients[name] for name in names if name in gradients] for names in owned.values()]
    return histograms(groups, max_elements)


class _Sample(NamedTuple):
    elements: Tensor
    amax: Tensor


def _sampled(tensor: Tensor, max_elements: int | None) -> _Sample:
    """A sample of a tensor; what else watches the step's operations does not see how it is taken."""
    is_watched = torch._C._len_torch_dispatch_stack() > 0
    with _disable_current_modes() if is_watched else contextlib.nullcontext():
        flat = flatten(tensor.detach())
        if not flat.numel():
            return _Sample(flat, torch.zeros((), device=flat.device))
        low, high = (flat if flat.itemsize > 1 else flat.float()).aminmax()
        return _Sample(sample([flat], max_elements)[0].clone(), torch.maximum(-low, high).double())


def _detached(value: Any) -> Any:
    """A copy of nested containers whose tensors are copies, too, out of the graph."""
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.detach().clone())

    return tree_map_only(Tensor, copied, value)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
