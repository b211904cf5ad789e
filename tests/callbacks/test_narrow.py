"""Runs whose layers compute products in 8 bits: trained, watched, moved, scheduled, evaluated and resumed."""

import json
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from lightnings import CSVLogger, pl
from plugin_models import MOMENTUM, Batches, Call, Evaluable, Task, fit, save, trainer
from torch import nn

from lightning_mixprec import (
    AdaptivePrecision,
    FidelityMonitor,
    OverflowMonitor,
    PerLayerPrecision,
    PrecisionReport,
    UnderflowMonitor,
)
from lightning_mixprec.callbacks.scheduler import PrecisionScheduler
from lightning_mixprec.errors import PolicyError

pytestmark = pytest.mark.filterwarnings("ignore:Products in", "ignore:The policy computes in bf16")

FORMATS = ["fp8", "int8"]
NARROW = {"fp8": {"default": "bf16", "net.2": "fp8"}, "int8": {"default": "bf16", "net.2": "int8"}}


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 2))


def trained(policy: Any, *callbacks: pl.Callback, kind: type[Task] = Task, **options: Any) -> Any:
    model, plugin = kind(net(), MOMENTUM), PerLayerPrecision(policy)
    fit(model, plugin, Batches(6, count=8), callbacks=list(callbacks), **options)
    return model, plugin


def numbers(model: Task) -> list[torch.Tensor]:
    return [*model.losses, *(param.detach() for param in model.parameters())]


def same(one: Task, other: Task) -> bool:
    return all(map(torch.equal, numbers(one), numbers(other)))


# The run


@pytest.mark.parametrize("format", FORMATS)
def test_it_trains_near_bf16_and_otherwise(format: str) -> None:
    narrow, plugin = trained(NARROW[format])
    wide, _ = trained("bf16")
    assert not same(narrow, wide)
    assert float(sum(narrow.losses)) == pytest.approx(float(sum(wide.losses)), rel=0.03)
    assert plugin.scaler.get_scale() == 1, "an operand has a scale of its own, so the loss needs none"


def test_in_fp16_the_loss_is_scaled_as_ever() -> None:
    _, plugin = trained({"default": "fp16", "net.2": "fp8"})
    assert plugin.scaler.get_scale() > 1


def test_a_device_without_such_products_is_said_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained({"default": "bf16", "net": "fp8"})
    told = [str(each.message) for each in caught if "emulated" in str(each.message)]
    assert len(told) == 1
    assert told[0].startswith("Products in fp8 are emulated on the CPU (CPUs have no fp8 arithmetic")


@pytest.mark.parametrize("format", FORMATS)
def test_a_gradient_that_is_not_finite_skips_the_step(format: str) -> None:
    class Spoiled(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 2 else loss

    model, plugin = trained(NARROW[format], kind=Spoiled)
    assert all(param.isfinite().all() for param in model.parameters())
    assert plugin.skipped_steps == 1


@pytest.mark.parametrize("format", FORMATS)
def test_an_edit_leads_to_bf16_and_back(format: str) -> None:
    def edit(value: str) -> Any:
        return lambda run, model: run.precision_plugin.edit_policy({"net.2": value}, reason="test")

    moves = [Call("on_train_batch_start", edit("bf16"), at=3), Call("on_train_batch_start", edit(format), at=6)]
    model, plugin = trained(NARROW[format], *moves)
    told = [(entry["step"], entry["layer"], entry["from"], entry["to"]) for entry in plugin.history]
    assert told == [(3, "net.2", format, "bf16"), (6, "net.2", "bf16", format)]
    assert all(loss.isfinite() for loss in model.losses)


def test_a_schedule_leads_to_fp8_and_back_to_bf16() -> None:
    """As the NVFP4 report asks for it: 8 bits in the middle, bf16 before the learning rate decays."""
    phases = [{"at": {"step": 2}, "edit": {"net.2": "c=fp8,s=row"}}, {"at": {"step": 6}, "edit": {"net.2": "bf16"}}]
    model, plugin = trained("bf16", PrecisionScheduler(phases))
    assert [(entry["step"], entry["to"]) for entry in plugin.history] == [(2, "fp8"), (6, "bf16")]
    by_hand, _ = trained(
        "bf16",
        Call("on_train_batch_start", lambda run, _: run.precision_plugin.edit_policy({"net.2": "c=fp8,s=row"}), at=2),
        Call("on_train_batch_start", lambda run, _: run.precision_plugin.edit_policy({"net.2": "bf16"}), at=6),
    )
    assert same(model, by_hand)


@pytest.mark.parametrize("format", FORMATS)
def test_evaluation_may_have_it_alone(format: str) -> None:
    def validated(eval_policy: Any) -> Evaluable:
        model = Evaluable(net())
        plugin = PerLayerPrecision("bf16", eval_policy=eval_policy)
        trainer(plugin).fit(model, Batches(6), Batches(6, seed=1))
        return model

    narrow, wide = validated(NARROW[format]), validated(None)
    assert same(narrow, wide)
    assert not all(map(torch.equal, narrow.eval_losses, wide.eval_losses))
    assert torch.allclose(torch.stack(narrow.eval_losses), torch.stack(wide.eval_losses), rtol=0.1)


@pytest.mark.parametrize("policy", [{"default": "bf16", "net.2": "c=fp8,s=row,g=input"}, NARROW["int8"]], ids=FORMATS)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(policy: Any) -> None:
    whole, _ = trained(policy, max_epochs=2)
    trained(policy, save("first.ckpt"), max_epochs=1)
    resumed, plugin = Task(net(), MOMENTUM), PerLayerPrecision(policy)
    trainer(plugin, max_epochs=2).fit(resumed, Batches(6, count=8), ckpt_path="first.ckpt", weights_only=False)
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))


# Monitors


@pytest.mark.parametrize("format", FORMATS)
def test_monitors_change_not_one_bit(format: str, tmp_path: Path) -> None:
    watching = [
        UnderflowMonitor(every_n_steps=2),
        FidelityMonitor(every_n_steps=2),
        OverflowMonitor(),
        PrecisionReport(every_n_steps=2),
    ]
    watched, _ = trained(NARROW[format], *watching, logger=CSVLogger(tmp_path))
    unwatched, _ = trained(NARROW[format])
    assert same(watched, unwatched)
    [rows] = tmp_path.rglob("mixprec.jsonl")
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    [page] = tmp_path.rglob("*.html")
    assert format in page.read_text()
    described = next(row["run"]["layers"] for row in written if "run" in row)
    assert [layer[4] for layer in described if layer[0] == "net.2"] == [format]
    assert watching[1].latest["layers"]["net.2"]["grad_cosine"] > 0.9


CAST = {"e4m3": (448.0, ml_dtypes.float8_e4m3fn), "e5m2": (57344.0, ml_dtypes.float8_e5m2), "int8": (127.0, None)}


def vanishing(matrix: torch.Tensor, format: str, per_row: bool) -> float:
    """The share of a matrix that a cast after scaling turns to zero, by NumPy and ml_dtypes."""
    wide, (most, dtype) = matrix.detach().double().numpy(), CAST[format]
    scaled = wide / (np.abs(wide).max(1 if per_row else None, keepdims=True) / most)
    cast = np.rint(scaled) if dtype is None else scaled.astype(np.float32).astype(dtype).astype(np.float64)
    return float(((cast == 0) & (wide != 0)).sum() / (wide != 0).sum())


class Spread(nn.Module):
    """Multiplies what comes by constants that are spread widely, and its gradient as well."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.register_buffer("factors", torch.exp(width * torch.randn(32, generator=torch.Generator().manual_seed(1))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factors


@pytest.mark.filterwarnings("ignore:.*vanish in")
@pytest.mark.parametrize("said", ["fp8", "c=fp8,s=row", "int8", "c=int8,g=all"])
def test_rows_tell_what_vanishes_of_each_operand_after_scaling(said: str) -> None:
    model, monitor = Task(net()), UnderflowMonitor(1000, max_elements=None)
    model.net[1], model.net[3] = Spread(5.0), Spread(7.0)
    nn.init.normal_(model.net[2].weight[:, :4].detach(), std=1000.0)
    weight = model.net[2].weight.detach().clone()
    x, y = Batches(6).batches[0]
    given = model.net[1](model.net[0](x))
    output = model.net[2](given)
    output.retain_grad()
    nn.functional.mse_loss(model.net[4](model.net[3](output)), y).backward()
    model.zero_grad()
    fit(model, PerLayerPrecision({"default": "bf16", "net.2": said}), Batches(6, count=1), callbacks=[monitor])

    format, per_row = ("int8", True) if "int8" in said else ("fp8", "s=row" in said)
    forward, backward = ("int8", "int8") if format == "int8" else ("e4m3", "e5m2")
    expected = {"input": vanishing(given, forward, per_row), "weight": vanishing(weight, forward, per_row)}
    if said != "int8":
        expected["gradient"] = vanishing(output.grad, backward, per_row)
    told = dict(monitor.latest["net.2"]["operands"])
    assert told.pop("format") == format
    assert told.pop("scaling") == ("row" if per_row else "tensor")
    assert told == pytest.approx(expected, abs=1e-3)
    assert max(expected.values()) > 0.05, "or the test shows nothing"
    assert "operands" not in monitor.latest["net.0"]
    assert monitor.latest["net.2"]["format"] == "bf16"


def test_operands_that_vanish_are_warned_of_once() -> None:
    model, monitor = Task(net()), UnderflowMonitor(1)
    model.net[1] = Spread(12.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, PerLayerPrecision(NARROW["fp8"]), Batches(6), callbacks=[monitor])
    told = [str(each.message) for each in caught if "vanish in fp8" in str(each.message)]
    assert len(told) == 1
    assert (
        "of the input of layer 'net.2' vanish in fp8, scaled by its largest; scale it by row (scaling: row)" in told[0]
    )


@pytest.mark.parametrize("format", FORMATS)
def test_adaptive_precision_promotes_to_bf16(format: str) -> None:
    """A weight that is multiplied by zero alone is so large that 8 bits with its scale lose all the others."""

    class Mask(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (torch.arange(32) > 0)

    plugin, model = PerLayerPrecision({"default": "bf16", "net.2": format}), Task(net(), MOMENTUM)
    model.net[1] = Mask()
    nn.init.constant_(model.net[2].weight[:, 0].detach(), 1e7)
    fit(model, plugin, Batches(6, count=8), callbacks=[AdaptivePrecision(every_n_steps=2)])
    assert [(entry["layer"], entry["from"], entry["to"]) for entry in plugin.history] == [("net.2", format, "bf16")]


def test_overflow_in_the_16_bits_around_is_told_as_theirs(tmp_path: Path) -> None:
    model = Task(net())
    with torch.no_grad():
        model.net[2].weight.mul_(1e7)
    monitor = OverflowMonitor()
    plugin = PerLayerPrecision({"default": "fp16", "net.2": "fp8"}, loss_scaling=1.0)
    with pytest.warns(UserWarning, match="overflows in fp16"):
        fit(model, plugin, Batches(6, count=1), callbacks=[monitor])
    [event] = monitor.events
    assert (event["verdict"], event["layer"], event["format"], event["fits"]) == ("precision", "net.2", "fp16", "bf16")


def test_a_policy_that_covers_no_linear_layer_ends_the_run_before_it_begins() -> None:
    with pytest.raises(PolicyError, match="covers GELU, and fp8 is for products of nn.Linear alone"):
        trained({"default": "bf16", "net.1": "fp8"})
