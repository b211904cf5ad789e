"""Weights in 16 bits under DDP: the same bits on both processes, and as in one where both have the same batches."""

from pathlib import Path

import pytest
import torch
from narrow_runs import CASES, trained
from optimizer_runs import are_equal
from processes import saved_by_two

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).parent / "stored_narrow_script.py", tmp_path_factory.mktemp("narrow"))


@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join(case) for case in CASES])
def test_replicas_have_the_same_bits_as_one_process(ranks, case):
    """The mean of two equal gradients is the gradient in bf16; in fp16 a half may be subnormal and lose a bit."""
    alone = trained(CASES[case])
    assert are_equal(ranks[0][case], ranks[1][case])
    if CASES[case][0] == "bf16":
        assert are_equal(ranks[0][case], alone)
    else:
        torch.testing.assert_close(ranks[0][case], alone, rtol=1e-2, atol=1e-3)
