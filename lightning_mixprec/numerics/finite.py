"""The search for NaN and infinities in many tensors at once.

>>> tensors = [torch.ones(2), torch.tensor([1.0, torch.inf]), torch.arange(3)]
>>> are_nonfinite(tensors), all_finite(tensors[:1]).item()
([False, True, False], True)
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_mixprec.numerics.flat_batches import by_kind, local_part


def are_nonfinite(tensors: Sequence[Tensor]) -> list[bool]:
    """For each tensor, True if it holds a NaN or an infinity; one read from each device."""
    parts: dict[torch.device, list[tuple[list[int], Tensor]]] = {}
    for places, flags in _nonfinite_flags(tensors):
        parts.setdefault(flags.device, []).append((places, flags))
    result = [False] * len(tensors)
    for group in parts.values():
        told = torch.cat([flags for _, flags in group]).tolist()
        for place, flag in zip((place for places, _ in group for place in places), told, strict=True):
            result[place] = flag
    return result


def are_finite(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For each tensor, true if it holds no NaN and no infinity: a bool on its device. Waits for nothing there."""
    result = [torch.tensor(True)] * len(tensors)
    for places, flags in _nonfinite_flags(tensors):
        for place, flag in zip(places, (~flags).unbind(), strict=True):
            result[place] = flag
    return result


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """True if no tensor holds a NaN or an infinity: a bool on the device of the first one. Waits for nothing there."""
    bad = [flags.any() for _, flags in _nonfinite_flags(tensors)]
    return ~torch.stack([flag.to(bad[0].device) for flag in bad]).any() if bad else torch.tensor(True)


def _nonfinite_flags(tensors: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Places of tensors of one kind and, on their device, which of them hold a NaN or an infinity."""
    real = [[dense(tensor)] if tensor.is_floating_point() or tensor.is_complex() else [] for tensor in tensors]
    for places, pieces in by_kind(real):
        yield places, ~finite_flags([values for _, values in pieces])


def dense(tensor: Tensor) -> Tensor:
    """A tensor's values, as real numbers of a format that norms can be taken in."""
    values = local_part(tensor.detach())
    if values.layout == torch.sparse_coo:
        values = values._values()
    elif values.layout != torch.strided:
        values = values.values()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    return values.float() if values.dtype.itemsize == 1 else values


def finite_flags(tensors: list[Tensor]) -> Tensor:
    """Which of some tensors are finite, by one pass that only reads: bools on their device.

    On a CPU the least and the largest of each take as long as reading it, in the order of memory; norms, in a wider
    format or of infinite order, take 3 to 15 times that.

    Args:
        tensors: Not empty, dense and real, each with elements, of one dtype of at least 16 bits and one device.
    """
    if tensors[0].device.type == "cpu":
        least, largest = zip(*(torch.aminmax(_in_memory_order(tensor)) for tensor in tensors), strict=True)
        return torch.isfinite(torch.stack(least + largest)).view(2, -1).all(0)
    return torch.isfinite(torch.stack(list(torch._foreach_norm(tensors, float("inf")))))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A view with the dimensions from the largest stride to the least: contiguous, if no element is left out."""
    return tensor if tensor.is_contiguous() else tensor.permute(sorted(range(tensor.dim()), key=tensor.stride)[::-1])
