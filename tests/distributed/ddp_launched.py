"""One script that Lightning makes two processes of: by spawning, by forking, or by running it once more.

Started by itself it goes through all three; a process that has a rank already does its part of one run and ends.
"""

import os
import sys
from pathlib import Path

import torch
from ddp_cases import MIXED, data, told
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from plugin_models import Task, ours, snapshot, task, trainer

from lightning_mixprec import OverflowMonitor

HAS_RANK = "LOCAL_RANK" in os.environ


class Loading(Task):
    """Loads each rank's own batches once the rank is known; the first rank's third one overflows."""

    def train_dataloader(self):
        return data(rank=self.global_rank, spoiled=2)


class Moving(Callback):
    def on_train_batch_end(self, run, model, outputs, batch, batch_idx):
        if batch_idx == 1:
            run.precision_plugin.edit_policy({"net.6": "fp32"}, reason="m")


class Saving(Callback):
    """Saves what a rank knows when training ends."""

    def __init__(self, folder, name):
        self.path = Path(folder) / name

    def on_train_end(self, run, model):
        plugin = run.precision_plugin
        result = {
            "losses": torch.stack(model.losses).nan_to_num(nan=-1.0),
            "weights": [param.detach().clone() for param in model.parameters()],
            "scale": plugin.scaler.get_scale(),
            "step": run.global_step,
            **told(plugin),
        }
        torch.save(result, f"{self.path}-rank{run.global_rank}.pt")


def launched(folder, name, strategy):
    model, plugin, monitor = task(Loading), ours(MIXED), OverflowMonitor()
    before = snapshot(model)
    callbacks = [Moving(), monitor, Saving(folder, name)]
    options = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False, "default_root_dir": folder}
    run = trainer(plugin, callbacks=callbacks, **options)
    run.fit(model)
    return {
        "weights": [param.detach().clone() for param in model.parameters()],
        "left": [key for key, value in snapshot(model).items() if key and value != before[key]],  # DDP leaves one on ""
        "metrics": {key: value.item() for key, value in run.callback_metrics.items()},
        "events": monitor.events,
        "scale": plugin.scaler.get_scale(),
        "policy": plugin.policy.to_dict(),
        "plugin": plugin,
        **told(plugin),
    }


def alone_again(result):
    """The same plugin object, in a run of this process alone."""
    model, plugin = task(Loading), result.pop("plugin")
    trainer(plugin).fit(model)
    return result | {"again": (plugin.skipped_steps, torch.stack(model.losses))}


def main(folder):
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launched(folder, "torchrun", DDPStrategy(process_group_backend="gloo"))
        torch.save(None, Path(folder) / f"rank{os.environ['LOCAL_RANK']}.pt")  # what saved_by_two waits for
        return
    parents = {}
    if not HAS_RANK:
        for name, strategy in {"spawn": "ddp_spawn", "fork": DDPStrategy(start_method="fork")}.items():
            parents[name] = alone_again(launched(folder, name, strategy))
    result = launched(folder, "script", "ddp")
    result.pop("plugin")
    if not HAS_RANK:
        torch.save(parents | {"script": result}, Path(folder) / "parents.pt")


if __name__ == "__main__":
    main(sys.argv[1])
