"""What one of two processes does in test_fsdp_scheduled.py: trains with phases under each strategy."""

import sys
from pathlib import Path

import torch
from fsdp2_script import RANK, ddp, outcome, sharded, split, train
from fsdp_script import gathered, under_fsdp
from sharded_models import Sharded, Split

from lightning_mixprec import MixPrecError, PerLayerFSDPPrecision, PerLayerPrecision, PrecisionScheduler

PHASES = [
    {"at": 2, "edit": {"model.blocks.0": "fp32"}},
    {"at": "50%", "policy": "configured"},
    {"at": {"epoch": 2}, "policy": {"default": "fp32", "model.blocks.1": "bf16"}},
]


def scheduled(strategy, plugin, folder, model=Sharded, shared=False):
    scheduler = PrecisionScheduler(PHASES)
    options = {"model": model, "shared": shared, "max_epochs": 3, "default_root_dir": folder}
    found = outcome(strategy, plugin, [scheduler], **options)
    return {**found, "came": scheduler.came}


def refused():
    """The line for a phase in another format than weights are gathered in, and how many steps were taken before."""
    strategy, plugin, options = gathered("bf16", torch.bfloat16)
    model, scheduler = options.pop("model")(), PrecisionScheduler([{"at": 2, "edit": {"model.2": "fp32"}}])
    try:
        train(strategy, plugin, [scheduler], model=lambda: model, **options)
    except MixPrecError as error:
        return str(error), len(model.losses)
    return None


def main(folder):
    results = {
        "ddp": scheduled(ddp(), PerLayerPrecision("bf16"), folder),
        "fsdp1": scheduled(under_fsdp(), PerLayerFSDPPrecision("bf16"), folder),
        "fsdp2": scheduled(sharded(), PerLayerPrecision("bf16"), folder),
        "ddp shared": scheduled(ddp(), PerLayerPrecision("bf16"), folder, Split, shared=True),
        "split": scheduled(split(), PerLayerPrecision("bf16"), folder, Split, shared=True),
        "gathered": refused(),
    }
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
