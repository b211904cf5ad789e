"""Rounding to a number format, exactly and on any device.

>>> round_to(torch.tensor([0.1, 2049.0, 70000.0]), "fp16").tolist()
[0.0999755859375, 2048.0, inf]
"""

import math

import torch
from torch import Tensor

from lightning_mixprec.errors import FormatError
from lightning_mixprec.numerics.formats import Format, get_format, stored_format


def round_to(tensor: Tensor, format: str) -> Tensor:
    """Round each element to the nearest number of a format, ties to even, in one rounding.

    What is too large becomes infinite, in e4m3, which has no infinity, NaN; and so does an infinity in e4m3. In int8,
    which has neither, it becomes the largest number. NaN stays NaN and zero keeps its sign. ``"fp8"`` rounds to its
    forward format, e4m3.

    Args:
        tensor: any shape, device and floating-point dtype.
        format: a format's name.

    Returns:
        A new tensor of the same shape, device and dtype, without a gradient. Only where the dtype cannot hold the
        result is it fp32: from fp16 to bf16 (65504 rounds to 65536), and from float8 dtypes outside the table.

    Raises:
        FormatError: the format is unknown, or the tensor is no floating-point tensor.

    >>> round_to(torch.tensor([1.0625, 1.1875, 500.0, -0.0009]), "e4m3").tolist()
    [1.0, 1.25, nan, -0.0]
    """
    target = get_format(format).forward
    source = _stored_format(tensor)
    values = tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)
    held = source or stored_format(values.dtype)
    if held is None or not target.contains(held):
        values = torch.copysign(_rounded_magnitude(values.abs(), target), values)
    return values.to(tensor.dtype) if source and _holds_rounded(source, target) else values


def _stored_format(tensor: Tensor) -> Format | None:
    if not isinstance(tensor, Tensor):
        raise FormatError(
            f"cannot round a {type(tensor).__name__}, only a floating-point tensor: use torch.tensor(...)"
        )
    if not tensor.is_floating_point() or tensor.dtype == torch.float4_e2m1fn_x2:
        raise FormatError(f"cannot round a tensor of {tensor.dtype}, only of an unpacked floating-point dtype: cast it")
    return stored_format(tensor.dtype)


def _holds_rounded(source: Format, target: Format) -> bool:
    step = math.ldexp(1.0, source.max_exponent - target.mantissa_bits)
    largest = round(source.max / step) * step
    return largest <= source.max or largest > target.max


def _rounded_magnitude(magnitude: Tensor, target: Format) -> Tensor:
    """Round fp32 or fp64 magnitudes to a format with fewer mantissa bits.

    In the normal range, where the exponent is the number's own, by adding just under half a step to the bit pattern and
    cutting it off. In the subnormal range, where the step is fixed, by adding and subtracting the power of two whose
    own last place is that step. Neither depends on how a device casts, or on flush-to-zero.
    """
    work = stored_format(magnitude.dtype)
    assert work is not None
    dropped = work.mantissa_bits - target.mantissa_bits
    bits = magnitude.view(torch.int64 if work.bits == 64 else torch.int32)
    half_to_even = (bits >> dropped & 1) + ((1 << (dropped - 1)) - 1)
    rounded = (bits + half_to_even & -(1 << dropped)).view(magnitude.dtype)
    if target.min_exponent > work.min_exponent:
        shifter = math.ldexp(1.0, target.min_exponent + dropped)
        rounded = torch.where(magnitude < target.smallest_normal, (magnitude + shifter) - shifter, rounded)
    beyond = {"inf": math.inf, "nan": math.nan, "max": target.max}[target.overflow]
    rounded = torch.where(rounded > target.max, beyond, rounded)
    return torch.where(magnitude.isnan(), math.nan, rounded)
