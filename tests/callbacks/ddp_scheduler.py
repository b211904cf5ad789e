"""What one of two processes does in test_scheduler_ddp.py: what the ranks see differs, what they do may not."""

import os
import sys
from pathlib import Path

import torch
from lightnings import DDPStrategy
from plugin_models import Batches, Task, fit, task
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.callbacks.scheduler import PrecisionScheduler

RANK = int(os.environ.get("LOCAL_RANK", 0))
PLATEAU = {"event": "plateau", "monitor": "metric", "patience": 2}


class Judged(Task):
    """A metric that each rank logs for itself: on the first it is flat from the first epoch on, on the second never."""

    def training_step(self, batch, batch_idx):
        self.log("metric", 1.0 if RANK == 0 else -float(self.current_epoch), on_step=False, on_epoch=True, batch_size=4)
        return super().training_step(batch, batch_idx)


class OnlyTheFirst(Task):
    """A metric that exists on the first rank alone."""

    def training_step(self, batch, batch_idx):
        self.log("metric", 1.0, on_step=False, on_epoch=True, batch_size=4, rank_zero_only=True)
        return super().training_step(batch, batch_idx)


class Slowing(Judged):
    """Its learning rate falls on the first rank alone."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "metric"}}


def scheduled(kind, phases, folder):
    model, plugin, scheduler = task(kind), PerLayerPrecision("fp32"), PrecisionScheduler(phases)
    options = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, "default_root_dir": folder}
    fit(model, plugin, Batches(6, seed=7 + RANK, count=2), callbacks=[scheduler], max_epochs=5, **options)
    return {"came": scheduler.came, "history": plugin.history, "state": scheduler.state_dict()}


def main(folder):
    results = {
        "timed": scheduled(Task, [{"at": 1, "policy": "bf16"}, {"at": "50%", "policy": "fp32"}], folder),
        "plateau": scheduled(Judged, [{"at": PLATEAU, "policy": "bf16"}], folder),
        "first": scheduled(OnlyTheFirst, [{"at": PLATEAU, "policy": "bf16"}], folder),
        "rate": scheduled(Slowing, [{"at": {"event": "lr_below", "share": 0.5}, "policy": "fp16"}], folder),
    }
    torch.save(results, Path(folder) / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
