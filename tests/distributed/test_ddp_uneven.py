"""Ranks that are not given the same or do not do the same: a run ends as it does under Lightning's own plugin.

Lightning's DDP has no joining of uneven ranks. A rank that has fewer batches is done; the other waits for it, and gets
an error as soon as its process ends. What is to hold is that the plugin and the monitors add no other way to end.
"""

from pathlib import Path

import pytest
from plugin_models import same
from processes import saved_by_two

pytestmark = pytest.mark.slow

WAYS = ["stock", "ours", "watched"]
GOES_WELL = {"limited": 3, "padded": 4, "own epochs": 6, "early stopping": 8}
LEFT_ALONE = {"first longer": 0, "second longer": 1, "stopping alone": 0}
RAISES = {"nothing": "RuntimeError: Skipping the `training_step` by returning None", "raising": "KeyError: 'only here'"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).with_name("ddp_uneven.py"), tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("case", "steps"), GOES_WELL.items(), ids=GOES_WELL)
def test_what_goes_well_under_lightnings_plugin_goes_well(ranks, case, steps, way):
    first, second = (results[f"{case}, {way}"] for results in ranks)
    assert first["ended"] == second["ended"] == steps
    assert same(first["weights"], second["weights"])


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("case", GOES_WELL)
def test_it_comes_to_the_same_weights(ranks, case, way):
    for results in ranks:
        assert same(results[f"{case}, {way}"]["weights"], results[f"{case}, stock"]["weights"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("case", "left"), LEFT_ALONE.items(), ids=LEFT_ALONE)
def test_the_rank_with_fewer_batches_is_done_and_the_other_is_told(ranks, case, left, way):
    waits, leaves = (results[f"{case}, {way}"] for results in (ranks[left], ranks[1 - left]))
    assert leaves["ended"] == ranks[1 - left][f"{case}, stock"]["ended"]
    assert waits["ended"].startswith("RuntimeError")
    assert not waits["skipped"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("case", "error"), RAISES.items(), ids=RAISES)
def test_an_error_of_one_rank_is_its_own_and_ends_the_other(ranks, case, error, way):
    first, second = (results[f"{case}, {way}"] for results in ranks)
    assert second["ended"].startswith(error)
    assert first["ended"].startswith("RuntimeError")
    assert len(first["losses"]) == len(ranks[0][f"{case}, stock"]["losses"])


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_raises_on_one_rank_is_not_replayed_and_says_so(ranks, way):
    told = ranks[1][f"raising, {way}"]["notes"]
    assert len(told) == (way == "watched")
    assert all("raises on one of several ranks is not replayed" in note for note in told)


def test_monitors_of_lightnings_plugin_end_as_it_does(ranks):
    for rank, results in enumerate(ranks):
        assert same(results["own epochs, watched stock"]["weights"], results["own epochs, stock"]["weights"])
        assert (results["first longer, watched stock"]["ended"] == 3) is (rank == 1)


@pytest.mark.parametrize("case", ["step", "share of steps"])
def test_a_phase_that_counts_steps_comes_together_where_epochs_differ(ranks, case):
    first, second = (results[f"schedule by {case}"] for results in ranks)
    assert first["ended"] == second["ended"] == 6
    assert first["history"] == second["history"] != []
    assert same(first["weights"], second["weights"])


@pytest.mark.parametrize("case", ["epoch", "plateau"])
def test_a_phase_that_would_come_at_other_steps_is_refused_on_both(ranks, case):
    for results in ranks:
        ended = results[f"schedule by {case}"]["ended"]
        assert ended.startswith("PolicyError: phase 1: it comes at")
        assert "3 and 6 batches" in ended and "limit_train_batches=3" in ended
        assert results[f"schedule by {case}"]["losses"] == []


def test_an_outcome_that_comes_late_waits_where_epochs_end_on_one_rank_alone(ranks):
    for results in ranks:
        assert (results["late, watched"]["ended"], results["late, watched"]["skipped"]) == (6, 1)
        assert same(results["late, watched"]["weights"], results["late, ours"]["weights"])
