"""Weights stored in 16 bits, and what an optimizer keeps of the bits that they cannot hold.

=============  ===================================================================================  ===============
word           kept beside the weight                                                               bytes a weight
=============  ===================================================================================  ===============
"exact"        the other 16 bits of the fp32 weight (bf16), or the fp32 weight itself (fp16)        2, or 4 (fp16)
"kahan"        what rounding lost, in the weight's own format                                       2
"stochastic"   nothing; the weight is rounded at random, so that small updates count in the mean    0
"nearest"      nothing: updates of less than half the weight's last bit are lost                    0
=============  ===================================================================================  ===============
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mixprec.numerics.formats import half_dtypes
from lightning_mixprec.numerics.splitting import join, narrowed, nearest, rounded_at_random, split

WEIGHTS = ("exact", "kahan", "stochastic", "nearest")


class Keeping(NamedTuple):
    """One way to keep a weight of fp32 in 16 bits.

    Attributes:
        name: The key of what is kept in the optimizer's state; None if nothing is.
        dtype: The dtype of what is kept.
        widened: The fp32 weight of what is stored and what is kept.
        narrowed: What is stored and what is kept of an fp32 weight, given random bits.
        is_random: Whether it needs random bits.
    """

    name: str | None
    dtype: torch.dtype | None
    widened: Callable[[Tensor, Tensor | None], Tensor]
    narrowed: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    is_random: bool = False


def is_narrow(param: Tensor) -> bool:
    """True of weights stored in 16 bits."""
    return param.dtype in half_dtypes()


def keeping(weights: str, dtype: torch.dtype) -> Keeping:
    """The way of a word for weights stored in bf16 or fp16."""
    return _KEEPING[weights, dtype]


def keeping_of(name: str, kept: Tensor) -> tuple[Keeping, torch.dtype] | None:
    """The way that left this in an optimizer's state, and the dtype of the weight; None if none did."""
    for (_, dtype), each in _KEEPING.items():
        if each.name == name and each.dtype == kept.dtype:
            return each, dtype
    return None


def is_kept(state: Mapping[str, Any], param: Tensor, weights: str) -> bool:
    """True if a state has what is to be kept of a parameter in 16 bits."""
    name = keeping(weights, param.dtype).name
    return name is None or name in state


def empty_kept(param: Tensor, weights: str) -> dict[str, Tensor]:
    """What is kept of a parameter in 16 bits that has lost nothing yet."""
    way = keeping(weights, param.dtype)
    if way.name is None:
        return {}
    if way.dtype == torch.float32:
        return {way.name: param.detach().to(torch.float32, copy=True)}
    return {way.name: torch.zeros_like(param, dtype=way.dtype, memory_format=torch.preserve_format)}


def _with_master(stored: Tensor, master: Tensor | None) -> Tensor:
    assert master is not None
    # Who wrote the weight itself, as averaging and pruning do, meant it.
    return torch.where(nearest(master, stored.dtype) == stored, master, stored.to(torch.float32))


def _compensated(stored: Tensor, lost: Tensor | None) -> Tensor:
    assert lost is not None
    return stored.to(torch.float32) + lost.to(torch.float32)


def _joined(stored: Tensor, lost: Tensor | None) -> Tensor:
    assert lost is not None
    return join(stored, lost)


def _plain(stored: Tensor, _: Tensor | None) -> Tensor:
    return stored.to(torch.float32)


def _near(dtype: torch.dtype, wide: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    return nearest(wide, dtype), None


def _near_and_lost(dtype: torch.dtype, wide: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
    stored, lost = narrowed(wide, dtype)
    return stored, lost.to(dtype)


def _at_random(dtype: torch.dtype, wide: Tensor, noise: Tensor | None) -> tuple[Tensor, None]:
    assert noise is not None
    return rounded_at_random(wide, dtype, noise), None


def _in_two_halves(wide: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
    return split(wide)


def _table() -> dict[tuple[str, torch.dtype], Keeping]:
    table: dict[tuple[str, torch.dtype], Keeping] = {
        ("exact", torch.bfloat16): Keeping("remainder", torch.int16, _joined, _in_two_halves),
        ("exact", torch.float16): Keeping(
            "master", torch.float32, _with_master, lambda wide, _: (nearest(wide, torch.float16), wide)
        ),
    }
    for dtype in (torch.bfloat16, torch.float16):
        table["kahan", dtype] = Keeping("compensation", dtype, _compensated, partial(_near_and_lost, dtype))
        table["stochastic", dtype] = Keeping(None, None, _plain, partial(_at_random, dtype), is_random=True)
        table["nearest", dtype] = Keeping(None, None, _plain, partial(_near, dtype))
    return table


_KEEPING = _table()
