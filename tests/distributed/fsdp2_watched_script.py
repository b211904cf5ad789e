"""What one of two processes does in test_fsdp2.py: runs with monitors and the controller, sharded or not."""

import sys
from pathlib import Path

import torch
from fsdp2_script import RANK, ddp, sharded, watched
from sharded_models import Hot, Steep


def main(folder):
    results = {}
    for name, strategy in (("ddp", ddp), ("fsdp2", sharded)):
        results[f"{name} watched"] = watched(folder / f"{name}{RANK}", strategy(), Hot)
        results[f"{name} searched"] = watched(folder / f"{name} searched{RANK}", strategy(), Steep)
    torch.save(results, folder / f"rank{RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
