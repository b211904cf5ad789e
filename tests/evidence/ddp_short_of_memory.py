"""What one of two processes does in test_short_of_memory.py: one runs out of memory between the messages of a step."""

import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from ddp_monitors import Synchronized
from diary import Diary
from lightnings import DDPStrategy
from plugin_models import Batches, Task, fit, ours
from torch import nn
from torch.optim import SGD

from lightning_mixprec import AdaptivePrecision, FidelityMonitor, OverflowMonitor, UnderflowMonitor

RANK, BACKEND = int(os.environ.get("LOCAL_RANK", 0)), os.environ.get("MIXPREC_TEST_BACKEND", "gloo")
SEEN = Diary()


class Short(nn.Module):
    """Runs out of memory on the second process, in replays of more rows than it has memory for."""

    def __init__(self, most, error):
        super().__init__()
        self.most, self.error, self.is_replayed = most, error, False

    def forward(self, x):
        if self.is_replayed:
            SEEN.append(len(x))
            if RANK == 1 and len(x) > self.most:
                raise self.error
        return x


class Spiky(nn.Module):
    """Leaves the range of fp16, and comes back."""

    def forward(self, x):
        return x * 1e6 / 1e6


class Replayed(Task):
    """Tells its layers whether they are replayed."""

    def training_step(self, batch, batch_idx):
        for module in self.modules():
            if isinstance(module, Short):
                module.is_replayed = "log" in vars(self)  # a replay replaces it
        return super().training_step(batch, batch_idx)


def net(messages, most, error, inner=nn.Identity):
    """Messages before and after the layer that runs out of memory, or none."""
    between = [Synchronized(), Short(most, error), Synchronized()] if messages else [Short(most, error)]
    return nn.Sequential(nn.Linear(6, 8), *between, inner(), nn.Linear(8, 2))


def case(name, folder, monitors, **options):
    SEEN.clear()
    torch.manual_seed(3)
    folder = Path(folder) / name
    trainer = {
        "strategy": DDPStrategy(process_group_backend=BACKEND),
        "accelerator": "cuda" if BACKEND == "nccl" else "cpu",
        "devices": 2,
        "default_root_dir": folder,
        "batches": Batches(6, seed=7 + RANK, count=4),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(Replayed(net(**options), partial(SGD, lr=0.05)), ours("fp16"), callbacks=monitors, **trainer)
    rows = (folder / "mixprec.jsonl").read_text().splitlines() if RANK == 0 else []
    return {
        "sizes": list(SEEN),
        "steps": run.global_step,
        "said": [
            str(each.message) for each in caught if "memory" in str(each.message) or "teacher" in str(each.message)
        ],
        "rows": [json.loads(row) for row in rows],
        "events": [dict(event) for each in monitors for event in getattr(each, "events", ())],
    }


def main(folder):
    memory, other = torch.OutOfMemoryError("CUDA out of memory."), KeyError("teacher")
    sampled = lambda: [FidelityMonitor(2), UnderflowMonitor(2)]  # noqa: E731
    results = {
        "half fits": case("half fits", folder, sampled(), messages=True, most=2, error=memory),
        "nothing fits": case("nothing fits", folder, sampled(), messages=True, most=0, error=memory),
        "fails": case("fails", folder, sampled(), messages=True, most=2, error=other),
        "no messages": case("no messages", folder, sampled(), messages=False, most=2, error=memory),
        "judged": case("judged", folder, [OverflowMonitor()], messages=True, most=2, error=memory, inner=Spiky),
        "tried": case("tried", folder, [AdaptivePrecision(every_n_steps=2)], messages=True, most=0, error=memory),
    }
    torch.save(results, os.path.join(folder, f"rank{RANK}.pt"))


if __name__ == "__main__":
    main(sys.argv[1])
