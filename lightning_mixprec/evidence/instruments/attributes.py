"""The Python attributes of a model's modules, recorded before a step and put back after it."""

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_OF_EVERY_MODULE = set(vars(nn.Module())) - {"training"}
_NO_STATE = (type, FunctionType, MethodType, ModuleType)
_NOT_LOOKED_INTO = {"builtins", "functools", "torch", "lightning", "pytorch_lightning", "lightning_fabric"}
_MOST_ITEMS = 1000


class Attributes:
    """Everything that modules hold besides parameters, buffers and registered modules, recorded to be put back.

    Looks into lists, tuples, dicts, sets and deques, and into the attributes of objects that a module holds, unless
    they are torch's or Lightning's; not into the objects that these hold in turn. Restores tensors, arrays of NumPy,
    and random number generators, too; of a container with more than a thousand items only what it holds in which order.

    Attributes:
        modules: The modules of the model, and those that it holds without having them registered.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self._known = {id(module) for module in self.modules}
        self._dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._children: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        self._setters: list[Callable[[], Any]] = []
        for module in self.modules:  # grows while modules are found
            self._children.append((module._modules, dict(module._modules)))
            self._keep_attributes(vars(module), looks_into_objects=True)

    def replace(self, stand_in_of: Callable[[Tensor], Tensor | None]) -> None:
        """Puts stand-ins for parameters into the containers that hold some."""

        def replaced(value: Any) -> Any:
            if type(value) is tuple and any(isinstance(item, nn.Parameter) for item in value):
                return tuple(map(replaced, value))
            stand_in = stand_in_of(value) if isinstance(value, nn.Parameter) else None
            return value if stand_in is None else stand_in

        for container, before in self._containers:
            if isinstance(before, dict):
                _refill(container, {key: replaced(value) for key, value in before.items()})
            elif not isinstance(before, set):
                _refill(container, [replaced(item) for item in before])
        for attributes, before in self._dicts:
            attributes.update({name: replaced(value) for name, value in before.items() if type(value) is tuple})

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back."""
        for attributes, before in self._dicts:
            for name in [name for name in attributes if name not in before and name not in _OF_EVERY_MODULE]:
                del attributes[name]
            for name, value in before.items():
                if attributes.get(name, self) is not value:
                    attributes[name] = value
        for container, before in (*self._children, *self._containers):
            _refill(container, before)
        for tensor, version, copy in self._tensors:
            if version_of(tensor) != version:
                tensor.copy_(copy)
        for restore in self._setters:
            restore()

    def _keep_attributes(self, attributes: dict[str, Any], looks_into_objects: bool) -> None:
        before = {name: value for name, value in attributes.items() if name not in _OF_EVERY_MODULE}
        self._dicts.append((attributes, before))
        self._keep_all(before.values(), looks_into_objects)

    def _keep_all(self, values: Iterable[Any], looks_into_objects: bool) -> None:
        for value in values:
            if isinstance(value, (bool, int, float, str, type(None))) or id(value) in self._known:
                continue
            if isinstance(value, Tensor):
                if value.is_leaf and not isinstance(value, nn.Parameter):
                    self._known.add(id(value))
                    self._tensors.append((value, version_of(value), value.detach().clone()))
                continue
            self._known.add(id(value))
            if isinstance(value, nn.Module):
                new = [module for module in value.modules() if module is value or id(module) not in self._known]
                self._known.update(map(id, new))
                self.modules += new
            elif isinstance(value, (list, tuple, dict, set, deque)):
                if not isinstance(value, tuple):
                    self._containers.append((value, _copy(value)))
                if len(value) <= _MOST_ITEMS:
                    self._keep_all(value.values() if isinstance(value, dict) else value, looks_into_objects)
            elif (setter := _setter(value)) is not None:
                self._setters.append(setter)
            elif looks_into_objects and _is_looked_into(value):
                self._keep_attributes(vars(value), looks_into_objects=False)


def _is_looked_into(value: Any) -> bool:
    package = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and not isinstance(value, _NO_STATE) and package not in _NOT_LOOKED_INTO


def _setter(value: Any) -> Callable[[], Any] | None:
    """A function that sets a random number generator or an array back; None if the value is neither."""
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state)
    if isinstance(value, random.Random):
        internal = value.getstate()
        return lambda: value.setstate(internal)
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.Generator):
        bits = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", bits)
    if isinstance(value, numpy.random.RandomState):
        legacy = value.get_state()
        return lambda: value.set_state(legacy)
    if isinstance(value, numpy.ndarray) and value.flags.writeable:
        copy = value.copy()
        return lambda: numpy.copyto(value, copy)
    return None


def _copy(container: Any) -> Any:
    kind = next(kind for kind in (dict, set, deque, list) if isinstance(container, kind))
    return kind(container)


def _refill(container: Any, before: Any) -> None:
    """Makes a container hold the same objects as before, in the same order; one that does is not touched."""
    if isinstance(container, dict):
        if list(map(id, container.values())) != list(map(id, before.values())) or list(container) != list(before):
            container.clear()
            container.update(before)
    elif isinstance(container, (list, deque)):
        if len(container) != len(before) or any(a is not b for a, b in zip(container, before, strict=True)):
            container.clear()
            container.extend(before)
    elif container != before:
        container.clear()
        container.update(before)


def version_of(tensor: Tensor) -> int:
    """The number of writes to a tensor; 0 for inference tensors, which do not count."""
    return 0 if tensor.is_inference() else tensor._version
