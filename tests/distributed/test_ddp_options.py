"""DDP's own options and communication hooks, with two processes: what Lightning's plugin does with them, and skips."""

from pathlib import Path

import pytest
import torch
from plugin_models import same
from processes import saved_by_two

pytestmark = pytest.mark.slow

SAME_AS_PLAIN = ["static graph", "bucket views", "sharded"]
HOOKS = ["fp16 hook", "bf16 hook", "PowerSGD"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).with_name("ddp_options.py"), tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("option", ["plain", "unused", "accumulating", *HOOKS])
def test_a_uniform_policy_is_bit_for_bit_lightnings_own_plugin(ranks, option):
    for results in ranks:
        expected, found = results[f"{option}, stock"], results[f"{option}, ours"]
        assert all(same(found[what], expected[what]) for what in ("losses", "weights", "step", "scales"))


@pytest.mark.parametrize("policy", ["ours", "mixed"])
@pytest.mark.parametrize("option", SAME_AS_PLAIN)
def test_an_option_that_changes_no_number_changes_none_under_a_policy(ranks, option, policy):
    for results in ranks:
        expected, found = results[f"plain, {policy}"], results[f"{option}, {policy}"]
        assert all(same(found[what], expected[what]) for what in ("losses", "weights", "step", "scales"))


def test_both_processes_end_with_the_same_weights_and_counts(ranks):
    first, second = ranks
    for case in first:
        for what in first[case].keys() - {"losses"}:
            assert same(first[case][what], second[case][what]), (case, what)
        assert all(torch.isfinite(weight).all() for weight in first[case]["weights"]), case


@pytest.mark.parametrize("case", ["accumulating, stock", "accumulating, ours", "accumulating, mixed", "watched"])
def test_gradients_are_sent_once_per_step_and_not_per_batch(ranks, case):
    for results in ranks:
        assert (results[case]["messages"], results[case]["step"]) == (2, 2)


def test_monitors_send_their_own_messages_and_change_no_gradient(ranks):
    for results in ranks:
        assert same(results["watched"]["weights"], results["accumulating, mixed"]["weights"])


@pytest.mark.parametrize("option", [*SAME_AS_PLAIN, "unused", "fp16 hook", "bf16 hook"])
def test_an_overflow_of_one_process_is_skipped_once_on_both(ranks, option):
    for results in ranks:
        result = results[f"spoiled, {option}"]
        assert (result["skipped"], result["steps"]) == (1, [1, 2, 2, 3])
        assert result["scales"] == [1024, 1024, 512, 512]


def test_an_overflow_in_an_accumulated_batch_skips_that_window_alone(ranks):
    for results in ranks:
        result = results["spoiled, accumulating"]
        assert (result["skipped"], result["steps"]) == (1, [0, 1, 1, 1])


def test_power_sgd_goes_on_after_an_overflow(ranks):
    assert ranks[0]["spoiled, PowerSGD"]["skipped"] == 1


def test_an_overflow_in_the_compressed_message_is_a_skip_on_both_and_ends(ranks):
    for results in ranks:
        result = results["compressed, fp16"]
        assert 1 <= result["skipped"] <= 4
        assert result["steps"][-2:] == [result["step"] - 1, result["step"]]
        assert result["scales"][-1] < 1024
        assert result["history"] == []


def test_no_layer_is_accused_of_what_the_message_did(ranks):
    for results in ranks:
        result = results["compressed, fp16"]
        assert result["reasons"] == {"unknown": result["skipped"]}


@pytest.mark.parametrize("hook", ["none", "bf16"])
def test_messages_with_the_range_of_fp32_overflow_never(ranks, hook):
    for results in ranks:
        assert results[f"compressed, {hook}"]["skipped"] == 0
