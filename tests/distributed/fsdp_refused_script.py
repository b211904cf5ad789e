"""What one of two processes does in test_fsdp_refused.py: tries what cannot be, and saves the errors."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from fsdp2_script import RANK, ddp, sharded, train
from fsdp_script import OnTheCPU, gathered, under_fsdp
from lightning.pytorch.callbacks import Callback
from sharded_models import ByHand, Sharded
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_mixprec import MixPrecError, OverflowMonitor, PerLayerPrecision
from lightning_mixprec.plugin.fsdp import PerLayerFSDPPrecision

WIDE_HEAD = {"default": "bf16", "model.2": "fp32"}


class Widens(Callback):
    """Moves a layer away from the format that it is gathered in."""

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        trainer.precision_plugin.edit_policy({"model.2": "fp32"})


def shards_by_himself():
    return Sharded(MixedPrecisionPolicy(torch.bfloat16))


def refused(run, *args, kind=MixPrecError, **options):
    """The line with which a run is refused."""
    try:
        run(*args, **options)
    except kind as error:
        return str(error)
    return None


def gathers(policy, **options):
    strategy, plugin, model = gathered(policy, torch.bfloat16)
    train(strategy, plugin, **model, **options)


def main(folder):
    stored_wide = {"default": "fp32", "model.head": "p=fp64"}
    computed_wide = PerLayerFSDPPrecision({"default": "bf16", "model.head": "fp64"})
    unknown = {"strategy": OnTheCPU(process_group_backend="gloo"), "accelerator": "cpu", "devices": 2}
    errors = {
        "fsdp2 own policy": refused(train, sharded(), PerLayerPrecision("fp32"), model=shards_by_himself),
        "fsdp2 stored": refused(train, sharded(), PerLayerPrecision(stored_wide)),
        "fsdp1 gathered wrong": refused(gathers, WIDE_HEAD),
        "fsdp1 gathered and moved": refused(gathers, "bf16", callbacks=[Widens()]),
        "fsdp1 plain plugin": refused(pl.Trainer, kind=TypeError, plugins=PerLayerPrecision("bf16"), **unknown),
        "fsdp1 under ddp": refused(train, ddp(), PerLayerFSDPPrecision("bf16")),
        "fsdp1 fp64": refused(train, under_fsdp(), computed_wide),
        "fsdp1 by hand": refused(train, under_fsdp(), PerLayerFSDPPrecision("fp16"), model=ByHand),
        "fsdp1 watched": refused(train, under_fsdp(), PerLayerFSDPPrecision("fp16"), [OverflowMonitor()]),
    }
    torch.save(errors, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
