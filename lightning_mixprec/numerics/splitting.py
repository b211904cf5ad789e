"""fp32 numbers split in a 16-bit number and the bits it lost, and rounded to 16 bits at random.

All on integer bits: a compiler that leaves out a rounding between two casts (torch's Inductor does) leaves these alone,
and the results are the same on every device, compiled and not.

>>> stored, lost = split(torch.tensor([1.0, 1.0 + 2**-20]))
>>> stored, lost, join(stored, lost) == torch.tensor([1.0, 1.0 + 2**-20])
(tensor([1., 1.], dtype=torch.bfloat16), tensor([0, 8], dtype=torch.int32), tensor([True, True]))
"""

import math

import torch
from torch import Tensor

_NAN = 0x7FC00000

_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of SplitMix64, 0x9e3779b97f4a7c15 and so on, as signed numbers."""


def split(wide: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bf16 number, of two equally near ones the larger, and what it lost: 16 more bits.

    Ties go away from zero: rounded to even, one bf16 number would stand for 65,537 fp32 numbers, which 16 bits cannot
    tell apart. Together they are the fp32 number, every bit of it, infinities, subnormals and -0 included; of a NaN it
    is kept that it is one.

    Args:
        wide: fp32, any shape.

    Returns:
        A bf16 and an int32 tensor of that shape, the latter from -2**15 to 2**15 - 1. (Inductor has no int16 vectors.)
    """
    bits = torch.where(wide.isnan(), _NAN, wide.view(torch.int32)) + 0x8000
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16), (bits & 0xFFFF) - 0x8000


def join(stored: Tensor, lost: Tensor) -> Tensor:
    """The fp32 numbers of bf16 ones and the bits that :func:`split` found them to have lost.

    A zero that somebody else wrote, as pruning does, stays next to zero, whatever was lost before.
    """
    lost = torch.where(stored == 0, lost.clamp(min=0), lost)
    return (stored.to(torch.float32).view(torch.int32) + lost).view(torch.float32)


def narrowed(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The nearest 16-bit number, ties to even, and as fp32 what is missing from it; 0 where it is not finite.

    Args:
        wide: fp32, any shape.
        dtype: bf16 or fp16.
    """
    near = nearest(wide, dtype)
    rest = wide - near
    return near.to(dtype), torch.where(rest.isfinite(), rest, 0.0)


def nearest(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of bf16 or fp16, ties to even, in fp32.

    A cast there and back is what a compiler leaves out, even with integers in between.

    Args:
        wide: fp32, any shape.
        dtype: bf16 or fp16.
    """
    dropped = _bits_more_than(dtype)
    bits = wide.view(torch.int32)
    half_to_even = ((bits >> dropped) & 1) + ((1 << (dropped - 1)) - 1)
    near = ((bits + half_to_even) & -(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:  # whose subnormals are 2**-24 apart
        near = torch.where(
            wide.abs() < 2.0**-14, torch.copysign(torch.round(wide.abs() * 2.0**24) * 2.0**-24, wide), near
        )
    return torch.where(_is_finite_in(dtype, wide), near, wide * math.inf)


def rounded_at_random(wide: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """One of the two neighbouring 16-bit numbers, the nearer the likelier, so that the mean is the number itself.

    Infinities and NaN stay what they are, and what rounds to a finite number becomes none of them.

    Args:
        wide: fp32, any shape.
        dtype: bf16 or fp16.
        noise: int32 of the same shape, its lowest 16 bits random.
    """
    dropped = _bits_more_than(dtype)
    drawn = noise & ((1 << dropped) - 1)
    cut = ((wide.view(torch.int32) + drawn) & -(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:  # whose subnormals are 2**-24 apart
        steps = torch.floor(wide.abs() * 2.0**24 + drawn * 2.0**-13) * 2.0**-24
        cut = torch.where(wide.abs() < 2.0**-14, torch.copysign(steps, wide), cut)
    largest = torch.finfo(dtype).max
    return torch.where(_is_finite_in(dtype, wide), cut.clamp(-largest, largest), wide * math.inf).to(dtype)


def _bits_more_than(dtype: torch.dtype) -> int:
    """How many bits of a mantissa in fp32 a 16-bit number does not have."""
    return 16 if dtype == torch.bfloat16 else 13


def _is_finite_in(dtype: torch.dtype, wide: Tensor) -> Tensor:
    """Whether numbers are nearest to a finite one: they are less than half a step above the largest."""
    info = torch.finfo(dtype)
    return wide.abs() < info.max + info.max * info.eps / (4 - 2 * info.eps)


def random_bits(counters: Tensor, key: Tensor | int) -> Tensor:
    """Random bits by their numbers: the same for the same number and key, whoever draws them and in what order.

    SplitMix64 (Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, 2014), begun at 0: of its 2**64
    numbers those whose places are counter and key added up.

    Args:
        counters: int64, any shape.
        key: Where in the sequence the counters begin; int64 if a tensor.

    Returns:
        int64 of that shape, all bits random.
    """
    mixed = (counters + key) * _GOLDEN
    mixed = (mixed ^ _shifted(mixed, 30)) * _FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * _SECOND
    return mixed ^ _shifted(mixed, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A shift to the right that brings in zeros."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
