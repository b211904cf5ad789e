"""Similarity of numbers before and after: signal to noise, direction, and updates that change nothing.

Results stay on the device of the data and nothing waits for it.

>>> reference = torch.tensor([1.0, 2.0, 3.0])
>>> sqnr_db(reference, reference + 0.01).round().item()
47.0
>>> cosine_of(dots([reference], [2 * reference])).tolist()
[1.0]
>>> stagnation_rate(torch.ones(2), torch.tensor([0.01, 0.001]), "bf16").item()
0.5
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_mixprec.errors import FormatError
from lightning_mixprec.numerics.flat_batches import batches, by_kind, flatten_together, placed, sums
from lightning_mixprec.numerics.formats import Format, format_of, get_format
from lightning_mixprec.numerics.rounding import round_to


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


@torch.no_grad()
def stagnation_rate(param: Tensor, update: Tensor, format: str | None = None) -> Tensor:
    """Share of the updates that change nothing: ``round(param + update) == param`` although the update is not zero.

    Exact, since no sum is formed: an update is lost if it is at most half the distance to the next number, or less
    than half if the tie would go there.

    Args:
        param: floating-point, any shape; as it is after rounding to the format.
        update: of the same shape, what is added. Elements that are zero or not finite, or whose parameter is not, do
            not count.
        format: in which the parameter is stored, by default its own dtype's; "fp8" is e4m3.

    Returns:
        fp64 of shape (), on the parameter's device; 0 if no element counts.

    Raises:
        FormatError: the format is unknown, the shapes differ, or a tensor holds no floating-point numbers.
    """
    name = format or format_of(param.dtype)
    if name is None:
        raise FormatError(f"{param.dtype} is not among the formats: name the one in which the parameter is stored")
    target = get_format(name).forward
    first, second = flatten_together(param, update)
    counted = torch.zeros((), dtype=torch.int64, device=first.device)
    lost = counted.clone()
    for stored, added in _pairs(first, second):
        stored = round_to(stored, target.name)
        counts = (added != 0) & added.isfinite() & stored.isfinite()
        counted += counts.sum()
        lost += (counts & _is_lost(stored, added, target)).sum()
    return lost.double() / counted.clamp(min=1)


def _pairs(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in fp64, in pieces that bound the memory for it."""
    pieces = (batches([(0, tensor)] if tensor.numel() else []) for tensor in (first, second))
    for a, b in zip(*pieces, strict=True):
        yield a.values.double(), b.values.double()


def _is_lost(stored: Tensor, added: Tensor, target: Format) -> Tensor:
    """True if numbers of a format stay what they are when something is added; all in fp64, exactly."""
    mantissa, exponent = torch.frexp(stored.abs())
    is_power = mantissa == 0.5
    exponent = torch.where(stored == 0, target.min_exponent, exponent.long() - 1).clamp(min=target.min_exponent)
    steps = _in_steps(stored.abs(), exponent, target)
    distance = _in_steps(added.abs(), exponent, target)
    # Below a power of two, numbers are twice as dense.
    denser = is_power & (exponent > target.min_exponent) & (stored.sign() != added.sign())
    half = torch.where(denser, 0.25, 0.5)
    return torch.where(steps.remainder(2) == 1, distance < half, distance <= half)


def _in_steps(magnitude: Tensor, exponent: Tensor, target: Format) -> Tensor:
    """Magnitudes divided by the distance of the format's numbers at these exponents.

    By powers of two, in halves because 2**-1023 is no normal number: exact unless the result is far from what matters.
    """
    half = exponent >> 1
    return magnitude * _power_of_two(-half) * 2.0**target.mantissa_bits * _power_of_two(half - exponent)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 1023) << 52).view(torch.float64)
