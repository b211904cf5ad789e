"""Four processes under FSDP2 on a mesh of two by two, which replicates and shards (HSDP)."""

from pathlib import Path

import pytest
import torch
from processes import saved_by

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What all processes saved."""
    return saved_by(4, Path(__file__).parent / "hsdp_script.py", tmp_path_factory.mktemp("hsdp"))


def test_training_is_bit_for_bit_the_same_with_monitors_and_without(ranks):
    for results in ranks:
        assert results["watched"]["losses"] == results["plain"]["losses"]
        assert all(map(torch.equal, results["watched"]["weights"], results["plain"]["weights"]))


def test_what_monitors_say_is_of_the_global_batch(ranks):
    for results in ranks:
        cosine, bits = results["by hand"]
        assert cosine < 0.99999999
        assert results["told"] == pytest.approx([cosine, bits], rel=1e-6)
