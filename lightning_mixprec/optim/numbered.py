"""The numbers that random rounding is keyed by: those of a seed, a step, a parameter and an element.

The same on every rank, however a weight is sharded, and after a resume; no rank's generator is drawn from.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from lightning_mixprec.numerics.flat_batches import local_part, moved_to
from lightning_mixprec.numerics.splitting import random_bits
from lightning_mixprec.optim.pieces import Part, joined

_LARGEST = 2**40
"""More elements than a parameter has; their numbers begin at its place times this."""


def numbers_of(part: Part) -> Tensor:
    """The places of a part's elements in the whole of its parameter, of which a rank may have a shard; int64."""
    local, shape = local_part(part.param), part.of(part.param).shape
    first_row = part.rows.start if part.rows is not None else 0
    if local is part.param:
        first = first_row * local[0].numel() if first_row else 0
        return torch.arange(first, first + shape.numel(), device=local.device).view(shape)
    strides = [*accumulate(reversed(part.param.shape[1:]), mul, initial=1)][::-1]
    firsts = _first_indices(part.param)
    numbers = torch.zeros((), dtype=torch.int64, device=local.device)
    for dim, (first, stride) in enumerate(zip(firsts, strides, strict=True)):
        begin = first if dim else first + first_row
        along = torch.arange(begin, begin + shape[dim], device=local.device) * stride
        numbers = numbers + along.view(-1, *[1] * (len(shape) - dim - 1))
    return numbers.expand(shape)


def _first_indices(param: Any) -> Sequence[int]:
    """The place in the whole of a DTensor's first local element."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)[1]


def drawn(parts: Sequence[Part], places: Sequence[int], steps: Sequence[Tensor], seed: int) -> Tensor:
    """64 random bits for each element of some parts on one device; int64, as :func:`joined` lays them.

    Args:
        parts: The parts of parameters.
        places: The place of each parameter among all those of the optimizer.
        steps: The number of each one's step, tensors of one element.
        seed: The seed of the optimizer.
    """
    device = local_part(parts[0].param).device
    keys = random_bits(torch.stack([step.reshape(()) for step in steps]).to(torch.int64), seed)
    keys = moved_to(device, keys)
    numbers = [numbers_of(part) + place * _LARGEST for part, place in zip(parts, places, strict=True)]
    spread = [key.expand(each.shape) for key, each in zip(keys.unbind(), numbers, strict=True)]
    return random_bits(joined(numbers), joined(spread))
