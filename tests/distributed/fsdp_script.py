"""What one of two processes does in test_fsdp.py: trains each case under DDP and under FSDP1."""

import math
import sys
from pathlib import Path

import torch
from fsdp2_script import BY_BLOCK, NORMS, RANK, Moves, ddp, outcome
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from sharded_models import Block, Sharded
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.plugin.fsdp import PerLayerFSDPPrecision


class OnTheCPU(FSDPStrategy):
    """Lightning's strategy wants a GPU; torch's FSDP runs on a CPU that is named to it."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(
            model,
            mixed_precision=self.mixed_precision_config,
            device_id=torch.device("cpu"),
            sharding_strategy=self.sharding_strategy,
            **self.kwargs,
        )


class SpoiledPart(Callback):
    """Makes a gradient overflow in the part of it that the second process holds."""

    def on_after_backward(self, trainer, model):
        if trainer.global_rank == 1 and trainer.fit_loop.epoch_loop.batch_idx == 2:
            next(param.grad for param in model.parameters() if param.grad is not None and param.grad.numel()).fill_(
                math.inf
            )


class SpoiledBatch(Callback):
    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 2:
            batch[0].fill_(float("inf"))


def under_fsdp(**options):
    wrap = ModuleWrapPolicy({Block})
    return OnTheCPU(process_group_backend="gloo", auto_wrap_policy=wrap, **options)


def trained(name, policy, *callbacks, model=None, **options):
    plugin = PerLayerPrecision(policy) if name == "ddp" else PerLayerFSDPPrecision(policy)
    strategy = ddp() if name == "ddp" else under_fsdp()
    return outcome(strategy, plugin, callbacks, model=model, **options)


class Linears(Sharded):
    """Its layers hold nothing but what autocast casts, so that they can be gathered in 16 bits."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def gathered(policy, param_dtype, ignored=(), model=Linears, **options):
    mixed = MixedPrecision(
        param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False, _module_classes_to_ignore=ignored
    )
    plugin = PerLayerFSDPPrecision(policy)
    return under_fsdp(mixed_precision=mixed), plugin, {"model": model, **options}


def main(folder):
    results = {}
    for name in ("ddp", "fsdp"):
        for policy in ("fp32", "bf16", "fp16", NORMS, BY_BLOCK):
            case = policy if isinstance(policy, str) else "norms" if policy is NORMS else "by block"
            results[f"{name} {case}"] = trained(name, policy)
        results[f"{name} spoiled"] = trained(name, "fp16", SpoiledBatch())
        results[f"{name} moved"] = trained(name, "bf16", Moves())
        results[f"{name} clipped"] = trained(name, "fp16", gradient_clip_val=0.05, accumulate_grad_batches=2)
        results[f"{name} linears"] = trained(name, "bf16", model=Linears)
    for policy in ("bf16", "fp16"):
        results[f"spoiled part {policy}"] = trained("fsdp", policy, SpoiledPart())
    strategy, plugin, options = gathered("bf16", torch.bfloat16)
    results["gathered"] = outcome(strategy, plugin, **options)
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
