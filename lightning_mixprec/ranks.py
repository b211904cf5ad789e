"""Messages between the ranks of a distributed run, so that all of them see and decide the same."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def are_many() -> bool:
    """True if there is more than one rank."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def count() -> int:
    """The number of ranks."""
    return distributed.get_world_size() if are_many() else 1


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors by their sums over all ranks, one message for each dtype."""
    _reduce(tensors, distributed.ReduceOp.SUM)


def take_largest(tensors: Sequence[Tensor]) -> None:
    """Replaces tensors by their largest values over all ranks."""
    _reduce(tensors, distributed.ReduceOp.MAX)


def is_any(claim: bool, device: torch.device) -> bool:
    """True if a claim holds on some rank. Waits for all ranks."""
    if not are_many():
        return claim
    flag = torch.tensor(float(claim), device=device)
    take_largest([flag])
    return bool(flag.item())


def first_found(value: T | None) -> tuple[int, T | None]:
    """The first rank that has a value, and the value. Waits for all ranks; the value has to be picklable."""
    return next(((rank, each) for rank, each in enumerate(all_values(value)) if each is not None), (0, None))


def all_values(value: T) -> list[T]:
    """The values of all ranks, in their order. Waits for all ranks; the value has to be picklable."""
    if not are_many():
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def told_by(rank: int, message: str) -> str:
    """A message of a rank, for the one that speaks for all."""
    return f"{message}, on rank {rank}" if are_many() else message


def first_told(message: str | None) -> str | None:
    """The message of the first rank that has one. Waits for all ranks."""
    rank, found = first_found(message)
    return None if found is None else told_by(rank, found)


def _reduce(tensors: Sequence[Tensor], operation: Any) -> None:
    if not are_many():
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        distributed.all_reduce(flat, operation)
        parts = flat.split([tensor.numel() for tensor in same])
        for tensor, part in zip(same, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
