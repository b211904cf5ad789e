"""What one of two processes does in test_ddp_uneven.py: the ranks are not given the same, or do not do the same.

Every run has a process group of its own, so that one that breaks off leaves the next one alone. A rank that is done
leaves its group, as its process would; one that waits for it in vain gets an error.
"""

import itertools
import sys
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from adaptive_models import send_outcomes
from ddp_cases import RANK, data, gloo
from lightning.pytorch.callbacks import EarlyStopping
from plugin_models import Call, Task, fit, ours, stock, task
from torch import distributed
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from lightning_mixprec import AdaptivePrecision, FidelityMonitor, OverflowMonitor, PrecisionScheduler, UnderflowMonitor

NUMBERS = itertools.count()


def grouped(folder, seconds):
    path = Path(folder) / f"group {next(NUMBERS)}"
    limit = timedelta(seconds=seconds)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=RANK, world_size=2, timeout=limit)


def attempt(folder, plugin, kind=Task, counts=(4, 4), callbacks=(), seconds=15, spoiled=None, batches=None, **options):
    grouped(folder, 120)
    distributed.barrier()
    distributed.destroy_process_group()
    grouped(folder, seconds)
    model, ended, notes = task(kind), None, []
    options = {"strategy": gloo(), "devices": 2, "use_distributed_sampler": False, **options}
    batches = batches or data(count=counts[RANK], spoiled=spoiled)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run = fit(model, plugin, batches, callbacks=[*callbacks], default_root_dir=folder, **options)
            ended = run.global_step
        except Exception as error:
            kind = RuntimeError if isinstance(error, RuntimeError) else type(error)
            ended = f"{kind.__name__}: {error}".splitlines()[0]
            notes = list(getattr(error, "__notes__", []))
    distributed.destroy_process_group()
    return {
        "ended": ended,
        "notes": notes,
        "losses": model.losses,
        "weights": [param.detach().clone() for param in model.parameters()],
        "skipped": getattr(plugin, "skipped_steps", None),
        "history": getattr(plugin, "history", None),
        "warned": [str(each.message) for each in caught],
    }


class Nothing(Task):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if RANK == 1 and batch_idx == 2 else loss


class Raising(Task):
    def training_step(self, batch, batch_idx):
        if RANK == 1 and batch_idx == 2 and torch.is_grad_enabled():
            raise KeyError("only here")
        return super().training_step(batch, batch_idx)


class Stopping(Task):
    """A metric that is as it should be on the first rank alone."""

    def training_step(self, batch, batch_idx):
        self.log("metric", -float(self.current_epoch) if RANK == 0 else 1.0, on_step=False, on_epoch=True, batch_size=4)
        return super().training_step(batch, batch_idx)


class Fused(Task):
    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.05, momentum=0.9, fused=True)


def seven_rows():
    """A loader of which Lightning gives each rank its share; seven rows do not go round evenly."""
    rows = [torch.cat(parts) for parts in zip(*data(rank=0, count=2).batches, strict=True)]
    return DataLoader(TensorDataset(*(part[:7] for part in rows)), batch_size=2)


def stops(run, model):
    if RANK == 1:
        run.should_stop = True


OWN_EPOCHS = {"counts": (6, 3), "max_steps": 6, "max_epochs": -1}
CASES = {
    "limited": lambda: {"counts": (6, 3), "limit_train_batches": 3},
    "padded": lambda: {"batches": seven_rows(), "use_distributed_sampler": True, "max_epochs": 2},
    "own epochs": lambda: {**OWN_EPOCHS},
    "early stopping": lambda: {
        "kind": Stopping,
        "callbacks": [EarlyStopping("metric", patience=1, check_on_train_epoch_end=True)],
        "max_epochs": 6,
    },
    "first longer": lambda: {"counts": (6, 3)},
    "second longer": lambda: {"counts": (3, 6)},
    "nothing": lambda: {"kind": Nothing},
    "raising": lambda: {"kind": Raising},
    "stopping alone": lambda: {"callbacks": [Call("on_train_batch_end", stops, at=1)]},
}


def monitors():
    return [OverflowMonitor(), UnderflowMonitor(2), FidelityMonitor(2)]


def watchers():
    return [*monitors(), AdaptivePrecision(every_n_steps=1)]


WAYS = {
    "stock": (partial(stock, "fp16"), list),
    "ours": (partial(ours, "fp16"), list),
    "watched": (partial(ours, "fp16"), watchers),
}


WHEN = {
    "step": 2,
    "share of steps": "50%",
    "epoch": {"epoch": 1},
    "plateau": {"event": "plateau", "monitor": "metric", "patience": 1},
}


def scheduled(folder, when):
    scheduler = PrecisionScheduler([{"at": when, "policy": "fp32"}])
    return attempt(folder, ours("fp16"), Stopping, callbacks=[scheduler], **OWN_EPOCHS)


def late(folder, callbacks):
    """The CPU stands in for a device, whose outcomes come later; each rank's first epoch ends with an overflow."""
    with pytest.MonkeyPatch.context() as patch:
        send_outcomes(patch)
        return attempt(folder, ours("fp16"), Fused, callbacks=callbacks, spoiled=2, **OWN_EPOCHS)


def main(folder):
    results = {}
    for case, made in CASES.items():
        for way, (plugin, callbacks) in WAYS.items():
            option = made()
            option["callbacks"] = [*option.get("callbacks", []), *callbacks()]
            results[f"{case}, {way}"] = attempt(folder, plugin(), **option)
    for case in ("own epochs", "first longer"):
        results[f"{case}, watched stock"] = attempt(folder, stock("fp16"), callbacks=monitors(), **CASES[case]())
    for name, when in WHEN.items():
        results[f"schedule by {name}"] = scheduled(folder, when)
    results["late, ours"], results["late, watched"] = late(folder, []), late(folder, watchers())
    torch.save(results, Path(folder) / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
