"""The one statistic from which the others are derived: how many numbers there are of each binary exponent.

Underflow, overflow, headroom and the best scale of any format follow from it without another look at the data (see
:mod:`lightning_mixprec.numerics.rates`), before any cast, which is the only moment at which an underflow can be told
from a zero.

>>> h = histogram(torch.tensor([0.0, 1.0, 1.5, 2.0, -3.0, float("inf")]))
>>> {exponent + LOWEST: count for exponent, count in enumerate(h.by_exponent.tolist()) if count}
{0: 2, 1: 2}
>>> h.zeros.item(), h.infs.item(), h.amax.item()
(1, 1, 3.0)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mixprec.numerics.flat_batches import (
    Batch,
    batches,
    by_kind,
    flatten,
    maxima,
    on_device,
    placed,
    sample,
    sums,
)

LOWEST, HIGHEST = -192, 191
"""The exponents with bins of their own; what lies outside, which only fp64 has, falls in the first or last bin."""

BINS = 2 * (HIGHEST - LOWEST + 1)
"""Two per exponent: the power of two itself, and what lies between it and the next."""

_COLUMNS = BINS + 3  # while counting: zeros, the bins, and two for infinities and NaNs


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of magnitudes by binary exponent, and what is told along with them.

    The leading shape ``[...]`` of every field is ``()`` for one group of tensors and ``[groups]`` for several.

    Attributes:
        counts: int64 [..., BINS]. Bin ``2 * (e - LOWEST)`` counts ``|x| == 2**e``, the one after it
            ``2**e < |x| < 2**(e + 1)``. A power of two has its own bin since it may round otherwise: fp16 rounds
            2**-25 to zero and every number above it to 2**-24. The first bin counts ``|x| <= 2**LOWEST``, the last all
            above ``2**HIGHEST``.
        zeros: int64 [...], true zeros.
        infs: int64 [...].
        nans: int64 [...].
        amax: fp64 [...], the largest finite magnitude of all elements, whether counted or not; 0 without any.
        log2_sum: fp64 [...], sum of ``log2|x|`` over the counted finite elements other than zero.
        log2_square_sum: fp64 [...], sum of their squares.
        elements: int64 [...], all elements, whether counted or not.
    """

    counts: Tensor
    zeros: Tensor
    infs: Tensor
    nans: Tensor
    amax: Tensor
    log2_sum: Tensor
    log2_square_sum: Tensor
    elements: Tensor

    @property
    def by_exponent(self) -> Tensor:
        """Counts of ``2**e <= |x| < 2**(e + 1)`` at ``e - LOWEST``, int64 [..., HIGHEST - LOWEST + 1]."""
        return self.counts[..., 0::2] + self.counts[..., 1::2]

    @property
    def finite_nonzero(self) -> Tensor:
        """Counted finite elements other than zero, int64 [...]."""
        return self.counts.sum(-1)

    @property
    def counted(self) -> Tensor:
        """Counted elements, int64 [...]; fewer than ``elements`` if it was sampled."""
        return self.finite_nonzero + self.zeros + self.infs + self.nans

    @property
    def log2_mean(self) -> Tensor:
        """Mean of ``log2|x|`` over the finite elements other than zero, fp64 [...]; NaN without any."""
        return self.log2_sum / self.finite_nonzero

    @property
    def log2_var(self) -> Tensor:
        """Variance of ``log2|x|`` over the finite elements other than zero, fp64 [...]; NaN without any."""
        return (self.log2_square_sum / self.finite_nonzero - self.log2_mean.square()).clamp(min=0)

    @cached_property
    def cumulative(self) -> list[int]:
        """Of one group: how many elements were counted in the bins before each, BINS + 1 integers; waits for a GPU."""
        return [0, *self.counts.cumsum(-1).tolist()]

    @cached_property
    def largest(self) -> float:
        """Of one group: ``amax``, on the host; waits for a GPU."""
        return float(self.amax)

    @cached_property
    def others(self) -> tuple[int, int, int]:
        """Of one group: counted zeros, counted infinities and NaNs, and all elements, on the host; waits for a GPU."""
        return int(self.zeros), int(self.infs) + int(self.nans), int(self.elements)

    def merge(self, other: "Histogram") -> "Histogram":
        """The histogram of both data together; exact except for rounding in the two sums of logarithms."""
        merged = {name: getattr(self, name) + getattr(other, name) for name in FIELDS}
        return Histogram(**merged | {"amax": torch.maximum(self.amax, other.amax)})

    def to(self, device: str | torch.device) -> "Histogram":
        """The same on another device."""
        return Histogram(**{name: getattr(self, name).to(device) for name in FIELDS})

    def select(self, index: int) -> "Histogram":
        """The histogram of one of several groups."""
        return Histogram(**{name: getattr(self, name)[index] for name in FIELDS})

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The numbers to sum over ranks and those to take the maximum of: fp64 [..., BINS + 6] and fp64 [...].

        Counts are exact in fp64 up to 2**53. After the reductions :meth:`from_tensors` makes a histogram of the two.
        """
        single = [getattr(self, name).double() for name in FIELDS if name not in ("counts", "amax")]
        return torch.cat([self.counts.double(), torch.stack(single, -1)], -1), self.amax.clone()

    @staticmethod
    def from_tensors(to_sum: Tensor, to_max: Tensor) -> "Histogram":
        """The histogram whose :meth:`tensors` these are."""
        zeros, infs, nans, log2_sum, log2_square_sum, elements = to_sum[..., BINS:].unbind(-1)
        counts, zeros, infs, nans, elements = (
            counted.long() for counted in (to_sum[..., :BINS], zeros, infs, nans, elements)
        )
        return Histogram(counts, zeros, infs, nans, to_max, log2_sum, log2_square_sum, elements)


FIELDS = [field.name for field in fields(Histogram)]


def histogram(tensors: Tensor | Sequence[Tensor], max_elements: int | None = None) -> Histogram:
    """The histogram of a tensor, or of several together; as :func:`histograms` with one group, fields of shape ()."""
    return histograms([[tensors] if isinstance(tensors, Tensor) else tensors], max_elements).select(0)


@torch.no_grad()
def histograms(groups: Sequence[Sequence[Tensor]], max_elements: int | None = None) -> Histogram:
    """The histograms of groups of tensors, in few kernels for all of them and without waiting for a GPU.

    Exact for every floating-point dtype, subnormals included, whatever the device does with them. Complex tensors
    count as their real and imaginary parts, DTensors by their local part. Of sparse tensors only the stored values
    count (coalescing them does wait): absent entries are neither elements nor zeros.

    Args:
        groups: floating-point or complex tensors of any shape, dtype and device; a group may be empty.
        max_elements: of a group with more elements than this, about this many are counted, at one stride over all its
            tensors in storage order, which is coprime with their sizes and so misses no column. ``amax`` is exact
            nevertheless. None counts everything.

    Returns:
        One row per group, on the device of the first tensor.

    Raises:
        FormatError: a tensor holds no floating-point numbers.
    """
    flat = [[flatten(tensor) for tensor in group] for group in groups]
    device = next((tensor.device for group in flat for tensor in group), torch.device("cpu"))
    elements = on_device([sum(tensor.numel() for tensor in group) for group in flat], device)
    table = torch.zeros(len(flat), _COLUMNS, dtype=torch.int64, device=device)
    moments = torch.zeros(len(flat), 2, dtype=torch.float64, device=device)
    amax = torch.zeros(len(flat), dtype=torch.float64, device=device)
    for rows, pieces in by_kind([sample(group, max_elements) for group in flat]):
        for total, part in zip((table, moments), _count(pieces, len(rows)), strict=True):
            total += placed(part, rows, total)
    for rows, pieces in by_kind(flat):
        amax = torch.maximum(amax, placed(_largest(pieces, len(rows)), rows, amax))
    zeros, counts, infs, nans = table.split([1, BINS, 1, 1], -1)
    log2_sum, log2_square_sum = moments.unbind(-1)
    return Histogram(
        counts, zeros.squeeze(-1), infs.squeeze(-1), nans.squeeze(-1), amax, log2_sum, log2_square_sum, elements
    )


class _Layout(NamedTuple):
    """The layout in bits of a float that holds every number of a dtype; as integers these sort by magnitude."""

    float_dtype: torch.dtype
    int_dtype: torch.dtype
    mantissa_bits: int
    bias: int

    @property
    def infinity(self) -> int:
        """Bits of infinity; larger ones are NaNs."""
        return (2 * self.bias + 1) << self.mantissa_bits

    @property
    def smallest_normal(self) -> int:
        """Bits of the smallest normal number."""
        return 1 << self.mantissa_bits

    def bits_of_power(self, exponent: int) -> int:
        """Bits of a power of two in the normal range."""
        return (exponent + self.bias) << self.mantissa_bits


_FP32 = _Layout(torch.float32, torch.int32, 23, 127)
_FP64 = _Layout(torch.float64, torch.int64, 52, 1023)


def _layout(dtype: torch.dtype) -> _Layout:
    return _FP64 if dtype == torch.float64 else _FP32


def _magnitude_bits(values: Tensor, layout: _Layout) -> Tensor:
    return values.to(layout.float_dtype).view(layout.int_dtype) & (layout.infinity | (layout.smallest_normal - 1))


def _count(pieces: list[tuple[int, Tensor]], rows: int) -> tuple[Tensor, Tensor]:
    """Counts, int64 [rows, _COLUMNS], and sums of log2 and of its square, fp64 [rows, 2], of one dtype and device."""
    device, layout = pieces[0][1].device, _layout(pieces[0][1].dtype)
    table = torch.zeros(rows, _COLUMNS, dtype=torch.int64, device=device)
    moments = torch.zeros(rows, 2, dtype=torch.float64, device=device)
    for batch in batches(pieces):
        bits = _magnitude_bits(batch.values, layout)
        # Only the device that need not be waited for is asked; elsewhere all are treated as if they had some.
        has_subnormals = device.type != "cpu" or bool(bits.min() < layout.smallest_normal)
        here = slice(batch.rows[0], batch.rows[-1] + 1)
        table[here] += _tally(_columns(bits, layout, has_subnormals), batch)
        log2 = _log2(bits, layout, has_subnormals)
        moments[here, 0] += sums(log2, batch.sizes)
        moments[here, 1] += sums(log2.double().square_(), batch.sizes)
    return (table if layout is _FP64 else _infinities_moved(table)), moments


def _columns(bits: Tensor, layout: _Layout, has_subnormals: bool) -> Tensor:
    """The column of each magnitude: the exponent rounded down plus the exponent rounded up, which tells 2**e apart."""
    if layout is _FP64:
        bits = _clamped_to_bins(bits)
    elif has_subnormals:
        bits = _with_true_exponents(bits, layout)
    column = (bits >> layout.mantissa_bits) - (bits.neg() >> layout.mantissa_bits)
    column += 1 - 2 * (layout.bias + LOWEST)
    return column.clamp_(min=0) if has_subnormals else column


def _with_true_exponents(bits: Tensor, layout: _Layout) -> Tensor:
    """Bits whose exponent field, negative where need be, is the number's own for subnormals too; least for zero.

    A subnormal's mantissa is converted as an integer, which no device flushes to zero. What is added is 0 for normal
    numbers.
    """
    mantissa = bits.clamp(max=layout.smallest_normal)
    shift = (layout.bias - 1 + layout.mantissa_bits) << layout.mantissa_bits
    return (mantissa.to(layout.float_dtype).view(layout.int_dtype) - shift).sub_(mantissa).add_(bits)


def _clamped_to_bins(bits: Tensor) -> Tensor:
    """fp64 bits with finite magnitudes moved into the bins, zero just below, infinity and NaNs just above."""
    lowest, above = _FP64.bits_of_power(LOWEST), _FP64.bits_of_power(HIGHEST + 1)
    excess = (bits - (_FP64.infinity - 1)).clamp_(min=0)
    return bits.clamp(lowest, above - 1).add_(excess).add_(bits.clamp(max=1)).sub_(1)


def _infinities_moved(table: Tensor) -> Tensor:
    """The table of numbers counted as fp32, where infinity has the exponent 128: it and NaNs go to the end."""
    infinity = 1 + 2 * (_FP32.bias + 1 - LOWEST)
    moved = table.clone()
    moved[:, infinity : infinity + 2] = 0
    moved[:, -2:] = table[:, infinity : infinity + 2]
    return moved


def _log2(bits: Tensor, layout: _Layout, has_subnormals: bool) -> Tensor:
    """Logarithms of magnitudes, 0 for zeros, infinities and NaNs."""
    log2 = bits.clamp(min=layout.smallest_normal).view(layout.float_dtype).log2_()
    if has_subnormals:
        # Of a subnormal the first logarithm is that of the smallest normal number; of a normal one the second is 0.
        # Zeros count as one step there, and then as nothing: the logarithm of 0 itself is slow.
        mantissa = bits.clamp(1, layout.smallest_normal).to(layout.float_dtype)
        log2 += mantissa.log2_().sub_(layout.mantissa_bits)
        log2 *= bits.clamp(max=1)
    return log2.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def _tally(column: Tensor, batch: Batch) -> Tensor:
    """Counts of each column in each stretch of a batch, [stretches, _COLUMNS]."""
    stretches = len(batch.sizes)
    if stretches > 1:
        torch._foreach_add_(column.split(batch.sizes), [index * _COLUMNS for index in range(stretches)])
    count = _count_on_cpu if column.device.type == "cpu" else _count_elsewhere
    return count(column, stretches * _COLUMNS).view(stretches, _COLUMNS)


def _count_on_cpu(codes: Tensor, bins: int) -> Tensor:
    return torch.bincount(codes, minlength=bins)


def _count_elsewhere(codes: Tensor, bins: int) -> Tensor:
    """As bincount, which on a GPU waits for the largest code; a batch is too small to overflow 32-bit counters."""
    if torch.are_deterministic_algorithms_enabled():
        return _count_by_sorting(codes, bins)
    return torch.histc(codes.int(), bins=bins, min=0, max=bins)


def _count_by_sorting(codes: Tensor, bins: int) -> Tensor:
    edges = torch.arange(bins + 1, dtype=codes.dtype, device=codes.device)
    return torch.searchsorted(codes.sort().values, edges).diff()


def _largest(pieces: list[tuple[int, Tensor]], rows: int) -> Tensor:
    """Largest finite magnitudes of rows, fp64 [rows], of one dtype and device.

    On a CPU a tensor's own minimum and maximum say it at once, unless they are not finite or subnormal.
    """
    if pieces[0][1].device.type != "cpu" or pieces[0][1].dtype.itemsize == 1:
        return _largest_by_bits(pieces, rows)
    largest, info = [0.0] * rows, torch.finfo(pieces[0][1].dtype)
    doubtful: list[list[Tensor]] = [[] for _ in range(rows)]
    for row, values in pieces:
        low, high = values.aminmax()
        magnitude = max(-float(low), float(high))
        if info.smallest_normal <= magnitude <= info.max:
            largest[row] = max(largest[row], magnitude)
        else:
            doubtful[row].append(values)
    amax = torch.tensor(largest, dtype=torch.float64)
    for places, kind in by_kind(doubtful):
        amax = amax.maximum(placed(_largest_by_bits(kind, len(places)), places, amax))
    return amax


def _largest_by_bits(pieces: list[tuple[int, Tensor]], rows: int) -> Tensor:
    layout = _layout(pieces[0][1].dtype)
    bits = torch.zeros(rows, dtype=layout.int_dtype, device=pieces[0][1].device)
    for batch in batches(pieces):
        here = slice(batch.rows[0], batch.rows[-1] + 1)
        magnitudes = _magnitude_bits(batch.values, layout)
        magnitudes *= magnitudes < layout.infinity
        bits[here] = torch.maximum(bits[here], maxima(magnitudes, batch.sizes))
    if layout is _FP64:
        return bits.view(torch.float64)
    subnormal = bits.double() * math.ldexp(1.0, 1 - layout.bias - layout.mantissa_bits)
    return torch.where(bits < layout.smallest_normal, subnormal, bits.view(layout.float_dtype).double())
