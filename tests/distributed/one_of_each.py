"""What one of two processes does in test_one_of_each.py: a case of every suite that needs two, and what came of it."""

import sys
from pathlib import Path

import torch
from callbacks import ddp_adaptive, ddp_scheduler
from fsdp2_script import NORMS, RANK, outcome, sharded
from fsdp_script import Moves, SpoiledBatch, trained
from plugin import ddp_script
from plugin_models import Task, ours, stock

from lightning_mixprec import PerLayerPrecision, UnderflowRate

NUMBERS = torch.logspace(-9, 0, 40).view(2, 20)
"""What each process counts: on the first most of it vanishes in fp16, on the second nothing does."""


def counted():
    metric = UnderflowRate("fp16")
    metric.update(NUMBERS[RANK])
    return metric.compute()


def main(folder):
    steps = [{"at": 1, "policy": "bf16"}, {"at": "50%", "policy": "fp32"}]
    results = {
        "stock": ddp_script.train(stock("fp16")),
        "ours": ddp_script.train(ours("fp16")),
        "spoiled": ddp_script.train(ours(ddp_script.MIXED), [ddp_script.Spoiled()]),
        "scheduled": ddp_scheduler.scheduled(Task, steps, folder),
        "adapted": ddp_adaptive.run("adapted", folder, ddp_adaptive.Spiked, ddp_adaptive.lessons()),
        "ddp": trained("ddp", "fp16", SpoiledBatch()),
        "fsdp": trained("fsdp", "fp16", SpoiledBatch()),
        "ddp norms": trained("ddp", NORMS, Moves()),
        "fsdp2 norms": outcome(sharded(), PerLayerPrecision(NORMS), [Moves()]),
        "underflow": counted(),
    }
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
