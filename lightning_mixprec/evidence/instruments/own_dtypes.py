"""The dtypes that a layer's own numbers have while a step runs in low precision.

A layer that is to compute in fp16 may hold fp32 numbers all the same: autocast computes norms and losses in fp32, and
an embedding is not cast at all. What is said of a number goes by the narrowest dtype that it has: as it is computed, or
as what takes it casts it.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mixprec.engine.objects import tensors_in
from lightning_mixprec.evidence.instruments.restoring.contents import version_of
from lightning_mixprec.policy.module_names import is_scripted

_CAST = "ToCopyBackward0"


def hookable(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers that take hooks."""
    return {name: module for name, module in layers.items() if not is_scripted(module)}


class HookOf:
    """A hook of one module. A copy of the module that a step makes has it, too, and there it does nothing.

    Args:
        module: The module.
        function: What it calls: with the module, and what torch gives hooks of its kind.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self._module, self._function = module, function

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        """The function's result; None for another module."""
        return self._function(module, *args) if module is self._module else None

    def __deepcopy__(self, memo: Any) -> "HookOf":
        """The same."""
        return self


class OwnTensors:
    """Tells what a layer computed itself from what it hands on from a layer inside it, which is that layer's alone."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def among(self, output: Any) -> Iterator[tuple[int, Tensor]]:
        """The layer's own floating tensors in its output, each with its place there."""
        floating = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        for place, tensor in enumerate(floating):
            seen = self._seen.get(id(tensor))
            if seen is None or seen[0]() is not tensor or seen[1] != version_of(tensor):
                self._seen[id(tensor)] = weakref.ref(tensor), version_of(tensor)
                yield place, tensor


@dataclass
class OwnDtypes:
    """The dtypes of layers' own numbers, as far as they are known; the narrowest where there are several.

    Attributes:
        outputs: By layer and place in its output, that of what it hands on and of the gradient that arrives there.
        weights: By layer, the one in which the gradient of its weights arrives.
    """

    outputs: dict[str, dict[int, torch.dtype]] = field(default_factory=dict)
    weights: dict[str, torch.dtype] = field(default_factory=dict)

    def of_output(self, layer: str) -> torch.dtype | None:
        """The narrowest of its outputs' dtypes; None if it is not known."""
        return min(self.outputs.get(layer, {}).values(), key=_bytes, default=None)

    def is_wider_than_others(self, layer: str, place: int) -> bool:
        """True for a part of a layer's output that has a wider dtype than another part."""
        known, narrowest = self.outputs.get(layer, {}).get(place), self.of_output(layer)
        return known is not None and narrowest is not None and known.itemsize > narrowest.itemsize

    def is_several(self, layer: str) -> bool:
        """True if the parts of a layer's output have dtypes of several widths."""
        return any(self.is_wider_than_others(layer, place) for place in self.outputs.get(layer, {}))


class DtypeRecorder:
    """Records the dtypes of layers' own numbers while a step runs.

    Args:
        layers: The modules by name.
        own: Takes over what is found.
    """

    def __init__(self, layers: Mapping[str, nn.Module], own: OwnDtypes) -> None:
        self._layers, self._own = layers, own
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "DtypeRecorder":
        self._tensors, self._seen = OwnTensors(), set[tuple[Any, torch.dtype | None]]()
        self._layer_of: dict[int, str] = {}
        self._maker_of: dict[Any, tuple[str, int]] = {}
        for name, module in hookable(self._layers).items():
            self._handles.append(module.register_forward_pre_hook(HookOf(module, partial(self._note_weights, name))))
            self._handles.append(module.register_forward_hook(HookOf(module, partial(self._on_output, name))))
            self._note_weights(name, module)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()
        self._maker_of.clear()

    def _note_weights(self, name: str, module: nn.Module, args: Any = ()) -> None:
        """Notes whose the weights are; when a layer is called they may be others, gathered from all ranks."""
        for param in module._parameters.values():
            self._layer_of.setdefault(id(param), name)

    def _on_output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        for place, tensor in self._tensors.among(output):
            if tensor.grad_fn is not None:
                self._note_output(name, place, _computed_in(tensor))
                self._follow(tensor.grad_fn)
                self._maker_of[tensor.grad_fn] = name, place

    def _follow(self, newest: Any) -> None:
        """Follows the graph of backward from an output. What casts a number is a node with one alone before it."""
        waiting: list[tuple[Any, torch.dtype | None]] = [(newest, None)]
        while waiting:
            node, cast_to = waiting.pop()
            if node is None or (node, cast_to) in self._seen:
                continue
            self._seen.add((node, cast_to))
            weight = getattr(node, "variable", None)
            if weight is not None and id(weight) in self._layer_of:
                layer = self._layer_of[id(weight)]
                dtype = _narrower(cast_to, weight.dtype)
                self._own.weights[layer] = _narrower(self._own.weights.get(layer), dtype)
            if cast_to is not None and node in self._maker_of:
                self._note_output(*self._maker_of[node], cast_to)
            before = node.next_functions
            below = _narrower(cast_to, node._input_metadata[0].dtype) if len(before) == 1 else None
            waiting += [(each, below) for each, _ in before]

    def _note_output(self, name: str, place: int, dtype: torch.dtype) -> None:
        known = self._own.outputs.setdefault(name, {})
        known[place] = _narrower(known.get(place), dtype)


def _computed_in(tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor before it was cast, if that is the last that happened to it."""
    node, dtype = tensor.grad_fn, tensor.dtype
    while node is not None and node.name() == _CAST:
        node, place = node.next_functions[0]
        dtype = _narrower(dtype, node._input_metadata[place].dtype) if node is not None else dtype
    return dtype


def _narrower(one: torch.dtype | None, other: torch.dtype) -> torch.dtype:
    return other if one is None or other.itemsize < one.itemsize else one


def _bytes(dtype: torch.dtype) -> int:
    return dtype.itemsize
