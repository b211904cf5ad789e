"""What one process does in test_tensor_parallel.py: trains with split layers, watched or not, sharded beside it or not.

Of two processes each holds halves of the blocks' layers; of four the two halves of the ranks have batches of their own
and shard over each other, too.
"""

import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from fsdp2_script import whole
from lightning.pytorch.strategies import ModelParallelStrategy
from plugin_models import Batches
from sharded_models import Hot, Sharded, Split, SplitAndSharded
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional as F

from lightning_mixprec import AdaptivePrecision, FidelityMonitor, OverflowMonitor, PerLayerPrecision, UnderflowMonitor
from lightning_mixprec.numerics.exponents import histogram
from lightning_mixprec.numerics.rates import headroom

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
REPLICAS = RANKS // 2
MINE = RANK // 2  # the batch of this rank and of the one that has the other halves
LAYERS = ["model.stem", "model.head", *(f"model.blocks.{n}.{part}" for n in (0, 1) for part in ("norm", "up", "down"))]


class Spread(Split if REPLICAS == 1 else SplitAndSharded):
    """Its blocks' layers are split over two ranks."""


class HotSpread(Spread, Hot):
    """One layer of the first block overflows in fp16."""


class InSequence(Sharded):
    """Norms work on parts of the sequence, so that the gradients of their weights are summands on each rank."""

    def configure_model(self):
        for block in self.model.blocks:
            plan = {"norm": SequenceParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, self.device_mesh["tensor_parallel"], plan)

    def loss(self, batch):
        return in_sequence(self, batch)


def in_sequence(module, batch):
    """The loss of a batch as sequences of four."""
    x = module.model.stem(batch[0][None])
    for block in module.model.blocks:
        if (mesh := getattr(block.norm.weight, "device_mesh", None)) is not None:
            normed = block.norm(DTensor.from_local(x, mesh, [Replicate()], run_check=False)).full_tensor()
        else:
            normed = block.norm(x)
        x = x + block.down(F.gelu(block.up(normed)))
    return F.mse_loss(module.model.head(x)[0], batch[1])


def trained(model, policy, monitors=(), **options):
    torch.manual_seed(3)
    module, plugin = model(), PerLayerPrecision(policy, emulate=False)
    strategy = ModelParallelStrategy(data_parallel_size=REPLICAS, tensor_parallel_size=2, process_group_backend="gloo")
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=RANKS,
        plugins=plugin,
        callbacks=[*monitors],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_steps": 2} | options,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, Batches(6, seed=7 + MINE))
    return {
        "losses": module.losses,
        "weights": [whole(param) for param in module.parameters()],
        "history": plugin.history,
        "said": [str(each.message) for each in caught if "could not" in str(each.message)],
    }


def both_ways(model, policy):
    plain = trained(model, policy)
    monitors = [OverflowMonitor(), UnderflowMonitor(1), FidelityMonitor(1)]
    return {"plain": plain, "watched": trained(model, policy, monitors)}


class Fidelity(FidelityMonitor):
    """Keeps how large the layers' gradients are, too."""

    def _take_in(self, trainer, found):
        super()._take_in(trainer, found)
        self.shares = {layer: each.share for layer, each in found.agreement.layers.items()}
        self.title = self._summary()[0]


def told(model):
    """What monitors say of the first step's gradients of weights."""
    monitors = [UnderflowMonitor(1, max_elements=10**6), Fidelity(1)]
    trained(model, "bf16", monitors, max_steps=1)
    lost, seen, shares = monitors[0].latest, monitors[1].latest["layers"], monitors[1].shares
    of_layers = {
        layer: {"headroom": lost[layer]["headroom_bits"], "share": shares[layer]} | seen[layer] for layer in LAYERS
    }
    return of_layers | {"summary": monitors[1].title}


def by_hand(loss_of):
    """The same of the whole model, its gradients averaged over the batches."""
    gradients = []
    for enabled in (True, False):
        torch.manual_seed(3)
        module = Sharded()
        batch = Batches(6, seed=7 + MINE).batches[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(module, batch)
        loss.backward()
        of_layers = {
            layer: torch.cat([param.grad.flatten() for param in module.get_submodule(layer).parameters()]).double()
            for layer in LAYERS
        }
        for gradient in of_layers.values():
            distributed.all_reduce(gradient)
            gradient /= RANKS
        gradients.append(of_layers)
    low, wide = gradients
    largest = max(gradient.norm() for gradient in wide.values())
    return {
        layer: {
            "headroom": headroom(histogram(gradient.float()), "bf16", direction="backward"),
            "grad_cosine": F.cosine_similarity(low[layer], gradient, dim=0).item(),
            "share": (gradient.norm() / largest).item(),
        }
        for layer, gradient in wide.items()
    }


def adapted(model):
    adaptive, monitors = AdaptivePrecision(), [OverflowMonitor(), FidelityMonitor(2)]
    found = trained(model, "fp16", [adaptive, *monitors], max_steps=6)
    return found | {"decisions": adaptive.decisions, "events": monitors[0].events}


def main(folder):
    results = {
        "bf16": both_ways(Spread, "bf16"),
        "mixed": both_ways(Spread, {"default": "fp16", "model.blocks.*.norm": "c=fp32,o=input"}),
        "told": told(Spread),
        "by hand": by_hand(lambda module, batch: F.mse_loss(module.model(batch[0]), batch[1])),
        "adapted": adapted(HotSpread),
    }
    if REPLICAS == 1:
        results["in sequence"] = both_ways(InSequence, "bf16")
        results["told in sequence"] = told(InSequence)
        results["by hand in sequence"] = by_hand(in_sequence)
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
