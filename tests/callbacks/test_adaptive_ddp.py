"""AdaptivePrecision in two processes: they see different data, and decide the same at the same steps."""

import json
from pathlib import Path

import pytest
from plugin_models import same
from processes import saved_by_two

pytestmark = pytest.mark.slow

CASES = ["overflow", "one", "undoing", "uneven", "advice", "damaged", "planned"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return saved_by_two(Path(__file__).with_name("ddp_adaptive.py"), tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["decisions", "history", "policies", "state", "weights", "skipped"])
def test_both_processes_do_the_same(ranks, case, what):
    first, second = (results[case][what] for results in ranks)
    assert same(first, second)


ENCODING = ("net.encode", "fp16", "fp32")
MOVES = {
    "overflow": [("net.down", "fp16", "bf16")],
    "one": [ENCODING, ENCODING[:1] + ENCODING[:0:-1]],
    "undoing": [ENCODING],
    "uneven": [ENCODING],
    "advice": [ENCODING],
    "damaged": [],
    "planned": [(name, "fp32", "bf16") for name in ("", "net", "net.encode")],
}


@pytest.mark.parametrize(("case", "moves"), MOVES.items(), ids=MOVES)
def test_what_fails_on_either_moves_on_both(ranks, case, moves):
    for results in ranks:
        assert results[case]["moves"][: len(moves)] == moves
        assert results[case]["finite"]


def test_an_overflow_of_one_process_is_skipped_by_both_until_the_culprit_moved(ranks):
    for results in ranks:
        assert results["overflow"]["skipped"] <= 3
        assert results["overflow"]["decisions"][0]["evidence"]["layer"] == "net.down"


def test_steps_are_undone_on_both(ranks):
    for results in ranks:
        assert [decision["restores"] for decision in results["undoing"]["decisions"]] == [True]


def test_weights_that_one_process_lost_are_restored_on_both(ranks):
    for results in ranks:
        assert {decision["kind"] for decision in results["damaged"]["decisions"]} == {"restore"}


def test_what_a_plan_narrowed_goes_back_on_both_where_one_process_relapses(ranks):
    for results in ranks:
        decisions = results["planned"]["decisions"]
        (back,) = [decision for decision in decisions if decision["kind"] == "promote"]
        assert {decision["kind"] for decision in decisions} == {"demote", "promote"}
        assert back["moves"] == [["net.encode", "bf16", "fp32"]]
        assert results["planned"]["state"]["demotions"]["refused"] == ["net.encode"]


@pytest.mark.parametrize("case", CASES)
def test_files_are_written_by_one(ranks, case):
    files, rows = ranks[0][case]["files"], [json.loads(line) for line in ranks[0][case]["rows"]]
    assert ("learned_policy.yaml" in files) is (case != "advice")
    assert ("advised_policy.yaml" in files) is (case == "advice")
    for kind in ("sample", "decision"):
        places = [(row["step"], row["batch_idx"]) for row in rows if kind in row]
        assert len(places) == len(set(places)) > 0
