"""The commands of the examples' README that plan, compare and export run as they are written, on one small batch."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"^ *(python examples/\w+\.py (?:plan|compare|export) .+)$", README, re.MULTILINE)))
SMALL = {
    "gpt.py": ["--model.depth=1", "--data.size=60000", "--data.batch_size=4"],
    "image_classification.py": ["--data.batch_size=4"],
    "recommendation.py": [],
}
WRITTEN = {"plan": {"plan.json", "plan_policy.yaml"}, "compare": {"comparison.json"}, "export": {"model."}}


def test_there_is_one_of_each() -> None:
    assert {shlex.split(command)[2] for command in COMMANDS} == set(WRITTEN)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(shlex.split(command)[1:3]))
def test_a_command_of_the_readme_runs(command: str, tmp_path: Path) -> None:
    _, script, subcommand, *arguments = shlex.split(command)
    arguments = [each.replace("examples/", f"{EXAMPLES}/") for each in arguments]
    few = [] if subcommand == "export" else ["--batches=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command_line = [sys.executable, str(ROOT / script), subcommand, *arguments, *SMALL[Path(script).name], *few]
    done = subprocess.run(command_line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "lightning_logs" / "version_0").iterdir()}
    assert "config.yaml" in written
    assert all(any(name.startswith(each) for name in written) for each in WRITTEN[subcommand]), written
