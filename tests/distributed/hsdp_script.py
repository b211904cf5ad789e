"""What one of four processes does in test_hsdp.py: trains on a mesh that replicates and shards, watched or not."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from fsdp2_script import RANK, whole
from lightning.pytorch.strategies import ModelParallelStrategy
from plugin_models import Batches
from sharded_models import Sharded
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from lightning_mixprec import FidelityMonitor, PerLayerPrecision, UnderflowMonitor
from lightning_mixprec.numerics.exponents import histogram
from lightning_mixprec.numerics.rates import headroom


class Replicated(Sharded):
    """Shards over two ranks, and each half over two others."""

    def configure_model(self):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        self.trainer.precision_plugin.fully_shard(self, [*self.model.blocks, self.model], mesh=mesh)


def trained(monitors, steps):
    torch.manual_seed(3)
    model = Replicated()
    strategy = ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=4,
        plugins=PerLayerPrecision("bf16", emulate=False),
        callbacks=monitors,
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Batches(6, seed=7 + RANK))
    return {"losses": model.losses, "weights": [whole(param) for param in model.parameters()]}


def by_hand():
    """The cosine and the headroom of the head's gradient, averaged over all ranks, in the first step."""
    gradients = []
    for enabled in (True, False):
        torch.manual_seed(3)
        model = Sharded().model
        batch = Batches(6, seed=7 + RANK).batches[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.mse_loss(model(batch[0]), batch[1])
        loss.backward()
        flat = torch.cat([param.grad.flatten() for param in model.head.parameters()])
        distributed.all_reduce(flat)
        gradients.append(flat.double() / 4)
    cosine = F.cosine_similarity(*gradients, dim=0).item()
    return [cosine, headroom(histogram(gradients[1]), "bf16", direction="backward")]


def main(folder):
    results = {"plain": trained([], 2), "watched": trained([UnderflowMonitor(1), FidelityMonitor(1)], 2)}
    monitors = [UnderflowMonitor(1, max_elements=10**6), FidelityMonitor(1)]
    trained(monitors, 1)
    head = monitors[1].latest["layers"]["model.head"], monitors[0].latest["model.head"]
    results["told"] = [head[0]["grad_cosine"], head[1]["headroom_bits"]]
    results["by hand"] = by_hand()
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
