"""What of an optimizer's parameters is worked on at one time: chunks of bounded size, each laid end to end.

A kernel has a price, so that what is done to each number is done to all of a chunk at once.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mixprec.numerics.flat_batches import local_part
from lightning_mixprec.optim.kept_moments import BLOCK, stored_as

CHUNK = 1 << 22
"""Numbers that are widened at one time, at most; 16 MiB in fp32, and as much per moment."""


class Part(NamedTuple):
    """A parameter, or consecutive rows of one that is too large to be widened at one time; of a DTensor this rank's.

    Attributes:
        param: The parameter.
        rows: Which rows, in whole blocks of 8-bit moments; None for all of it.
        is_last: Whether no part of this parameter comes after it.
    """

    param: Tensor
    rows: slice | None = None
    is_last: bool = True

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor of the parameter's shape, sharing memory."""
        local = local_part(tensor)
        return local if self.rows is None else local[self.rows]

    def of_scales(self, scales: Tensor) -> Tensor:
        """The scales of this part's blocks, sharing memory."""
        if self.rows is None:
            return scales
        row = local_part(self.param)[0].numel()
        return scales[self.rows.start * row // BLOCK : math.ceil(self.rows.stop * row / BLOCK)]


def parts_of(param: Tensor) -> list[Part]:
    """A parameter in parts of about ``CHUNK`` numbers."""
    local = local_part(param)
    if local.numel() <= CHUNK:
        return [Part(param)]
    row = local[0].numel()
    least = BLOCK // math.gcd(BLOCK, row)
    rows = least * max(1, CHUNK // (least * row))
    firsts = range(0, len(local), rows)
    return [Part(param, slice(first, min(first + rows, len(local))), first == firsts[-1]) for first in firsts]


def chunks(params: Iterable[Tensor], states: str) -> Iterator[list[Part]]:
    """Parameters in lists of one device and dtype, with moments stored in one way, of about ``CHUNK`` numbers."""
    kinds: dict[Any, list[Part]] = {}
    for param in params:
        kind = (local_part(param).device, param.dtype, stored_as(param, states))
        kinds.setdefault(kind, []).extend(parts_of(param))
    for alike in kinds.values():
        chunk: list[Part] = []
        size = 0
        for part in alike:
            numel = part.of(part.param).numel()
            if chunk and size + numel > CHUNK:
                yield chunk
                chunk, size = [], 0
            chunk.append(part)
            size += numel
        yield chunk


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one dtype laid end to end, as one of one dimension."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def divided(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What :func:`joined` laid end to end as tensors of these shapes, sharing memory."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
