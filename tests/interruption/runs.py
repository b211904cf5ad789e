"""A run with everything in it that an interruption could lose, what it ends with, and what the two differ in."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from adaptive_models import Encoding, encoded
from lightning.pytorch.callbacks import ModelCheckpoint
from plugin_models import Task, trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from lightning_mixprec import (
    AdaptivePrecision,
    FidelityMonitor,
    OverflowMonitor,
    PerLayerPrecision,
    PrecisionScheduler,
    UnderflowMonitor,
)

BATCHES, EPOCHS, WINDOW = 8, 3, 2
LEARNED = "learned_policy.yaml"


class Lesson(Task):
    """An encoding that fp16 gets wrong from the second epoch on; dropout, running statistics, a decaying rate."""

    def __init__(self) -> None:
        net = [Encoding(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 2)]
        super().__init__(nn.Sequential(*net), partial(torch.optim.Adam, lr=1e-2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.current_epoch > 0 else 1e-3 * x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [[optimizer], [{"scheduler": ExponentialLR(optimizer, 0.95), "interval": "step"}]]


class Seeding(pl.Callback):
    """Random numbers begin anew with each batch, because Lightning's checkpoints do not hold them."""

    def on_train_batch_start(self, run: pl.Trainer, *_: Any) -> None:
        torch.manual_seed(run.fit_loop.epoch_loop.total_batch_idx)


def watchers() -> list[pl.Callback]:
    """Two callbacks that move layers, in the second epoch and in the last one, and three that watch."""
    phases = [{"at": {"epoch": 1}, "edit": {"net.4": "bf16"}}, {"at": "70%", "edit": {"net.1": "fp32"}}]
    moving = [
        PrecisionScheduler(phases),
        AdaptivePrecision(every_n_steps=3, dwell_steps=2, min_low_precision_share=None),
    ]
    return [*moving, OverflowMonitor(), UnderflowMonitor(3), FidelityMonitor(3)]


def scaled(kind: type[PerLayerPrecision] = PerLayerPrecision) -> PerLayerPrecision:
    """With a loss scale that is too large at first and grows again later."""
    return kind("fp16", loss_scaling={"init_scale": 2.0**20, "growth_interval": 3})


def trained(
    folder: Path,
    ckpt_path: Any = None,
    callbacks: Any = (),
    plugin: Any = None,
    watching: Any = None,
    weights_only: bool | None = None,
    **options: Any,
) -> tuple[Lesson, pl.Trainer]:
    """Trains with a checkpoint per epoch in the folder."""
    torch.manual_seed(0)
    model = Lesson()
    saving = ModelCheckpoint(folder / "saved", filename="{epoch}", save_top_k=-1, save_last=True)
    usual = {"default_root_dir": folder, "max_epochs": EPOCHS, "accumulate_grad_batches": WINDOW}
    watching = watchers() if watching is None else watching
    run = trainer(
        scaled() if plugin is None else plugin,
        callbacks=[Seeding(), *watching, *callbacks, saving],
        enable_checkpointing=True,
        **{**usual, **options},
    )
    run.fit(model, encoded(BATCHES), ckpt_path=ckpt_path, weights_only=weights_only)
    return model, run


def ending(model: Lesson, run: pl.Trainer) -> dict[str, Any]:
    """All that a run ends with."""
    plugin: Any = run.precision_plugin
    ours = [each for each in run.callbacks if type(each).__module__.startswith("lightning_mixprec")]
    named = {type(each).__name__: each for each in ours}
    return {
        "losses": model.losses,
        "weights": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "schedules": [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
        "step": run.global_step,
        "scale": plugin.scaler.state_dict(),
        "plugin": plugin.state_dict(),
        "history": plugin.history,
        "skipped": plugin.skipped_steps,
        "formats": {name: layer.compute for name, layer in plugin.assignment.items()},
        "monitors": {name: each.state_dict() for name, each in named.items()},
        "metrics": {key: value for key, value in run.callback_metrics.items() if key.startswith("mixprec/")},
    }


def differences(found: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Where two nested structures differ, bit for bit; NaN is as good as NaN."""
    if type(found) is not type(expected):
        yield path
    elif isinstance(found, Tensor):
        if found.dtype != expected.dtype or not torch.equal(found.nan_to_num(), expected.nan_to_num()):
            yield path
    elif isinstance(found, dict):
        if found.keys() != expected.keys():
            yield f"{path} {sorted(map(str, found.keys() ^ expected.keys()))}"
        for key in found.keys() & expected.keys():
            yield from differences(found[key], expected[key], f"{path}.{key}")
    elif isinstance(found, (list, tuple)):
        if len(found) != len(expected):
            yield f"{path}: {len(found)} instead of {len(expected)}"
        for place, (one, other) in enumerate(zip(found, expected, strict=False)):
            yield from differences(one, other, f"{path}[{place}]")
    elif found != expected and not (found != found and expected != expected):
        yield path
