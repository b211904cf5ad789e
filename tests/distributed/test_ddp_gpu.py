"""DDP over NCCL: two GPUs, or one GPU and a world of one."""

from pathlib import Path

import pytest
import torch
from plugin_models import same
from processes import outcomes, python_path, saved_by_two, started

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).with_name("ddp_nccl.py")
SPOILED = ["spoiled", "spoiled, fused", "spoiled, watched", "spoiled, fused and watched"]


def by_one(folder):
    """What a process saved that is its own world."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(SCRIPT.parent)}
    outcomes([started([SCRIPT, folder], folder, **environment)])
    return [torch.load(folder / "rank0.pt", weights_only=False)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one GPU", "two GPUs"])
def ranks(request, tmp_path_factory):
    """What all processes saved."""
    found = torch.cuda.device_count()
    if request.param > found:
        pytest.skip(f"needs {request.param} GPUs for two NCCL processes, and torch sees {found}")
    folder = tmp_path_factory.mktemp("nccl")
    return by_one(folder) if request.param == 1 else saved_by_two(SCRIPT, folder)


@pytest.mark.parametrize(("expected", "found"), [("stock", "ours"), ("hooked stock", "hooked ours")])
def test_a_uniform_policy_is_bit_for_bit_lightnings_own_plugin(ranks, expected, found):
    for results in ranks:
        for what in ("losses", "weights", "step", "scale"):
            assert same(results[found][what], results[expected][what])


def test_a_static_graph_changes_no_number(ranks):
    for results in ranks:
        assert same(results["static graph"]["weights"], results["mixed"]["weights"])


def test_all_processes_end_with_the_same_weights_counts_and_decisions(ranks):
    for case, result in ranks[0].items():
        assert all(torch.isfinite(weight).all() for weight in result["weights"]), case
        for other in ranks[1:]:
            for what in result.keys() - {"losses"}:
                assert same(result[what], other[case][what]), (case, what)


@pytest.mark.parametrize("case", SPOILED)
def test_an_overflow_of_the_first_process_is_skipped_on_all(ranks, case):
    for results in ranks:
        # The third batch of each of the two epochs.
        assert (results[case]["skipped"], results[case]["step"], results[case]["scale"]) == (2, 6, 256)


@pytest.mark.parametrize("case", ["spoiled, watched", "spoiled, fused and watched"])
def test_monitors_say_that_it_was_the_data_and_change_nothing(ranks, case):
    alone = {"spoiled, watched": "spoiled", "spoiled, fused and watched": "spoiled, fused"}[case]
    for results in ranks:
        assert results[case]["reasons"] == [{"data": 2}]
        assert results[case]["decisions"] == [[]]
        assert same(results[case]["weights"], results[alone]["weights"])
