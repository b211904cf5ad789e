"""Every command of the examples' README runs as it is written, for two steps, and no example is without one."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"^ *(python examples/\w+\.py fit .+)$", README, re.MULTILINE)))
LIMITS = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]


def of_yaml(command: str) -> list[str]:
    return re.findall(r"(\w+\.yaml)", command)


def run(command: str, folder: Path) -> Path:
    """Run it for two steps; return its log directory."""
    program, script, *arguments = shlex.split(command)
    assert program == "python"
    arguments = [each.replace("examples/", f"{EXAMPLES}/") for each in arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command_line = [sys.executable, str(ROOT / script), *arguments, *LIMITS]
    done = subprocess.run(command_line, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr
    assert "With the default config expect " in done.stdout
    assert "optimizer steps:" in done.stdout
    return folder / "lightning_logs" / "version_0"


@pytest.fixture(scope="module")
def log_dir_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs a command, once; one that takes a checkpoint gets that of the command that the README gives before it."""

    @cache
    def log_dir_of(command: str) -> Path:
        if "CHECKPOINT" in command:
            (pretraining,) = (each for each in COMMANDS if each.endswith("/bert.yaml"))
            (checkpoint,) = (log_dir_of(pretraining) / "checkpoints").glob("*.ckpt")
            command = command.replace("CHECKPOINT", str(checkpoint))
        return run(command, tmp_path_factory.mktemp("command"))

    return log_dir_of


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(of_yaml(command)))
def test_a_command_of_the_readme_runs(command: str, log_dir_of: Callable[[str], Path]) -> None:
    log_dir = log_dir_of(command)
    assert {"metrics.csv", "config.yaml", "precision_report.html"} <= {path.name for path in log_dir.iterdir()}
    (told,) = json.loads((log_dir / "precision_report.json").read_text())["runs"]
    assert told["status"]["state"] == "finished"


def test_every_script_and_every_config_of_the_examples_is_in_the_readme() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py") if "start(main)" in path.read_text()}
    assert len(scripts) > 10
    assert {name for name in scripts if not any(f"examples/{name} fit" in command for command in COMMANDS)} == set()
    assert {path.name for path in (EXAMPLES / "configs").iterdir() if path.name not in README} == set()
