"""SIGKILL anywhere, also while a checkpoint is written: what is left loads, and goes on as if nothing had happened.

Each point costs a run that is killed there and one that goes on; a quick run has one of them.
"""

import json
import pickle
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from interruption.killed_run import POINTS
from interruption.runs import EPOCHS, LEARNED, differences
from processes import outcomes, python_path, started
from selection import selected, slow_but_for

from lightning_mixprec import PrecisionPolicy
from lightning_mixprec.records.journal import FILE_NAME

NOTHING_TO_GO_ON_FROM = {"on_train_batch_end 3", "half moved 1"}
CUT_SHORT = {"half moved 1": {"epoch=0.ckpt"}, "half moved 4": {"last.ckpt"}}
WHOLE = "whole"
QUICK = {"half moved 4"}
"""While a checkpoint takes the place of the one before it."""

every_point = pytest.mark.parametrize("name", slow_but_for(QUICK, POINTS))
every_point_to_go_on_from = pytest.mark.parametrize(
    "name", slow_but_for(QUICK, [name for name in POINTS if name not in NOTHING_TO_GO_ON_FROM])
)


class Left(NamedTuple):
    """What a run left when it was killed."""

    code: int
    checkpoints: set[str]
    learned: str | None
    rows: list[str]


def left_in(folder, code):
    learned, rows = folder / LEARNED, folder / FILE_NAME
    return Left(
        code,
        {path.name for path in (folder / "saved").glob("*")},
        learned.read_text() if learned.exists() else None,
        rows.read_text().splitlines() if rows.exists() else [],
    )


def unpickled(path):
    return pickle.loads(path.read_bytes())


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """The folder of all runs, and what each had left when it was killed; by now they have gone on."""
    folder, left = tmp_path_factory.mktemp("kills"), {}
    script = Path(__file__).with_name("killed_run.py")
    points = [name for name in POINTS if name in selected(request, "name")]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    for task in ("kill", "continue"):
        outcomes([started([script, task, folder, *points], folder, **environment)])
        left = left or {name: left_in(folder / name, code) for name, code in unpickled(folder / "kill.pkl").items()}
    return folder, left


@pytest.fixture(scope="module")
def whole(runs):
    """What the uninterrupted run ended with."""
    return unpickled(runs[0] / WHOLE / "end.pkl")


def checkpoint(path):
    """What a checkpoint says of the training: without the run's id, and the places and times of files."""
    content = torch.load(path, weights_only=True)
    assert content.pop("mixprec_run_id")
    content["callbacks"] = {
        key: state for key, state in content["callbacks"].items() if not key.startswith("ModelCheckpoint")
    }
    return content


def test_the_run_has_all_that_could_be_lost(runs, whole):
    assert runs[1][WHOLE].code == 0
    assert [entry["step"] for entry in whole["history"]] == [1, 2, 6]
    assert [made["kind"] for made in whole["monitors"]["AdaptivePrecision"]["decisions"]] == ["promote"]
    assert len(whole["monitors"]["PrecisionScheduler"]["came"]) == 2
    assert whole["monitors"]["OverflowMonitor"]["events"]
    assert whole["monitors"]["UnderflowMonitor"]["latest"]
    assert whole["monitors"]["FidelityMonitor"]["latest"]["layers"]
    assert 0 < whole["skipped"] < whole["step"]
    scale = checkpoint(runs[0] / WHOLE / "saved/epoch=1.ckpt")["PerLayerPrecision"]["scaler"]
    assert scale["scale"] < 2.0**20
    assert scale["growth_tracker"] > 0


@every_point
def test_it_died_and_left_whole_files(runs, name):
    folder, left = runs[0], runs[1][name]
    assert left.code == -9
    assert all(isinstance(json.loads(row), dict) for row in left.rows)
    refused = unpickled(folder / name / "refused.pkl")
    assert refused.keys() == CUT_SHORT.get(name, set())
    if left.learned is not None:
        learned = PrecisionPolicy.from_dict(yaml.safe_load(left.learned))
        saved = [checkpoint(folder / WHOLE / f"saved/epoch={epoch}.ckpt") for epoch in range(EPOCHS)]
        assert learned.to_dict() in [content["PerLayerPrecision"]["policy"] for content in saved]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned policy 3"])
def test_a_learned_policy_that_was_being_written_is_still_the_last_one(runs, name):
    folder, left = runs[0], runs[1][name]
    assert left.checkpoints == {"epoch=0.ckpt", "last.ckpt"}
    first, second = (checkpoint(folder / WHOLE / f"saved/epoch={epoch}.ckpt") for epoch in (0, 1))
    assert yaml.safe_load(left.learned) == first["PerLayerPrecision"]["policy"] != second["PerLayerPrecision"]["policy"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NOTHING_TO_GO_ON_FROM))
def test_before_the_first_checkpoint_is_whole_there_is_none_to_take_for_good(runs, name):
    assert runs[1][name].checkpoints == CUT_SHORT.get(name, set())
    assert not (runs[0] / name / "end.pkl").exists()


@every_point_to_go_on_from
def test_it_goes_on_to_the_bits_of_the_uninterrupted_run(runs, whole, name):
    end = unpickled(runs[0] / name / "end.pkl")
    begun = len(whole["losses"]) - len(end["losses"])
    assert begun > 0
    end["losses"] = whole["losses"][:begun] + end["losses"]
    assert list(differences(end, whole)) == []


@every_point_to_go_on_from
def test_all_files_are_those_of_the_uninterrupted_run(runs, name):
    folder = runs[0]
    for epoch in range(EPOCHS):
        mine, theirs = (checkpoint(folder / each / f"saved/epoch={epoch}.ckpt") for each in (name, WHOLE))
        assert list(differences(mine, theirs)) == []
    assert list(differences(checkpoint(folder / name / "saved/last.ckpt"), theirs)) == []
    assert (folder / name / LEARNED).read_text() == (folder / WHOLE / LEARNED).read_text()
    rows, expected = (rows_of(folder / each / FILE_NAME) for each in (name, WHOLE))
    assert [row for row in expected if row not in rows] == []
    assert [row for row in rows if row not in expected] == []


def rows_of(path: Path) -> list[dict[str, object]]:
    """The rows of a file, without the run that they are of."""
    told = map(json.loads, path.read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "run_id"} for row in told]
