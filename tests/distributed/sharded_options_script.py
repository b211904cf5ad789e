"""What one of two processes does in test_sharded_options.py: runs under FSDP2's options, with monitors and without."""

import sys
from pathlib import Path

import torch
from fsdp2_script import RANK
from sharded_models import Sharded
from sharded_replay_script import NORMS, both_ways
from torch.distributed.fsdp import CPUOffloadPolicy


class Offloaded(Sharded):
    """Its weights, gradients and optimizer states are on the CPU, and gathered from there."""

    def configure_model(self):
        parts, options = [*self.model.blocks, self.model], {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
        self.trainer.precision_plugin.fully_shard(self, parts, **options)


class Compiled(Sharded):
    """Each of its blocks is compiled by itself, and sharded."""

    def configure_model(self):
        for block in self.model.blocks:
            block.compile(backend="aot_eager")
        super().configure_model()


def main(folder):
    results = {"offloaded": both_ways(NORMS, Offloaded), "compiled": both_ways("bf16", Compiled)}
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
