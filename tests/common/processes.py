"""Two processes that find each other, started as torchrun starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

COMMON = Path(__file__).parent
SEARCHED = [COMMON.parents[1], COMMON.parent, COMMON]
"""Where a process finds the package, what a folder of tests keeps for itself, and what all share."""


def python_path(*folders):
    """The ``PYTHONPATH`` of a process that a test starts, with further folders in it."""
    return os.pathsep.join(dict.fromkeys(map(str, [*SEARCHED, *folders, os.environ.get("PYTHONPATH", "")])))


def outcomes(processes):
    """Waits until all have ended well; ends them whatever happens."""
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)


def started(arguments, folder, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def saved_by_two(script, folder):
    """What both processes of a script, which is told the folder, saved there as ``rank0.pt`` and ``rank1.pt``."""
    return saved_by(2, script, folder)


def saved_by(count, script, folder):
    """The same of any number of processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outcomes(
        [started([script, folder], folder, **_launched(rank, count, port, script.parent)) for rank in range(count)]
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(count)]


def _launched(rank, count, port, own_folder):
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python_path(own_folder),
    }
