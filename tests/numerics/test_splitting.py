"""fp32 split into 16 bits and what they lost, and rounded at random, against models in integers of pure Python."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixprec.numerics.splitting import join, narrowed, random_bits, rounded_at_random, split

DTYPES = [torch.bfloat16, torch.float16]
BITS = st.integers(0, 2**32 - 1)
# Of each sign: zero, the smallest and largest subnormal, 1, the largest finite, infinity, NaN; and ties above each.
EDGES = [sign << 31 | bits for sign in (0, 1) for bits in (0, 1, 0x7FFFFF, 0x3F800000, 0x7F7FFFFF, 0x7F800000)]
EDGES += [
    (bits & 0xFFFF0000) + half for bits in EDGES for half in (0x7FFF, 0x8000, 0x8001) if bits & 0x7F800000 < 0x7F800000
]
NANS = [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF]


def fp32(bits: list[int]) -> torch.Tensor:
    """The numbers of bit patterns."""
    return torch.tensor([bit - 2**32 * (bit >> 31) for bit in bits], dtype=torch.int32).view(torch.float32)


def bits_of(wide: torch.Tensor) -> list[int]:
    return [bit % 2**32 for bit in wide.view(torch.int32).tolist()]


def exactly(bits: int) -> float:
    """The number of a bit pattern, by struct."""
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def half_away_from_zero(bits: int) -> int:
    """The bf16 pattern next to an fp32 one, by distance in a line of integers on which infinity is just one more."""
    magnitude, sign = bits & 0x7FFFFFFF, bits >> 31
    below = magnitude // 2**16
    above_is_near = 2 * (magnitude - below * 2**16) >= 2**16
    return sign << 15 | below + above_is_near


def is_nan(bits: int) -> bool:
    return bits & 0x7FFFFFFF > 0x7F800000


@given(st.lists(BITS, min_size=1, max_size=50))
def test_every_bit_comes_back(bits):
    bits = [*bits, *EDGES]
    stored, lost = split(fp32(bits))
    assert stored.dtype == torch.bfloat16
    assert lost.dtype == torch.int32
    assert ((lost >= -(2**15)) & (lost < 2**15)).all()
    joined = bits_of(join(stored, lost))
    assert all(back == bit or (is_nan(bit) and is_nan(back)) for back, bit in zip(joined, bits, strict=True))


@given(st.lists(BITS, min_size=1, max_size=50))
def test_what_is_stored_is_the_nearest_and_of_two_the_larger(bits):
    bits = [bit for bit in [*bits, *EDGES] if not is_nan(bit)]
    stored = [bit % 2**16 for bit in split(fp32(bits))[0].view(torch.int16).tolist()]
    assert stored == [half_away_from_zero(bit) for bit in bits]


def test_all_numbers_of_bf16_with_every_kind_of_rest():
    """All 65,536 upper halves with lower halves around nothing, the tie and a whole step."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] << 16
    wide = (upper + torch.tensor([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)).view(torch.float32)
    back = join(*split(wide))
    assert torch.equal(back.view(torch.int32)[~wide.isnan()], wide.view(torch.int32)[~wide.isnan()])
    assert back[wide.isnan()].isnan().all()


def test_it_is_torchs_rounding_but_for_ties():
    wide = torch.randn(10**5)
    ties = (wide.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(split(wide)[0][~ties], wide.bfloat16()[~ties])


@pytest.mark.parametrize("bits", NANS)
def test_a_nan_stays_one(bits):
    stored, lost = split(fp32([bits]))
    assert stored.isnan()
    assert join(stored, lost).isnan()


@given(BITS, st.booleans())
def test_a_weight_that_was_set_to_zero_stays_next_to_it(bits, is_negative):
    _, lost = split(fp32([bits]))
    zero = torch.tensor([-0.0 if is_negative else 0.0], dtype=torch.bfloat16)
    assert join(zero, lost).abs() < 2.0**-133


@pytest.mark.parametrize("dtype", DTYPES)
@given(bits=st.lists(BITS, min_size=1, max_size=50))
def test_what_is_narrowed_and_what_is_missing_make_the_whole(bits, dtype):
    wide = fp32([*bits, *EDGES])
    near, rest = narrowed(wide, dtype)
    numbers = ~wide.isnan()
    assert torch.equal(near.isnan(), wide.isnan())
    assert torch.equal(near[numbers].view(torch.int16), wide[numbers].to(dtype).view(torch.int16))
    assert rest.isfinite().all()
    finite = near.isfinite()
    assert torch.equal(near[finite].double() + rest[finite].double(), wide[finite].double())


def neighbours(bits: int, dtype: torch.dtype) -> tuple[float, float]:
    """The two numbers of a format between which a finite one lies, by whole steps of its exponent."""
    value = abs(exactly(bits))
    info = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}[dtype]
    exponent = max(math.frexp(value)[1] - 1, info[1]) if value else info[1]
    step = 2.0 ** (exponent - info[0])
    below = math.floor(value / step) * step
    return below, below + step


@pytest.mark.parametrize("dtype", DTYPES)
@given(bits=BITS, noise=st.integers(0, 2**31 - 1))
def test_rounded_at_random_it_is_one_of_its_neighbours_the_upper_as_often_as_it_is_near(bits, noise, dtype):
    """The noise of 16 bits is compared with the part of the step that is above the lower neighbour."""
    value, largest = exactly(bits), torch.finfo(dtype).max
    if is_nan(bits) or abs(value) > largest:
        return
    rounded = rounded_at_random(fp32([bits]), dtype, torch.tensor([noise], dtype=torch.int32)).item()
    below, above = neighbours(bits, dtype)
    drawn_bits = 16 if dtype == torch.bfloat16 else 13
    drawn = noise % 2**drawn_bits / 2**drawn_bits
    part = (abs(value) - below) / (above - below)
    if abs(value) < 2.0**-14 and 0 < abs(part + drawn - 1) < 2.0**-13:
        return  # fp16's subnormals drop more bits than are drawn, and than fp32 tells apart in the sum
    expected = min(above, largest) if part + drawn >= 1 else below
    assert abs(rounded) == expected
    assert math.copysign(1.0, rounded) == math.copysign(1.0, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise", [0, 0xFFFF])
def test_rounded_at_random_what_has_no_neighbours_is_what_it_was(dtype, noise):
    largest = torch.finfo(dtype).max
    wide = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, largest, -largest, 1.0, 3e38, 65519.0])
    rounded = rounded_at_random(wide, dtype, torch.full(wide.shape, noise, dtype=torch.int32))
    expected = wide.to(dtype)
    expected[-1] = {torch.bfloat16: 65536.0 if noise else 65280.0, torch.float16: 65504.0}[dtype]
    if dtype == torch.bfloat16:
        expected[-2] = rounded[-2]
        assert rounded[-2] in neighbours(bits_of(wide)[-2], dtype)
    assert torch.equal(rounded[~wide.isnan()].view(torch.int16), expected[~wide.isnan()].view(torch.int16))
    assert rounded[2].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0003, -3e-6, 5.5e-8, 1e-3, -0.7])
def test_rounding_at_random_has_the_mean_and_the_variance_of_a_fair_draw(dtype, value):
    """Within five standard errors of the value, and of p (1 - p) steps squared."""
    count = 1 << 18
    wide = torch.full((count,), value)
    noise = (random_bits(torch.arange(count), 5) >> 48).to(torch.int32) & 0xFFFF
    rounded = rounded_at_random(wide, dtype, noise).double()
    below, above = neighbours(bits_of(wide[:1])[0], dtype)
    part, step = (abs(wide[0].item()) - below) / (above - below), above - below
    variance = part * (1 - part) * step**2
    assert abs(rounded.mean().item() - wide[0].item()) <= 5 * math.sqrt(variance / count) + 2.0**-13 * step
    fourth = part * (1 - part) * (1 - 3 * part * (1 - part)) * step**4
    error = 5 * math.sqrt(max(fourth - variance**2, 0) / count) + 2.0**-12 * step**2
    assert abs(rounded.var().item() - variance) <= error


def splitmix64(place: int) -> int:
    """The number at a place of the sequence that begins at 0, after the paper, in integers of any size."""
    mask = 2**64 - 1
    mixed = place * 0x9E3779B97F4A7C15 & mask
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & mask
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
    return mixed ^ mixed >> 31


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_random_bits_are_splitmix64s(counter, key):
    bits = random_bits(torch.tensor(counter), torch.tensor(key)).item()
    assert bits % 2**64 == splitmix64(counter + key)


def test_the_first_numbers_are_those_that_are_published():
    """Of the reference implementation, begun at 0."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [bits % 2**64 for bits in random_bits(torch.arange(1, 4), 0).tolist()] == expected


def test_random_bits_are_even_and_do_not_follow_each_other():
    """Each of 16 bits is set in half of the draws, and bits of neighbours agree in half, within five deviations."""
    bits = random_bits(torch.arange(1 << 16), 3)
    for bit in range(0, 64, 4):
        drawn = (bits >> bit & 1).double()
        assert abs(drawn.mean().item() - 0.5) < 5 * 0.5 / 2**8
        assert abs((drawn[1:] == drawn[:-1]).double().mean().item() - 0.5) < 5 * 0.5 / 2**8
