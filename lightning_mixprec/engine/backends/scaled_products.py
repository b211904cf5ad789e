"""Matrix products of 8-bit operands with scales of their own, from 16-bit matrices to a 16-bit matrix.

To compilers a product is one operation, casts included. Inductor would write the operands' transposes itself, and with
triton 3.8 it stores some of them wrongly (pytorch issue 188841).
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from lightning_mixprec.engine.backends.products import without_autocast
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.numerics.scaled import Scaled, scaled_to

TILE = 16
"""What GPUs take in multiples: rows, columns and what is summed over."""

_LEAST_ROWS = 32
"""Rows that a product of integers has at least on a GPU, which takes none of 16 or fewer."""

_MOST_SUMMED = 2**17
"""How many products of two numbers of 8 bits are added up in 32 bits for certain."""


def scaled_product(
    left: Tensor, right: Tensor, left_format: str, right_format: str, per_row: bool, is_emulated: bool
) -> Tensor:
    """The product ``left @ right.T`` of two matrices that are cast to 8 bits, each with its scale, and summed in 32.

    Operands of any size: a GPU takes multiples of 16, and what is missing is filled with zeros, which change nothing.

    Args:
        left: [rows, summed], of a 16-bit dtype.
        right: [columns, summed], of the same dtype.
        left_format: ``"e4m3"``, ``"e5m2"``, or ``"int8"``, then for both.
        right_format: The same.
        per_row: Whether each row of both has a scale of its own, and not each matrix.
        is_emulated: Whether the 8-bit numbers are multiplied in fp32, on a device that has no such product.

    Returns:
        [rows, columns], of the operands' dtype. Not finite where a row of either, without ``per_row`` either at all,
        holds what is not finite.
    """
    is_traced = is_compiling() or torch._C._functorch.maybe_current_level() is not None
    multiply = _as_one_operation if is_traced else _multiplied
    return multiply(left, right, left_format, right_format, per_row, is_emulated)


def _multiplied(
    left: Tensor, right: Tensor, left_format: str, right_format: str, per_row: bool, is_emulated: bool
) -> Tensor:
    rows, columns = len(left), len(right)
    if not (left.numel() and right.numel()):
        return left.new_zeros(rows, columns)
    is_integer = get_format(left_format).is_integer
    operands = (
        scaled_to(_filled_up(left, _LEAST_ROWS if is_integer else TILE), left_format, per_row=per_row),
        scaled_to(_filled_up(right, TILE), right_format, per_row=per_row),
    )
    multiply = _in_fp32 if is_emulated else _of_integers if is_integer else _of_fp8
    return multiply(*operands, left.dtype)[:rows, :columns].to(left.dtype).contiguous()


decomposed_product = _multiplied
"""The same, as the operations that it is made of, for graphs that are to run without this package."""

_as_one_operation = torch.library.custom_op("lightning_mixprec::scaled_product", _multiplied, mutates_args=())


def product_operation() -> Any:
    """The operation that stands for a product in compilers' graphs."""
    return torch.ops.lightning_mixprec.scaled_product.default


@_as_one_operation.register_fake
def _(left: Tensor, right: Tensor, *_: Any) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[0])


@_as_one_operation.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], left: Tensor, right: Tensor, *rest: Any) -> tuple[Tensor, int]:
    """One product for each sample: each has scales of its own, as it has without vmap."""
    operands = [
        [each] * info.batch_size if dim is None else each.unbind(dim)
        for each, dim in zip((left, right), in_dims, strict=False)
    ]
    return torch.stack([_as_one_operation(*pair, *rest) for pair in zip(*operands, strict=True)]), 0


def _filled_up(matrix: Tensor, least_rows: int) -> Tensor:
    rows, summed = matrix.shape
    missing = max(-rows % TILE, least_rows - rows), -summed % TILE
    return F.pad(matrix, (0, missing[1], 0, missing[0])) if any(missing) else matrix


def _of_fp8(left: Scaled, right: Scaled, dtype: torch.dtype) -> Tensor:
    """Tensor cores, or torch's kernel on a CPU: the left one by rows in memory, the right one by columns."""
    if left.values.device.type == "cpu" and not _has_kernel_on_cpu():
        return _in_fp32(left, right, dtype)
    is_per_row = left.scale.numel() > 1 or right.scale.numel() > 1
    # With a scale per row CUDA hands on bf16 alone.
    dtype = torch.bfloat16 if is_per_row else dtype
    values, transposed = left.values.contiguous(), right.values.contiguous().t()
    # Tensor cores may add up in fewer bits than fp32, which is faster; gradients, whose formats differ, do not.
    is_fast = left.values.dtype == right.values.dtype
    if not is_per_row:
        scales = left.scale.view(()), right.scale.view(())
    else:
        scales = left.scale.contiguous(), right.scale.t().contiguous()
    # The CPU's kernel multiplies numbers in fp32, which autocast would take for a product of the region's.
    with without_autocast(values):
        if hasattr(F, "scaled_mm"):
            kind = F.ScalingType.RowWise if is_per_row else F.ScalingType.TensorWise
            return F.scaled_mm(
                values, transposed, scales[0], kind, scales[1], kind, output_dtype=dtype, use_fast_accum=is_fast
            )
        return torch._scaled_mm(values, transposed, *scales, out_dtype=dtype, use_fast_accum=is_fast)


@functools.cache
def _has_kernel_on_cpu() -> bool:
    """False before torch 2.14: its kernel, too, multiplies in fp32."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU")


def _of_integers(left: Scaled, right: Scaled, dtype: torch.dtype) -> Tensor:
    values, transposed = left.values.contiguous(), right.values.contiguous().t()
    summed = zip(values.split(_MOST_SUMMED, 1), transposed.split(_MOST_SUMMED, 0), strict=True)
    first, *others = (torch._int_mm(*parts) for parts in summed)
    total = sum((each.float() for each in others), start=first.float())
    return total * left.scale * right.scale.t()


def _in_fp32(left: Scaled, right: Scaled, dtype: torch.dtype) -> Tensor:
    with without_autocast(left.values):
        return left.values.float() @ right.values.float().t() * left.scale * right.scale.t()
