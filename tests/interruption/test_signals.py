"""SIGTERM and Ctrl-C: a run ends as Lightning's own does, and its files are whole."""

import json
import pickle
from pathlib import Path

import pytest
from interruption.runs import BATCHES, LEARNED, Lesson, differences, ending, trained
from interruption.signalled_run import AT, SIGNALS, plugin
from processes import outcomes, python_path, started
from selection import selected

from lightning_mixprec import PrecisionPolicy
from lightning_mixprec.records.journal import FILE_NAME

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

LAST = {"SIGTERM": AT, "SIGINT": AT - 1}
"""The last batch that counts: Lightning ends the one of a SIGTERM, and Ctrl-C is an exception within one."""


every_signal = pytest.mark.parametrize("name", SIGNALS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """The folder of the runs and their exit codes."""
    folder = tmp_path_factory.mktemp("signals")
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    names = [name for name in SIGNALS if name in selected(request, "name")]
    outcomes([started([Path(__file__).with_name("signalled_run.py"), folder, *names], folder, **environment)])
    return folder, pickle.loads((folder / "codes.pkl").read_bytes())


@pytest.fixture(scope="module")
def whole(runs):
    return pickle.loads((runs[0] / "whole" / "end.pkl").read_bytes())


def rows(folder):
    """The rows of a run's file, without the run that they are of."""
    told = map(json.loads, (folder / FILE_NAME).read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "run_id"} for row in told]


@every_signal
def test_it_ends_as_lightnings_own_run(runs, name):
    folder, codes = runs
    assert codes[f"ours {name}"] == codes[f"stock {name}"] == {"SIGTERM": 0, "SIGINT": 1}[name]
    ours, stock = ((folder / f"{kind} {name}" / "notes.txt").read_text() for kind in ("ours", "stock"))
    assert ours == stock
    assert f"batch {LAST[name]}" in ours
    assert "Exception" in ours or "KeyboardInterrupt" in ours
    assert "training ends" not in ours
    assert "Traceback" not in (folder / f"ours {name}" / "output.txt").read_text()


@every_signal
def test_all_rows_up_to_there_are_in_the_file(runs, name):
    expected = rows(runs[0] / "whole")
    found = rows(runs[0] / f"ours {name}")
    assert found == expected[: len(found)]
    until = (1, LAST[name] - BATCHES)
    assert all((row["epoch"], row["batch_idx"]) > until for row in expected[len(found) :])
    assert {row["monitor"] for row in found} == {"schedule", "adaptive", "underflow", "fidelity"}


@every_signal
def test_what_was_learned_is_in_its_file(runs, whole, name):
    learned = PrecisionPolicy.from_file(runs[0] / f"ours {name}" / LEARNED).resolve(Lesson())
    assert [entry["layer"] for entry in whole["history"]] == ["net.4", "net.0", "net.1"]  # the last one comes later
    assert [learned[layer].compute for layer in ("net.4", "net.0", "net.1")] == ["bf16", "fp32", "fp16"]


@pytest.mark.parametrize("name", ["SIGTERM"])
def test_a_run_goes_on_from_where_a_sigterm_ended_it(runs, whole, tmp_path, name):
    model, run = trained(tmp_path, runs[0] / f"ours {name}" / "on_exception.ckpt", plugin=plugin("ours"))
    end = ending(model, run)
    end["losses"] = whole["losses"][: AT + 1] + end["losses"]
    assert list(differences(end, whole)) == []


@pytest.mark.parametrize("name", ["SIGINT"])
def test_a_run_goes_on_from_where_ctrl_c_ended_it(runs, whole, tmp_path, name):
    """With the window lost that it fell into, as Lightning's own run goes on."""
    model, run = trained(tmp_path / "ours", runs[0] / f"ours {name}" / "on_exception.ckpt", plugin=plugin("ours"))
    stock = trained(
        tmp_path / "stock", runs[0] / f"stock {name}" / "on_exception.ckpt", plugin=plugin("stock"), watching=()
    )[1]
    end = ending(model, run)
    assert end["step"] == stock.global_step == whole["step"] - 1
    assert end["formats"] == whole["formats"]
    assert [(entry["layer"], entry["to"]) for entry in end["history"]] == [
        (entry["layer"], entry["to"]) for entry in whole["history"]
    ]
    assert end["monitors"]["AdaptivePrecision"]["decisions"] == whole["monitors"]["AdaptivePrecision"]["decisions"]
