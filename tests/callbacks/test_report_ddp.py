"""PrecisionReport in two processes under DDP: one report, of what both saw, with the losses of the first."""

import json
from pathlib import Path

import pytest
from processes import saved_by_two

pytestmark = pytest.mark.slow


def test_the_first_process_alone_writes_what_both_saw(tmp_path):
    first, second = saved_by_two(Path(__file__).parent / "ddp_report.py", tmp_path)
    assert first["skipped"] == second["skipped"] == 1
    (run,) = json.loads((tmp_path / "precision_report.json").read_text())["runs"]
    assert dict(run["environment"])["processes"] == "2"
    assert sum(run["curve"]["skipped"]) == 1
    assert run["span"] == [0, 3]
    expected = first["losses"][[0, 1, 3]].tolist()
    told = [*run["curve"]["loss"][:2], run["curve"]["loss_max"][2]]
    assert told[:2] == pytest.approx(expected[:2], rel=1e-3)
    assert [alert["title"] for alert in run["alerts"]][0] == "A batch is not finite itself"
    rows = [json.loads(line) for line in (tmp_path / "mixprec.jsonl").read_text().splitlines()]
    assert [
        next(key for key in ("run", "curve", "sample", "end", "change") if key in row)
        for row in rows
        if row["monitor"] == "report"
    ] == [
        "run",
        "sample",
        "sample",
        "curve",
        "end",
    ]
