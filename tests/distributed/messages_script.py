"""What one of several processes does in test_messages.py: counts what is sent in each batch, and its bytes."""

import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from lightnings import DDPStrategy, pl
from plugin_models import Batches, Task, ours, trainer
from torch import distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mixprec import FidelityMonitor, OverflowMonitor, PrecisionReport, UnderflowMonitor

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
EVERY, BATCHES = 2, 3


class Sent(TorchDispatchMode):
    """Notes the messages that are sent from Python; the gradients that DDP sends from C++ are not among them."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            size = sum(tensor.numel() * tensor.itemsize for tensor in _tensors(args))
            self.messages.append((func._opname, size))
        return func(*args, **(kwargs or {}))


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, (list, tuple)) else []


class PerBatch(pl.Callback):
    """The messages of each batch; the first callback."""

    def __init__(self):
        self.batches, self.sent = [], None

    def on_train_batch_start(self, run, model, batch, batch_idx):
        self._end()
        self.sent = Sent()
        self.sent.__enter__()

    def on_train_end(self, run, model):
        self._end()

    def _end(self):
        if self.sent is not None:
            self.sent.__exit__(None, None, None)
            self.batches.append(self.sent.messages)
            self.sent = None


def messages(layers, monitors, folder):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)), nn.Linear(6, 2))
    counted = PerBatch()
    run = trainer(
        ours("bf16"),
        callbacks=[counted, *monitors],
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=RANKS,
        default_root_dir=folder,
    )
    run.fit(Task(net, partial(torch.optim.SGD, lr=1e-3)), Batches(6, seed=7 + RANK, count=BATCHES))
    return counted.batches


def watching(max_layers):
    fidelity = FidelityMonitor(EVERY, layers_per_sample=1, max_layers=max_layers)
    others = [kind(EVERY, max_layers=max_layers) for kind in (UnderflowMonitor, PrecisionReport)]
    return [OverflowMonitor(), fidelity, *others]


def main(folder):
    warnings.simplefilter("ignore")
    results = {}
    for layers in (12, 36):
        results[layers] = {
            "alone": messages(layers, [], folder / f"alone {layers}"),
            "watched": messages(layers, watching(8), folder / f"watched {layers}"),
            "all": messages(layers, watching(None), folder / f"all {layers}"),
        }
    torch.save(results, folder / f"rank{RANK}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
