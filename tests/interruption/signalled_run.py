"""What the process of test_signals.py does: runs that get a signal in the middle of an epoch, ours and Lightning's."""

import os
import pickle
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from interruption.forks import forked
from interruption.runs import BATCHES, ending, trained, watchers
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from plugin_models import Call

from lightning_mixprec import PerLayerPrecision

SIGNALS = ["SIGTERM", "SIGINT"]
AT = BATCHES + 3
"""The batch of the signal, from 0 on: in the second epoch, after the moves; the second one of a window."""


class Noting(pl.Callback):
    """Writes down how the run ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, what: str, run: pl.Trainer) -> None:
        with self.path.open("a") as file:
            file.write(f"{what}: batch {run.fit_loop.epoch_loop.total_batch_idx}, step {run.global_step}\n")

    def on_train_batch_end(self, run: pl.Trainer, *_: Any) -> None:
        self.note("batch ends", run)

    def on_exception(self, run: pl.Trainer, model: pl.LightningModule, exception: BaseException) -> None:
        self.note(f"{type(exception).__name__} {run.state.status}", run)

    def on_train_end(self, run: pl.Trainer, model: pl.LightningModule) -> None:
        self.note("training ends", run)

    def teardown(self, run: pl.Trainer, model: pl.LightningModule, stage: str) -> None:
        self.note("teardown", run)


def plugin(kind: str) -> Any:
    if kind == "stock":
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    return PerLayerPrecision("fp16", loss_scaling={"init_scale": 1024.0})


def train(folder: Path, kind: str, name: str | None) -> None:
    send = Call("on_train_batch_start", lambda *_: os.kill(os.getpid(), getattr(signal, name)) if name else None, at=AT)
    callbacks = [] if kind == "stock" else watchers()
    saving = OnExceptionCheckpoint(folder)
    callbacks += [Noting(folder / "notes.txt"), send, saving]
    model, run = trained(folder, plugin=plugin(kind), callbacks=callbacks, watching=())
    (folder / "end.pkl").write_bytes(pickle.dumps(ending(model, run)))


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    codes = {"whole": forked(partial(train, folder / "whole", "ours", None), folder / "whole")}
    for kind in ("stock", "ours"):
        for name in names:
            case = f"{kind} {name}"
            codes[case] = forked(partial(train, folder / case, kind, name), folder / case)
    (folder / "codes.pkl").write_bytes(pickle.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
