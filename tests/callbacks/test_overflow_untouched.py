"""A diagnosis changes nothing of the run by one bit: runs with and without the monitor end alike."""

import copy
import math
import random
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
import torchmetrics
from known_results import Batches, stock, trainer_of
from lightnings import pl
from monitor_models import Memory, batches, watch
from selection import slow_cases_but_for
from torch import nn

from lightning_mixprec import PerLayerPrecision


class Busy(pl.LightningModule):
    """Does in its training_step whatever could give a replay away."""

    def __init__(self, fused=False):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 2)
        )
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self.mae = torchmetrics.MeanAbsoluteError()
        self.all_of_it = torchmetrics.CatMetric(nan_strategy="disable")
        self.losses, self.recent, self.seen = [], deque(maxlen=3), {"count": 0, "nested": {"keys": []}}
        self.count, self.best, self.names, self.shadow = 0, math.inf, set(), torch.zeros(8)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.shadows = {name: param.detach().clone() for name, param in self.net.named_parameters()}
        self.fused, self.draws = fused, []

    def training_step(self, batch, batch_idx):
        x = batch.pop("x")
        x.add_(0.25)
        batch["used"] = True
        self.draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
        out = self.net(x)
        loss = out.float().square().mean()
        self.mae.update(out.detach().float(), torch.zeros(len(x), 2))
        self.all_of_it(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(x))
        self.log_dict({"mae": self.mae, "count": float(self.count)}, on_step=False, on_epoch=True, batch_size=4)
        self.logger.experiment.append(loss.item())
        for logger in self.loggers:
            logger.log_metrics({"by_hand": loss.item()})
        self.print(f"step {self.count}")
        self.losses.append(loss.detach())
        self.recent.append(batch_idx)
        self.names.add(batch_idx % 3)
        self.seen["count"] += 1
        self.seen["nested"]["keys"].append(batch_idx)
        self.count, self.best = self.count + 1, min(self.best, loss.item())
        self.new = {"batch": batch_idx}
        self.steps += 1
        self.shadow.mul_(0.5).add_(out.detach().float().sum().nan_to_num(0, 0, 0))
        for average, weight in zip(self.average.parameters(), self.net.parameters(), strict=True):
            average.lerp_(weight.detach(), 0.25)
        for name, weight in self.net.named_parameters():
            self.shadows[name].lerp_(weight.detach(), 0.25)
        return {"loss": loss, "out": out}

    def configure_optimizers(self):
        # Torch's fused SGD keeps momentum that nothing was written to if its first step is skipped.
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.0 if self.fused else 0.9, fused=self.fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}


def schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)


class BusyByHand(Busy):
    """The same with two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.second = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            if "x" in batch:
                self.manual_backward(super().training_step(batch, batch_idx)["loss"])
            else:
                self.manual_backward(self.second(batch["z"]).float().mean())
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.lr_schedulers().step()

    def configure_optimizers(self):
        first = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        return [first, torch.optim.Adam(self.second.parameters(), lr=0.01)], [schedule(first)]


def data():
    values = [{"x": x, "z": x[:2], "name": "b"} for x in batches(10)]
    values[4]["x"][0, 0] = math.nan
    values[6]["x"] *= 1e6
    values[9]["z"] *= 1e6
    return values


def everything(model, trainer, logger, values):
    """All that a run leaves behind."""
    attributes = {
        name: {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
        for name, module in model.named_modules()
    }
    grads = {name: None if param.grad is None else param.grad for name, param in model.named_parameters()}
    return {
        "batches": values,
        "weights": dict(model.state_dict()),
        "grads": grads,
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "scale": trainer.precision_plugin.state_dict(),
        "metrics": {key: value for key, value in trainer.callback_metrics.items() if not key.startswith("mixprec/")},
        "rows": [(step, row) for step, row in logger.rows if not any(key.startswith("mixprec/") for key in row)],
        "experiment": logger.experiment,
        "attributes": attributes,
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
        "global_step": trainer.global_step,
    }


def alike(a, b):
    """Bitwise, and NaN equals NaN."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=1.25e30), b.nan_to_num(nan=1.25e30))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple, deque)):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float) and a != a:
        return b != b
    return a == b if not isinstance(a, (nn.Module, torchmetrics.Metric)) and not callable(a) else type(a) is type(b)


def differences(a, b, path=""):
    """Where two such structures differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{path}/{key}")]
    return [] if alike(a, b) else [path]


def run(make, make_plugin, monitored, capsys, **options):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model, logger, values = make(), Memory(), data()
    options = {"logger": logger, "log_every_n_steps": 1, **options}
    if monitored:
        seen = watch(model, make_plugin(), values, **options)
        trainer, monitor = seen.trainer, seen.monitor
    else:
        trainer, monitor = trainer_of(make_plugin(), **options), None
        trainer.fit(model, Batches(values))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    return {**everything(model, trainer, logger, values), "printed": printed}, monitor


PLUGINS = {
    "fp16": lambda: PerLayerPrecision({"default": "fp16", "net.1": "c=fp32,o=input"}),
    "bf16": lambda: PerLayerPrecision("bf16"),
    "stock fp16": stock,
    "stock bf16": partial(stock, "bf16-mixed"),
    "stock fp32": partial(stock, "32-true"),
}
CASES = {
    "automatic": (Busy, "fp16", {}),
    "fused": (partial(Busy, fused=True), "fp16", {}),
    "accumulating": (Busy, "fp16", {"accumulate_grad_batches": 2}),
    "clipping": (Busy, "fp16", {"gradient_clip_val": 0.5}),
    "by hand": (BusyByHand, "fp16", {}),
    "bf16": (Busy, "bf16", {}),
    "stock fp16": (Busy, "stock fp16", {}),
    "stock fp16, fused": (partial(Busy, fused=True), "stock fp16", {}),
    "stock fp16, accumulating": (Busy, "stock fp16", {"accumulate_grad_batches": 2}),
    "stock fp16, by hand": (BusyByHand, "stock fp16", {}),
    "stock bf16": (Busy, "stock bf16", {}),
    "stock fp32": (Busy, "stock fp32", {}),
}
QUICK = {"automatic", "fused", "accumulating", "by hand", "stock fp16"}


# Lightning's own plugin moves the schedule when a step is skipped, the first one too.
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@pytest.mark.parametrize(("make", "plugin", "options"), slow_cases_but_for(QUICK, CASES))
def test_nothing_changes_by_one_bit(make, plugin, options, capsys):
    plain, _ = run(make, PLUGINS[plugin], False, capsys, **options)
    watched, monitor = run(make, PLUGINS[plugin], True, capsys, **options)
    assert monitor.reasons["data"] == 1
    assert len(monitor.events) >= (2 if "fp16" in plugin else 1)
    assert differences(plain, watched) == []
