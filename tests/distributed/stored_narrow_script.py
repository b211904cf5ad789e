"""What one of two processes does in test_stored_narrow.py: trains weights in 16 bits under DDP, on the same batches."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from narrow_runs import CASES, trained


def main(folder):
    weights = [trained(case, strategy=DDPStrategy(process_group_backend="gloo"), devices=2) for case in CASES]
    torch.save(weights, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
