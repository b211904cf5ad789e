"""A module that computes as a policy says, formats inside its forward, for as long as it is traced and compared."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mixprec.engine.apply import Attachment, attach
from lightning_mixprec.engine.compiling import uncompiled
from lightning_mixprec.errors import ExportError, ReplayError
from lightning_mixprec.evidence.instruments.restoring.attributes import Attributes
from lightning_mixprec.evidence.instruments.sandbox import RandomState
from lightning_mixprec.numerics.formats import REFERENCE, is_wider
from lightning_mixprec.policy.assignment import LayerPrecision


class Formatted(nn.Module):
    """A module whose forward enters the formats of its layers itself: tracers see every cast.

    What it returns is plain: dataclasses become dicts of their fields, named tuples tuples, and what is None in a
    mapping is left out, so that a file needs no class of its user's.

    Args:
        module: The module, with borders in place.
        attachment: The formats in force on it.
        layers: What they are.
    """

    def __init__(self, module: nn.Module, attachment: Attachment, layers: Mapping[str, LayerPrecision]) -> None:
        super().__init__()
        self.module = module
        self.held = (attachment, layers)  # in a tuple: scripting looks into attributes
        self.names: tuple[str, ...] = ()
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, in its formats; where there are ``names``, the last arguments have these."""
        if self.names:
            first = len(args) - len(self.names)
            args, kwargs = args[:first], dict(zip(self.names, args[first:], strict=True))
        with self.held[0].context():
            return plain(self.module(*args, **kwargs))

    @contextlib.contextmanager
    def in_fp32(self) -> Iterator[None]:
        """Everything that computes in fewer bits in fp32, within."""
        attachment, layers = self.held
        wide = {
            name: layer if is_wider(layer.compute, REFERENCE) else LayerPrecision(layer.param, REFERENCE)
            for name, layer in layers.items()
        }
        attachment.change(wide, is_lent=True)
        try:
            yield
        finally:
            attachment.change(layers, is_lent=True)


@contextlib.contextmanager
def formatted(module: nn.Module, layers: Mapping[str, LayerPrecision], device: torch.device) -> Iterator[Formatted]:
    """A module in eval mode under an assignment, computed by torch's own kernels; all is put back afterwards.

    Args:
        module: The module.
        layers: What each of its layers is assigned.
        device: Where it is.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_it_was(module, device))
        stack.enter_context(uncompiled())
        stack.enter_context(_without_fused_attention())
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # tracers warn of what is compared here anyway
        _evaluate(module)
        attachment = attach(module, layers, device.type, emulate=False)
        stack.callback(attachment.detach)
        yield Formatted(module, attachment, layers)


def _evaluate(module: nn.Module) -> None:
    """Eval mode; graphs that were exported and quantized refuse to be asked, and are in the mode that they have."""
    try:
        module.eval()
    except NotImplementedError:
        for each in module.modules():
            each.training = False


@contextlib.contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Attention computed by its parts: what is fused in eval mode passes the parts' formats by."""
    was_on = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_on)


@contextlib.contextmanager
def _as_it_was(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts back what calls in eval mode leave: what modules and their hooks hold, buffers, modes, random numbers."""
    random, held = RandomState(device), Attributes(module, ReplayError)
    values = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for put_back in held.put_back():
            put_back()
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(bits(buffer), bits(value)):
                    buffer.copy_(value)
        random.restore()


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes: NaN is not equal to itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.detach()


def plain(result: Any) -> Any:
    """A result as tensors in dicts, lists and tuples.

    Raises:
        ExportError: It holds an object of another class.

    >>> plain({"logits": torch.ones(1), "loss": None})
    {'logits': tensor([1.])}
    """
    if result is None or isinstance(result, Tensor | bool | int | float | str):
        return result
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        return {str(name): plain(value) for name, value in result.items() if value is not None}
    if isinstance(result, list):
        return [plain(value) for value in result]
    if isinstance(result, tuple):
        return tuple(plain(value) for value in result)
    raise ExportError(
        f"forward returns a {type(result).__name__}, which a file cannot hold; let it return tensors, or tuples, "
        "lists, dicts or dataclasses of tensors"
    )
