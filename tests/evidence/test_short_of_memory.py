"""Memory that runs out on one rank alone, in a step whose layers send messages: all go on with half of it, or none."""

from pathlib import Path

import pytest
import torch
from processes import python_path, saved_by_two


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def ranks(request, tmp_path_factory):
    """What both processes saved. Two processes take half a minute; without lockstep they would wait for ever."""
    if request.param == "nccl" and (found := torch.cuda.device_count()) < 2:
        pytest.skip(f"needs two GPUs for two NCCL processes, and torch sees {found}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(Path(__file__).parents[1] / "callbacks"))
        patch.setenv("MIXPREC_TEST_BACKEND", request.param)
        return saved_by_two(Path(__file__).parent / "ddp_short_of_memory.py", tmp_path_factory.mktemp("ddp"))


pytestmark = pytest.mark.slow


def test_both_ranks_go_on_with_half_of_the_batch(ranks):
    for results in ranks:
        assert set(results["half fits"]["sizes"]) == {4, 2}
        assert results["half fits"]["steps"] == 4
    first, second = ([each for each in results["half fits"]["sizes"] if each == 2] for results in ranks)
    assert first == second != []
    rows = [row for row in ranks[0]["half fits"]["rows"] if "problem" in row]
    assert {row["is_sampled"] for row in rows} == {True}
    assert all(
        "rank 1 could not go on with it (OutOfMemoryError: CUDA out of memory.)" in row["problem"] for row in rows
    )


@pytest.mark.parametrize(("case", "reason"), [("nothing fits", "out of memory"), ("fails", "teacher")])
def test_a_sample_that_one_rank_cannot_take_is_left_out_on_both(ranks, case, reason):
    assert [results[case]["steps"] for results in ranks] == [4, 4]
    assert any("could not sample step 0" in said and reason in said for said in ranks[0][case]["said"])
    assert set(ranks[0][case]["sizes"]) == ({4, 2} if case == "nothing fits" else {4})


def test_without_messages_the_other_rank_keeps_its_whole_batch(ranks):
    assert [set(results["no messages"]["sizes"]) for results in ranks] == [{4}, {4, 2}]


def test_a_failed_step_is_judged_on_half_of_both_batches(ranks):
    for results in ranks:
        assert results["judged"]["events"]
        assert {event["verdict"] for event in results["judged"]["events"]} == {"precision"}
        assert {event["detail"] for event in results["judged"]["events"]} == {"on half of the batch, as memory ran out"}
        assert set(results["judged"]["sizes"]) == {4, 2}


def test_trials_that_one_rank_has_no_memory_for_end_on_both(ranks):
    assert [results["tried"]["steps"] for results in ranks] == [4, 4]
