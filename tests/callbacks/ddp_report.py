"""What one of two processes does in test_report_ddp.py: trains with a report, one batch of the second being NaN."""

import os
import sys
import warnings
from pathlib import Path

import torch
from lightnings import DDPStrategy, pl
from plugin_models import Batches, fit, ours, task

from lightning_mixprec import OverflowMonitor, PrecisionReport

RANK = int(os.environ.get("LOCAL_RANK", 0))


class Spoiled(pl.Callback):
    """The third batch of the second process."""

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if RANK == 1 and batch_idx == 2:
            batch[0].fill_(float("nan"))


def main(folder):
    model, plugin = task(), ours("fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            model,
            plugin,
            Batches(6, seed=7 + RANK, count=4),
            callbacks=[PrecisionReport(every_n_steps=2), OverflowMonitor(), Spoiled()],
            strategy=DDPStrategy(process_group_backend="gloo"),
            devices=2,
            default_root_dir=folder,
        )
    told = {"losses": torch.stack(model.losses), "skipped": plugin.skipped_steps}
    torch.save(told, Path(folder) / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
