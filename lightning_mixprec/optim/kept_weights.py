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

from collections.abc import Callable, Mapping, Sequence
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
        dtypes: The dtypes of what is kept, by its keys in the optimizer's state.
        widened: The fp32 weight of what is stored and what is kept.
        narrowed: What is stored and what is kept of an fp32 weight, given random bits.
        is_random: Whether it needs random bits.
    """

    dtypes: dict[str, torch.dtype]
    widened: Callable[[Tensor, Sequence[Tensor]], Tensor]
    narrowed: Callable[[Tensor, Tensor | None], tuple[Tensor, Sequence[Tensor]]]
    is_random: bool = False


def is_narrow(param: Tensor) -> bool:
    """True of weights stored in 16 bits."""
    return param.dtype in half_dtypes()


def keeping(weights: str, dtype: torch.dtype) -> Keeping:
    """The way of a word for weights stored in bf16 or fp16."""
    return _KEEPING[weights, dtype]


def keeping_in(state: Mapping[str, Any]) -> tuple[Keeping, torch.dtype] | None:
    """The way that left something in an optimizer's state, and the dtype of the weight; None if none did."""
    for (_, dtype), way in _KEEPING.items():
        if way.dtypes and all(getattr(state.get(key), "dtype", None) == kept for key, kept in way.dtypes.items()):
            return way, dtype
    return None


def is_kept(state: Mapping[str, Any], param: Tensor, weights: str) -> bool:
    """True if a state has what is to be kept of a parameter in 16 bits."""
    return state.keys() >= keeping(weights, param.dtype).dtypes.keys()


def empty_kept(param: Tensor, weights: str) -> dict[str, Tensor]:
    """What is kept of a parameter in 16 bits that has lost nothing yet."""
    way = keeping(weights, param.dtype)
    if torch.float32 in way.dtypes.values():
        return {key: param.detach().to(torch.float32, copy=True) for key in way.dtypes}
    return {
        key: torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        for key, dtype in way.dtypes.items()
    }


def _with_master(stored: Tensor, kept: Sequence[Tensor]) -> Tensor:
    (master,) = kept
    # Who wrote the weight itself, as averaging and pruning do, meant it.
    is_its = nearest(master, stored.dtype) == stored.to(torch.float32)
    return torch.where(is_its, master, stored.to(torch.float32))


def _and_master(dtype: torch.dtype, wide: Tensor, _: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
    return narrowed(wide, dtype)[0], (wide,)


def _compensated(stored: Tensor, kept: Sequence[Tensor]) -> Tensor:
    # What is stored as 0 has lost nothing, unless somebody else wrote the 0, who meant it.
    wide = stored.to(torch.float32)
    return torch.where(stored == 0, wide, wide + kept[0].to(torch.float32))


def _and_compensation(dtype: torch.dtype, wide: Tensor, _: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
    stored, lost = narrowed(wide, dtype)
    # What was lost is rounded, too, maybe to half a step, and then another number may be the one to store: that which a
    # run finds that goes on from the sum of both.
    again, rest = narrowed(stored.to(torch.float32) + nearest(lost, dtype), dtype)
    is_sound = again.isfinite() | ~stored.isfinite()
    return torch.where(is_sound, again, stored), (torch.where(is_sound, rest, 0.0).to(dtype),)


def _joined(stored: Tensor, kept: Sequence[Tensor]) -> Tensor:
    upper, lower = kept
    return join(stored, (upper.to(torch.int32) << 8) + lower.to(torch.int32))


def _and_remainder(wide: Tensor, _: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
    stored, lost = split(wide)
    return stored, ((lost >> 8).to(torch.int8), (lost & 0xFF).to(torch.uint8))


def _plain(stored: Tensor, _: Sequence[Tensor]) -> Tensor:
    return stored.to(torch.float32)


def _at_random(dtype: torch.dtype, wide: Tensor, noise: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
    assert noise is not None
    return rounded_at_random(wide, dtype, noise), ()


def _near(dtype: torch.dtype, wide: Tensor, _: Tensor | None) -> tuple[Tensor, Sequence[Tensor]]:
    return narrowed(wide, dtype)[0], ()


# Of 8 bits each, because Inductor has no vectors of int16.
_REMAINDER = {"remainder": torch.int8, "remainder_low": torch.uint8}


def _table() -> dict[tuple[str, torch.dtype], Keeping]:
    table = {
        ("exact", torch.bfloat16): Keeping(_REMAINDER, _joined, _and_remainder),
        ("exact", torch.float16): Keeping({"master": torch.float32}, _with_master, partial(_and_master, torch.float16)),
    }
    for dtype in (torch.bfloat16, torch.float16):
        table["kahan", dtype] = Keeping({"compensation": dtype}, _compensated, partial(_and_compensation, dtype))
        table["stochastic", dtype] = Keeping({}, _plain, partial(_at_random, dtype), is_random=True)
        table["nearest", dtype] = Keeping({}, _plain, partial(_near, dtype))
    return table


_KEEPING = _table()

KEPT = {key for way in _KEEPING.values() for key in way.dtypes}
"""All keys of what is kept of weights."""
