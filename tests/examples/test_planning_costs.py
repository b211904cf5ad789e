"""The benchmark of what costs predict runs, and writes what it found; what is committed keeps what is promised."""

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
