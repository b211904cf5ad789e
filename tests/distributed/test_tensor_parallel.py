"""Layers that tensor parallelism splits, on two processes, and on four that shard them over each other, too (FSDP2)."""

from pathlib import Path

import pytest
import torch
from processes import saved_by

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What all processes saved."""
    return saved_by(request.param, Path(__file__).parent / "tensor_parallel_script.py", tmp_path_factory.mktemp("tp"))


@pytest.mark.parametrize("case", ["bf16", "mixed", "in sequence"])
def test_training_is_bit_for_bit_the_same_with_monitors_and_without(ranks, case):
    for results in ranks if case in ranks[0] else ():
        plain, watched = results[case]["plain"], results[case]["watched"]
        assert watched["losses"] == plain["losses"]
        assert all(map(torch.equal, watched["weights"], plain["weights"]))
        assert watched["said"] == []


@pytest.mark.parametrize("case", ["", " in sequence"])
def test_what_monitors_say_is_of_the_whole_weight_and_the_global_batch(ranks, case):
    for results in ranks if f"told{case}" in ranks[0] else ():
        told, by_hand = results[f"told{case}"], results[f"by hand{case}"]
        for layer, expected in by_hand.items():
            found = told[layer]
            assert found["share"] == pytest.approx(expected["share"], rel=1e-5)
            # Summands of a split layer are rounded to bf16 before they are added up, those of a whole one are not.
            assert 0.2 < (1 - found["grad_cosine"]) / (1 - expected["grad_cosine"]) < 5
            if "norm" not in layer:  # they compute in fp32
                assert found["headroom"] == pytest.approx(expected["headroom"], abs=0.01)


def test_a_layer_that_overflows_is_found_and_moved_on_all_ranks(ranks):
    first = ranks[0]["adapted"]
    assert [entry["layer"] for entry in first["history"]] == ["model.blocks.0.down"]
    assert {event["layer"] for event in first["events"]} == {"model.blocks.0.down"}
    assert all(results["adapted"]["history"] == first["history"] for results in ranks)
    assert all(results["adapted"]["decisions"] == first["decisions"] for results in ranks)


def test_a_layer_that_is_split_is_not_run_alone_and_the_summary_says_so(ranks):
    for results in ranks:
        assert results["told"]["model.stem"]["sqnr_db"] > 20
        assert results["told"]["model.blocks.0.up"]["sqnr_db"] is None
        assert "could not be compared" in results["told"]["summary"]
