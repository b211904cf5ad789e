"""The benchmarks of plans run, and write what they found; what is committed keeps what is promised."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"


@pytest.mark.slow
def test_it_writes_what_it_found(tmp_path: Path) -> None:
    output = tmp_path / "new" / "costs.json"
    command = [sys.executable, str(BENCHMARKS / "planning_costs.py"), "--quick", "--models", "cnn"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--output", str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = json.loads(output.read_text())["results"]
    assert line["saved_error"] < 0.05
    assert [row["policy"] for row in line["times"]] == [
        *("fp32", "bf16", "ends wide", "norms wide", "first half", "products alone")
    ]
    assert all(row["low"] <= row["measured"] <= row["high"] for row in line["times"])
    assert 0 <= line["right"] <= line["pairs"] <= 15
    assert f"{line['right']} of {line['pairs']} pairs" in done.stdout


@pytest.mark.slow
def test_plans_are_set_beside_rivals_and_written(tmp_path: Path) -> None:
    output = tmp_path / "plans.json"
    command = [sys.executable, str(BENCHMARKS / "plans.py"), "--quick", "--models", "recommender"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--output", str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = json.loads(output.read_text())["results"]
    assert [row["rival"] for row in line["rivals"]][:3] == ["all bf16", "first and last wide", "norms wide"]
    for row in line["rivals"]:
        for cost in ("time", "memory"):
            assert row["plan_takes"][cost] <= row["budget"][cost] * (1 + 1e-6)
        assert row["plan_takes"]["low_precision_share"] >= row["budget"]["low_precision_share"] - 1e-6
    assert {kind: len(found) for kind, found in line["endings"].items()} == {"fp32": 1, "all bf16": 1, "plan": 1}


def test_the_committed_plans_are_better_than_their_rivals_on_each_model() -> None:
    lines = json.loads((BENCHMARKS / "results" / "plans-cpu.json").read_text())["results"]
    assert [line["model"] for line in lines] == ["cnn", "gpt", "recurrent", "recommender"]
    for line in lines:
        better = [row["plan_gap"] < row["gap"] for row in line["rivals"]]
        assert all(better[:3]) and sum(better[3:]) >= 0.9 * len(better[3:])
        ends = {kind: sum(found) / len(found) for kind, found in line["endings"].items()}
        spread = max(line["endings"]["fp32"]) - min(line["endings"]["fp32"])
        assert ends["plan"] <= ends["all bf16"] + spread / 4
