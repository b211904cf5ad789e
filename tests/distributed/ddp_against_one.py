"""What one of two processes does in test_ddp_against_one.py: runs alone on both ranks' data, then together on its own.

The losses are means over a batch, so the mean over the ranks, which DDP takes of gradients, is that of one process on
the batches put together.
"""

import json
import sys
from pathlib import Path

import torch
from ddp_cases import MIXED, RANK, data, gloo, trained
from plugin_models import Call, Task, TwoOptimizers
from torch import nn

from lightning_mixprec import FidelityMonitor, PerLayerPrecision, UnderflowMonitor

POLICIES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "mixed": MIXED}
ALONE = {"strategy": "auto", "devices": 1}
SPOILED = 5


class Taking(Task):
    """Manual optimization: two optimizers take turns, each after two batches whose gradients wait on the rank."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx // 2 % 2]
        steps = batch_idx % 2 == 1
        with optimizer.toggle_model(sync_grad=steps):
            self.manual_backward(super().training_step(batch, batch_idx) / 2)
            if steps:
                self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()

    configure_optimizers = TwoOptimizers.configure_optimizers


class Summed(Task):
    """A loss that is a sum over the rows, each of which then has the same gradient alone and among others."""

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self(batch[0]), batch[1], reduction="sum") * 1e-10
        self.losses.append(loss.detach())
        return loss


STYLES = {
    "automatic": (Task, {}),
    "accumulating": (Task, {"accumulate_grad_batches": 2}),
    "two optimizers": (TwoOptimizers, {}),
    "taking turns": (Taking, {}),
}


def together(spoiled=SPOILED):
    """The batches of both ranks, put together."""
    first, second = (data(rank, 8, spoiled) for rank in range(2))
    first.batches = [
        tuple(torch.cat(parts) for parts in zip(*pair, strict=True))
        for pair in zip(first.batches, second.batches, strict=True)
    ]
    return first


def compared(policy, style, alone):
    """A run in which the scale grows, falls once, and a layer moves."""
    options = {"init_scale": 64, "growth_interval": 2} if "fp16" in str(policy) else "auto"
    plugin = PerLayerPrecision(policy, loss_scaling=options)
    move = Call("on_train_batch_end", lambda run, model: plugin.edit_policy({"net.6": "fp32"}, reason="m"), at=3)
    kind, more = STYLES[style]
    more = more | (ALONE if alone else {"strategy": gloo(find_unused_parameters=kind is Taking)})
    batches = together() if alone else data(count=8, spoiled=SPOILED)
    return trained(plugin, kind, batches, [move] if policy != "fp32" else (), **more)


def measured(folder, alone):
    folder = Path(folder) / f"alone on {RANK}" if alone else Path(folder) / "together"
    monitors = [UnderflowMonitor(100, max_elements=None), FidelityMonitor(100, layers_per_sample=100)]
    plugin = PerLayerPrecision("fp16", loss_scaling=1024)
    batches = together(None) if alone else data(count=8)
    options = {"callbacks": monitors, "default_root_dir": folder, "limit_train_batches": 1, **(ALONE if alone else {})}
    trained(plugin, Summed, batches, **options)
    if RANK:
        return None
    return [json.loads(line) for line in (folder / "mixprec.jsonl").read_text().splitlines()]


def main(folder):
    results = {}
    for alone in (True, False):  # alone first, as long as there are no ranks
        cases = [(name, style) for name in POLICIES for style in STYLES]
        results["alone" if alone else "together"] = {
            f"{name}, {style}": compared(POLICIES[name], style, alone) for name, style in cases
        } | {"rows": measured(folder, alone)}
    torch.save(results, Path(folder) / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
