"""However Lightning comes by its processes, they train alike; and what the process that started them knows afterwards.

Lightning hands the weights and the logged metrics of spawned and forked processes back, and no attribute of a plugin or
a callback: ``history``, ``skipped_steps`` and ``events`` of the starting process say what it has seen itself, nothing.
What happened is in ``trainer.callback_metrics``, the JSONL file, checkpoints and the learned policy.
"""

import json
from pathlib import Path

import pytest
import torch
from plugin_models import same
from processes import outcomes, python_path, saved_by_two, started

pytestmark = pytest.mark.slow

LAUNCHERS = ["spawn", "fork", "script"]
SCRIPT = Path(__file__).with_name("ddp_launched.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all launchers left what their processes know."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(SCRIPT.parent)}
    outcomes([started([SCRIPT, folder], folder, **environment)])
    (folder / "mixprec.jsonl").rename(folder / "launched.jsonl")
    saved_by_two(SCRIPT, folder)
    return folder


def load(path):
    return torch.load(path, weights_only=False)


@pytest.fixture(scope="module")
def parents(folder):
    return load(folder / "parents.pt")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_trains_as_one_that_torchrun_started(folder, launcher, rank):
    expected, found = (load(folder / f"{name}-rank{rank}.pt") for name in ("torchrun", launcher))
    assert [what for what in expected if not same(expected[what], found[what])] == []


def test_the_ranks_of_torchrun_skip_and_move_a_layer(folder):
    first, second = (load(folder / f"torchrun-rank{rank}.pt") for rank in range(2))
    for result in (first, second):
        assert (result["skipped"], result["step"], result["scale"]) == (1, 3, 512)
        assert [(entry["step"], entry["layer"]) for entry in result["history"]] == [(2, "net.6")]
    assert same(first["weights"], second["weights"])
    assert not same(first["losses"], second["losses"])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_starting_process_gets_the_weights_and_the_metrics(folder, parents, launcher):
    assert same(parents[launcher]["weights"], load(folder / "torchrun-rank0.pt")["weights"])
    assert parents[launcher]["left"] == []
    metrics = parents[launcher]["metrics"]
    assert (metrics["mixprec/skipped_steps"], metrics["mixprec/loss_scale"]) == (1, 512)


@pytest.mark.parametrize("launcher", ["spawn", "fork"])
def test_what_plugin_and_monitor_saw_stays_in_the_processes_that_were_started(parents, launcher):
    result = parents[launcher]
    assert (result["history"], result["skipped"], result["events"], result["scale"]) == ([], 0, [], 1)
    assert result["policy"]["default"] == "fp16"


def test_a_script_run_once_more_knows_everything(folder, parents):
    rank0 = load(folder / "torchrun-rank0.pt")
    assert all(parents["script"][what] == rank0[what] for what in ("history", "skipped", "scale"))
    assert len(parents["script"]["events"]) == 1


def test_every_launch_writes_its_event_to_the_file(folder):
    rows = [json.loads(line) for line in (folder / "launched.jsonl").read_text().splitlines()]
    assert [(row["verdict"], row["batch_idx"], row["rank"]) for row in rows] == [("data", 2, 0)] * len(LAUNCHERS)


@pytest.mark.parametrize("launcher", ["spawn", "fork"])
def test_the_plugin_can_be_used_again_by_the_starting_process(parents, launcher):
    skipped, losses = parents[launcher]["again"]
    assert skipped == 1
    assert losses.isfinite().tolist() == [True, True, False, True]
