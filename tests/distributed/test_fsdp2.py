"""Two processes under FSDP2 (``ModelParallelStrategy``): as under DDP, which is as one process, but sharded."""

from pathlib import Path

import pytest
import torch
from processes import saved_by_two

pytestmark = pytest.mark.slow

FP16, BF16, FP32 = (f"torch.{name}" for name in ("float16", "bfloat16", "float32"))
CASES = [
    "fp32",
    "bf16",
    "fp16",
    "norms",
    "by block",
    "emulated",
    "spoiled fp16",
    "spoiled bf16",
    "moved",
    "eval",
    "accumulated",
    "by hand",
    "fused",
    "recomputed",
    "watched",
    "searched",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What both processes saved of runs without monitors."""
    return saved_by_two(Path(__file__).parent / "fsdp2_script.py", tmp_path_factory.mktemp("fsdp2"))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The same of runs with monitors and the controller."""
    return saved_by_two(Path(__file__).parent / "fsdp2_watched_script.py", tmp_path_factory.mktemp("watched"))


@pytest.fixture
def ranks(trained, watched):
    """What both processes saved."""
    return [plain | with_monitors for plain, with_monitors in zip(trained, watched, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_those_under_ddp(ranks, case):
    for results in ranks:
        expected, found = results[f"ddp {case}"], results[f"fsdp2 {case}"]
        for what in ("losses", "evaluated"):
            torch.testing.assert_close(found[what], expected[what], rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_skips_scales_and_histories_are_those_under_ddp_on_both_ranks(ranks, case):
    expected = ranks[0][f"ddp {case}"]
    for results in ranks:
        for what in ("step", "skipped", "scale", "history"):
            assert without(OF_WEIGHTS, results[f"fsdp2 {case}"][what]) == without(OF_WEIGHTS, expected[what])


def test_an_overflow_on_one_rank_is_skipped_on_both(ranks):
    for results in ranks:
        assert results["fsdp2 spoiled fp16"]["skipped"] == results["fsdp2 fp16"]["skipped"] + 2
        assert results["fsdp2 spoiled bf16"]["skipped"] == 2


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_an_overflow_in_the_part_that_one_rank_holds_is_skipped_on_both(ranks, policy):
    for results in ranks:
        found = results[f"spoiled shard {policy}"]
        assert found["skipped"] == results[f"fsdp2 {policy}"]["skipped"] + 2
        assert found["scale"] == ranks[0][f"spoiled shard {policy}"]["scale"]
        assert all(weights.isfinite().all() for weights in found["weights"])


GATHERED = {
    "bf16": [[(BF16, BF16)], [(BF16, BF16)]],
    "fp16": [[(FP16, FP16)], [(FP16, FP16)]],
    "norms": [[(FP16, FP16)], [(FP16, FP16)]],
    "by block": [[(BF16, BF16)], [(FP32, FP32)]],
    "emulated": [[(BF16, BF16)], [(FP32, FP32)]],
    "moved": [[(BF16, BF16), (FP32, FP32)], [(BF16, BF16)]],
    "eval": [[(BF16, BF16), (FP32, FP32)], [(BF16, BF16), (FP32, FP32)]],
}


@pytest.mark.parametrize(("case", "seen"), GATHERED.items(), ids=GATHERED)
def test_weights_are_gathered_in_the_format_their_layer_computes_in_at_that_time(ranks, case, seen):
    assert ranks[0][f"fsdp2 {case}"]["seen"] == seen


def test_a_move_inside_a_gathered_group_has_all_of_it_gathered_as_stored(ranks):
    first, second = ranks[0]["fsdp2 watched"]["seen"]
    assert first == [(FP16, FP16), (FP32, FP16)]
    assert second == [(FP16, FP16)]


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_of_it_afterwards(ranks, case):
    for results in ranks:
        assert results[f"fsdp2 {case}"]["stored"] == {FP32}
        assert results[f"fsdp2 {case}"]["own forwards"] == []


def test_a_layer_moves_that_overflows_and_one_that_holds_the_loss_scale_below_1(ranks):
    for results in ranks:
        for case in ("watched", "searched"):
            (decision,) = results[f"fsdp2 {case}"]["decisions"]
            assert decision["moves"] == [["model.blocks.0.down", "fp16", "bf16"]]
    assert {event["verdict"] for event in ranks[0]["fsdp2 searched"]["events"]} == {"scale"}


@pytest.mark.parametrize("case", ["watched", "searched"])
def test_monitors_see_and_the_controller_decides_what_they_do_under_ddp(ranks, case):
    expected = ranks[0][f"ddp {case}"]
    assert expected["events"] and expected["underflow"] and expected["fidelity"]["layers"]
    for results in ranks:
        found = results[f"fsdp2 {case}"]
        for what in ("decisions", "events"):
            assert without(OF_WEIGHTS, found[what]) == without(OF_WEIGHTS, expected[what])
        for what in ("fidelity", "underflow"):
            compared = [without(OF_WEIGHTS | TOO_LARGE, each[what]) for each in (found, expected)]
            torch.testing.assert_close(*map(numbers, compared), rtol=1e-6, atol=1e-9)


OF_WEIGHTS = {"underflow_rate", "subnormal_share", "headroom_bits", "what_if", "grad_cosine"}
"""What is said of the gradients of weights: of the global batch where they are sharded (test_sharded_replay.py)."""

TOO_LARGE = {"model"}
"""What no rank of two could hold beside a set of gradients, so that its output is not compared."""


def without(keys, value):
    """Nested dicts and lists without some keys."""
    if isinstance(value, dict):
        return {key: without(keys, entry) for key, entry in value.items() if key not in keys}
    return [without(keys, entry) for entry in value] if isinstance(value, list) else value


def numbers(value):
    """All numbers in nested dicts, in order."""
    if isinstance(value, dict):
        return [number for entry in value.values() for number in numbers(entry)]
    return [float(value)] if isinstance(value, (int, float)) else []


def test_a_run_resumed_from_a_sharded_checkpoint_is_the_uninterrupted_one(ranks):
    for results in ranks:
        resumed, straight = results["resume"]["resumed"], results["resume"]["straight"]
        assert resumed["losses"] == straight["losses"][-len(resumed["losses"]) :]
        assert resumed["history"] == straight["history"] != []
        assert all(map(torch.equal, resumed["weights"], straight["weights"]))


def test_a_sharded_checkpoint_carries_the_scale_and_the_skips(ranks):
    for results in ranks:
        assert results["resume"]["scale"] == results["fsdp2 spoiled fp16"]["scale"]
        assert results["resume"]["skipped"] == results["fsdp2 spoiled fp16"]["skipped"]


def test_layers_that_are_split_over_ranks_train_as_whole_ones(ranks):
    for results in ranks:
        expected, found = results["ddp shared"], results["split shared"]
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-2, atol=1e-3)
        assert found["skipped"] == expected["skipped"]


def test_a_mesh_of_one_that_shards_nothing_is_one_warning_of_the_first_rank(ranks):
    first, second = (results["whole copies"] for results in ranks)
    (said,) = first["said"]
    assert said.startswith("fully_shard shards nothing: its mesh has size 1, in a run of 2 ranks")
    assert "ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)" in said
    assert "\n" not in said
    assert second["said"] == []


@pytest.mark.parametrize("case", ["split and sharded", "halves"])
def test_a_mesh_that_shards_and_layers_that_are_split_are_nothing_to_warn_of(ranks, case):
    for results in ranks:
        assert results[case] == {"said": [], "spread": {True}}


def test_what_a_user_sharded_by_himself_is_gathered_in_his_format_or_the_policys(ranks):
    assert ranks[0]["own policy fits"]["seen"] == [[(FP32, BF16)], [(FP32, BF16)]]
    assert ranks[0]["plain fully_shard"]["seen"] == [[(FP32, BF16)], [(FP32, BF16)]]
