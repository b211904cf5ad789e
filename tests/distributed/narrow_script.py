"""What one of two processes does in test_narrow.py: trains with products in 8 bits under DDP and FSDP2, saves it."""

import sys
import warnings
from pathlib import Path

import torch
from fsdp2_script import RANK, Spoiled, ddp, outcome, sharded

from lightning_mixprec import PerLayerPrecision, UnderflowMonitor

POLICIES = {
    "fp8": {"default": "bf16", "model.blocks": "fp8"},
    "fp8 by row": {"default": "bf16", "model.blocks.1": "c=fp8,s=row,g=input"},
    "int8": {"default": "fp16", "model.blocks": "c=int8,g=all"},
}


def main(folder: Path) -> None:
    results = {}
    for name, strategy in (("ddp", ddp), ("fsdp2", sharded)):
        for case, policy in POLICIES.items():
            monitor = UnderflowMonitor(every_n_steps=2)
            results[f"{name} {case}"] = outcome(strategy(), PerLayerPrecision(policy), [monitor])
            results[f"{name} {case}"]["latest"] = monitor.latest
            results[f"{name} {case} unwatched"] = outcome(strategy(), PerLayerPrecision(policy))
            results[f"{name} {case} spoiled"] = outcome(strategy(), PerLayerPrecision(policy), [Spoiled()])
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(Path(sys.argv[1]))
