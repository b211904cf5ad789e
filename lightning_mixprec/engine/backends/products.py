"""Products of 16-bit tensors as a unit with fp32 accumulators computes them, on devices that have none.

A product takes operands in 16 bits, multiplies and adds in fp32, and rounds the sum to 16 bits once; backward does the
same with each gradient, as the operations of torch's autocast do. What is kept for backward are the operands, in 16
bits. Every gradient is made of products, so that backward can be differentiated in turn.

Compiled code sees each product as one operation of torch's (``torch.ops.lightning_mixprec``): inductor takes a cast to
16 bits that is followed by one to fp32 for nothing, and would multiply operands that were never rounded.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

_LIBRARY = torch.library.Library("lightning_mixprec", "DEF")

Plain = Callable[..., Any]


def opaque(schema: str) -> Callable[[Plain], Plain]:
    """A decorator of functions that compute in fp32: in compiled code they are operations that nothing looks into.

    Args:
        schema: The operation's name and types, as ``torch.library`` takes them.
    """

    def decorate(plain: Plain) -> Plain:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lightning_mixprec::{name}", plain, lib=_LIBRARY)
        operation = getattr(torch.ops.lightning_mixprec, name).default

        def compute(*args: Any) -> Any:
            return operation(*args) if is_compiling() else plain(*args)

        return compute

    return decorate


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Operations within compute in what they are given; autocast would cast operands in fp32 back to 16 bits."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


@opaque("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")
def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    with without_autocast(a):
        if bias is not None and a.dim() == 2:
            return torch.addmm(bias.float(), a.float(), b.float()).to(a.dtype)
        result = torch.matmul(a.float(), b.float())
        return (result if bias is None else result + bias.float()).to(a.dtype)


class Product(torch.autograd.Function):
    """``a @ b + bias`` for matrices, or stacks of matrices with equal leading dimensions, of one 16-bit dtype.

    Shapes: ``a`` (..., n, k), ``b`` (..., k, m), ``bias`` None or what broadcasts to the result (..., n, m).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None) -> Any:
        """The product, rounded once."""
        return _product(a, b, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps the operands."""
        a, b, bias = inputs
        ctx.save_for_backward(a, b)
        ctx.bias_shape = None if bias is None else bias.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients, each a product rounded once; one of a matrix is laid out as the matrix is."""
        a, b = ctx.saved_tensors
        grad_a = grad_b = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_a = _laid_out_as(a, grad, b.mT)
        if ctx.needs_input_grad[1]:
            grad_b = _laid_out_as(b, a.mT, grad)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.float().sum_to_size(ctx.bias_shape).to(grad.dtype)
        return grad_a, grad_b, grad_bias


def _laid_out_as(matrix: Tensor, left: Tensor, right: Tensor) -> Any:
    """The product of two, in rows or columns as a matrix is laid out in memory: a weight's gradient is not copied."""
    is_in_columns = matrix.stride(-2) == 1 and matrix.stride(-1) > 1
    if is_in_columns:
        return Product.apply(right.mT, left.mT, None).mT
    return Product.apply(left, right, None)


def mm(input: Tensor, mat2: Tensor) -> Any:
    """``torch.mm`` of 16-bit tensors."""
    return Product.apply(input, mat2, None) if input.dim() == mat2.dim() == 2 else NotImplemented


def bmm(input: Tensor, mat2: Tensor) -> Any:
    """``torch.bmm`` of 16-bit tensors."""
    is_stack = input.dim() == mat2.dim() == 3 and input.shape[0] == mat2.shape[0]
    return Product.apply(input, mat2, None) if is_stack else NotImplemented


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """``torch.nn.functional.linear`` of 16-bit tensors."""
    if not input.dim() or weight.dim() > 2:
        return NotImplemented
    rows = input.reshape(-1, input.shape[-1])
    columns = weight.t() if weight.dim() == 2 else weight[:, None]
    return Product.apply(rows, columns, bias).reshape(*input.shape[:-1], *weight.shape[:-1])


def matmul(input: Tensor, other: Tensor) -> Any:
    """``torch.matmul`` of 16-bit tensors: vectors, matrices and stacks of them, broadcast."""
    if not (input.dim() and other.dim()):
        return NotImplemented
    a = input[None] if input.dim() == 1 else input
    b = other[:, None] if other.dim() == 1 else other
    result = _stacked(a, b)
    if other.dim() == 1:
        result = result.squeeze(-1)
    return result.squeeze(-2 if other.dim() > 1 else -1) if input.dim() == 1 else result


def _stacked(a: Tensor, b: Tensor) -> Any:
    if b.dim() == 2:
        return Product.apply(a.reshape(-1, a.shape[-1]), b, None).reshape(*a.shape[:-1], b.shape[-1])
    if a.dim() == 2:  # its gradient is one sum over the whole stack
        return _stacked(b.mT, a.mT).mT
    leading = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = a.expand(*leading, *a.shape[-2:]), b.expand(*leading, *b.shape[-2:])
    return Product.apply(a, b, None)
