"""Histograms of a part of the elements: unbiased, without a blind spot, and exact about the largest."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mixprec.errors import FormatError
from lightning_mixprec.numerics import flat_batches as segments
from lightning_mixprec.numerics.exponents import LOWEST, histogram


def test_at_or_below_the_limit_everything_counts():
    values = torch.randn(1000)
    for data, limit in ((values, 1000), ([values, values], 2000)):
        sampled, whole = histogram(data, limit).tensors(), histogram(data).tensors()
        assert torch.equal(sampled[0], whole[0])
        assert torch.equal(sampled[1], whole[1])
        assert int(histogram(data, limit - 1).counted) < int(histogram(data).counted)


def test_about_that_many_are_counted_and_all_are_known_of():
    group = [torch.randn(512, 4608), torch.randn(512)]
    counted = histogram(group, max_elements=16384)
    assert 0.95 * 16384 < int(counted.counted) <= 16384
    assert int(counted.elements) == 512 * 4608 + 512


def test_no_column_is_missed():
    columns = torch.arange(4608.0) + 1
    values = columns.expand(512, 4608).contiguous()
    seen = segments.sample([segments.flatten(values)], 16384)[0]
    assert set(seen.tolist()) == set(columns.tolist())
    seen = segments.sample([segments.flatten(values.T.contiguous())], 16384)[0]
    assert set(seen.tolist()) == set(columns.tolist())


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(0, 400), min_size=1, max_size=12), limit=st.integers(1, 300))
def test_it_is_every_sth_element_of_all_laid_end_to_end(sizes, limit):
    tensors = [part.clone() for part in torch.arange(float(sum(sizes))).split(sizes)]
    seen = torch.cat(segments.sample(tensors, limit))
    assert len(seen) <= limit
    steps = set(seen.diff().tolist())
    assert len(steps) <= 1
    stride = int(steps.pop()) if steps else 1
    assert sum(sizes) <= limit or len(seen) == 1 or stride >= sum(sizes) / limit
    assert all(size == 0 or math.gcd(size, stride) == 1 for size in sizes)


def test_small_tensors_count_by_their_share():
    group = [torch.full((64,), 2.0) for _ in range(100)] + [torch.full((6400,), 8.0)]
    counted = histogram(group, max_elements=200)
    assert int(counted.by_exponent[1 - LOWEST]) == pytest.approx(int(counted.by_exponent[3 - LOWEST]), abs=1)


def test_counts_are_unbiased():
    torch.manual_seed(0)
    values = torch.randn(200, 5000) * 1e-3
    whole, part = (histogram(values, limit).by_exponent.double() for limit in (None, 20_000))
    share, expected = part / part.sum(), whole / whole.sum()
    deviation = (expected * (1 - expected) / part.sum()).sqrt()
    assert ((share - expected).abs() <= 4 * deviation + 1e-4).all()


def test_the_largest_is_of_all_elements():
    for place in (1, 2, 777_777):
        values = torch.full((1_000_001,), 1e-3)
        values[place] = -50.0
        values[place - 1] = math.inf
        assert histogram(values, max_elements=100).amax == 50.0


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one(limit):
    with pytest.raises(FormatError, match="max_elements must be at least 1"):
        histogram(torch.ones(3), max_elements=limit)
