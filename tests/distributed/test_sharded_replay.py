"""Two processes under FSDP2: steps are replayed on the sharded model, which is left as it was and never held whole."""

from pathlib import Path

import pytest
import torch
from processes import saved_by_two

pytestmark = pytest.mark.slow

CASES = ["norms", "busy", "accumulated", "waiting", "by hand", "recomputed", "clipping", "fails"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).parent / "sharded_replay_script.py", tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_for_bit_the_same_with_monitors_and_without(ranks, case):
    for results in ranks:
        plain, watched = results[case]["plain"], results[case]["watched"]
        for what in ("losses", "evaluated", "scale", "skipped", "stored"):
            assert watched[what] == plain[what]
        assert all(map(torch.equal, watched["weights"], plain["weights"]))


@pytest.mark.parametrize("case", CASES)
def test_random_numbers_buffers_and_attributes_are_put_back(ranks, case):
    for results in ranks:
        plain, watched = results[case]["plain"]["seen"], results[case]["watched"]["seen"]
        assert len(plain) == len(watched) > 0
        for before, after in zip(plain, watched, strict=True):
            assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("case", [case for case in CASES if case != "fails"])
def test_every_step_was_sampled(ranks, case):
    for results in ranks:
        assert results[case]["watched"]["said"] == []
        assert results[case]["watched"]["sampled"][0] >= 8


def test_a_replay_that_fails_on_one_rank_ends_on_all_and_costs_the_sample_alone(ranks):
    first, second = (results["fails"]["watched"] for results in ranks)
    (said,) = first["said"]
    assert "could not sample step 1" in said
    assert "fp32 is not for me" in said
    assert "rank 1" in said
    assert second["said"] == []
    assert first["sampled"] == second["sampled"] != [0]


def test_cosines_headroom_and_rates_are_those_of_the_global_batchs_gradient(ranks):
    for results in ranks:
        told, by_hand = results["global"]["told"], results["global"]["by hand"]
        assert min(each["grad_cosine"] for each in by_hand.values()) < 0.99999
        for layer, expected in by_hand.items():
            for what, number in expected.items():
                if "norm" in layer and what == "headroom_bits":
                    continue  # it computes in fp32
                assert told[layer][what] == pytest.approx(number, rel=1e-6, abs=1e-6), (layer, what)


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_a_sample_takes_a_ranks_share_of_two_sets_of_gradients_and_a_gathered_group(ranks, policy):
    for results in ranks:
        found = results[f"bytes {policy}"]
        share, group = found["weights"] / len(ranks), found["group"]
        assert 0 < found["sampled"] - found["ordinary"] <= 2 * share + group
