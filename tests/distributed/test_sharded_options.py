"""Two processes under FSDP2 with CPU offload, and with blocks that are compiled by themselves."""

from pathlib import Path

import pytest
import torch
from processes import saved_by_two

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).parent / "sharded_options_script.py", tmp_path_factory.mktemp("options"))


@pytest.mark.parametrize("case", ["offloaded", "compiled"])
def test_every_step_is_sampled_and_training_is_bit_for_bit_the_same(ranks, case):
    for results in ranks:
        plain, watched = results[case]["plain"], results[case]["watched"]
        for what in ("losses", "evaluated", "scale", "skipped", "stored"):
            assert watched[what] == plain[what]
        assert all(map(torch.equal, watched["weights"], plain["weights"]))
        assert len(plain["seen"]) == len(watched["seen"]) > 0
        for before, after in zip(plain["seen"], watched["seen"], strict=True):
            assert all(map(torch.equal, before, after))
        assert watched["said"] == []
        assert watched["sampled"][0] >= 8
