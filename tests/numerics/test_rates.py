"""Rates told from a histogram against what a real cast does to the numbers."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from selection import slow_but_for

from lightning_mixprec.errors import FormatError
from lightning_mixprec.numerics.exponents import histogram, histograms
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.numerics.rates import (
    Bounds,
    best_scale,
    fits,
    headroom,
    overflow_rate,
    subnormal_share,
    underflow_rate,
)

# ml_dtypes rounds fp64 to fp8 by way of fp32, so the numbers that are cast must fit fp32 exactly.
CAST = {
    "fp32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
SMALL = [name for name in CAST if name != "fp32"]


def cast(values, name):
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if name in ("fp16", "bf16"):
            dtype = torch.float16 if name == "fp16" else torch.bfloat16
            return torch.from_numpy(values.astype(np.float32)).to(dtype).double().numpy()
        return values.astype(CAST[name]).astype(np.float64)


def true_rates(values, name, scale):
    """Underflow, subnormal and overflow shares by casting."""
    scaled = values.double().numpy() * scale
    after = cast(scaled, name)
    nonzero = np.isfinite(scaled) & (scaled != 0)
    lost = nonzero & (after == 0)
    subnormal = nonzero & (after != 0) & (np.abs(scaled) < get_format(name).smallest_normal)
    total, everything = max(1, np.count_nonzero(nonzero)), max(1, scaled.size)
    return (
        np.count_nonzero(lost) / total,
        np.count_nonzero(subnormal) / total,
        np.count_nonzero(~np.isfinite(after)) / everything,
    )


def spread(name, count=20_000, seed=0):
    """fp32 numbers all over a format's range and beyond, many of them at its limits, at ties and next to them."""
    format, random = get_format(name), np.random.default_rng(seed)
    exponents = random.uniform(format.min_exponent - format.mantissa_bits - 4, format.max_exponent + 3, count)
    values = np.exp2(np.clip(exponents, -140, 127)) * random.choice([-1, 1], count)
    limits = [format.smallest_subnormal / 2, format.smallest_subnormal, format.smallest_normal, format.max]
    limits.append(format.max + math.ldexp(format.epsilon, format.max_exponent - 1))
    limits = torch.tensor([limit for limit in limits if limit < 3.4e38 and limit > 2.0**-149], dtype=torch.float32)
    near = [torch.nextafter(limits, torch.full_like(limits, towards)) for towards in (0, math.inf)]
    specials = torch.tensor([0.0, -0.0, math.inf, math.nan])
    values = torch.from_numpy(values.astype(np.float32))
    return torch.cat([values, *([limits, -limits, *near] * 50), *([specials] * 9)])


@pytest.mark.parametrize("scale", [1.0, 2.0**-7, 2.0**5, 2.0**10])
@pytest.mark.parametrize("name", SMALL)
def test_rates_are_those_of_a_real_cast(name, scale):
    values = spread(name)
    values = values[values.isfinite().logical_not() | (values.abs() < 1e38 / max(1, scale))]
    counted = histogram(values)
    underflow, subnormal, overflow = true_rates(values, name, scale)
    assert underflow_rate(counted, name, scale) == Bounds(underflow, underflow)
    assert subnormal_share(counted, name, scale) == Bounds(subnormal, subnormal)
    bounds = overflow_rate(counted, name, scale)
    assert bounds.low <= overflow <= bounds.high
    assert bounds.high - bounds.low < 0.2


@pytest.mark.parametrize("scale", [1.5, 0.3, 1e-3, 777.0])
@pytest.mark.parametrize("name", SMALL)
def test_other_scales_are_answered_by_bounds(name, scale):
    values = spread(name)
    values = values[values.isfinite().logical_not() | (values.abs() < 1e35)]
    counted = histogram(values)
    told = [rate(counted, name, scale) for rate in (underflow_rate, subnormal_share, overflow_rate)]
    for bounds, true in zip(told, true_rates(values, name, scale), strict=True):
        assert bounds.low <= true <= bounds.high
        assert bounds.high - bounds.low < 0.2
    # At 777 nothing in reach of the limit is left.
    assert (told[0].low == told[0].high) is (scale == 777.0)


NUMBERS = st.one_of(
    st.floats(width=16, allow_nan=True),
    st.floats(min_value=-3e4, max_value=3e4, width=32),
    st.floats(min_value=2.0**-30, max_value=2.0**-8, width=32),
    st.integers(-30, 20).map(lambda exponent: 2.0**exponent),
    st.sampled_from([464.0, 448.0, 464.00003, 65504.0, 65520.0, 61440.0, 57344.0, 2.0**-25, -(2.0**-10), 2.0**-17]),
)


@settings(max_examples=200, deadline=None)
@given(values=st.lists(NUMBERS, max_size=12), name=st.sampled_from(SMALL), exponent=st.integers(-20, 20))
@example(values=[464.0], name="e4m3", exponent=0)
@example(values=[65520.0, 65519.996], name="fp16", exponent=0)
def test_bounds_hold_the_rate_of_any_numbers(values, name, exponent):
    tensor = torch.tensor(values, dtype=torch.float32)
    counted, scale = histogram(tensor), 2.0**exponent
    underflow, subnormal, overflow = true_rates(tensor, name, scale)
    assert underflow_rate(counted, name, scale) == Bounds(underflow, underflow)
    assert subnormal_share(counted, name, scale) == Bounds(subnormal, subnormal)
    bounds = overflow_rate(counted, name, scale)
    assert bounds.low <= overflow <= bounds.high
    finite = tensor.abs()[tensor.isfinite()]
    if not len(finite) or np.isfinite(cast(np.array([finite.max().item() * scale]), name)).all():
        assert bounds == Bounds(overflow, overflow)


def test_the_tie_of_fp16_rounds_to_zero_and_nothing_above_it():
    tie = 2.0**-25
    above = torch.nextafter(torch.tensor(tie), torch.tensor(1.0))
    assert torch.tensor([tie, above]).half().count_nonzero() == 1
    assert underflow_rate(histogram(torch.tensor([tie, above])), "fp16").middle == 0.5


def test_true_zeros_and_what_is_not_finite_are_no_underflow():
    counted = histogram(torch.tensor([0.0, 0.0, 1e-9, 1.0, math.inf, math.nan]))
    assert underflow_rate(counted, "fp16") == Bounds(0.5, 0.5)
    assert overflow_rate(counted, "fp16") == Bounds(2 / 6, 2 / 6)


def test_one_overflow_is_not_lost_among_many_nor_in_a_sample():
    values = torch.full((100_001,), 1.0)
    values[1] = 65520.0
    assert overflow_rate(histogram(values), "fp16") == Bounds(1 / 100_001, 1 / 100_001)
    sampled = histogram(values, max_elements=100)
    assert overflow_rate(sampled, "fp16").low == overflow_rate(sampled, "fp16").high == 1 / 100_001
    values[1] = 65519.0
    assert overflow_rate(histogram(values, max_elements=100), "fp16") == Bounds(0.0, 0.0)


def test_without_elements_nothing_happens():
    for values in (torch.empty(0), torch.zeros(3)):
        counted = histogram(values)
        for rate in (underflow_rate, subnormal_share, overflow_rate):
            assert rate(counted, "fp16", 0.3) == Bounds(0.0, 0.0)
        assert headroom(counted, "fp16") == math.inf
        assert best_scale(counted, "fp16") == 1.0
        assert fits(counted, "e4m3")


def test_bounds():
    assert Bounds(0.25, 0.25).middle == 0.25
    assert Bounds(0.25, 0.75).middle == 0.5


@pytest.mark.parametrize("values", [[1e-300, 1.0, 1e300], [2.0**-192, 2.0**192], [1e-60], [1e250] * 2])
@pytest.mark.parametrize("exponent", [-140, -60, 0, 60, 140])
@pytest.mark.parametrize("name", ["fp64", "fp32", "bf16"])
def test_numbers_of_fp64_beyond_the_bins(values, exponent, name):
    tensor, scale = torch.tensor(values, dtype=torch.float64), 2.0**exponent
    counted = histogram(tensor)
    format, scaled = get_format(name), np.array([value * scale for value in values])
    # Far from every limit, so that no rounding needs to be minded.
    underflow = np.mean(scaled <= format.smallest_subnormal / 2 if name != "fp64" else scaled == 0)
    assert underflow_rate(counted, name, scale).low <= underflow <= underflow_rate(counted, name, scale).high
    overflow = np.mean(scaled > format.max)
    assert overflow_rate(counted, name, scale).low <= overflow <= overflow_rate(counted, name, scale).high


def test_subnormals_below_the_bins():
    counted = histogram(torch.tensor([2.0**-195, 2.0**-191], dtype=torch.float64))
    bounds = subnormal_share(counted, "bf16", 2.0**66)
    assert (bounds.low, bounds.high) == (0.0, 0.5)


def test_bounds_are_exact_in_the_range_of_fp32():
    counted = histogram(torch.tensor([2.0**-149, 2.0**-140, 1.0, 3e38]))
    for name in CAST:
        for bounds in (underflow_rate(counted, name), subnormal_share(counted, name)):
            assert bounds.low == bounds.high
    assert underflow_rate(counted, "fp32").middle == 0
    assert underflow_rate(counted, "fp32", 0.5).middle == 0.25
    assert subnormal_share(counted, "fp32").middle == 0.5


def test_fp8_stands_for_two_formats():
    counted = histogram(torch.tensor([2.0**-12, 1.0, 1000.0]))
    for rate in (underflow_rate, subnormal_share, overflow_rate, headroom, best_scale):
        assert rate(counted, "fp8") == rate(counted, "fp8", direction="forward") == rate(counted, "e4m3")
        assert rate(counted, "fp8", direction="backward") == rate(counted, "e5m2")
    assert underflow_rate(counted, "e5m2") != underflow_rate(counted, "e4m3")
    assert not fits(counted, "fp8")
    assert fits(counted, "fp8", direction="backward")


def test_headroom_in_bits():
    counted = histogram(torch.tensor([2.0**-20, 0.0, -4.0, math.inf]))
    assert headroom(counted, "fp32") == pytest.approx(126)
    assert headroom(counted, "e5m2", 2.0) == pytest.approx(math.log2(57344) - 3)
    assert headroom(histogram(torch.tensor([1e5])), "fp16") < 0


@pytest.mark.parametrize("margin", slow_but_for({1}, [0, 1, 3]))
@pytest.mark.parametrize("name", SMALL)
@given(amax=st.one_of(st.floats(2.0**-8, 2.0**8, width=32), st.sampled_from([1.75, 1.8125, 65519.0, 65520.0, 464.0])))
def test_the_best_scale_is_the_largest_that_leaves_its_margin(name, margin, amax):
    scale = best_scale(histogram(torch.tensor([amax, 2.0**-30])), name, margin)
    assert math.frexp(scale)[0] == 0.5
    room = scale * 2.0**margin
    if scale < 2.0**24:
        assert np.isfinite(cast(np.array([amax * room]), name)).all()
        assert not np.isfinite(cast(np.array([amax * room * 2]), name)).any()


def test_the_best_scale_keeps_its_limits():
    assert best_scale(histogram(torch.tensor([1e-30])), "fp16") == 2.0**24
    assert best_scale(histogram(torch.tensor([1e30])), "fp16") == 2.0**-24
    assert best_scale(histogram(torch.tensor([1e-300], dtype=torch.float64)), "fp64") == 2.0**24


def test_what_fits():
    gradients = torch.randn(10_000) * 1e-7
    assert underflow_rate(histogram(gradients), "fp16").low > 0.2
    assert fits(histogram(gradients), "fp16")
    assert not fits(histogram(torch.cat([gradients, torch.tensor([1e5])])), "fp16")
    assert not fits(histogram(torch.cat([gradients, torch.tensor([math.inf])])), "fp16")
    assert not fits(histogram(torch.tensor([1e30])), "fp16")
    assert not fits(histogram(torch.tensor([1e-30])), "fp16")
    assert fits(histogram(torch.tensor([1.0] * 99 + [1e-30])), "fp16", max_underflow=0.01)
    assert not fits(histogram(torch.tensor([1.0] * 99 + [1e-30])), "fp16", max_underflow=0.009)


ALL = [underflow_rate, subnormal_share, overflow_rate, headroom, best_scale, fits]


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("rate", [rate for rate in ALL if rate not in (best_scale, fits)])
def test_impossible_scales(rate, scale):
    with pytest.raises(FormatError, match="a scale is a positive finite number, not"):
        rate(histogram(torch.ones(2)), "fp16", scale)


@pytest.mark.parametrize("rate", ALL)
def test_wrong_arguments_are_answered_in_one_line(rate):
    one = histogram(torch.ones(2))
    for message, arguments in {
        "did you mean 'fp16'": {"h": one, "format": "half"},
        "one of 3 groups": {"h": histograms([[]] * 3), "format": "fp16"},
        "not 'down'": {"h": one, "format": "fp8", "direction": "down"},
    }.items():
        with pytest.raises(FormatError, match=message) as caught:
            rate(**arguments)
        assert "\n" not in str(caught.value)
