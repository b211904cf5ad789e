"""Many tensors of any shape and size, read as few flat batches, and sums and maxima per tensor of such a batch.

What statistics of a whole model's layers share: a kernel per layer would cost more than its arithmetic.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mixprec.errors import FormatError

_BATCH_ON_CPU = 1 << 16  # elements whose few temporaries stay in the cache
_BATCH_ELSEWHERE = 1 << 22  # bounds the temporaries' memory; far below what 32-bit counters hold


class Batch(NamedTuple):
    """Consecutive pieces of one dtype and device: ``sizes[i]`` elements of ``values`` belong to row ``rows[i]``."""

    values: Tensor
    rows: list[int]
    sizes: list[int]


def flatten(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in their storage order, as one real dimension and without a gradient.

    No copy where the tensor has no gaps, whatever the order of its dimensions. Of a DTensor the local part, of a
    sparse tensor the stored values (coalesced, which synchronises on CUDA), of a nested tensor the values of all its
    parts, of a complex tensor both parts.

    Raises:
        FormatError: it holds no floating-point numbers.
    """
    with torch.no_grad():
        tensor = local_part(tensor)
        if tensor.layout == torch.sparse_coo:
            tensor = tensor.coalesce().values()
        elif tensor.layout != torch.strided or tensor.is_nested:
            tensor = tensor.values()
        return _in_storage_order(_real(tensor))


def flatten_together(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape as flat ones of one dtype and device, the same elements at the same places.

    Sparse tensors become dense. Raises:
        FormatError: the shapes differ, or one holds no floating-point numbers.
    """
    with torch.no_grad():
        first, second = (_real(local_part(tensor).to_dense()) for tensor in (first, second))
        if first.shape != second.shape:
            raise FormatError(f"cannot compare shape {tuple(first.shape)} with shape {tuple(second.shape)}")
        if first.dtype != second.dtype:
            first, second = first.double(), second.double()
        second = moved_to(first.device, second)
        if first.stride() == second.stride():
            return _in_storage_order(first), _in_storage_order(second)
        return first.reshape(-1), second.reshape(-1)


def local_part(tensor: Tensor) -> Tensor:
    """Of a tensor that is spread over ranks (a DTensor) this rank's part, sharing memory; any other one itself.

    Raises:
        FormatError: it is no tensor.
    """
    if not isinstance(tensor, Tensor):
        raise FormatError(f"expected a tensor, not a {type(tensor).__name__}")
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def counted_part(tensor: Tensor) -> Tensor:
    """Of a tensor that is spread over ranks (a DTensor) what this rank counts of it, so that each number counts once.

    That is this rank's part, or nothing where an earlier rank holds the same. Any other tensor is counted whole.
    """
    local, spread = local_part(tensor), getattr(tensor, "placements", ())
    at = tensor.device_mesh.get_coordinate() if spread else None  # type: ignore[attr-defined]
    is_copy = at is not None and any(each.is_replicate() and place for each, place in zip(spread, at, strict=True))
    return local.reshape(-1)[:0] if is_copy else local


def _real(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point() or tensor.dtype == torch.float4_e2m1fn_x2:
        raise FormatError(f"a tensor of {tensor.dtype} has no floating-point numbers to measure: cast it")
    return tensor.resolve_neg()


def _in_storage_order(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous():
        return tensor.view(-1)
    largest_stride_first = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(largest_stride_first).reshape(-1)


def sample(tensors: Sequence[Tensor], max_elements: int | None) -> list[Tensor]:
    """Every s-th element of flat tensors laid end to end, with the least s that fits and is coprime with every size.

    Coprime, because a stride that shared a divisor with a matrix's width would see some columns only. End to end,
    because a first element taken from every tensor would count small tensors too much.
    """
    stride = _coprime_stride(tuple(tensor.numel() for tensor in tensors), max_elements)
    if stride == 1:
        return list(tensors)
    sampled, start = [], 0
    for tensor in tensors:
        sampled.append(tensor[-start % stride :: stride])
        start += tensor.numel()
    return sampled


@functools.lru_cache(maxsize=4096)
def _coprime_stride(sizes: tuple[int, ...], max_elements: int | None) -> int:
    if max_elements is None:
        return 1
    if max_elements < 1:
        raise FormatError(f"max_elements must be at least 1, not {max_elements}")
    stride = max(1, -(-sum(sizes) // max_elements))
    while any(size and math.gcd(size, stride) != 1 for size in sizes):
        stride += 1
    return stride


def by_kind(groups: list[list[Tensor]]) -> list[tuple[list[int], list[tuple[int, Tensor]]]]:
    """Per dtype and device the groups that have such tensors, and these tensors with their place among those groups."""
    kinds: dict[tuple[torch.dtype, torch.device], tuple[list[int], list[tuple[int, Tensor]]]] = {}
    for index, group in enumerate(groups):
        for tensor in group:
            if tensor.numel():
                rows, pieces = kinds.setdefault((tensor.dtype, tensor.device), ([], []))
                if not rows or rows[-1] != index:
                    rows.append(index)
                pieces.append((len(rows) - 1, tensor))
    return list(kinds.values())


def batches(pieces: Iterable[tuple[int, Tensor]]) -> Iterator[Batch]:
    """Flat pieces of one dtype and device, with their rows in rising order, in batches of bounded size."""
    values: list[Tensor] = []
    rows: list[int] = []
    sizes: list[int] = []
    total = 0
    for row, piece in pieces:
        limit = _BATCH_ON_CPU if piece.device.type == "cpu" else _BATCH_ELSEWHERE
        for part in piece.split(limit) if piece.numel() > limit else (piece,):
            if values and total + part.numel() > limit:
                yield Batch(_joined(values), rows, sizes)
                values, rows, sizes, total = [], [], [], 0
            values.append(part)
            total += part.numel()
            if rows and rows[-1] == row:
                sizes[-1] += part.numel()
            else:
                rows.append(row)
                sizes.append(part.numel())
    if values:
        yield Batch(_joined(values), rows, sizes)


def _joined(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.cat(values)


def sums(values: Tensor, sizes: list[int]) -> Tensor:
    """Sums of consecutive stretches of a flat tensor, fp64 [len(sizes)]."""
    if len(set(sizes)) == 1:
        return values.view(len(sizes), -1).sum(-1, dtype=torch.float64)
    if values.device.type == "cpu":
        return torch.stack([part.sum(dtype=torch.float64) for part in values.split(sizes)])
    # On a GPU norms are the sums that take stretches of any size in one kernel.
    positive = torch._foreach_norm(values.clamp(min=0).split(sizes), 1, dtype=torch.float64)
    negative = torch._foreach_norm(values.clamp(max=0).split(sizes), 1, dtype=torch.float64)
    return torch.stack(positive) - torch.stack(negative)


def maxima(values: Tensor, sizes: list[int]) -> Tensor:
    """Maxima of consecutive non-empty stretches of a flat tensor of non-negative integers, [len(sizes)]."""
    if len(set(sizes)) == 1:
        return values.view(len(sizes), -1).amax(-1)
    return torch.stack(torch._foreach_max(values.split(sizes)))


def moved_to(device: torch.device, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device. Waits for it towards the CPU alone, where the host might read before it is there."""
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Integers of the host as an int64 tensor, without waiting for the device."""
    return moved_to(device, torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda"))


def placed(part: Tensor, rows: list[int], total: Tensor) -> Tensor:
    """Rows of a part at their places in the total, zeros elsewhere; by gathering, which is always deterministic."""
    if len(rows) == len(total):
        return moved_to(total.device, part)
    source = [len(rows)] * len(total)
    for place, row in enumerate(rows):
        source[row] = place
    padded = torch.cat([part, part.new_zeros(1, *part.shape[1:])])
    return moved_to(total.device, padded.index_select(0, on_device(source, part.device)))
