"""Similarity of numbers before and after: signal to noise, and direction.

Results stay on the device of the data and nothing waits for it.

>>> reference = torch.tensor([1.0, 2.0, 3.0])
>>> sqnr_db(reference, reference + 0.01).round().item()
47.0
>>> cosine_of(dots([reference], [2 * reference])).tolist()
[1.0]
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_mixprec.errors import FormatError
from lightning_mixprec.numerics.flat_batches import batches, by_kind, flatten_together, placed, sums


@torch.no_grad()
def sqnr_db(reference: Tensor, approximation: Tensor) -> Tensor:
    """Signal to quantization noise ratio, ``10 log10(sum r**2 / sum (r - a)**2)`` in decibels, computed in fp64.

    Infinite if all elements are equal, also if all are zero. Minus infinity if the reference is all zeros and the
    approximation is not, or if the approximation holds infinities or NaNs. NaN if there are no elements, or the
    reference holds infinities or NaNs, or fp64 numbers beyond 1e154, whose squares overflow.

    Args:
        reference: floating-point or complex, any shape.
        approximation: of the same shape.

    Returns:
        fp64 of shape (), on the reference's device.

    Raises:
        FormatError: the shapes differ, or a tensor holds no floating-point numbers.
    """
    first, second = flatten_together(reference, approximation)
    signal, noise = energies(first, second)
    return decibels(signal, noise) if first.numel() else torch.full_like(signal, math.nan)


@torch.no_grad()
def energies(reference: Tensor, approximation: Tensor) -> tuple[Tensor, Tensor]:
    """The energies of a flat tensor and of its difference from another one of the same dtype, device and size, fp64."""
    signal = torch.zeros((), dtype=torch.float64, device=reference.device)
    noise = signal.clone()
    for exact, other in _pairs(reference, approximation):
        signal += exact.square().sum()
        noise += (exact - other).square().sum()
    return signal, noise


def decibels(signal: Tensor, noise: Tensor) -> Tensor:
    """Ratios of energies in decibels: infinite without noise, minus infinite if it is not finite; NaN if signal is not.

    >>> one = torch.ones((), dtype=torch.float64)
    >>> decibels(one, one / 1000).item(), decibels(one, 0 * one).item(), decibels(one, one * math.nan).item()
    (30.0, inf, -inf)
    """
    ratio = 10 * torch.log10(signal / noise.nan_to_num(nan=math.inf, posinf=math.inf))
    return torch.where(signal.isfinite(), torch.where(noise == 0, math.inf, ratio), math.nan)


@torch.no_grad()
def dots(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Dot products ``(a.b, a.a, b.b)`` of corresponding tensors, accumulated in fp64, in few kernels for all of them.

    They may be summed, over rows for the cosine of all parameters together and over ranks, before :func:`cosine_of`.

    Args:
        first: floating-point tensors of any shapes; of complex ones both parts count, of DTensors the local part.
        second: as many, of the same shapes.

    Returns:
        fp64 [len(first), 3], on the device of the first tensor.

    Raises:
        FormatError: numbers or shapes of tensors differ, or a tensor holds no floating-point numbers.
    """
    if len(first) != len(second):
        raise FormatError(f"cannot compare {len(first)} tensors with {len(second)}")
    pairs = [flatten_together(a, b) for a, b in zip(first, second, strict=True)]
    total = torch.zeros(len(pairs), 3, dtype=torch.float64, device=pairs[0][0].device if pairs else None)
    kinds = (by_kind([[pair[side]] for pair in pairs]) for side in (0, 1))
    for (rows, a_pieces), (_, b_pieces) in zip(*kinds, strict=True):
        part = torch.zeros(len(rows), 3, dtype=torch.float64, device=a_pieces[0][1].device)
        for a, b in zip(batches(a_pieces), batches(b_pieces), strict=True):
            x, y, here = a.values.double(), b.values.double(), slice(a.rows[0], a.rows[-1] + 1)
            part[here] += torch.stack([sums(product, a.sizes) for product in (x * y, x * x, y * y)], -1)
        total += placed(part, rows, total)
    return total


def cosine_of(parts: Tensor) -> Tensor:
    """Cosine similarities from :func:`dots` or sums of them.

    1 if both vectors are zero, 0 if only one is, NaN if anything is not finite. The same to the last bit if all parts
    are multiplied by a power of two, as by ranks that have the same data, unless the product of the squared norms
    leaves the range of fp64.

    Args:
        parts: fp64 [..., 3].

    Returns:
        fp64 [...], in [-1, 1].
    """
    product, first, second = parts.unbind(-1)
    both = first * second
    is_normal = both.isfinite() & (both >= torch.finfo(both.dtype).tiny)
    norms = torch.where(is_normal, both.sqrt(), first.sqrt() * second.sqrt())
    cosine = (product / norms).clamp(-1, 1)
    cosine = torch.where((first == 0) | (second == 0), ((first == 0) & (second == 0)).to(cosine.dtype), cosine)
    return torch.where(parts.isfinite().all(-1), cosine, math.nan)


def _pairs(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in fp64, in pieces that bound the memory for it."""
    pieces = (batches([(0, tensor)] if tensor.numel() else []) for tensor in (first, second))
    for a, b in zip(*pieces, strict=True):
        yield a.values.double(), b.values.double()
