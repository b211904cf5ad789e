"""A model's step run without a trace: on stand-ins for its weights and buffers, with everything else put back.

While a sandbox is open the model holds copies of its parameters and buffers, so whatever the step does to them (running
statistics, an averaged copy of the weights, clipped weights, gradients) is gone with the copies. Random numbers and the
modules' Python attributes are recorded before and put back after.

What is *not* put back: iterators and open files, what objects of other kinds hold below their own attributes, and
anything that is not within reach of the modules' attributes (see ``attributes`` in this room).
"""

import contextlib
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_mixprec.engine import sharding
from lightning_mixprec.engine.compiling import uncompiled
from lightning_mixprec.errors import SupportError
from lightning_mixprec.evidence.instruments.attributes import Attributes
from lightning_mixprec.numerics.formats import half_dtypes


class RandomState:
    """Random number generators as they were when this was made: torch's on the CPU and on one device, and all others.

    Reading torch's takes a microsecond and does not wait for the device; Python's and NumPy's take fifty times as long.

    Args:
        device: The device beside the CPU.
        others: Whether the generators of Python and NumPy are recorded, too.
    """

    def __init__(self, device: torch.device, *, others: bool = True) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = device if device.type == "cuda" else None
        self._device = torch.cuda.get_rng_state(self._cuda) if self._cuda is not None else None
        self._python = random.getstate() if others else None
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if others and numpy is not None else None

    def is_same(self, other: "RandomState") -> bool:
        """True if torch's generators were in the same state when the other was made."""
        if not torch.equal(self._torch, other._torch):
            return False
        if self._device is None or other._device is None:
            return self._device is other._device
        return torch.equal(self._device, other._device)

    def restore(self) -> None:
        """Sets the recorded generators back."""
        torch.set_rng_state(self._torch)
        if self._device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(self._device, self._cuda)
        if self._python is not None:
            random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)

    def to_dict(self) -> dict[str, Any]:
        """Torch's generators, for a file."""
        return {"torch": self._torch, "device": self._device}

    @classmethod
    def from_dict(cls, state: dict[str, Any], device: torch.device) -> "RandomState":
        """Reads :meth:`to_dict`; the generator of a device of another kind than the recorded one stays as it is."""
        new = cls(device, others=False)
        new._torch = state["torch"]
        if new._device is not None and state["device"] is not None:
            new._device = state["device"]
        return new


class Sandbox:
    """The stand-ins of a model whose step is run without a trace; made by :func:`sandbox`.

    Attributes:
        parameters: Stand-in of each parameter by its name in ``model.named_parameters()``.
        trained: The names of the parameters that require a gradient.
        is_wide: Whether 16-bit weights and buffers have fp32 stand-ins.
    """

    def __init__(self, model: nn.Module, widen: bool, device: torch.device) -> None:
        self._device = device
        self.is_wide = widen
        self._copies: dict[int, Tensor] = {}
        self._kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._attributes = Attributes(model)
        originals = dict(model.named_parameters())
        modules = self._attributes.modules
        every = {id(param): param for module in modules for param in module._parameters.values() if param is not None}
        _refuse_lazy(modules)
        self._grads = [(param, param.grad, param.requires_grad) for param in every.values()]
        self.trained = {name for name, param in originals.items() if param.requires_grad}
        self.parameters = {name: self._stand_in(param) for name, param in originals.items()}
        self._of_original = {id(param): self.parameters[name] for name, param in originals.items()}

    def of(self, original: Tensor) -> Tensor | None:
        """The stand-in of one of the model's own parameters."""
        return self._of_original.get(id(original))

    def open(self) -> None:
        """Puts the stand-ins in place."""
        for module in self._attributes.modules:
            both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in both:
                self._kept.append((tensors, dict(tensors)))
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = self._stand_in(tensor)
        self._attributes.replace(lambda tensor: self._copies.get(id(tensor)))
        # Whatever still reaches an original is a constant, so that no hook on it fires.
        for param, _, _ in self._grads:
            param.grad = None
            param.requires_grad_(False)

    def close(self) -> None:
        """Puts the originals and the attributes back."""
        self._attributes.restore()
        for tensors, originals in self._kept:
            tensors.clear()
            tensors.update(originals)
        for param, _, requires_grad in self._grads:
            param.requires_grad_(requires_grad)
        for param, grad, _ in self._grads:
            param.grad = grad

    def _stand_in(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = _copy(tensor, self.is_wide, self._device)
        return self._copies[id(tensor)]


@contextlib.contextmanager
def sandbox(model: nn.Module, device: torch.device, *, widen: bool = False) -> Iterator[Sandbox]:
    """Opens a sandbox around a model: whatever is run inside leaves the model and the random numbers as they were.

    Compiled modules run eagerly inside. Takes a copy of the weights and buffers in memory for as long as it is open; of
    weights that are sharded over ranks the whole, so all ranks have to open it together.

    Args:
        model: The model.
        device: The device it runs on.
        widen: Whether stand-ins of 16-bit weights and buffers are fp32.

    Raises:
        SupportError: The model has lazy parameters that are not initialised yet.
    """
    state = RandomState(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(sharding.bypassed(model))
        opened = Sandbox(model, widen, device)
        stack.enter_context(uncompiled())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(state.restore)
        stack.callback(torch.clear_autocast_cache)
        stack.callback(opened.close)
        opened.open()
        yield opened


def _copy(tensor: Tensor, widen: bool, device: torch.device) -> Tensor:
    whole: Tensor = tensor.to(device).full_tensor() if sharding.is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    copied = whole.detach().clone()
    if widen and copied.dtype in half_dtypes():
        copied = copied.float()
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
        vars(copied).update(vars(tensor))
    return copied


def _refuse_lazy(modules: list[nn.Module]) -> None:
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
                raise SupportError(
                    f"a step cannot be replayed while a {type(module).__name__} has lazy parameters; run the model on "
                    "one batch before training, as its documentation asks"
                )
