"""The runs whose state is kept in ``data``: how each is set up, interrupted and gone on with, and what comes of it."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from compatibility.old_models import (
    ByHand,
    Doing,
    Eventful,
    Judged,
    Lessons,
    Line,
    Loud,
    Saving,
    Silent,
    Task,
    constant,
    encoded,
    eventful_batches,
    random_batches,
)
from lightning.pytorch.plugins.precision import MixedPrecision

from lightning_mixprec import (
    AdaptivePrecision,
    FidelityMonitor,
    OverflowMonitor,
    PerLayerPrecision,
    PrecisionReport,
    PrecisionScheduler,
    UnderflowMonitor,
)

DATA = Path(__file__).parent / "data"

RULES = {
    "default": "fp16",
    "rules": [
        {"layers": "parts.head", "compute": "fp32", "output": "input"},
        {"types": ["Gate"], "compute": "bf16"},
        {"layers": "blocks.[1:]", "compute": "fp32", "recurse": False},
    ],
}
SCALING = {"init_scale": 2048.0, "growth_interval": 4, "hysteresis": 3, "max_scale": 8192.0, "at_min": "warn"}
PHASES = [
    {"at": 1, "edit": {"parts.head": "bf16"}},
    {"at": {"event": "plateau", "monitor": "metric", "patience": 2}, "policy": {"default": "bf16", "blocks.0": "fp32"}},
    {"at": {"event": "lr_below", "share": 0.001}, "edit": {"parts.stem": "bf16"}},
    {"at": {"epoch": 4}, "edit": {"blocks.1": "bf16"}},
    {"at": "90%", "policy": "configured"},
]


def stock(**options: Any) -> MixedPrecision:
    """Lightning's own fp16; on the CPU its Trainer would make bf16 of ``precision="16-mixed"``."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **options))


@dataclass(frozen=True)
class Run:
    """A run that is interrupted.

    Attributes:
        plugin: Makes its precision plugin.
        batches: Makes its loader.
        model: Makes its model.
        callbacks: Makes its callbacks.
        batch: The checkpoint is written when this batch ends; None for the end of the epoch.
        epoch: In this epoch.
        saves_first: Whether it is written before the callbacks are told that the batch ended.
        options: Of the Trainer.
        resumed: Makes the plugin that goes on; None for the same.
        is_exact: Whether every machine gives the same bits.
        keeps_rows: Whether the rows that are written after the checkpoint are kept, too.
    """

    plugin: Callable[[], Any]
    batches: Callable[[], Lessons]
    model: Callable[[], pl.LightningModule] = Line
    callbacks: Callable[[], list[pl.Callback]] = list
    batch: int | None = None
    epoch: int = 0
    saves_first: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    resumed: Callable[[], Any] | None = None
    is_exact: bool = True
    keeps_rows: bool = False


def moves() -> list[pl.Callback]:
    """Changes of the policy, with evidence and without."""
    evidence = {"looked_at": ["blocks.0"], "rate": 0.25, "nested": {"steps": 3, "known": True, "why": None}}
    return [
        Doing(
            {
                0: lambda plugin: plugin.edit_policy({"blocks.0": "bf16"}, "by hand", evidence),
                3: lambda plugin: plugin.edit_policy({"parts.stem": "c=bf16,o=fp32", "blocks.1": "fp16"}),
                8: lambda plugin: plugin.set_policy("fp16", "back to fp16", {"loss": 1.5}),
            }
        )
    ]


LOUD = 64.0
"""A batch whose gradient, at a scale of 2048, is beyond fp16; at 512 it is not."""


def scaled(batch: int) -> Run:
    """A run under rules, with moves, skipped steps and hysteresis, interrupted after a batch."""
    values = (1.0, 0.5, LOUD, LOUD, 1.0, 2.0, 0.25, LOUD, 1.0, LOUD, LOUD, 0.5)
    plugin = lambda: PerLayerPrecision(RULES, loss_scaling=SCALING)  # noqa: E731
    return Run(plugin, lambda: constant(*values), callbacks=moves, batch=batch)


def watchers() -> list[pl.Callback]:
    """All monitors that work under any plugin."""
    return [
        OverflowMonitor(window=8),
        UnderflowMonitor(every_n_steps=3, max_elements=64),
        FidelityMonitor(every_n_steps=3, layers_per_sample=4, max_loss_gap=0.01),
        PrecisionReport(every_n_steps=3),
    ]


def events(count: int = 14) -> Lessons:
    """Batches that give an event of each verdict, in the part of a run before the checkpoint and in the one after."""
    return eventful_batches(count, {4: 2.0**20, 8: 2.0**140, 12: 2.0**20}, infinite=6)


def everybody() -> list[pl.Callback]:
    """All callbacks."""
    waits = {"at": {"event": "plateau", "monitor": "train_loss", "patience": 2}, "policy": "bf16"}
    return [
        PrecisionScheduler([{"at": 12, "edit": {"starved": "fp32"}}, waits]),
        OverflowMonitor(window=16),
        UnderflowMonitor(every_n_steps=10),
        FidelityMonitor(every_n_steps=10, layers_per_sample=6),
        PrecisionReport(every_n_steps=10),
        AdaptivePrecision(every_n_steps=8, dwell_steps=100),
    ]


def every_event() -> Lessons:
    """Batches for all callbacks: a spike that comes back, one that fp32 cannot hold, one that is not finite itself."""
    spikes = dict.fromkeys((24, 26, 38), 2.0**20)
    return eventful_batches(44, {**spikes, 16: 2.0**140}, infinite=22)


def adaptive(**options: Any) -> Callable[[], list[pl.Callback]]:
    """The controller."""
    return lambda: [AdaptivePrecision(**options)]


RUNS = {
    "scaled_after_skip": scaled(3),
    "scaled_between": scaled(6),
    "two_optimizers": Run(
        lambda: PerLayerPrecision("fp16", loss_scaling={"init_scale": 4096.0, "growth_interval": 2}),
        lambda: constant(1.0, LOUD, 0.5, 1.0, LOUD, 0.25),
        ByHand,
        batch=1,
    ),
    "uniform_bf16": Run(
        lambda: PerLayerPrecision("bf16"), lambda: constant(1.0, 0.5, 2.0, math.inf, 1.0, 4.0), batch=3
    ),
    "auto": Run(lambda: PerLayerPrecision("auto"), lambda: constant(1.0, 0.5, 2.0, 0.25), batch=1),
    "fp32_unguarded": Run(
        lambda: PerLayerPrecision("fp32", skip_nonfinite=False), lambda: constant(1.0, 0.5, 2.0, 0.25), batch=1
    ),
    "scheduled": Run(
        lambda: PerLayerPrecision("fp32"),
        lambda: constant(1.0, 0.5, 2.0, 0.25),
        Judged,
        lambda: [PrecisionScheduler(PHASES)],
        epoch=3,
        options={"max_epochs": 7},
        is_exact=False,
    ),
    "stock": Run(
        lambda: stock(init_scale=2048.0, growth_interval=3),
        lambda: constant(1.0, LOUD, 0.5, 1.0, 2.0, 1.0, LOUD, 0.25),
        batch=3,
        resumed=lambda: PerLayerPrecision("fp16", loss_scaling={"growth_interval": 3}),
    ),
    "promoted": Run(
        lambda: PerLayerPrecision("fp16"),
        lambda: Lessons(random_batches(10)),
        lambda: Task(Loud()),
        adaptive(),
        batch=5,
        is_exact=False,
    ),
    "pending": Run(
        lambda: PerLayerPrecision("fp16"),
        lambda: Lessons(random_batches(8)),
        lambda: Task(Loud()),
        adaptive(),
        batch=1,
        saves_first=True,
        is_exact=False,
    ),
    "to_and_fro": Run(
        lambda: PerLayerPrecision("fp16"),
        lambda: encoded(16, lambda number: 4 <= number < 11),
        lambda: Task(Silent(), 3e-2),
        adaptive(every_n_steps=1, dwell_steps=2),
        batch=4,
        is_exact=False,
    ),
    "undoing": Run(
        lambda: PerLayerPrecision("fp16"),
        lambda: encoded(8),
        lambda: Task(Silent(is_solved=True), 1e-3),
        adaptive(),
        batch=0,
        is_exact=False,
    ),
    "advised": Run(
        lambda: PerLayerPrecision("fp16"),
        lambda: Lessons(random_batches(6)),
        lambda: Task(Loud()),
        adaptive(mode="advise"),
        batch=3,
        is_exact=False,
    ),
    "watched": Run(
        lambda: PerLayerPrecision("fp16", loss_scaling={"init_scale": 2.0**19}),
        events,
        Eventful,
        watchers,
        batch=9,
        is_exact=False,
    ),
    "everybody": Run(
        lambda: PerLayerPrecision("fp16", loss_scaling={"init_scale": 2.0**19}),
        every_event,
        lambda: Eventful(cannot_widen=30),
        everybody,
        batch=34,
        is_exact=False,
        keeps_rows=True,
    ),
    "watched_stock": Run(lambda: stock(init_scale=2.0**19), events, Eventful, watchers, batch=9, is_exact=False),
}


def trainer_of(plugin: Any, callbacks: Sequence[pl.Callback], folder: Path, **options: Any) -> pl.Trainer:
    """A Trainer on the CPU that writes its files into a folder."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(plugins=plugin, callbacks=[*callbacks], default_root_dir=folder, **(quiet | options))


def fit(run: Run, plugin: Any, callbacks: Sequence[pl.Callback], folder: Path, path: Path | None = None) -> Any:
    """Trains, from the start or from a checkpoint; the model and the Trainer."""
    torch.manual_seed(0)
    model = run.model()
    trainer = trainer_of(plugin, callbacks, folder, **run.options)
    validation = [constant(1.0)] if isinstance(model, Judged) else []
    trainer.fit(model, run.batches(), *validation, ckpt_path=path)
    return model, trainer


def write(run: Run, path: Path, folder: Path) -> None:
    """Trains the whole run, and saves its checkpoint on the way; files of the run go into the folder."""
    saving = Saving(path, run.batch, run.epoch)
    callbacks = [saving, *run.callbacks()] if run.saves_first else [*run.callbacks(), saving]
    fit(run, run.plugin(), callbacks, folder)


def resume(run: Run, path: Path, folder: Path, *more: pl.Callback) -> dict[str, Any]:
    """Goes on from a checkpoint to the end; what came of it, in JSON's types."""
    plugin, callbacks = (run.resumed or run.plugin)(), run.callbacks()
    model, trainer = fit(run, plugin, [*more[:1], *callbacks, *more[1:]], folder, path)
    told = outcome(model, trainer, plugin, callbacks)
    return told | {"rows": rows_of(folder)} if run.keeps_rows else told


def outcome(model: Any, trainer: pl.Trainer, plugin: Any, callbacks: Sequence[pl.Callback]) -> dict[str, Any]:
    """What a run came to."""
    told = {
        "global_step": trainer.global_step,
        "losses": model.losses,
        "formats": getattr(model, "formats", []),
        "weights": {name: value.flatten().tolist() for name, value in model.state_dict().items()},
        "rates": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
        "callbacks": {type(callback).__name__: without_copy(callback.state_dict()) for callback in callbacks},
    }
    if isinstance(plugin, PerLayerPrecision):
        told["plugin"] = {
            "policy": plugin.policy.to_dict(),
            "history": plugin.history,
            "scaler": plugin.scaler.state_dict(),
            "scale": plugin.scaler.get_scale(),
            "skipped_steps": plugin.skipped_steps,
        }
    else:
        told["plugin"] = plugin.state_dict()
    return told


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What the callbacks of a run wrote into its file of rows."""
    path = folder / "mixprec.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def without_copy(state: dict[str, Any]) -> dict[str, Any]:
    """A callback's state without the controller's copy of weights, which is of tensors."""
    if "steered" not in state:
        return state
    return {**state, "steered": {key: value for key, value in state["steered"].items() if key != "copy"}}


def expected(name: str) -> dict[str, Any]:
    """What the run came to under 0.1.0."""
    return json.loads((DATA / f"{name}.json").read_text())
