"""What one of two processes does in test_monitors_ddp.py: trains each case and saves what the monitors saw."""

import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from lightnings import DDPStrategy, pl
from observed_models import trace
from plugin_models import Batches, Call, Task, ours, stock
from torch import distributed, nn
from torch.optim import SGD

from lightning_mixprec import FidelityMonitor, OverflowMonitor, UnderflowMonitor
from lightning_mixprec.evidence.sampled_step import SampledStep

RANK = int(os.environ.get("LOCAL_RANK", 0))
MIXED = {"default": "fp16", "net.1": "c=fp32,o=input", "net.4": "bf16"}


class AllReduced(torch.autograd.Function):
    """The mean over ranks, in forward and in backward: what SyncBatchNorm does, which runs on GPUs alone."""

    @staticmethod
    def forward(ctx, x):
        return _mean(x)

    @staticmethod
    def backward(ctx, gradient):
        return _mean(gradient)


def _mean(x):
    total = x.float().clone()
    distributed.all_reduce(total)
    return (total / distributed.get_world_size()).to(x.dtype)


class Synchronized(nn.Module):
    def forward(self, x):
        return x - AllReduced.apply(x.mean(0, keepdim=True))


class Filled(pl.Callback):
    """A value in the third batch of one process."""

    def __init__(self, rank, value):
        self.rank, self.value = rank, value

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if self.rank == RANK and batch_idx == 2:
            batch[0].fill_(self.value)


class Plain(Task):
    """Nothing is sent but gradients."""

    def __init__(self, net, make_optimizer):
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), make_optimizer)


class Searching(Plain):
    """Its gradients overflow at the first loss scales, on the first process alone."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1000.0 if RANK == 0 else 1.0)


class Small(Plain):
    """A loss so small that a part of its gradients vanishes."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 1e-10


def convnet():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), Synchronized(), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))


def task(kind=Task):
    torch.manual_seed(3)
    return kind(convnet(), partial(SGD, lr=0.05, momentum=0.9))


def options(folder):
    return {
        "strategy": DDPStrategy(process_group_backend="gloo"),
        "devices": 2,
        "default_root_dir": folder,
        "batches": Batches(6, seed=7 + RANK, count=4),
    }


def watched(name, plugin, folder, kind=Task, callbacks=()):
    monitors = [OverflowMonitor(save_batch=True), UnderflowMonitor(1, max_elements=None), FidelityMonitor(1)]
    folder = Path(folder) / name
    seen, keys = [], Call("on_train_batch_end", lambda run, model: seen.append(dict(run.callback_metrics)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trace(lambda: task(kind), plugin, [*callbacks, *monitors, keys], **options(folder))
    return {
        "trace": run,
        "events": monitors[0].events,
        "skipped": monitors[0].skipped_steps,
        "reasons": monitors[0].reasons,
        "underflow": monitors[1].latest,
        "fidelity": monitors[2].latest,
        "metrics": seen,
        "warned": [str(each.message) for each in caught if "step " in str(each.message)],
        "rows": (folder / "mixprec.jsonl").read_text().splitlines() if RANK == 0 else None,
    }


def failing_on_the_second(name, folder):
    """A replay that fails on the second process alone, after its step."""
    compared = SampledStep._compared

    def fails(self, batch):
        result = compared(self, batch)
        if RANK == 1:
            raise KeyError("only here")
        return result

    SampledStep._compared = fails
    try:
        return watched(name, ours("fp16"), folder)
    finally:
        SampledStep._compared = compared


def main(folder):
    results = {
        "alone": {"trace": trace(task, ours(MIXED), **options(folder))},
        "mixed": watched("mixed", ours(MIXED), folder),
        "small": watched("small", ours("fp16"), folder, Small),
        "stock": watched("stock", stock("fp16"), folder),
        "spoiled": watched("spoiled", ours("fp16"), folder, callbacks=[Filled(0, 60000.0)]),
        "elsewhere": watched("elsewhere", ours("fp16"), folder, Plain, [Filled(1, 60000.0)]),
        "broken": watched("broken", ours("fp16"), folder, callbacks=[Filled(1, float("nan"))]),
        "unguarded": watched("unguarded", stock("bf16"), folder, callbacks=[Filled(1, float("nan"))]),
        "searching": watched("searching", ours("fp16"), folder, Searching, [Filled(1, float("nan"))]),
        "failing": failing_on_the_second("failing", folder),
    }
    torch.save(results, os.path.join(folder, f"rank{RANK}.pt"))


if __name__ == "__main__":
    main(sys.argv[1])
