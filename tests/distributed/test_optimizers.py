"""Optimizers on weights that are spread over two processes, in shards of uneven size: as on one, bit for bit."""

from pathlib import Path

import pytest
from optimizer_runs import are_equal
from processes import saved_by_two

pytestmark = pytest.mark.slow

OPTIONS = [("exact", "fp32"), ("exact", "bf16"), ("kahan", "bf16"), ("stochastic", "bf16"), ("nearest", "fp32")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).parent / "optimizers_script.py", tmp_path_factory.mktemp("optimizers"))


@pytest.mark.parametrize("how", ["rows", "columns", "whole"])
@pytest.mark.parametrize(("weights", "states"), OPTIONS)
def test_shards_are_those_of_the_whole(ranks, weights, states, how):
    """Random rounding too, whose numbers are those of the whole; rows after a distributed checkpoint in between."""
    for results in ranks:
        assert are_equal(results[weights, states, how], results[weights, states, "one"])


def test_blocks_that_shards_would_cut_are_one_line(ranks):
    for results in ranks:
        assert results["int8"].startswith("states is 'int8', and a parameter is a DTensor")
        assert "\n" not in results["int8"]
