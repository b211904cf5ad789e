"""Moments of an optimizer, stored in fewer bits than they are computed in.

``"fp32"``: as torch has them. ``"bf16"``: rounded at random, because a moment that decays by 0.1 % a step would stay
where it is for ever if it were rounded to the nearest number, of which there are 128 in each power of two. ``"int8"``:
a code of 8 bits for each number and a scale for each block of 256, in the dynamic map of Dettmers et al. (8-bit
Optimizers via Block-wise Quantization, 2021, arXiv 2110.02861): seven decades below the block's largest number, finer
towards it. Tensors of less than 4,096 numbers stay in fp32.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_mixprec.numerics.flat_batches import local_part
from lightning_mixprec.optim.kept_weights import is_narrow

STATES = ("fp32", "bf16", "int8")

BLOCK = 256
"""Numbers that share a scale."""

SMALLEST = 4096
"""Numbers from which on a tensor's moments are stored in 8 bits."""

SCALES = "_scales"
"""The end of the key under which the scales of a moment are in the state."""

_DECADES = 7


@dataclass(frozen=True)
class Moment:
    """A tensor that an optimizer keeps for each parameter.

    Attributes:
        name: Its key in the state.
        is_signed: Whether it has negative numbers.
    """

    name: str
    is_signed: bool


def stored_as(param: Tensor, states: str) -> str:
    """The word for how a parameter's moments are stored: those of few numbers are not in 8 bits, nor of fp64 at all."""
    if not is_narrow(param) and param.dtype != torch.float32:
        return "fp32"
    return "fp32" if states == "int8" and param.numel() < SMALLEST else states


def is_plain(param: Tensor, states: str) -> bool:
    """True of a parameter whose weights and moments are stored as torch has them."""
    return not is_narrow(param) and stored_as(param, states) == "fp32"


def empty_moment(param: Tensor, moment: Moment, states: str) -> dict[str, Tensor]:
    """The moment of a parameter before its first step, as it is stored."""
    word = stored_as(param, states)
    # What is stored as torch has it is in the weight's own dtype, unless that is one of 16 bits.
    plain = torch.float32 if is_narrow(param) else param.dtype
    dtype = {"fp32": plain, "bf16": torch.bfloat16, "int8": torch.uint8}[word]
    empty = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if word != "int8":
        return {moment.name: empty}
    blocks = math.ceil(local_part(param).numel() / BLOCK)
    scales = torch.zeros(blocks, dtype=torch.float32, device=empty.device)
    return {moment.name: empty.add_(MAPS[moment.is_signed].index(0.0)), moment.name + SCALES: scales}


def dynamic_map(is_signed: bool) -> tuple[float, ...]:
    """The numbers between -1 and 1 (or 0 and 1) that the 256 codes stand for, in order.

    Each decade is divided evenly, the highest one in 64 parts (128 without a sign), each lower one in half as many; a
    code stands for the middle of its part. Two are left for 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        parts = 2 ** (decade if is_signed else decade + 1)
        top = 10.0 ** (decade - _DECADES + 1)
        middles = [(0.1 + 0.9 * (part + 0.5) / parts) * top for part in range(parts)]
        values += middles
        values += [-middle for middle in middles] if is_signed else []
    values = sorted(values)
    return (-1.0, *values[1:]) if is_signed else tuple(values)


MAPS = {is_signed: dynamic_map(is_signed) for is_signed in (True, False)}
"""The map of moments with and without a sign."""


def quantized(wide: Tensor, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of fp32 numbers.

    A number that is not zero gets no code of zero where nothing is signed, since updates divide by such numbers.

    Args:
        wide: fp32, one dimension.
        is_signed: Whether there are negative ones.

    Returns:
        uint8 codes of that shape, and fp32 scales, one for each block: the largest magnitude in it.
    """
    count = wide.numel()
    blocks = pad(wide, (0, -count % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    values = _values(is_signed, wide.device)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None], middles)
    if not is_signed:
        codes = torch.where((blocks > 0) & (codes == 0), 1, codes)
    return codes.to(torch.uint8).view(-1)[:count], scales


def dequantized(codes: Tensor, scales: Tensor, is_signed: bool) -> Tensor:
    """The fp32 numbers of codes, one dimension, and of the scales of their blocks."""
    values = _values(is_signed, codes.device)[codes.to(torch.int32)]
    return values * scales.repeat_interleave(BLOCK, output_size=scales.numel() * BLOCK)[: codes.numel()]


def _values(is_signed: bool, device: torch.device) -> Tensor:
    return _copied(is_signed, device) if torch.compiler.is_compiling() else _copied_once(is_signed, device)


def _copied(is_signed: bool, device: torch.device) -> Tensor:
    return torch.tensor(MAPS[is_signed], dtype=torch.float32, device=device)


# Once, because the device is waited for; compiled it is a constant.
_copied_once = functools.cache(_copied)
