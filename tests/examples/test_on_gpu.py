"""The script for the day there is a GPU: it names every test that needs one, and goes on whatever happens."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "examples" / "benchmarks" / "on_gpu.sh"
STEPS = ["versions", "devices", "tests-engine", "tests-eight-bits", "tests-numerics", "tests-evidence"]
STEPS += [
    "tests-deploy",
    "tests-callbacks",
    "tests-compiled",
    "tests-distributed",
    "overhead",
    "monitors",
    "low_bits",
    "low_bits-compiled",
    "rescue",
    "optimizers",
]


def go(folder: Path, **environment: object) -> tuple[int, dict[str, dict], str]:
    """Run it; return its exit code, what it recorded of each step, and what it printed."""
    named = {name: str(value) for name, value in environment.items()}
    done = subprocess.run(
        [SCRIPT, folder / "out"],
        cwd=folder,
        env={**os.environ, "ON_GPU_DEVICE": "cpu", "PYTHON": sys.executable, **named},
        capture_output=True,
        text=True,
    )
    lines = (folder / "out" / "steps.jsonl").read_text().splitlines()
    return done.returncode, {step["step"]: step for step in map(json.loads, lines)}, done.stdout


@pytest.fixture
def pretend(tmp_path: Path) -> Path:
    """A Python that has all packages but torchvision, fails in the tests of numbers, and sleeps if it is told to."""
    python = tmp_path / "python"
    python.write_text("""#!/bin/bash
echo "ran: $*"
case "$*" in
    *find_spec*torchvision*) exit 1 ;;
    *find_spec*) exit 0 ;;
    *"$SLEEPS"*) sleep 60 ;;
    *tests/numerics*) exit 3 ;;
esac
""")
    python.chmod(0o755)
    return python


def test_it_names_every_file_with_a_test_that_needs_a_gpu() -> None:
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__) and re.search(r"mark\.gpu\b", path.read_text())
    }
    named = re.findall(r"tests/[\w/]+\.py", SCRIPT.read_text())
    assert len(named) == len(set(named))
    assert marked - set(named) == set(), "not named in on_gpu.sh"
    assert set(named) - marked == set(), "named there, but without a gpu test"


def test_a_step_that_fails_or_lacks_a_package_does_not_stop_the_others(tmp_path: Path, pretend: Path) -> None:
    code, steps, printed = go(tmp_path, PYTHON=pretend, SLEEPS="nothing")
    assert code == 1
    assert list(steps) == STEPS
    assert {name for name, step in steps.items() if step["status"] == "failed"} == {"tests-numerics"}
    skipped = {name: step["why"] for name, step in steps.items() if step["status"] == "skipped"}
    assert set(skipped) == {"overhead", "monitors", "low_bits"}
    assert all("torchvision is missing" in why for why in skipped.values())
    assert "exit code 3" in printed
    log = (tmp_path / "out" / "log.txt").read_text()
    assert all(f"== {name}\n" in log for name in set(STEPS) - set(skipped))
    assert f"--device cpu --cases offset --controls --seeds 1 --rounds 0 --output {tmp_path}/out/rescue.json" in log


def test_steps_can_be_chosen_and_all_is_well_if_they_are(tmp_path: Path, pretend: Path) -> None:
    code, steps, _ = go(tmp_path, PYTHON=pretend, SLEEPS="nothing", STEPS="rescue devices")
    assert (code, list(steps)) == (0, ["devices", "rescue"])


@pytest.mark.slow
def test_a_step_that_hangs_is_stopped_and_the_time_in_all_is_kept(tmp_path: Path, pretend: Path) -> None:
    code, steps, _ = go(tmp_path, PYTHON=pretend, SLEEPS="tests/engine", SECONDS_IN_ALL=7)
    assert code == 1
    assert steps["tests-engine"]["status"] == "out of time"
    assert 5 <= steps["tests-engine"]["seconds"] <= 12
    assert steps["rescue"] == {
        "step": "rescue",
        "status": "skipped",
        "seconds": 0,
        "why": "no time is left of 7 seconds",
    }


@pytest.mark.slow
def test_without_a_gpu_it_runs_in_tiny_sizes(tmp_path: Path) -> None:
    chosen = ["versions", "tests-numerics", "low_bits"]
    code, steps, printed = go(tmp_path, STEPS=" ".join(chosen), PATIENCE=10, SECONDS_IN_ALL=900)
    assert [(name, step["status"]) for name, step in steps.items()] == [(name, "passed") for name in chosen], printed
    assert code == 0
    versions = json.loads((tmp_path / "out" / "versions.json").read_text())
    assert versions["gpu"] is None and versions["torch"] and versions["pytest"] == pytest.__version__
    rows = {row["format"]: row for row in json.loads((tmp_path / "out" / "low_bits.json").read_text())["results"]}
    assert rows["tf32"]["left_out"] == "a CPU has no TF32"
    assert rows["bf16"]["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert rows["fp32"]["tflops_per_s"] > 0 and rows["again"]["loss"] == rows["bf16"]["loss"] != rows["fp32"]["loss"]
    for name in ("fp8", "fp8-row", "int8"):
        assert rows[name]["left_out"] or rows[name]["loss"] != rows["bf16"]["loss"]
