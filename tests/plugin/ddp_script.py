"""What one of two processes does in test_plugin_ddp.py: trains each case and saves what came out of it."""

import os
import sys
from functools import partial

import torch
from lightnings import Callback, DDPStrategy, pl
from plugin_models import Batches, Task, TwoOptimizers, ours, stock
from torch import nn
from torch.optim import SGD

from lightning_mixprec import MixPrecError, PerLayerPrecision

MIXED = {"default": "bf16", "net.0": "fp16", "net.1": "c=fp32,o=input", "net.5": "fp32"}


class Spoiled(Callback):
    """Makes the third batch overflow on the first process alone, whose buffers DDP hands on to the other."""

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if trainer.global_rank == 0 and batch_idx == 2:
            batch[0].fill_(float("inf"))


class MovesALayer(Callback):
    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if batch_idx == 1:
            trainer.precision_plugin.edit_policy({"net.3": "fp32"})


def convnet():
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    )  # fmt: skip


def train(plugin, callbacks=(), task=Task, **options):
    torch.manual_seed(3)
    model = task(convnet(), partial(SGD, lr=0.05, momentum=0.9))
    rank = int(os.environ["LOCAL_RANK"])
    trainer = pl.Trainer(
        strategy=DDPStrategy(process_group_backend="gloo"),
        accelerator="cpu",
        devices=2,
        plugins=plugin,
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=2,
        **options,
    )
    trainer.fit(model, Batches(6, seed=7 + rank))
    result = {
        "losses": model.losses,
        "weights": [param.detach().clone() for param in model.parameters()],
        "buffers": [buffer.clone() for buffer in model.buffers()],
        "step": trainer.global_step,
        "own forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
    }
    if isinstance(plugin, PerLayerPrecision):
        result |= {
            "skipped": plugin.skipped_steps,
            "scale": plugin.scaler.get_scale(),
            "history": plugin.history,
            "formats": {name: layer.compute for name, layer in plugin.assignment.items()},
        }
    return result


def refused(*args, **options):
    try:
        train(*args, **options)
    except MixPrecError as error:
        return {"error": str(error)}
    return {"error": None}


def main(folder):
    results = {f"stock {format}": train(stock(format)) for format in ("fp32", "bf16", "fp16")}
    results |= {f"ours {format}": train(ours(format)) for format in ("fp32", "bf16", "fp16")}
    results["mixed"] = train(ours(MIXED))
    results["mixed, accumulating"] = train(ours(MIXED), accumulate_grad_batches=2)
    results["mixed, two optimizers"] = train(ours(MIXED), task=TwoOptimizers)
    results["fp16, spoiled"] = train(ours("fp16"), [Spoiled()])
    results["bf16, spoiled"] = train(ours("bf16"), [Spoiled()])
    results["mixed, spoiled"] = train(ours(MIXED), [Spoiled()])
    results["moved"] = train(ours(MIXED), [MovesALayer()])
    results["refused"] = refused(ours({"default": "bf16", "net.55": "fp32"}))
    torch.save(results, os.path.join(folder, f"rank{os.environ['LOCAL_RANK']}.pt"))


if __name__ == "__main__":
    main(sys.argv[1])
