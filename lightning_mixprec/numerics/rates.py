"""The losses of a cast to a format, told from a histogram of the numbers alone, for any format and any scale.

With a scale, the numbers are those of the histogram times the scale. Rates refer to the counted elements; where the
histogram cannot tell, because a limit falls inside a bin, a rate is two bounds. With a power of two as scale, no limit
that matters for underflow falls inside a bin.

>>> import torch
>>> from lightning_mixprec.numerics.exponents import histogram
>>> gradient = histogram(torch.tensor([0.0, 2.0**-25, 2.0**-24, 1.0]))
>>> underflow_rate(gradient, "fp16").middle, underflow_rate(gradient, "fp16", scale=2.0).middle
(0.3333333333333333, 0.0)
>>> best_scale(gradient, "fp16"), round(headroom(gradient, "fp16"), 3)
(16384.0, 15.999)
"""

import functools
import math
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_mixprec.errors import FormatError
from lightning_mixprec.numerics.exponents import BINS, LOWEST, Histogram
from lightning_mixprec.numerics.formats import Format, get_format

Direction = Literal["forward", "backward"]
"""The one of the two formats of "fp8" that is meant; the others have only one."""

_LEAST_POWER, _LARGEST_POWER = -24, 24  # of two, as a scale


class Bounds(NamedTuple):
    """A number known to lie in ``[low, high]``."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """The number itself if it is known, otherwise the one with the least possible error."""
        return (self.low + self.high) / 2


def underflow_rate(h: Histogram, format: str, scale: float = 1.0, direction: Direction = "forward") -> Bounds:
    """Share of the finite elements other than zero that round to zero; 0 without any.

    Half the smallest subnormal is a tie, which rounds to zero. Exact if the scale is a power of two.

    Args:
        h: of one group, on any device; reading it waits for the device.
        format: a format's name.
        scale: positive factor that comes before the cast.
        direction: which format "fp8" stands for.

    Raises:
        FormatError: the format is unknown, the scale not positive and finite, or the histogram one of several groups.
    """
    target = _format(h, format, direction)
    below, up_to = _boundary(target.min_exponent - target.mantissa_bits - 1, scale, inclusive=True)
    return _share(h, (0, below), (0, up_to))


def subnormal_share(h: Histogram, format: str, scale: float = 1.0, direction: Direction = "forward") -> Bounds:
    """Share of the finite elements other than zero that lose precision, but not all: too small for normal numbers.

    Their magnitude is below the format's smallest normal number, before rounding, and they do not round to zero. Exact
    if the scale is a power of two. Arguments and errors are those of :func:`underflow_rate`.
    """
    target = _format(h, format, direction)
    zero_low, zero_high = _boundary(target.min_exponent - target.mantissa_bits - 1, scale, inclusive=True)
    normal_low, normal_high = _boundary(target.min_exponent, scale, inclusive=False)
    return _share(h, (zero_high, normal_low), (zero_low, normal_high))


def overflow_rate(h: Histogram, format: str, scale: float = 1.0, direction: Direction = "forward") -> Bounds:
    """Share of all elements that end as infinity or NaN, those that are so already included; 0 without any elements.

    Exact if no finite element overflows, which ``amax`` tells even of a sampled histogram, or if all that do lie above
    the format's last power of two by a factor of two or more. If one does, the rate is at least one in all elements,
    whether that one was counted or not. Arguments and errors are those of :func:`underflow_rate`.
    """
    target = _format(h, format, direction)
    _, sure = _boundary(target.max_exponent + 1, scale, inclusive=False)
    possible, _ = _boundary(target.max_exponent, scale, inclusive=True)
    below, (zeros, already, elements) = h.cumulative, h.others
    counted = below[-1] + zeros + already
    if counted == 0:
        return Bounds(0.0, 0.0)
    if not _overflows(h.largest * scale, target):
        return Bounds(already / counted, already / counted)
    low = max((already + below[-1] - below[sure]) / counted, 1 / elements)
    return Bounds(low, max((already + below[-1] - below[possible]) / counted, low))


def headroom(h: Histogram, format: str, scale: float = 1.0, direction: Direction = "forward") -> float:
    """Bits by which the largest finite magnitude may still grow: ``log2(max / (amax * scale))``.

    Negative if it is too large already; infinite if there is no finite element other than zero. Arguments and errors
    are those of :func:`underflow_rate`.
    """
    target, amax = _format(h, format, direction), h.largest
    log2_scale = math.log2(_checked(scale))
    return math.log2(target.max) - math.log2(amax) - log2_scale if amax else math.inf


def best_scale(h: Histogram, format: str, margin: int = 1, direction: Direction = "forward") -> float:
    """The largest power of two as scale that leaves the largest magnitude ``margin`` bits short of overflow.

    Kept within ``[2**-24, 2**24]``, and 1 if there is no finite element other than zero. Other
    arguments and errors are those of :func:`underflow_rate`.
    """
    target, amax = _format(h, format, direction), h.largest
    if not amax:
        return 1.0
    exponent = target.max_exponent + 1 - math.frexp(amax)[1]
    while _overflows(math.ldexp(amax, exponent), target):
        exponent -= 1
    return 2.0 ** min(max(exponent - margin, _LEAST_POWER), _LARGEST_POWER)


def fits(h: Histogram, format: str, max_underflow: float = 0.01, direction: Direction = "forward") -> bool:
    """True if some scale keeps everything finite and lets at most ``max_underflow`` of the numbers round to zero.

    Scales are the powers of two in ``[2**-24, 2**24]``, of which the largest without overflow is best.
    False where something is infinite or NaN already. Other arguments and errors are those of :func:`underflow_rate`.
    """
    scale = best_scale(h, format, margin=0, direction=direction)
    if overflow_rate(h, format, scale, direction).high > 0:
        return False
    return underflow_rate(h, format, scale, direction).high <= max_underflow


def underflows(values: Tensor, target: Format, scale: float) -> tuple[Tensor, Tensor]:
    """The number of elements that a format, after scaling, rounds to zero; and of all that are finite and not zero.

    Exact for every scale: half the smallest subnormal is a tie, which goes to zero.

    >>> underflows(torch.tensor([0.0, 2.0**-25, 2.0**-24]), get_format("fp16"), 1.0)
    (tensor(1), tensor(2))
    """
    magnitudes = _magnitudes(values)
    last_zero = _last_within(_power(target.min_exponent - target.mantissa_bits - 1), True, scale, magnitudes.dtype)
    nonzero = magnitudes > 0
    return (nonzero & (magnitudes <= last_zero)).sum(), (nonzero & (magnitudes < torch.inf)).sum()


def overflows(values: Tensor, target: Format, scale: float) -> tuple[Tensor, Tensor]:
    """The number of elements that a format, after scaling, does not keep finite; and of all. Exact for every scale.

    >>> overflows(torch.tensor([65519.0, 65520.0, torch.nan]), get_format("fp16"), 1.0)
    (tensor(2), tensor(3))
    """
    magnitudes = _magnitudes(values)
    is_kept = magnitudes <= _last_finite(target, scale, magnitudes.dtype)
    return (~is_kept).sum(), torch.full((), magnitudes.numel(), device=magnitudes.device)


def _magnitudes(values: Tensor) -> Tensor:
    return values.to(torch.float64 if values.dtype == torch.float64 else torch.float32).abs()


@functools.lru_cache
def _last_finite(target: Format, scale: float, dtype: torch.dtype) -> float:
    """The largest number of a dtype that a format, after scaling, keeps finite.

    Beyond half a step above the format's maximum it is infinite or NaN; the tie goes to the even one of the two, which
    the maximum is only where the codes above it are NaN.
    """
    half_step = _power(max(target.max_exponent, target.min_exponent) - target.mantissa_bits - 1)
    return _last_within(Fraction(target.max) + half_step, target.overflow == "nan", scale, dtype)


def _power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


@functools.lru_cache
def _last_within(bound: Fraction, inclusive: bool, scale: float, dtype: torch.dtype) -> float:
    """The largest number of a dtype whose product with a scale, as a real number, is below a bound, or equal to it."""
    bound /= Fraction(scale)
    # Rounding keeps the order, so this is none of the numbers below the one that is looked for.
    last = torch.tensor(float(min(bound, Fraction(torch.finfo(dtype).max))), dtype=dtype)
    while last.item() > bound or (last.item() == bound and not inclusive):
        last = last.nextafter(torch.zeros_like(last))
    return float(last.item())


def _format(h: Histogram, name: str, direction: Direction) -> Format:
    if h.counts.dim() != 1:
        raise FormatError(f"this histogram is one of {len(h.counts)} groups: take one of them with select(index)")
    if direction not in ("forward", "backward"):
        raise FormatError(f"direction is 'forward' or 'backward', not {direction!r}")
    format = get_format(name)
    return format.forward if direction == "forward" else format.backward


def _checked(scale: float) -> float:
    if not (scale > 0 and math.isfinite(scale)):
        raise FormatError(f"a scale is a positive finite number, not {scale}")
    return scale


def _boundary(exponent: int, scale: float, inclusive: bool) -> tuple[int, int]:
    """The number of bins below ``|x| * scale == 2**exponent``, at least and at most, that limit included if inclusive.

    The two differ by the bin in which the limit falls, and by the first and the last bin, which have no outer limit.
    """
    mantissa, scale_exponent = math.frexp(_checked(scale))
    place = 2 * (exponent - (scale_exponent - 1) - LOWEST)
    if mantissa == 0.5:
        at_least = at_most = place + inclusive
    else:
        at_least, at_most = place - 1, place
    return min(max(at_least, 0), BINS - 1), min(max(at_most, 1), BINS)


def _share(h: Histogram, sure: tuple[int, int], possible: tuple[int, int]) -> Bounds:
    below = h.cumulative
    if below[-1] == 0:
        return Bounds(0.0, 0.0)
    low, high = (max(below[stop] - below[start], 0) / below[-1] for start, stop in (sure, possible))
    return Bounds(low, high)


def _overflows(magnitude: float, target: Format) -> bool:
    return magnitude > _last_finite(target, 1.0, torch.float64)
