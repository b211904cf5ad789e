"""What one of the processes does in test_ddp_gpu.py, on a GPU of its own, with NCCL."""

import os
import sys
from pathlib import Path

import torch
from ddp_cases import MIXED, RANK, data, told
from lightning.pytorch.strategies import DDPStrategy
from plugin_models import Task, fit, ours, stock, task
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.optim import SGD

from lightning_mixprec import AdaptivePrecision, FidelityMonitor, OverflowMonitor, UnderflowMonitor


class Fused(Task):
    """Its outcomes stay on the device and come to the host with the next step."""

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.05, momentum=0.9, fused=True)


def watchers():
    return [OverflowMonitor(), UnderflowMonitor(2), FidelityMonitor(2), AdaptivePrecision(every_n_steps=2)]


def trained(plugin, kind=Task, spoiled=None, callbacks=(), folder=None, **options):
    model, watching = task(kind), [*callbacks]
    strategy = DDPStrategy(process_group_backend="nccl", **options)
    run = fit(
        model,
        plugin,
        data(spoiled=spoiled),
        callbacks=watching,
        strategy=strategy,
        accelerator="cuda",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        default_root_dir=folder,
        use_distributed_sampler=False,
        max_epochs=2,
    )
    return {
        "losses": torch.stack(model.losses).float().cpu(),
        "weights": [param.detach().cpu() for param in model.parameters()],
        "step": run.global_step,
        "scale": plugin.scaler.get_scale(),
        "reasons": [each.reasons for each in watching if isinstance(each, OverflowMonitor)],
        "decisions": [each.decisions for each in watching if isinstance(each, AdaptivePrecision)],
        **told(plugin),
    }


def main(folder):
    hooked = {"ddp_comm_hook": default_hooks.fp16_compress_hook}
    results = {
        "stock": trained(stock("fp16", "cuda")),
        "ours": trained(ours("fp16")),
        "mixed": trained(ours(MIXED)),
        "static graph": trained(ours(MIXED), static_graph=True),
        "hooked stock": trained(stock("fp16", "cuda"), **hooked),
        "hooked ours": trained(ours("fp16"), **hooked),
        "spoiled": trained(ours(MIXED), spoiled=2),
        "spoiled, fused": trained(ours(MIXED), Fused, spoiled=2),
        "spoiled, watched": trained(ours(MIXED), spoiled=2, callbacks=watchers(), folder=folder),
        "spoiled, fused and watched": trained(ours(MIXED), Fused, spoiled=2, callbacks=watchers(), folder=folder),
    }
    torch.save(results, Path(folder) / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
