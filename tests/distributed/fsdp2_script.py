"""What one of two processes does in test_fsdp2.py: trains each case, sharded or not, and saves what came out of it."""

import math
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from plugin_models import Batches
from sharded_models import ByHand, Recomputing, Sharded, Split, SplitAndSharded
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lightning_mixprec import (
    AdaptivePrecision,
    FidelityMonitor,
    OverflowMonitor,
    PerLayerPrecision,
    UnderflowMonitor,
)

RANK = int(os.environ["LOCAL_RANK"])
NORMS = {"default": "fp16", "model.blocks.*.norm": "c=fp32,o=input"}
BY_BLOCK = {"default": "bf16", "model.blocks.1": "fp32", "model.head": "fp32"}


class Spoiled(Callback):
    """Makes the third batch overflow on the second process alone."""

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 2:
            batch[0].fill_(float("inf"))


class SpoiledShard(Callback):
    """Makes a gradient overflow in the part of it that the second process holds."""

    def on_after_backward(self, trainer, model):
        if trainer.global_rank == 1 and trainer.fit_loop.epoch_loop.batch_idx == 2:
            model.model.head.bias.grad.to_local().fill_(math.inf)


class Moves(Callback):
    """Moves a block away from the format that it is gathered in, and back."""

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if batch_idx == 1:
            trainer.precision_plugin.edit_policy({"model.blocks.0": "fp32"})
        if batch_idx == 3:
            trainer.precision_plugin.edit_policy({"model.blocks.0": "bf16"})


def sharded():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


def split():
    return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2, process_group_backend="gloo")


def ddp():
    return DDPStrategy(process_group_backend="gloo")


def train(strategy, plugin, callbacks=(), model=None, seed=3, resume=None, shared=False, **options):
    torch.manual_seed(seed)
    model = model() if model is not None else Sharded()
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False} | options
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        plugins=plugin,
        callbacks=[*callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    data = Batches(6, seed=7 + (0 if shared else RANK))
    trainer.fit(model, data, data, ckpt_path=resume)
    return trainer, model


def outcome(strategy, plugin, *args, **options):
    trainer, model = train(strategy, plugin, *args, **options)
    return {
        "losses": model.losses,
        "evaluated": model.evaluated,
        "weights": weights(trainer, model),
        "step": trainer.global_step,
        "skipped": plugin.skipped_steps,
        "scale": plugin.scaler.get_scale(),
        "history": plugin.history,
        "seen": [sorted(block.formats) for block in getattr(model.model, "blocks", ())],
        "stored": {str(param.dtype) for param in model.parameters()},
        "own forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
    }


def weights(trainer, model):
    root = trainer.strategy.model
    summoned = isinstance(root, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(root) if summoned else nullcontext():
        return [whole(param) for param in model.parameters()]


def whole(tensor):
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def watched(folder, strategy, model):
    """A run with monitors and the controller."""
    monitors = [OverflowMonitor(), UnderflowMonitor(every_n_steps=2), FidelityMonitor(every_n_steps=2)]
    adaptive = AdaptivePrecision()
    plugin = PerLayerPrecision("fp16")
    callbacks = [adaptive, *monitors]
    found = outcome(
        strategy, plugin, callbacks, model=model, max_epochs=8, default_root_dir=folder, num_sanity_val_steps=0
    )
    found["decisions"] = adaptive.decisions
    found["underflow"] = monitors[1].latest
    found["fidelity"] = monitors[2].latest
    found["events"] = monitors[0].events
    return found


def warned_of(strategy, model):
    """What is said of nothing being sharded, and how the weights are spread."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, model = train(strategy, PerLayerPrecision("bf16"), model=model, shared=True)
    said = [str(each.message) for each in caught if "shards nothing" in str(each.message)]
    return {"said": said, "spread": {isinstance(param, DTensor) for param in model.parameters()}}


def resumed(folder):
    """A run in one piece, and one that is saved sharded in the middle and goes on with another plugin object."""
    options = {"callbacks": [Moves()], "num_sanity_val_steps": 0}
    first, _ = train(sharded(), PerLayerPrecision("bf16"), **options)
    first.save_checkpoint(folder / "half")
    plugin = PerLayerPrecision("bf16")
    found = outcome(sharded(), plugin, resume=folder / "half", max_epochs=4, **options)
    straight = outcome(sharded(), PerLayerPrecision("bf16"), max_epochs=4, **options)
    scaled, _ = train(sharded(), PerLayerPrecision("fp16"), [Spoiled()], num_sanity_val_steps=0)
    scaled.save_checkpoint(folder / "scaled")
    again = PerLayerPrecision("fp16")
    train(sharded(), again, resume=folder / "scaled", max_epochs=2, num_sanity_val_steps=0)
    return {"resumed": found, "straight": straight, "scale": again.scaler.get_scale(), "skipped": again.skipped_steps}


def main(folder):
    results = {}
    for name, strategy in (("ddp", ddp), ("fsdp2", sharded)):
        for policy in ("fp32", "bf16", "fp16", NORMS, BY_BLOCK):
            case = policy if isinstance(policy, str) else "norms" if policy is NORMS else "by block"
            results[f"{name} {case}"] = outcome(strategy(), PerLayerPrecision(policy))
        results[f"{name} emulated"] = outcome(strategy(), PerLayerPrecision(BY_BLOCK, emulate=True))
        results[f"{name} spoiled fp16"] = outcome(strategy(), PerLayerPrecision("fp16"), [Spoiled()])
        results[f"{name} spoiled bf16"] = outcome(strategy(), PerLayerPrecision("bf16"), [Spoiled()])
        results[f"{name} moved"] = outcome(strategy(), PerLayerPrecision("bf16"), [Moves()])
        results[f"{name} eval"] = outcome(strategy(), PerLayerPrecision("bf16", eval_policy="fp32"))
        results[f"{name} accumulated"] = outcome(
            strategy(), PerLayerPrecision("fp16"), accumulate_grad_batches=2, gradient_clip_val=0.5
        )
        results[f"{name} by hand"] = outcome(strategy(), PerLayerPrecision(NORMS), model=ByHand)
        results[f"{name} fused"] = outcome(
            strategy(), PerLayerPrecision("fp16"), [Spoiled()], model=lambda: Sharded(optimizer=fused)
        )
        results[f"{name} recomputed"] = outcome(strategy(), PerLayerPrecision(NORMS), [Moves()], model=Recomputing)
    for policy in ("bf16", "fp16"):
        results[f"spoiled shard {policy}"] = outcome(sharded(), PerLayerPrecision(policy), [SpoiledShard()])
    results["resume"] = resumed(folder)
    for name, strategy in (("ddp", ddp), ("split", split)):
        plugin = PerLayerPrecision(NORMS)
        results[f"{name} shared"] = outcome(strategy(), plugin, model=Split, shared=True)
    for name, strategy, model in (
        ("whole copies", ModelParallelStrategy(process_group_backend="gloo"), Sharded),
        ("split and sharded", split(), SplitAndSharded),
        ("halves", sharded(), Sharded),
    ):
        results[name] = warned_of(strategy, model)
    results |= {
        "own policy fits": outcome(
            sharded(), PerLayerPrecision("bf16"), model=lambda: Sharded(MixedPrecisionPolicy(torch.bfloat16))
        ),
        "plain fully_shard": outcome(
            sharded(), PerLayerPrecision("bf16"), model=lambda: Sharded(MixedPrecisionPolicy())
        ),
    }
    assert all(math.isfinite(loss) for loss in results["fsdp2 fp16"]["losses"])
    torch.save(results, folder / f"rank{RANK}.pt")


def fused(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
