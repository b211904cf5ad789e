"""What the processes of test_kills.py do: one trains and is killed at every point, one continues from what is left."""

import itertools
import os
import pickle
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileOpener
from interruption.forks import forked
from interruption.runs import BATCHES, EPOCHS, WINDOW, ending, trained

_COUNTS = {
    "on_train_batch_start": BATCHES,
    "on_before_backward": BATCHES,
    "on_after_backward": BATCHES,
    "on_before_optimizer_step": BATCHES // WINDOW,
    "on_train_batch_end": BATCHES,
    "on_save_checkpoint": 2,
}
"""How often each hook is called in an epoch; a checkpoint is saved twice, as last.ckpt, too."""


def _drawn() -> list[tuple[str, int]]:
    draw = random.Random(7)
    return [(hook, draw.randint(count + 1, EPOCHS * count)) for hook, count in _COUNTS.items()]


WRITES = ["half written", "written", "half moved", "moved"]
"""A checkpoint is written to a temporary file, which is then moved; between file systems moving is copying."""

POINTS = {
    f"{what} {number}": (what, number)
    for what, number in [
        *_drawn(),
        ("on_train_batch_end", 3),  # before there is a checkpoint
        ("on_after_backward", BATCHES + 3),  # the first batch of a window
        *(("policy change", number) for number in (1, 2, 3)),
        ("half moved", 1),  # the only checkpoint is cut short
        *zip(WRITES, (3, 4, 4, 3), strict=True),  # number 3 is that of the second epoch, 4 is its last.ckpt
        ("learned policy", 3),
    ]
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Dying(pl.Callback):
    """Kills its process at the n-th call of a hook."""

    def __init__(self, hook: str, number: int) -> None:
        calls = itertools.count(1)
        setattr(self, hook, lambda *_: die() if next(calls) == number else None)


class DyingAfterChange(pl.Callback):
    """Kills its process in the first hook that sees n layers changed."""

    def __init__(self, number: int) -> None:
        for hook in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
            setattr(self, hook, lambda run, *_: die() if len(run.precision_plugin.history) >= number else None)


def die_in_write(moment: str, number: int) -> None:
    """Has the process die in the middle of writing its n-th checkpoint."""
    commits, commit = itertools.count(1), LocalFileOpener.commit

    def dying(self: Any) -> None:
        if next(commits) != number:
            commit(self)
            return
        content = Path(self.temp).read_bytes()
        if moment.startswith("half"):
            Path(self.temp if moment == "half written" else self.path).write_bytes(content[: len(content) // 2])
        if moment == "moved":
            commit(self)
        die()

    LocalFileOpener.commit = dying


def die_in_policy(number: int) -> None:
    """Has the process die while it writes the learned policy for the n-th time."""
    calls, sync = itertools.count(1), os.fsync
    os.fsync = lambda file: die() if next(calls) == number else sync(file)


def train(folder: Path, point: tuple[str, int] | None = None) -> None:
    callbacks = []
    if point is not None:
        what, number = point
        if what in WRITES:
            die_in_write(what, number)
        elif what == "learned policy":
            die_in_policy(number)
        else:
            callbacks = [DyingAfterChange(number) if what == "policy change" else Dying(what, number)]
    finish(folder, callbacks=callbacks)


def finish(folder: Path, **options: Any) -> None:
    pickle_to(folder / "end.pkl", ending(*trained(folder, **options)))


def go_on(folder: Path) -> None:
    """Continues from the newest checkpoint that loads; notes why a newer one did not."""
    refused: dict[str, str] = {}
    for path in sorted((folder / "saved").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            try:
                trained(folder, path)
            except Exception as error:
                refused[path.name] = f"{type(error).__name__}: {error}"
            continue
        finish(folder, ckpt_path=path)
        break
    pickle_to(folder / "refused.pkl", refused)


def pickle_to(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content))


def main(task: str, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    codes: dict[str, int] = {}
    if task == "kill":
        codes["whole"] = forked(partial(train, folder / "whole"), folder / "whole")
    for name in names:
        point = POINTS[name]
        act: Callable[[], None] = partial(go_on, folder / name)
        codes[name] = forked(partial(train, folder / name, point) if task == "kill" else act, folder / name)
    pickle_to(folder / f"{task}.pkl", codes)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
