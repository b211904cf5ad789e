"""Moments in 8 bits against a search through all codes, and the map against its description."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mixprec.optim.kept_moments import (
    BLOCK,
    SCALES,
    Moment,
    dequantized,
    dynamic_map,
    empty_moment,
    quantized,
    stored_as,
)

SIGNS = [True, False]


def moments(count: int, is_signed: bool, spread: int = 8) -> torch.Tensor:
    """Numbers over many powers of ten."""
    wide = torch.randn(count) * 10.0 ** -(torch.rand(count) * spread)
    return wide if is_signed else wide.abs()


def searched(wide: torch.Tensor, is_signed: bool) -> torch.Tensor:
    """What nearest codes stand for, by the distance to each of the 256, in fp64."""
    values = np.array(dynamic_map(is_signed), dtype=np.float32).astype(np.float64)
    found = []
    for block in wide.split(BLOCK):
        scale = float(block.abs().max())
        shares = (block / scale).double().numpy() if scale else np.zeros(len(block))
        found.append(values[np.abs(shares[:, None] - values).argmin(axis=1)] * scale)
    return torch.from_numpy(np.concatenate(found))


@pytest.mark.parametrize("is_signed", SIGNS)
def test_the_map_has_256_numbers_in_order_from_end_to_end(is_signed):
    values = dynamic_map(is_signed)
    assert len(values) == len(set(values)) == 256
    assert list(values) == sorted(values)
    assert values[-1] == 1.0
    assert values[0] == (-1.0 if is_signed else 0.0)
    assert 0.0 in values


def test_the_map_is_the_published_one():
    """A sanity check against bitsandbytes' or torchao's own, where one is installed; its signed map has no -1."""
    theirs = pytest.importorskip("torchao.optim.subclass_8bit", reason="torchao has the published map")
    del theirs
    from torchao.optim.quant_utils import create_dynamic_map

    for is_signed in SIGNS:
        published = create_dynamic_map(is_signed)
        assert np.allclose(sorted(published)[1:], dynamic_map(is_signed)[1:], atol=1e-7)


@pytest.mark.parametrize("is_signed", SIGNS)
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_each_number_gets_the_nearest_code(count, is_signed):
    wide = moments(count, is_signed)
    codes, scales = quantized(wide, is_signed)
    assert codes.dtype == torch.uint8
    assert codes.shape == wide.shape
    assert scales.shape == (-(-count // BLOCK),)
    stored = dequantized(codes, scales, is_signed).double()
    nearest = searched(wide, is_signed)
    if not is_signed:  # where no number but zero is stored as zero
        nearest = torch.where((wide > 0) & (nearest == 0), stored, nearest)
    # Of two codes that are equally near in fp32 either may be chosen.
    assert ((stored - wide).abs() <= (nearest - wide).abs() + 1e-6 * wide.abs()).all()


@given(st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=600))
def test_a_second_moment_stays_positive_and_zero_stays_zero(values):
    wide = torch.tensor(values, dtype=torch.float32)
    codes, scales = quantized(wide, False)
    stored = dequantized(codes, scales, False)
    assert (codes[wide > 0] > 0).all()
    assert (stored[wide == 0] == 0).all()
    assert (stored >= 0).all()


@pytest.mark.parametrize("is_signed", SIGNS)
def test_the_largest_of_a_block_is_kept_exactly_and_blocks_do_not_disturb_each_other(is_signed):
    wide = moments(4 * BLOCK, is_signed)
    wide[BLOCK : 2 * BLOCK] *= 1e20
    stored = dequantized(*quantized(wide, is_signed), is_signed)
    for number in range(4):
        block = slice(number * BLOCK, (number + 1) * BLOCK)
        largest = wide[block].abs().argmax()
        assert stored[block][largest] == wide[block][largest]
        assert torch.equal(dequantized(*quantized(wide[block], is_signed), is_signed), stored[block])


@pytest.mark.parametrize("is_signed", SIGNS)
def test_what_is_stored_is_stored_again_as_it_is(is_signed):
    codes, scales = quantized(moments(1000, is_signed), is_signed)
    again, same = quantized(dequantized(codes, scales, is_signed), is_signed)
    assert torch.equal(again, codes)
    assert torch.equal(same, scales)


def test_a_moment_that_is_not_finite_is_seen_to_be_none():
    wide = torch.ones(2 * BLOCK)
    wide[3] = torch.nan
    stored = dequantized(*quantized(wide, False), False)
    assert stored[:BLOCK].isnan().all()
    assert torch.equal(stored[BLOCK:], wide[BLOCK:])


@pytest.mark.parametrize("is_signed", SIGNS)
def test_an_empty_moment_is_zero(is_signed):
    stored = empty_moment(torch.zeros(70, 70), Moment("m", is_signed), "int8")
    assert stored["m"].dtype == torch.uint8
    assert (dequantized(stored["m"].reshape(-1), stored["m" + SCALES], is_signed) == 0).all()


@pytest.mark.parametrize(
    ("count", "dtype", "states", "word"),
    [
        (4096, torch.float32, "int8", "int8"),
        (4095, torch.float32, "int8", "fp32"),
        (4095, torch.bfloat16, "int8", "fp32"),
        (4096, torch.float16, "int8", "int8"),
        (4096, torch.float64, "int8", "fp32"),
        (1, torch.bfloat16, "bf16", "bf16"),
        (1, torch.float64, "bf16", "fp32"),
        (1, torch.complex64, "bf16", "fp32"),
    ],
)
def test_moments_are_stored_by_word_size_and_dtype(count, dtype, states, word):
    assert stored_as(torch.zeros(count, dtype=dtype), states) == word
