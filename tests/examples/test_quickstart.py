"""The three steps at the top of the README: their commands, their output, their YAML."""

import os
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from plugin_models import task

from lightning_mixprec import OverflowMonitor, PerLayerPrecision, PrecisionReport

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def quickstart(folder: Path, *arguments: str) -> tuple[str, str]:
    """What it prints, and its warnings."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def block(language: str, word: str) -> str:
    """Return the README's only block of code in a language that holds a word."""
    languages, codes = zip(*(each.split("\n", 1) for each in README.split("```")[1::2]), strict=True)
    (code,) = (code for known, code in zip(languages, codes, strict=True) if known == language and word in code)
    return code


def shape(line: str) -> str:
    """A line whose numbers may end otherwise on another machine."""
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", line)


@pytest.mark.parametrize("arguments", ["", "--policy fp16 --adaptive"])
def test_the_command_is_in_the_readme(arguments):
    assert f"`python examples/quickstart.py{' ' * bool(arguments)}{arguments}`" in README


@pytest.mark.slow
def test_the_monitors_find_what_a_healthy_looking_run_hides(tmp_path):
    """The seconds of a process that imports Lightning, and of a short run."""
    printed, warned = quickstart(tmp_path)
    told = block("", "OverflowMonitor: 1 of 512").replace("/home/you", str(tmp_path))
    said, told = told.split("OverflowMonitor:")
    lines = [shape(line) for line in printed.splitlines()]
    for line in ("OverflowMonitor:" + told).replace("...\n", "").splitlines():
        assert shape(line) in lines, line
    assert shape(" ".join(said.split())) in shape(" ".join(warned.split()))
    table = printed.split("FidelityMonitor:")[1].splitlines()
    assert table[2].split()[0] == "model.1"
    assert re.search(r"^loss 0\.13\d\d$", printed, re.MULTILINE)


@pytest.mark.slow
def test_adaptive_precision_finds_the_layer_and_its_policy_trains_frozen(tmp_path):
    printed, _ = quickstart(tmp_path, "--policy", "fp16", "--adaptive")
    for text in (printed, block("", "AdaptivePrecision: 1 move,")):
        assert re.search(r"^model\.1 +2  fp16  bf16 +gradients of .* vanish$", text, re.MULTILINE), text
        assert re.search(r"^loss 0\.010\d$", text, re.MULTILINE), text
    learned = tmp_path / "lightning_logs" / "version_0" / "learned_policy.yaml"
    assert learned.read_text() == block("yaml", "- layers: model.1\n")
    printed, _ = quickstart(tmp_path, "--policy", str(learned))
    assert re.search(r"^loss 0\.010\d$", printed, re.MULTILINE), printed


@pytest.mark.slow
def test_adaptive_needs_a_policy(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--adaptive"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--adaptive needs --policy" in done.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's of jsonargparse
def test_the_three_lines_of_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    config = yaml.safe_load(block("yaml", "callbacks: ["))
    config["trainer"]["plugins"]["init_args"]["policy"] = {"default": "bf16", "net.6": "fp32"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    limits = ["--trainer.logger=false", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    cli = LightningCLI(
        Given, run=False, seed_everything_default=1, args=[f"--config={tmp_path / 'config.yaml'}", *limits]
    )
    assert isinstance(cli.trainer.precision_plugin, PerLayerPrecision)
    kinds = {type(callback) for callback in cli.trainer.callbacks}
    assert {OverflowMonitor, PrecisionReport} <= kinds


class Given(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = task().net
