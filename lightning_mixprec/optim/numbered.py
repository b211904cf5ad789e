"""The numbers that random rounding is keyed by: those of a seed, a parameter, a step and an element.

The same on every rank, however a weight is sharded, and after a resume; no rank's generator is drawn from.
"""

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from lightning_mixprec.numerics.flat_batches import local_part
from lightning_mixprec.numerics.splitting import random_bits


def numbers_of(param: Tensor) -> Tensor:
    """The numbers of a parameter's elements in the whole of it, of those that this rank has; int64, one dimension."""
    local = local_part(param)
    if local is param:
        return torch.arange(param.numel(), device=param.device)
    numbers = torch.zeros((), dtype=torch.int64, device=local.device)
    strides = [*accumulate(reversed(param.shape[1:]), mul, initial=1)][::-1]
    for dim, (first, stride) in enumerate(zip(_first_indices(param), strides, strict=True)):
        along = (torch.arange(local.shape[dim], device=local.device) + first) * stride
        numbers = numbers + along.view(-1, *[1] * (local.ndim - dim - 1))
    return numbers.expand(local.shape).reshape(-1)


def _first_indices(param: Any) -> Sequence[int]:
    """The place in the whole of a DTensor's first local element."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)[1]


def drawn(params: Sequence[Tensor], places: Sequence[int], steps: Sequence[Tensor], seed: int) -> Tensor:
    """64 random bits for each element of some parameters, one after the other; int64, one dimension.

    Args:
        params: The parameters, on one device.
        places: The place of each of them among all parameters of the optimizer.
        steps: The number of the step of each of them, tensors of one element.
        seed: The seed of the optimizer.
    """
    device = local_part(params[0]).device
    sequences = random_bits(torch.tensor(places, device=steps[0].device), seed)
    keys = random_bits(torch.stack([step.reshape(()) for step in steps]).to(torch.int64), sequences)
    numbers = [numbers_of(param) for param in params]
    sizes = torch.tensor([each.numel() for each in numbers])
    total = int(sizes.sum())
    keys = keys.to(device, non_blocking=device.type != "cpu")
    return random_bits(torch.cat(numbers), keys.repeat_interleave(sizes.to(device), output_size=total))
