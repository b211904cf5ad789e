"""``F.linear`` with products in 8 bits, forward and backward; everything around the products is in 16 bits."""

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_mixprec.engine.backends.products import is_in_forward_mode, product, without_autocast
from lightning_mixprec.engine.backends.replacing import Function, Replacing
from lightning_mixprec.engine.backends.scaled_products import scaled_product
from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.formats import get_format


class Products(NamedTuple):
    """The manner in which a layer's products compute in 8 bits.

    Attributes:
        format: ``"fp8"`` or ``"int8"``.
        scaling: What a scale is of: ``"tensor"`` or ``"row"``.
        gradients: Which gradients are products in 8 bits, too: ``"all"``, ``"input"`` or ``"none"``; others are
            products of the 16-bit operands.
        is_emulated: Whether 8-bit operands are multiplied in fp32.
        is_around_emulated: Whether 16-bit operands are.
    """

    format: str
    scaling: str = "row"
    gradients: str = "all"
    is_emulated: bool = False
    is_around_emulated: bool = False


class NarrowLinear(Replacing):
    """``F.linear`` in 8 bits within.

    Args:
        dtype: The 16-bit dtype around its products.
        products: How they compute.

    Attributes:
        calls: How often it was called so far, by code that is not compiled.
    """

    def __init__(self, dtype: torch.dtype, products: Products) -> None:
        super().__init__({torch.nn.functional.linear: self._linear})
        self.dtype, self.products = dtype, products
        self.calls = 0

    def _linear(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not is_compiling():
            self.calls += 1
        return linear(*_operands(*args, **kwargs), self.dtype, self.products)

    def __reduce__(self) -> Any:
        """A copy is the same: whether it is entered is a matter of the thread."""
        return narrow_linear, (self.dtype, self.products)


@functools.cache
def narrow_linear(dtype: torch.dtype, products: Products) -> NarrowLinear:
    """The mode for a kind of products, always the same one: compiled code finds it again."""
    return NarrowLinear(dtype, products)


def _operands(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, products: Products) -> Tensor:
    """``F.linear`` in 8 bits.

    Args:
        input: [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features], or None.
        dtype: The 16-bit dtype of what the products take and give.
        products: How they compute.

    Returns:
        [..., out_features], of ``dtype``.

    Raises:
        SupportError: A tensor is none that 8-bit products take.
    """
    if weight.dim() != 2 or any(each.is_nested or each.layout != torch.strided for each in (input, weight)):
        raise SupportError(
            f"linear in {products.format} was given a weight of {weight.dim()} dimensions, nested or sparse tensors; "
            "it takes dense ones and weights of 2 dimensions, so give this layer bf16"
        )
    rows = input.to(dtype).reshape(-1, input.shape[-1])
    format = get_format(products.format).forward.name
    kind = _ProductWithTangent if is_in_forward_mode() else _Product
    # A graph of TorchScript has no place for what has a derivative of its own.
    multiply = kind.forward if torch._C._get_tracing_state() is not None else kind.apply
    result: Tensor = multiply(rows, weight.to(dtype), (format, format), products)
    if bias is not None:
        result = result + bias.to(dtype)
    return result.reshape(*input.shape[:-1], weight.shape[0])


class _Product(torch.autograd.Function):
    """The product of rows [rows, in] with a weight [out, in]: [rows, out]. Gradients pass the casts straight through.

    What is kept for backward are the 16-bit operands: transposed, they have other rows and with them other scales.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, formats: tuple[str, str], products: Products) -> Tensor:
        return scaled_product(rows, weight, *formats, products.scaling == "row", products.is_emulated)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, tuple[str, str], Products], output: Tensor) -> None:
        rows, weight, _, ctx.products = inputs
        ctx.save_for_backward(rows, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, *_ = ctx.needs_input_grad
        narrow = ctx.products.gradients
        of_rows = _gradient(gradient, weight.t(), ctx.products, narrow != "none") if needs_rows else None
        of_weight = _gradient(gradient.t(), rows.t(), ctx.products, narrow == "all") if needs_weight else None
        return of_rows, of_weight, None, None


class _ProductWithTangent(_Product):
    """The same where tangents are carried along; Dynamo takes no function that says how."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, tuple[str, str], Products], output: Tensor) -> None:
        _Product.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx: Any, of_rows: Tensor | None, of_weight: Tensor | None, *_: None) -> Tensor:
        """The tangent: products of the 16-bit operands, straight through the casts, as gradients of gradients are."""
        rows, weight = ctx.saved_tensors
        parts = [] if of_rows is None else [_in_16_bits(of_rows, weight, ctx.products)]
        if of_weight is not None:
            parts.append(_in_16_bits(rows, of_weight, ctx.products))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _gradient(gradient: Tensor, other: Tensor, products: Products, is_narrow: bool) -> Tensor:
    """``gradient @ other.T`` in 8 bits or in 16. Gradients of gradients are in 16."""
    if is_narrow:
        format = get_format(products.format)
        formats = format.backward.name, format.forward.name
        return cast(Tensor, _Product.apply(gradient, other, formats, products._replace(gradients="none")))
    return _in_16_bits(gradient, other, products)


def _in_16_bits(left: Tensor, right: Tensor, products: Products) -> Tensor:
    """``left @ right.T``."""
    if products.is_around_emulated:
        return cast(Tensor, product(left, right.t()))
    with without_autocast(left):
        return left @ right.t()
