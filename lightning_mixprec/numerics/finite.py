"""Which of many tensors hold a NaN or an infinity.

>>> are_nonfinite([torch.ones(2), torch.tensor([1.0, torch.inf]), torch.arange(3)])
[False, True, False]
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mixprec.numerics.flat_batches import local_part


def are_nonfinite(tensors: Sequence[Tensor]) -> list[bool]:
    """Which tensors hold a NaN or an infinity; one read from each device."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        if (tensor.is_floating_point() or tensor.is_complex()) and (values := dense(tensor)).numel():
            groups.setdefault((values.device, values.dtype), []).append((place, values))
    norms: dict[torch.device, list[tuple[list[int], Tensor]]] = {}
    for (device, _), group in groups.items():
        largest = torch.stack(list(torch._foreach_norm([values for _, values in group], float("inf"))))
        norms.setdefault(device, []).append(([place for place, _ in group], ~torch.isfinite(largest)))
    result = [False] * len(tensors)
    for parts in norms.values():
        flags = torch.cat([flags for _, flags in parts]).tolist()
        for place, flag in zip((place for places, _ in parts for place in places), flags, strict=True):
            result[place] = flag
    return result


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
