"""Measure what a sampled step takes in memory on each rank, above an ordinary one, of a model that FSDP2 shards.

    python examples/benchmarks/sharded_memory.py --output examples/benchmarks/results/sharded_memory-cpu.json

Starts its processes itself (gloo). Bytes of live tensors are counted after each operation, so that neither the machine
nor the allocator is in them. The bound is a rank's share of two sets of gradients, and the largest gathered group, in
fp32. The model is of 1 GiB in fp32 by default: 64 layers of 2048 x 2048 in 32 groups.
"""

import argparse
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from live_bytes import LiveBytes
from measuring import report
from torch import Tensor, nn
from workloads import Repeated

from lightning_mixprec import FidelityMonitor, PerLayerPrecision, UnderflowMonitor

STEPS, EVERY = 4, 2  # the first and the third are sampled, the last is not looked at


class Large(LightningModule):
    """Pairs of linear layers, each pair a group of its own."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        with torch.device("meta"):
            pairs = [nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(2))) for _ in range(groups)]
        self.net = nn.Sequential(*pairs)

    def configure_model(self) -> None:
        """Shard."""
        self.trainer.precision_plugin.fully_shard(self, [*self.net, self.net])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss."""
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that keeps nothing."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Peaks(Callback):
    """The most bytes that were there during each step; the first callback, so that samples fall into it."""

    def __init__(self, live: LiveBytes) -> None:
        self.live, self.of_steps = live, list[int]()

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """End a step, and begin the next one."""
        if batch_idx:
            self.of_steps.append(self.live.peak)
        self.live.peak = 0


def measured(format: str, width: int, groups: int) -> dict[str, Any]:
    """Train a few steps as one of the processes, and tell what they took."""
    torch.manual_seed(0)
    count = int(os.environ["WORLD_SIZE"])
    strategy = ModelParallelStrategy(data_parallel_size=count, tensor_parallel_size=1, process_group_backend="gloo")
    with LiveBytes() as live:
        peaks = Peaks(live)
        trainer = Trainer(
            strategy=strategy, plugins=PerLayerPrecision(format, emulate=False), max_steps=STEPS, logger=False,
            callbacks=[peaks, UnderflowMonitor(EVERY, max_elements=256), FidelityMonitor(EVERY)],
            accelerator="cpu", devices=count, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        module = Large(width, groups)
        trainer.fit(module, Repeated(torch.ones(2, width), STEPS))
    weights = 4 * sum(weight.numel() for weight in module.parameters())
    _, ordinary, sampled = peaks.of_steps
    bound = 2 * weights // count + weights // groups
    return {
        "format": format, "ranks": count, "weights": weights, "largest_group": weights // groups,
        "ordinary_step": ordinary, "sampled_step": sampled, "above": sampled - ordinary, "bound": bound,
        "whole_model_would_be": 3 * weights,
    }  # fmt: skip


def table(lines: list[dict[str, Any]]) -> str:
    """Return the results as text."""
    rows = []
    for line in lines:
        mib = {key: f"{value / 2**20:,.0f} MiB" for key, value in line.items() if isinstance(value, int)}
        within = "within" if line["above"] <= line["bound"] else "ABOVE"
        rows.append(
            f"{line['format']}, {line['ranks']} ranks, model {mib['weights']}: ordinary step {mib['ordinary_step']}, "
            f"sampled {mib['sampled_step']}, {mib['above']} more, {within} the bound of {mib['bound']}"
        )
    return "\n".join(rows)


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="processes")
    parser.add_argument("--width", type=int, default=2048, help="of a layer")
    parser.add_argument("--groups", type=int, default=32, help="of two layers each")
    parser.add_argument("--formats", nargs="+", default=["fp32", "bf16"], help="of the runs")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        raise SystemExit(subprocess.run([*launcher, *sys.argv], env=environment, check=False).returncode)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    options.device = "cpu"
    lines = [measured(format, options.width, options.groups) for format in options.formats]
    if os.environ["RANK"] == "0":
        report(lines, table(lines), options)


if __name__ == "__main__":
    main()
