"""Probes on the layers of a model while one step runs: samples of outputs and gradients, recorded calls to compare.

Everything here is for single, chosen steps: hooks are put on the modules when an observation begins and taken off when
it ends, and nothing waits for the device.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from lightning_mixprec.engine.casting import cast
from lightning_mixprec.engine.objects import rebuilt, tensors_in
from lightning_mixprec.engine.sharding import is_sharded
from lightning_mixprec.errors import OtherRankError, SupportError, TraceLeftError, one_line
from lightning_mixprec.evidence.instruments.memory import bytes_of, is_out_of_memory
from lightning_mixprec.evidence.instruments.own_dtypes import HookOf, OwnDtypes, OwnTensors, hookable
from lightning_mixprec.evidence.instruments.sandbox import RandomState, sandbox
from lightning_mixprec.numerics.exponents import Histogram, histograms
from lightning_mixprec.numerics.flat_batches import counted_part, flatten, on_device, sample
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

    Inside a transform of ``torch.func`` the samples of a ``vmap`` are seen together.

    Args:
        layers: The modules by name.
        max_elements: How many elements of a tensor are looked at; None for all.
        own: The dtypes that a layer's output has in low precision; of parts with different ones the wider are left out.
        scale: What losses are multiplied by before backward; gradients are seen without.
        among: All modules by name, if ``layers`` are a part: what others compute is theirs, and not looked at.

    Attributes:
        left_out: By layer the reason that something of it could not be looked at.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        max_elements: int | None,
        own: OwnDtypes | None = None,
        scale: float | Tensor = 1.0,
        among: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self._scale = scale
        self.left_out: dict[str, str] = {}
        self._layers, self._own = layers, own or OwnDtypes()
        self._among = layers if among is None else among
        self._max_elements = max_elements
        self._handles: list[RemovableHandle] = []
        self._tensors = OwnTensors()
        self._outputs: dict[str, list[_Sample]] = {}
        self._gradients: dict[str, list[_Sample]] = {}

    def __enter__(self) -> "Observer":
        for name, module in hookable(self._among).items():
            self._handles.append(module.register_forward_hook(HookOf(module, partial(self._on_output, name))))
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
        with leaving_out(name, self.left_out):
            for place, tensor in self._tensors.among(output):
                if name not in self._layers or self._own.is_wider_than_others(name, place):
                    continue
                if not is_recomputed:
                    self._outputs.setdefault(name, []).append(_sampled(tensor, self._max_elements))
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._on_gradient, name))

    def _on_gradient(self, name: str, gradient: Tensor) -> None:
        with leaving_out(name, self.left_out):
            if isinstance(self._scale, Tensor) or self._scale != 1:
                gradient = gradient.float() / self._scale
            self._gradients.setdefault(name, []).append(_sampled(gradient, self._max_elements))


class LayerCall(NamedTuple):
    """One call of a layer: what it was given and what it gave, and under which conditions."""

    module: nn.Module
    device: torch.device
    args: Any
    kwargs: Any
    output: list[Tensor]
    conditions: "_Conditions"


class _Conditions:
    """The random numbers that a call begins with, if it makes a graph, and attributes that its modules were given.

    Args:
        device: The device that it runs on.
        attributes: By module the attributes that are others than before the step.
    """

    def __init__(self, device: torch.device, attributes: list[tuple[nn.Module, dict[str, Any]]]) -> None:
        self._random = RandomState(device, others=False)
        self._makes_graph = torch.is_grad_enabled()
        self._attributes = attributes

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The same conditions again, within a sandbox."""
        for module, given in self._attributes:
            vars(module).update(cast_to_fp32(given))
        self._random.restore()
        with torch.set_grad_enabled(self._makes_graph):
            yield


class _Before:
    """A layer's weights and the attributes of its modules, before a step.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer, self._weights = layer, list(layer.parameters())
        self._attributes = [(module, dict(vars(module))) for module in layer.modules()]

    def has_own_weights(self) -> bool:
        """True unless the layer is lent other weights. A cast is the weight as a region sees it, as a gathered one."""
        weights = zip(self._layer.parameters(), self._weights, strict=False)
        return all(now is own or now.dtype != own.dtype or is_sharded(own) for now, own in weights)

    def given(self) -> list[tuple[nn.Module, dict[str, Any]]]:
        """The attributes that the step has set since, by module."""
        return [
            (module, given)
            for module, before in self._attributes
            if (given := {name: value for name, value in vars(module).items() if before.get(name, self) is not value})
        ]


class CallRecorder:
    """Records the first call of a few layers while a step runs, to compute it again.

    Args:
        layers: The modules by name.
        device: The device they run on.
        max_bytes: Calls that would take more than what is left of this are left out.

    Attributes:
        calls: The recorded calls, by layer.
        too_large: The layers that ``max_bytes`` left out.
        left_out: By layer the reason that its call could not be recorded.
    """

    def __init__(self, layers: Mapping[str, nn.Module], device: torch.device, max_bytes: int) -> None:
        self._layers, self._device = layers, device
        self._bytes_left = max_bytes
        self._handles: list[RemovableHandle] = []
        self._before: dict[str, _Before] = {}
        self._begun: dict[str, tuple[Any, Any, _Conditions]] = {}
        self.calls: dict[str, LayerCall] = {}
        self.too_large: list[str] = []
        self.left_out: dict[str, str] = {}

    def __enter__(self) -> "CallRecorder":
        for name, module in hookable(self._layers).items():
            self._before[name] = _Before(module)
            begin, end = (HookOf(module, partial(each, name)) for each in (self._begin, self._end))
            self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(end))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._begun.clear()
        self._before.clear()

    def _begin(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if any(name in known for known in (self._begun, self.calls, self.too_large, self.left_out)):
            return
        with leaving_out(name, self.left_out):
            if torch._C._functorch.maybe_current_level() is not None:
                raise SupportError("it is called inside a transform of torch.func (vmap, grad)")
            if not self._before[name].has_own_weights():
                raise SupportError("it is called with other weights than its own (functional_call)")
            arrived = args, kwargs, self._before[name].given()
            if self._has_room(name, tensors_in(arrived)):
                args, kwargs, given = _detached(arrived)
                self._begun[name] = args, kwargs, _Conditions(self._device, given)

    def _end(self, name: str, module: nn.Module, arrived: Any, result: Any) -> None:
        begun = self._begun.pop(name, None)
        if begun is None:
            return
        args, kwargs, conditions = begun
        with leaving_out(name, self.left_out):
            floating = _comparable(result)
            if self._has_room(name, floating):
                output = [tensor.clone() for tensor in floating]
                self.calls[name] = LayerCall(self._layers[name], self._device, args, kwargs, output, conditions)

    def _has_room(self, name: str, tensors: Iterable[Tensor]) -> bool:
        """True if the tensors fit, and then their room is taken; a layer of which they do not is left out."""
        size = sum(map(bytes_of, tensors))
        if size > self._bytes_left:
            self.too_large.append(name)
            return False
        self._bytes_left -= size
        return True


def computed_again(call: LayerCall) -> Tensor:
    """Computes a recorded call again, in whatever formats now are in force, and compares.

    Same layer, same input, same random numbers, with a graph if there was one, and no trace is left: neither in the
    layer nor in the random numbers. Input that came in 16 bits is cast to fp32.

    Args:
        call: The recorded call, of a layer whose sharded weights, if any, are gathered.

    Returns:
        Energy of what is computed now, and of the difference to what was recorded: fp64 [2] on the device. Their ratio
        is the signal-to-quantization-noise ratio.

    Raises:
        SupportError: The call cannot be compared. Whatever the layer raises is raised, too.
    """
    with sandbox(call.module, call.device, is_gathered=True), call.conditions.restored():
        args, kwargs = cast_to_fp32((call.args, call.kwargs))
        reference = _comparable(call.module(*args, **kwargs))
    if [tensor.shape for tensor in reference] != [tensor.shape for tensor in call.output]:
        raise SupportError("it returns another shape when it is run again on the same input")
    with torch.no_grad():
        pairs = [(wide.double(), low.double()) for wide, low in zip(reference, call.output, strict=True)]
        energies = [torch.stack([wide.square().sum(), (wide - low).square().sum()]) for wide, low in pairs]
        return torch.stack(energies).sum(0)


@contextlib.contextmanager
def leaving_out(layer: str, left_out: dict[str, str]) -> Iterator[None]:
    """An error within costs the layer alone and is noted; what ends a replay is raised."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, (TraceLeftError, OtherRankError)):
            raise
        left_out.setdefault(layer, one_line(error))


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
    """Dot products of two gradients of each layer's weights, of which cosines are made; of sharded ones a rank's share.

    Args:
        owned: Names of parameters by layer.
        low: Gradients by name.
        reference: Gradients by name, on the same device.

    Returns:
        fp64 [layers, 3] of (low x reference, low x low, reference x reference); zeros where there is no gradient.
    """
    compared = [[name for name in names if name in low and name in reference] for names in owned.values()]
    pairs = [(counted(low[name]), counted(reference[name])) for names in compared for name in names]
    if not pairs:
        return torch.zeros(len(owned), 3, dtype=torch.float64)
    parts = dots([each for each, _ in pairs], [each for _, each in pairs])
    # In the order of the parameters: a GPU's index_add_ adds in any, and the last bits would change from run to run.
    lengths = on_device(list(map(len, compared)), parts.device)
    return torch.segment_reduce(parts, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)  # unsafe: does not wait


def weight_gradients(
    owned: Mapping[str, Sequence[str]], gradients: Mapping[str, Tensor], max_elements: int | None
) -> Histogram:
    """Statistics of the gradients of each layer's own weights, a row per layer; of sharded ones a rank's share."""
    groups = [[counted_part(gradients[name]) for name in names if name in gradients] for names in owned.values()]
    return histograms(groups, max_elements)


class _Sample(NamedTuple):
    elements: Tensor
    amax: Tensor


def _sampled(tensor: Tensor, max_elements: int | None) -> _Sample:
    """A sample of a tensor; what else watches the step's operations does not see how it is taken."""
    is_watched = torch._C._len_torch_dispatch_stack() > 0
    with torch._C._DisableFuncTorch(), _disable_current_modes() if is_watched else contextlib.nullcontext():
        flat = flatten(whole(tensor).detach())
        if not flat.numel():
            return _Sample(flat, torch.zeros((), device=flat.device))
        low, high = (flat if flat.itemsize > 1 else flat.float()).aminmax()
        return _Sample(sample([flat], max_elements)[0].clone(), torch.maximum(-low, high).double())


def whole(tensor: Tensor) -> Tensor:
    """The tensor that the transforms of ``torch.func`` work on: of a ``vmap`` all samples."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _comparable(output: Any) -> list[Tensor]:
    """The numbers that a layer returns, out of the graph.

    Raises:
        SupportError: There are none.
    """
    floating = [tensor.detach() for tensor in tensors_in(output) if tensor.is_floating_point()]
    if not floating:
        raise SupportError("it returns no floating-point tensor")
    return [tensor.values() if tensor.is_nested else tensor for tensor in floating]


def _detached(value: Any) -> Any:
    """A copy of a value whose objects and tensors are copies, too, out of the graph but ready for another one."""
    return rebuilt(value, _copy_of)


def _copy_of(tensor: Tensor) -> Tensor:
    with torch.enable_grad():  # the copy of a leaf is no leaf: the layer may write to it
        return tensor.detach().requires_grad_(tensor.requires_grad).clone()


def counted(gradient: Tensor) -> Tensor:
    """What this rank counts of a gradient or a weight, dense."""
    return gradient.to_dense() if gradient.is_sparse else counted_part(gradient)
