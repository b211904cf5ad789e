"""What one of two processes does in test_world_size.py: goes on from a checkpoint of one, and writes one of two."""

import os
import sys
from pathlib import Path

import torch
from interruption.runs import ending, trained
from lightning.pytorch.strategies import DDPStrategy


def two():
    """Both processes see the same batches, so that their mean gradient is that of one."""
    return {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results = {"whole": ending(*trained(folder / "two", **two()))}
    results["resumed"] = ending(*trained(folder / "from_one", folder / "one/saved/epoch=1.ckpt", **two()))
    torch.save(results, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
