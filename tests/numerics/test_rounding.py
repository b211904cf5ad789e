"""round_to against ml_dtypes and NumPy bit by bit, and in fp64 against exact rational arithmetic."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixprec.errors import FormatError
from lightning_mixprec.numerics.rounding import round_to

ORACLE = {
    "fp32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
LOW = ["bf16", "fp16", "e4m3", "e5m2"]
# (mantissa bits, exponent of the smallest normal, largest finite number, what lies beyond)
DEFINITION = {
    "fp32": (23, -126, (2 - 2.0**-23) * 2.0**127, math.inf),
    "bf16": (7, -126, (2 - 2.0**-7) * 2.0**127, math.inf),
    "fp16": (10, -14, 65504.0, math.inf),
    "e4m3": (3, -6, 448.0, math.nan),
    "e5m2": (2, -14, 57344.0, math.inf),
}


def as_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def oracle(values, name):
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(ORACLE[name]).astype(np.float32)


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = {4: np.uint32, 8: np.uint64}[actual.dtype.itemsize]
    same = (actual.view(bits) == expected.view(bits)) | (np.isnan(actual) & np.isnan(expected))
    wrong = np.flatnonzero(~same)
    assert wrong.size == 0, f"{wrong.size} mismatches, first {actual.flat[wrong[0]]!r} for {expected.flat[wrong[0]]!r}"


def exactly(value, name):
    """The definition of rounding, in rationals."""
    mantissa_bits, min_exponent, largest, beyond = DEFINITION[name]
    if math.isnan(value) or value == 0:
        return value
    if math.isinf(value):
        return math.copysign(beyond, value)
    exponent = max(math.frexp(value)[1] - 1, min_exponent)
    step = Fraction(2) ** (exponent - mantissa_bits)
    rounded = round(abs(Fraction(value)) / step) * step
    return math.copysign(float(rounded) if rounded <= Fraction(largest) else beyond, value)


def all_codes(dtype):
    size = np.dtype(dtype).itemsize
    return np.arange(2 ** (8 * size), dtype=f"u{size}").view(dtype)


def non_negative_grid(name):
    codes = all_codes(ORACLE[name]).astype(np.float32)
    return np.unique(codes[np.isfinite(codes) & ~np.signbit(codes)])


@pytest.mark.parametrize("source", [np.float16, ml_dtypes.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["fp32", *LOW])
def test_every_16_bit_pattern(source, name):
    codes = all_codes(source)
    rounded = round_to(as_torch(codes), name)
    assert_same_bits(rounded.float().numpy(), oracle(codes.astype(np.float32), name))


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu],
    ids=str,
)
@pytest.mark.parametrize("name", ["fp32", *LOW])
def test_every_float8_code(dtype, name):
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.numpy().view(getattr(ml_dtypes, str(dtype).removeprefix("torch."))).astype(np.float32)
    rounded = round_to(codes.view(dtype), name)
    assert_same_bits(rounded.float().numpy(), oracle(values, name))


@pytest.mark.parametrize("name", LOW)
def test_around_every_number_of_the_format_and_every_midpoint(name):
    grid = non_negative_grid(name)
    above = np.append(grid[1:].astype(np.float64), 2 * float(grid[-1]) - float(grid[-2]))
    midpoints = ((grid.astype(np.float64) + above) / 2).astype(np.float32)
    exact = np.concatenate([grid, midpoints])
    exact = exact[np.isfinite(exact)]
    around = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])
    values = np.concatenate([around, -around])
    assert_same_bits(round_to(torch.from_numpy(values), name).numpy(), oracle(values, name))


@pytest.mark.parametrize("name", LOW)
def test_a_dense_sample_of_fp32(name):
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 2**32, 3_000_000, dtype=np.uint32).view(np.float32)
    _, min_exponent, largest, _ = DEFINITION[name]
    exponents = generator.uniform(min_exponent - 26, min(math.log2(largest) + 2, 127.99), 2_000_000)
    in_range = (2.0**exponents * generator.choice([-1, 1], exponents.size)).astype(np.float32)
    values = np.concatenate([patterns, in_range])
    assert_same_bits(round_to(torch.from_numpy(values), name).numpy(), oracle(values, name))


def tricky_doubles(name):
    """Numbers that come out wrong when they are rounded to fp32 first, and the ends of every range."""
    mantissa_bits, min_exponent, largest, _ = DEFINITION[name]
    generator = np.random.default_rng(1)
    top = math.frexp(largest)[1] - 1
    exponents = generator.integers(min_exponent - mantissa_bits - 2, top + 1, 1500)
    significands = 2.0**mantissa_bits + generator.integers(0, 2**mantissa_bits, exponents.size)
    steps = np.ldexp(1.0, np.maximum(exponents, min_exponent) - mantissa_bits)
    midpoints = np.ldexp(significands, exponents - mantissa_bits) // steps * steps + steps / 2
    nudges = [0.0, 2.0**-52, -(2.0**-53), 2.0**-45, -(2.0**-45), 2.0**-30, -(2.0**-30)]
    ends = [0.0, 5e-324, 2.0**-1022, 1e-300, largest, math.nextafter(largest, math.inf), 2.0**1023, 1.7e308, math.inf]
    smallest = math.ldexp(1.0, min_exponent - mantissa_bits)
    ends += [smallest / 2, math.nextafter(smallest / 2, 1), math.nextafter(smallest / 2, 0), smallest * 1.5]
    values = np.concatenate([midpoints * (1 + nudge) for nudge in nudges] + [np.array(ends)])
    return np.concatenate([values, -values])


@pytest.mark.parametrize("name", ["fp32", *LOW])
def test_doubles_are_rounded_once(name):
    values = tricky_doubles(name)
    expected = np.array([exactly(float(value), name) for value in values])
    assert_same_bits(round_to(torch.from_numpy(values), name).numpy(), expected)


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_doubles_agree_with_numpy(name):
    generator = np.random.default_rng(2)
    patterns = generator.integers(0, 2**64, 300_000, dtype=np.uint64).view(np.float64)
    normal = generator.standard_normal(300_000) * 2.0 ** generator.integers(-160, 130, 300_000)
    values = np.concatenate([patterns, normal, tricky_doubles(name)])
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        expected = values.astype(ORACLE[name]).astype(np.float64)
    assert_same_bits(round_to(torch.from_numpy(values), name).numpy(), expected)


def test_the_double_that_fp32_pushes_onto_a_midpoint():
    value = 1 + 2.0**-11 + 2.0**-40
    assert torch.tensor(value, dtype=torch.float64).float() == 1 + 2.0**-11
    assert round_to(torch.tensor(value, dtype=torch.float64), "fp16") == 1 + 2.0**-10


@pytest.mark.parametrize("name", ["fp64", "fp32", *LOW, "fp8"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_zero_keeps_its_sign_and_nan_stays(name, dtype):
    zero, negative_zero, nan = round_to(torch.tensor([0.0, -0.0, math.nan], dtype=dtype), name).tolist()
    assert (zero, math.copysign(1, zero)) == (0, 1)
    assert (negative_zero, math.copysign(1, negative_zero)) == (0, -1)
    assert math.isnan(nan)


@pytest.mark.parametrize("name", ["bf16", "fp16", "e5m2"])
def test_what_is_too_large_becomes_infinite(name):
    largest = DEFINITION[name][2]
    assert round_to(torch.tensor([largest, 1.2 * largest, -math.inf], dtype=torch.float64), name).tolist() == [
        largest,
        math.inf,
        -math.inf,
    ]


@pytest.mark.parametrize("name", ["e4m3", "fp8"])
def test_e4m3_has_no_infinity(name):
    rounded = round_to(torch.tensor([448.0, 464.0, 464.1, -1e9, math.inf]), name)
    assert rounded[:2].tolist() == [448.0, 448.0]
    assert rounded[2:].isnan().all()


@pytest.mark.parametrize("name", ["fp64", "fp32", *LOW, "fp8"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_the_dtype_is_kept_unless_it_cannot_hold_the_result(dtype, name):
    expected = torch.float32 if (dtype, name) == (torch.float16, "bf16") else dtype
    assert round_to(torch.ones(3, dtype=dtype), name).dtype == expected


def test_65504_in_bf16():
    assert round_to(torch.tensor([65504.0], dtype=torch.float16), "bf16").tolist() == [65536.0]


@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_shape_is_kept(shape, name):
    assert round_to(torch.randn(shape), name).shape == shape


@pytest.mark.parametrize("name", ["fp32", *LOW])
def test_strided_tensors(name):
    base = torch.randn(6, 8)
    for view in (base.t(), base[::2, ::3], base[:1].expand(5, 8), base.flip(0)):
        assert_same_bits(round_to(view, name).numpy(), oracle(view.numpy(), name))


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_the_input_is_neither_changed_nor_shared_and_no_gradient_flows(name):
    values = torch.randn(100, requires_grad=True)
    before = values.detach().clone()
    rounded = round_to(values, name)
    assert not rounded.requires_grad
    rounded.zero_()
    assert torch.equal(values.detach(), before)
    assert not isinstance(round_to(torch.nn.Parameter(before), name), torch.nn.Parameter)


def test_bf16_subnormals_survive_flush_to_zero():
    tiny = non_negative_grid("bf16")[:256] * np.float32(1.003)
    expected = oracle(tiny, "bf16")
    assert expected.any()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no flush-to-zero mode")
    try:
        rounded = round_to(torch.from_numpy(tiny), "bf16")
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(rounded.numpy(), expected)


def test_under_autocast_and_inference_mode():
    values = torch.randn(1000)
    expected = round_to(values, "e5m2")
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert torch.equal(round_to(values, "e5m2"), expected)


@pytest.mark.parametrize(
    "wrong", [torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool), torch.ones(2) + 1j]
)
def test_only_floating_tensors_are_rounded(wrong):
    with pytest.raises(FormatError, match=f"cannot round a tensor of {wrong.dtype}, only of"):
        round_to(wrong, "fp16")


def test_packed_float4_is_refused():
    packed = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(FormatError, match="unpacked"):
        round_to(packed, "fp16")


@pytest.mark.parametrize("wrong", [1.5, [1.0], np.ones(2), None])
def test_only_tensors_are_rounded(wrong):
    with pytest.raises(FormatError, match=f"cannot round a {type(wrong).__name__}"):
        round_to(wrong, "fp16")


def test_an_unknown_format():
    with pytest.raises(FormatError, match="did you mean 'fp16'"):
        round_to(torch.ones(2), "float16")


doubles = st.lists(st.floats(width=64), min_size=1, max_size=50).map(lambda v: torch.tensor(v, dtype=torch.float64))
names = st.sampled_from(["fp32", *LOW])


@given(doubles, names)
def test_rounding_twice_is_rounding_once(values, name):
    once = round_to(values, name)
    assert_same_bits(round_to(once, name).numpy(), once.numpy())


@given(doubles, names)
def test_rounding_keeps_order(values, name):
    rounded = round_to(values[~values.isnan()].sort().values, name)
    finite = rounded[~rounded.isnan()]
    assert (finite[1:] >= finite[:-1]).all()


@given(doubles, names)
def test_rounding_is_symmetric(values, name):
    assert_same_bits(round_to(-values, name).numpy(), (-round_to(values, name)).numpy())


@given(doubles, names)
def test_rounding_follows_the_definition(values, name):
    expected = np.array([exactly(value, name) for value in values.tolist()])
    assert_same_bits(round_to(values, name).numpy(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp32", *LOW])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_gives_the_same_bits(dtype, name):
    generator = np.random.default_rng(3)
    integers = {8: np.uint64, 4: np.uint32, 2: np.uint16}[dtype.itemsize]
    signed = {8: np.int64, 4: np.int32, 2: np.int16}[dtype.itemsize]
    patterns = generator.integers(0, 2 ** (8 * dtype.itemsize), 1_000_000, dtype=integers)
    values = torch.from_numpy(patterns.view(signed)).view(dtype)
    on_gpu = round_to(values.cuda(), name)
    assert on_gpu.is_cuda
    expected = round_to(values, name)
    width = np.float64 if dtype == torch.float64 else np.float32
    assert_same_bits(
        on_gpu.cpu().to(torch.float64).numpy().astype(width), expected.to(torch.float64).numpy().astype(width)
    )
