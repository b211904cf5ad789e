"""The benchmark of optimizers: what it trains and writes, and that the guide has the numbers of the committed file."""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightning_mixprec.optim import fp32_state_dict

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "benchmarks"
OPTIONS = argparse.Namespace(device="cpu")


@pytest.fixture
def optimizers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("optimizers")


def losses(optimizers: ModuleType, model: str, case: str) -> list[float]:
    trained = optimizers.Trained(model, case, 1, OPTIONS)
    return [trained.step(*batch).item() for batch in islice(optimizers.batches(model, 1, OPTIONS), 3)]


@pytest.mark.parametrize("model", ["gpt", "resnet"])
def test_the_case_of_fp32_is_torch_s_and_what_is_stored_in_bf16_is_not(optimizers: ModuleType, model: str) -> None:
    stock = losses(optimizers, model, "foreach")
    assert losses(optimizers, model, "fp32 fp32") == stock
    assert losses(optimizers, model, "exact fp32") != stock


def test_weights_in_bf16_begin_with_the_bits_of_fp32(optimizers: ModuleType) -> None:
    trained = optimizers.Trained("gpt", "exact fp32", 1, OPTIONS)
    drawn = optimizers.narrow_weights(optimizers.network("gpt", 1, OPTIONS))
    assert {p.dtype for p in trained.params} == {torch.bfloat16}
    held = fp32_state_dict(trained.net, trained.optimizer)
    assert all(torch.equal(held[name], p) for name, p in drawn.items())


@pytest.mark.slow
def test_it_writes_what_it_measured(tmp_path: Path) -> None:
    """The seconds of a process that imports Lightning."""
    output = tmp_path / "report.json"
    chosen = ["fp32 fp32", "exact bf16", "stochastic int8"]
    arguments = ["--device", "cpu", "--quick", "--models", "gpt", "--formats", *chosen, "--output", str(output)]
    done = subprocess.run(
        [sys.executable, FOLDER / "optimizers.py", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["results"]
    counted = {row["case"]: (row["counted"], row["documented"]) for row in rows if row["part"] == "bytes"}
    assert counted == {"fp32 fp32": (16, 16), "exact bf16": (10, 10), "stochastic int8": (6.03125, 6.03125)}
    ratios = {row["case"]: row["to_foreach"] for row in rows if row["part"] == "time"}
    assert list(ratios) == ["foreach", "again", "fused", *chosen]
    assert ratios["foreach"] == {"median": 1, "low": 1, "high": 1}
    assert [row["case"] for row in rows if row["part"] == "loss"] == chosen
    assert all(f"loss  gpt     {case}" in done.stdout for case in chosen)


def test_the_guide_has_the_numbers_of_the_committed_file() -> None:
    rows = json.loads((FOLDER / "results" / "optimizers-cpu.json").read_text())["results"]
    found = {(row["part"], row["model"], row["case"]): row for row in rows}
    guide = (ROOT / "examples" / "guides" / "optimizers.md").read_text()
    told = re.findall(
        r"^\| (?:bf16, )?`?(\w+)`? \| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([^|]+) \| ([^|]+) \|$", guide, re.M
    )
    assert len(told) == 15
    for weights, states, counted, ratio, *ends in told:
        case = f"{weights} {states}"
        assert counted == f"{found['bytes', 'gpt', case]['counted']:.2f}"
        assert ratio == f"{found['time', 'gpt', case]['to_foreach']['median']:.2f}"
        for model, end in zip(("gpt", "resnet"), ends, strict=True):
            loss = found["loss", model, case]
            assert end == f"{loss['mean']:.3f} ({min(loss['losses']):.3f} to {max(loss['losses']):.3f})"
