"""Products of 16-bit tensors as a unit with fp32 accumulators computes them, on devices that have none.

A product takes operands in 16 bits, multiplies and adds in fp32, and rounds the sum to 16 bits once; backward does the
same with each gradient, as the operations of torch's autocast do. What is kept for backward are the operands, in 16
bits. Every gradient is made of products, so that backward can be differentiated in turn.

Compiled code sees each product as one operation of torch's (``torch.ops.lightning_mixprec``): inductor takes a cast to
16 bits that is followed by one to fp32 for nothing, and would multiply operands that were never rounded. So does a
trace of a step: the operations have the names of ATen's, and like these, operands and results in 16 bits.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

_LIBRARY = torch.library.Library("lightning_mixprec", "DEF")

Plain = Callable[..., Any]


_traces: list[None] = []
"""One for each trace that is taken."""


@contextlib.contextmanager
def as_operations() -> Iterator[None]:
    """Within, a product is one operation for those who watch operations, whatever it is made of."""
    _traces.append(None)
    try:
        yield
    finally:
        _traces.pop()


def opaque(schema: str) -> Callable[[Plain], Plain]:
    """A decorator of functions that compute in fp32, as operations that nothing looks into: compilers and traces.

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
            if is_compiling() or (_traces and torch._C._functorch.peek_interpreter_stack() is None):
                return operation(*args)
            return plain(*args)

        return compute

    return decorate


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """A function of autograd applied to arguments, among which Dynamo takes no tensor twice: it gets views of them.

    In forward mode torch differentiates what the function is made of, with the same roundings; fp32 copies are kept.
    """
    if is_compiling():
        args = tuple(arg.view_as(arg) if isinstance(arg, Tensor) else arg for arg in args)
    elif is_in_forward_mode():
        return function.forward(*args)
    return function.apply(*args)


def is_in_forward_mode() -> bool:
    """True where tangents are carried along: ``torch.func.jvp``, ``jacfwd``, ``hessian``, a dual level."""
    return torch.autograd.forward_ad._current_level >= 0


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Operations within compute in what they are given; autocast would cast operands in fp32 back to 16 bits."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _multiplied(a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float) -> Tensor:
    with without_autocast(a):
        wide = a.float(), b.float()
        if bias is not None and a.dim() == 2:
            return torch.addmm(bias.float(), *wide, alpha=alpha, beta=beta).to(a.dtype)
        result = torch.matmul(*wide)
        if alpha != 1:
            result = result * alpha
        if bias is not None and beta != 0:
            result = torch.add(result, bias.float(), alpha=beta)
        return result.to(a.dtype)


_PRODUCTS = {
    name: opaque(f"{name}(Tensor a, Tensor b, Tensor? bias, float alpha, float beta) -> Tensor")(_multiplied)
    for name in ("mm", "addmm", "bmm", "baddbmm")
}


def _product(a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float) -> Tensor:
    name = "mm" if a.dim() == 2 else "bmm"
    if bias is not None:
        name = "addmm" if a.dim() == 2 else "baddbmm"
    product: Tensor = _PRODUCTS[name](a, b, bias, alpha, beta)
    return product


@opaque("sum(Tensor grad, int[] shape, float factor) -> Tensor")
def summed_to(grad: Tensor, shape: Sequence[int], factor: float) -> Tensor:
    """The sum over what was broadcast from a shape, times a factor: the gradient of what was added."""
    return (grad.float().sum_to_size(shape) * factor).to(grad.dtype)


class Product(torch.autograd.Function):
    """``alpha * a @ b + beta * bias`` for matrices, or stacks of equally many matrices, of one 16-bit dtype.

    Shapes: ``a`` (..., n, k), ``b`` (..., k, m), ``bias`` None or what broadcasts to the result (..., n, m).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float) -> Any:
        """The product, rounded once."""
        return _product(a, b, bias, alpha, beta)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps the operands."""
        a, b, bias, ctx.alpha, ctx.beta = inputs
        ctx.save_for_backward(a, b)
        ctx.bias_shape = None if bias is None else bias.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients, each a product rounded once; one of a matrix is laid out as the matrix is."""
        a, b = ctx.saved_tensors
        grad_a = grad_b = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_a = _laid_out_as(a, grad, b.mT, ctx.alpha)
        if ctx.needs_input_grad[1]:
            grad_b = _laid_out_as(b, a.mT, grad, ctx.alpha)
        if ctx.needs_input_grad[2]:
            grad_bias = summed_to(grad, ctx.bias_shape, ctx.beta)
        return grad_a, grad_b, grad_bias, None, None


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Any:
    """:class:`Product`, with what torch's own functions leave out left out."""
    return applied(Product, a, b, bias, alpha, beta)


def _laid_out_as(matrix: Tensor, left: Tensor, right: Tensor, alpha: float) -> Any:
    """The product of two, in rows or columns as a matrix is laid out in memory: a weight's gradient is not copied."""
    is_in_columns = matrix.stride(-2) == 1 and matrix.stride(-1) > 1
    return product(right.mT, left.mT, alpha=alpha).mT if is_in_columns else product(left, right, alpha=alpha)


def mm(input: Tensor, mat2: Tensor) -> Any:
    """``torch.mm`` of 16-bit tensors."""
    return product(input, mat2) if input.dim() == mat2.dim() == 2 else NotImplemented


def bmm(input: Tensor, mat2: Tensor) -> Any:
    """``torch.bmm`` of 16-bit tensors."""
    is_stack = input.dim() == mat2.dim() == 3 and input.shape[0] == mat2.shape[0]
    return product(input, mat2) if is_stack else NotImplemented


def unfolded(result: Tensor, shape: Sequence[int]) -> Any:
    """A new result in another shape. It is no view, as torch's own results are none: FSDP2 warns of those."""
    return torch.ops.aten._unsafe_view(result, list(shape))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """``torch.nn.functional.linear`` of 16-bit tensors."""
    if not input.dim() or weight.dim() > 2:
        return NotImplemented
    rows = _as_rows(input)
    columns = weight.t() if weight.dim() == 2 else weight[:, None]
    return unfolded(product(rows, columns, bias), (*input.shape[:-1], *weight.shape[:-1]))


def _as_rows(tensor: Tensor) -> Tensor:
    """A tensor as one matrix of its rows, of which each may be empty, too."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


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
        return unfolded(product(_as_rows(a), b), (*a.shape[:-1], b.shape[-1]))
    if a.dim() == 2:  # its gradient is one sum over the whole stack
        return _stacked(b.mT, a.mT).mT
    leading = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = a.expand(*leading, *a.shape[-2:]), b.expand(*leading, *b.shape[-2:])
    return product(a, b)


def mv(input: Tensor, vec: Tensor) -> Any:
    """``torch.mv`` of 16-bit tensors."""
    return matmul(input, vec) if (input.dim(), vec.dim()) == (2, 1) else NotImplemented


def dot(input: Tensor, other: Tensor) -> Any:
    """``torch.dot`` and ``torch.vdot`` of 16-bit tensors."""
    return matmul(input, other) if input.dim() == other.dim() == 1 else NotImplemented


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """``torch.addmm`` of 16-bit tensors."""
    return product(mat1, mat2, input, alpha, beta) if mat1.dim() == mat2.dim() == 2 else NotImplemented


def addmv(input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """``torch.addmv`` of 16-bit tensors."""
    if (mat.dim(), vec.dim()) != (2, 1):
        return NotImplemented
    return product(mat, vec[:, None], input.expand(len(mat))[:, None], alpha, beta).squeeze(-1)


def baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """``torch.baddbmm`` of 16-bit tensors; what is added times 0 may be anything."""
    is_stack = batch1.dim() == batch2.dim() == 3 and len(batch1) == len(batch2)
    return product(batch1, batch2, input, alpha, beta) if is_stack else NotImplemented


def addbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """``torch.addbmm`` of 16-bit tensors: one sum over the stack."""
    if not (batch1.dim() == batch2.dim() == 3 and len(batch1) == len(batch2)):
        return NotImplemented
    row = batch1.transpose(0, 1).flatten(1)
    return product(row, batch2.flatten(0, 1), input, alpha, beta)


def vecdot(x: Tensor, y: Tensor, *, dim: int = -1) -> Any:
    """``torch.linalg.vecdot`` of 16-bit tensors."""
    rows, columns = x.movedim(dim, -1).unsqueeze(-2), y.movedim(dim, -1).unsqueeze(-1)
    return matmul(rows, columns).squeeze(-1).squeeze(-1)


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """``torch.nn.functional.bilinear`` of 16-bit tensors: two products, the result of the first in 16 bits."""
    if input1.dim() != input2.dim() or weight.dim() != 3:
        return NotImplemented
    first = linear(input1, weight.transpose(1, 2).flatten(0, 1)).unflatten(-1, (weight.shape[0], weight.shape[2]))
    return product(first, input2.unsqueeze(-1), None if bias is None else bias[:, None]).squeeze(-1)
