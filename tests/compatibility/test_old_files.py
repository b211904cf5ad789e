"""Files that 0.1.0 wrote are read: rows, reports, a saved batch, policies; README.md says how they were made."""

import copy
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from compatibility.comparison import differences, plain
from compatibility.old_models import Eventful, Line, Tossed
from compatibility.old_runs import DATA, RUNS, expected, resume, rows_of

from lightning_mixprec import PrecisionPolicy, diagnose

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings(r"ignore:step \d+"),
    pytest.mark.filterwarnings("ignore:'lightning_mixprec.report.__main__' found in sys.modules"),
]


@pytest.fixture
def folders():
    """Copies of the two log directories, in the working directory."""
    for name in ("run", "stock_run"):
        shutil.copytree(DATA / name, name)


# Reports


def meant(report):
    """A report without what it need not have in common with another of the same rows.

    That is the moment at which it was made, and how alerts are worded: title, text and advice may become better. What
    is alerted of, how severely, where, when and how often has to stay.
    """
    report = copy.deepcopy(report)
    del report["made"]
    for run in report["runs"]:
        alerts = [{key: alert[key] for key in ("level", "layer", "step", "count", "of")} for alert in run["alerts"]]
        assert all(alert["title"] and alert["text"] for alert in run["alerts"])
        run["alerts"] = sorted(alerts, key=str)
    return report


def reported(monkeypatch, *arguments):
    """What the command leaves: the content of the JSON file."""
    monkeypatch.setattr(sys, "argv", ["report", *arguments, "--output", "made.html"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lightning_mixprec.report", run_name="__main__")
    assert not ended.value.code
    assert Path("made.html").stat().st_size > 1000
    return json.loads(Path("made.json").read_text())


REPORTS = {
    "run/precision_report": ["run"],  # made by PrecisionReport when the run ended
    "stock_report": ["stock_run"],  # of monitors' rows alone; the loss is from metrics.csv
    "comparison": ["run", "stock_run"],
}


@pytest.mark.parametrize("name", REPORTS)
def test_reports_of_old_rows_say_what_old_reports_said(name, folders, monkeypatch):
    old, new = expected(name), reported(monkeypatch, *REPORTS[name])
    assert [run.pop("compared") for run in new["runs"]] == [[]] * len(new["runs"])  # a section that came later
    assert old.keys() == new.keys()
    assert differences(meant(old), meant(new)) == []
    assert all(run["alerts"] and run["rows"] and run["curve"]["loss"] for run in new["runs"])


KINDS = {
    "report": ["run", "curve", "change", "sample", "end", "problem"],
    "overflow": ["verdict", "frames"],
    "underflow": ["underflow_rate", "stagnation_rate", "what_if", "problem"],
    "fidelity": ["loss_gap", "grad_cosine", "sqnr_db", "problem"],
    "schedule": ["phase"],
    "adaptive": ["sample", "decision", "verdict", "problem"],
}


@pytest.mark.parametrize("monitor", KINDS)
def test_the_old_rows_are_of_every_kind(monitor):
    rows = [row for row in rows_of(DATA / "run") if row["monitor"] == monitor]
    assert [kind for kind in KINDS[monitor] if not any(row.get(kind) for row in rows)] == []


def test_a_resumed_run_adds_its_rows_to_the_old_ones(monkeypatch):
    """To those before the checkpoint's step; what is added is what the old release added."""
    old = expected("everybody")["rows"]
    lines = (DATA / "run" / "mixprec.jsonl").read_text().splitlines(keepends=True)
    before = "".join(line for line in lines if json.loads(line)["step"] < old[0]["step"])
    Path("run").mkdir()
    Path("run/mixprec.jsonl").write_text(before)
    resume(RUNS["everybody"], DATA / "everybody.pt", Path("run"))
    after = Path("run/mixprec.jsonl").read_text()
    assert after.startswith(before)
    new = [json.loads(line) for line in after.removeprefix(before).splitlines()]
    for row in new:
        row.pop("min_cosine", None)  # which limit holds, told since
        row.pop("run_id")  # and of which run it is
    told = [row for row in new if "run" not in row]  # versions and machine
    assert differences([row for row in old if "run" not in row], plain(told), is_exact=False) == []
    assert [row.keys() for row in new] == [row.keys() for row in old]
    (run,) = reported(monkeypatch, "run")["runs"]
    assert run["status"]["state"] == "finished"
    assert {(move["step"], *move["layers"]) for move in run["moves"]} == {
        (move["step"], *move["layers"]) for move in expected("run/precision_report")["runs"][0]["moves"]
    }


# A saved batch


def test_a_saved_batch_is_diagnosed_as_before():
    old = expected("diagnosis")
    content = torch.load(DATA / old["file"], weights_only=True)
    assert content["random"] is not None and content["event"]["verdict"] == "precision"
    model = Tossed()
    model.load_state_dict(torch.load(DATA / "diagnosed_model.pt", weights_only=True))
    found = diagnose(model, DATA / old["file"])
    assert differences(old["found"], plain(found), is_exact=False) == []
    for key in ("verdict", "layer", "direction", "op", "format", "fits", "loss_scale", "batch_idx"):
        assert found[key] == old["found"][key]
        assert found[key] == content["event"][key]


# Policies

MODELS = {"policy_short.yaml": Line, "policy_full.yaml": Line, "run/learned_policy.yaml": Eventful}


@pytest.mark.parametrize("name", MODELS)
def test_policies_are_read_and_resolved_as_before(name):
    old, model = expected("policies")[name], MODELS[name]()
    policy = PrecisionPolicy.from_file(DATA / name)
    assert policy.to_dict() == old["policy"]
    assert PrecisionPolicy.from_dict(old["policy"]) == policy
    resolved = {
        layer: [got.param, got.compute, got.output, None if got.rule is None else policy.rules.index(got.rule)]
        for layer, got in policy.resolve(model).items()
    }
    assert resolved == old["layers"]


def test_a_learned_policy_is_written_as_before():
    PrecisionPolicy.from_file(DATA / "run" / "learned_policy.yaml").to_file("again.yaml")
    assert Path("again.yaml").read_text() == (DATA / "run" / "learned_policy.yaml").read_text()
