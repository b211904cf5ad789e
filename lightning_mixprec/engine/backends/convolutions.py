"""Convolutions of 16-bit tensors, transposed ones too, with fp32 accumulation; what holds for products holds here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_mixprec.engine.backends.products import applied, opaque, summed_to, without_autocast

Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]
"""Stride, padding, dilation, whether transposed, output padding and groups of a convolution."""

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"


@opaque(f"convolution(Tensor x, Tensor w, Tensor? bias, {_GEOMETRY}) -> Tensor")
def _convolution(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    with without_autocast(x):
        return torch.convolution(x.float(), w.float(), None if bias is None else bias.float(), *geometry).to(x.dtype)


@opaque(f"convolution_backward(Tensor grad, Tensor x, Tensor w, {_GEOMETRY}, bool of_x, bool of_w) -> Tensor[]")
def _gradients(grad: Tensor, x: Tensor, w: Tensor, *rest: Any) -> list[Tensor]:
    *geometry, of_x, of_w = rest
    wide = (grad.float(), x.float(), w.float())
    with without_autocast(x):
        found = torch.ops.aten.convolution_backward(*wide, None, *geometry, [of_x, of_w, False])
    return [gradient.to(x.dtype) for gradient in found if gradient is not None]


class Convolution(torch.autograd.Function):
    """A convolution of a batch of one 16-bit dtype, transposed or not, with its bias added before it is rounded."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> Any:
        """The convolution, rounded once."""
        return _convolution(x, w, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps the operands."""
        x, w, _, ctx.geometry = inputs
        ctx.save_for_backward(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients, each rounded once."""
        x, w = ctx.saved_tensors
        of_x, of_w, of_bias, _ = ctx.needs_input_grad
        grad_x, grad_w = _gradients_of(grad, x, w, ctx.geometry, of_x, of_w)
        shape = [1, grad.shape[1], *[1] * (grad.dim() - 2)]
        grad_bias = summed_to(grad, shape, 1.0).reshape(-1) if of_bias else None
        return grad_x, grad_w, grad_bias, None


class ConvolutionGradients(torch.autograd.Function):
    """The gradients of a convolution's batch and weight, as far as they are asked for.

    Both are linear in each of what they are made of, so that theirs are convolutions and gradients of convolutions.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor, w: Tensor, geometry: Geometry, of_x: bool, of_w: bool) -> Any:
        """A tuple of those asked for."""
        return tuple(_gradients(grad, x, w, *geometry, of_x, of_w))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps what they are made of."""
        grad, x, w, ctx.geometry, ctx.of_x, ctx.of_w = inputs
        ctx.save_for_backward(grad, x, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients of the gradients."""
        grad, x, w = ctx.saved_tensors
        of_grad, of_x, of_w = ctx.needs_input_grad[:3]
        along_x, along_w = grads[0] if ctx.of_x else None, grads[-1] if ctx.of_w else None
        grad_grad = grad_x = grad_w = None
        if along_x is not None:
            if of_grad:
                grad_grad = applied(Convolution, along_x, w, None, ctx.geometry)
            grad_w = _gradients_of(grad, along_x, w, ctx.geometry, False, of_w)[1]
        if along_w is not None:
            if of_grad:
                more = applied(Convolution, x, along_w, None, ctx.geometry)
                grad_grad = more if grad_grad is None else grad_grad + more
            grad_x = _gradients_of(grad, x, along_w, ctx.geometry, of_x, False)[0]
        return grad_grad, grad_x, grad_w, None, None, None


def _gradients_of(
    grad: Tensor, x: Tensor, w: Tensor, geometry: Geometry, of_x: bool, of_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not (of_x or of_w):
        return None, None
    found = applied(ConvolutionGradients, grad, x, w, geometry, of_x, of_w)
    return found[0] if of_x else None, found[-1] if of_w else None


def convolution(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    output_padding: Any = 0,
    transposed: bool = False,
) -> Any:
    """A convolution over some dimensions, of a batch or of one sample.

    Args:
        dims: The dimensions it slides over.
        input: Of shape (batch, channels, ...) or (channels, ...).
        weight: As torch has it.
        bias: One number for each channel of the result.
        stride: An integer or one for each dimension, as the next two.
        padding: Also ``"valid"`` or ``"same"``.
        dilation: As torch has it.
        groups: As torch has it.
        output_padding: As torch has it.
        transposed: Whether it is a transposed one.
    """
    if input.dim() not in (dims + 1, dims + 2) or weight.dim() != dims + 2:
        return NotImplemented
    batch = input if input.dim() == dims + 2 else input[None]
    dilation = _each(dilation, dims)
    if isinstance(padding, str):
        batch, padding = _padded(batch, padding, dilation, weight.shape[2:])
    geometry = (
        _each(stride, dims),
        _each(padding, dims),
        dilation,
        transposed,
        _each(output_padding, dims),
        groups,
    )
    result = applied(Convolution, batch, weight, bias, geometry)
    return result if input.dim() == dims + 2 else result.squeeze(0)


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _padded(batch: Tensor, padding: str, dilation: list[int], kernel: Any) -> tuple[Tensor, list[int]]:
    """A batch and the padding that is left: ``"same"`` may pad one side by one more, which no convolution does."""
    if padding == "valid":
        return batch, [0] * len(dilation)
    total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    uneven = [amount for whole in reversed(total) for amount in (0, whole % 2)]
    if any(uneven):
        batch = torch.nn.functional.pad(batch, uneven)
    return batch, [whole // 2 for whole in total]


def sliding(dims: int) -> Callable[..., Any]:
    """``torch.conv1d`` and its like, of 16-bit tensors."""

    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        return convolution(dims, input, weight, bias, stride, padding, dilation, groups)

    return conv


def transposed(dims: int) -> Callable[..., Any]:
    """``torch.conv_transpose1d`` and its like, of 16-bit tensors."""

    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        return convolution(dims, input, weight, bias, stride, padding, dilation, groups, output_padding, True)

    return conv
