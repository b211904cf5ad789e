"""What one process sees alone is decided on both, at the same steps; a replay that fails on one holds up neither."""

from pathlib import Path

import pytest
from plugin_models import same
from processes import saved_by_two

pytestmark = pytest.mark.slow

STEERED = ["prompt", "late", "whole", "resumed"]
PROBLEMS = ["unreplayed 0", "unreplayed 1"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).with_name("ddp_decisions.py"), tmp_path_factory.mktemp("ddp"))


def test_both_processes_decide_and_do_the_same(ranks):
    first, second = ranks
    for case in first:
        for what in first[case].keys() - {"losses", "warned"}:
            assert same(first[case][what], second[case][what]), (case, what)


@pytest.mark.parametrize("case", STEERED)
def test_an_overflow_of_the_second_alone_moves_the_layer_on_both(ranks, case):
    for results in ranks:
        moves = [tuple(move) for decision in results[case]["decisions"] for move in decision["moves"]]
        assert moves == [("net.down", "fp16", "bf16")]
        assert {event["rank"] for event in results[case]["events"]} == {1}
        assert 1 <= results[case]["skipped"] <= 3


@pytest.mark.parametrize("case", ["prompt", "whole", "resumed"])
def test_the_schedule_goes_on_from_what_was_decided(ranks, case):
    for results in ranks:
        assert [entry["layer"] for entry in results[case]["history"]] == ["net.down", "net.head"]
        assert [(phase["phase"], phase["step"]) for phase in results[case]["came"]] == [(1, 5)]


def test_an_outcome_that_comes_late_is_decided_on_one_step_later_at_most(ranks):
    for results in ranks:
        assert 0 <= results["late"]["skipped"] - results["prompt"]["skipped"] <= 1
        assert results["late"]["decisions"][0]["moves"] == results["prompt"]["decisions"][0]["moves"]


def test_a_resumed_run_is_the_uninterrupted_one_on_both(ranks):
    for results in ranks:
        whole, resumed = results["whole"], results["resumed"]
        assert [what for what in whole if not same(whole[what], resumed[what])] == []


def test_a_step_that_one_process_spoils_is_none_for_the_schedule(ranks):
    for results in ranks:
        result = results["skipping"]
        assert result["steps"] == [1, 1, 2, 3, 4, 5, 6, 7]  # the second batch is skipped
        assert [(phase["phase"], phase["step"]) for phase in result["came"]] == [(1, 2), (2, 5)]


@pytest.mark.parametrize("case", PROBLEMS)
def test_a_replay_that_fails_on_one_process_leaves_the_run_as_it_is(ranks, case):
    for results in ranks:
        run = results["unwatched"]
        assert [what for what in run if not same(_finite(run[what]), _finite(results[case][what]))] == []


def _finite(value):
    return value.nan_to_num(nan=-1.0) if hasattr(value, "nan_to_num") else value


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_says_once_which_one_could_not_replay(ranks, rank):
    """For all callbacks: the controller and the failed step's diagnosis meet the same problem, and add no line."""
    [said] = [line for line in ranks[0][f"unreplayed {rank}"]["warned"] if "KeyError: 'only here'" in line]
    assert said.startswith("UnderflowMonitor, FidelityMonitor could not sample step 0 (KeyError: 'only here'")
    assert f", on rank {rank})" in said
    assert ranks[1][f"unreplayed {rank}"]["warned"] == []


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_the_other_process_could_replay_is_measured(ranks, case):
    underflow, fidelity, _, decisions = ranks[1][case]["seen"]
    assert underflow["net.0"]["underflow_rate"] is not None
    assert fidelity["layers"]["net.0"]["grad_cosine"] > 0.99
    assert decisions == []
