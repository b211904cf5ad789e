"""The interval: against all resamples there are, against NumPy's, and as often right as it says."""

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_mixprec.deploy.bootstrap import interval


def test_it_is_that_of_all_resamples():
    """Of six gaps there are 46,656 resamples; of 10,000 draws a tail is off by its standard error of 0.16 %."""
    gaps = [0.31, -1.04, 2.53, 0.02, 0.71, 1.17]
    means = np.array(list(itertools.product(gaps, repeat=6))).mean(1)
    mean, low, high = interval(gaps)
    assert mean == pytest.approx(np.mean(gaps))
    assert (means < low).mean() == pytest.approx(0.025, abs=0.006)
    assert (means > high).mean() == pytest.approx(0.025, abs=0.006)


@pytest.mark.parametrize("count", [8, 100, 5000])
def test_it_is_numpys(count):
    gaps = np.random.default_rng(1).lognormal(size=count)
    means = np.array([np.random.default_rng(seed).choice(gaps, count).mean() for seed in range(4000)])
    mean, low, high = interval(gaps.tolist())
    expected, width = np.quantile(means, [0.025, 0.975]), means.std()
    assert mean == pytest.approx(gaps.mean())
    assert [low, high] == pytest.approx(expected, abs=0.12 * width)


@pytest.mark.parametrize(("count", "least", "most"), [(5, 0.75, 0.9), (10, 0.84, 0.96), (30, 0.9, 0.985)])
def test_it_holds_the_mean_as_often_as_is_said(count, least, most):
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, count, generator=generator, dtype=torch.float64) + 3.0
    hits = [low <= 3.0 <= high for _, low, high in (interval(row.tolist()) for row in draws)]
    assert least <= sum(hits) / len(hits) <= most


def test_the_same_seed_gives_the_same_interval_and_takes_nobodys_random_numbers():
    state = torch.get_rng_state()
    gaps = [0.1, 0.5, -0.2, 0.9]
    assert interval(gaps, seed=3) == interval(gaps, seed=3) != interval(gaps, seed=4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("skew", [1e-30, 1.0, 1e30])
def test_the_mean_is_within(skew):
    mean, low, high = interval([0.0] * 99 + [skew])
    assert low <= mean <= high


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(value):
    mean, low, high = interval([1.0, value])
    assert all(str(each) == str(value) for each in (mean, low, high))


def test_one_batch_says_nothing_of_how_batches_differ():
    assert interval([0.25]) == (0.25, -math.inf, math.inf)
