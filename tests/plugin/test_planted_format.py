"""A new 16-bit format, planted in the table and nowhere else, is trained with, watched and reported as any other."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightnings import pl
from plugin_models import Batches, Task, mlp
from torch import Tensor

from lightning_mixprec import FidelityMonitor, PerLayerPrecision, PrecisionPolicy, PrecisionReport, UnderflowMonitor
from lightning_mixprec.engine.backends import Backends
from lightning_mixprec.numerics.formats import FORMATS, Format, format_of, get_format, is_wider
from lightning_mixprec.report.content import content_of
from lightning_mixprec.report.reading import read_records

STEPS = 4


@pytest.fixture(autouse=True)
def xf16() -> Iterator[Format]:
    """bfloat16 under another name."""
    bf16 = get_format("bf16")
    FORMATS["xf16"] = replace(bf16, name="xf16")
    yield FORMATS["xf16"]
    del FORMATS["xf16"]


def fit(policy: Any, folder: Path, *callbacks: pl.Callback) -> tuple[Task, PerLayerPrecision]:
    torch.manual_seed(0)
    task, plugin = Task(mlp()), PerLayerPrecision(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=STEPS,
            logger=pl.loggers.CSVLogger(folder),
            plugins=plugin,
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            log_every_n_steps=1,
        )
        trainer.fit(task, Batches(6, count=STEPS))
    return task, plugin


def numbers(task: Task) -> list[Tensor]:
    return [*task.losses, *task.parameters()]


def policies(format: str) -> list[Any]:
    return [format, {"default": "fp32", "net.0": format}, {"default": format, "net.0": f"c=fp32,o={format}"}]


@pytest.mark.parametrize("which", range(3), ids=["uniform", "one layer", "all but one layer"])
def test_it_trains_bit_for_bit_as_the_format_it_is_an_alias_of(which: int, tmp_path: Path) -> None:
    new, plugin = fit(policies("xf16")[which], tmp_path / "new")
    old, _ = fit(policies("bf16")[which], tmp_path / "old")
    assert all(torch.equal(one, other) for one, other in zip(numbers(new), numbers(old), strict=True))
    assert plugin.precision == ("32-true" if which == 1 else "bf16-mixed")


def test_beside_bf16_it_is_a_format_of_its_own(tmp_path: Path) -> None:
    _, plugin = fit({"default": "bf16", "net.0": "xf16"}, tmp_path)
    assert plugin.assignment is not None
    assert plugin.assignment.compute_formats == {"bf16", "xf16"}
    assert not is_wider("xf16", "bf16")
    assert is_wider("xf16", "fp16")


def test_what_is_stored_has_the_name_that_comes_first_in_the_table() -> None:
    assert format_of(torch.bfloat16) == "bf16"
    backends = Backends("cpu", emulate=False)
    assert backends.backend_for("xf16") is backends.backend_for("bf16")


def test_the_table_of_the_policy_says_it() -> None:
    shown = str(PrecisionPolicy.from_dict({"default": "fp32", "0": "xf16"}).resolve(mlp()))
    assert "fp32/xf16/-" in shown


class Promotes(pl.Callback):
    """Moves a layer to the new format in the middle of the run."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        if idx == 2:
            trainer.precision_plugin.edit_policy({"net.0": "xf16"}, reason="test")  # type: ignore[attr-defined]


def test_the_history_knows_it(tmp_path: Path) -> None:
    _, plugin = fit("fp16", tmp_path, Promotes())
    assert [(entry["layer"], entry["from"], entry["to"]) for entry in plugin.history] == [("net.0", "fp16", "xf16")]


def test_monitors_and_report_know_it(tmp_path: Path) -> None:
    underflow, fidelity = UnderflowMonitor(every_n_steps=2), FidelityMonitor(every_n_steps=2)
    fit({"default": "fp32", "net.0": "xf16"}, tmp_path, underflow, fidelity, PrecisionReport(every_n_steps=2))
    assert underflow.latest["net.0"]["format"] == "xf16"
    assert {"fp16", "bf16", "fp8"} <= underflow.latest["net.0"]["what_if"].keys()
    assert "xf16" in underflow.latest["net.3"]["what_if"]
    assert fidelity.latest["layers"]["net.0"]["grad_cosine"] > 0.9

    [rows] = tmp_path.rglob("mixprec.jsonl")
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    described = next(row["run"]["layers"] for row in written if "run" in row)
    assert [layer[4] for layer in described if layer[0] == "net.0"] == ["xf16"]
    content = content_of([read_records(rows.parent)])
    assert "xf16" in content["formats"]
    assert {layer["compute"] for layer in content["runs"][0]["assignment"]} == {"fp32", "xf16"}
    [page] = tmp_path.rglob("*.html")
    assert "xf16" in page.read_text()
