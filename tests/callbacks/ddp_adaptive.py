"""What one of two processes does in test_adaptive_ddp.py: the data differ, what is decided may not."""

import os
import sys
from pathlib import Path

import torch
from adaptive_models import ADAM, Encoding, Lessons, Loud, adapt, phases, planned, silent, solved
from lightnings import DDPStrategy
from plugin_models import Call, Task

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision

RANK = int(os.environ.get("LOCAL_RANK", 0))


class Spiked(Task):
    """Overflows on the second process alone."""

    def __init__(self):
        super().__init__(Loud(1e4), ADAM)
        torch.nn.init.zeros_(self.net.up.bias)

    def forward(self, x):
        return super().forward(x * (100.0 if RANK == 1 else 0.01))


def spoil(run, model):
    if RANK == 1:
        torch.nn.init.constant_(model.net.head.weight, float("nan"))


def lessons(count=12, encoded=False, **options):
    made = Lessons(count, seed=7 + RANK, **options)
    if encoded:
        made.batches = [(x, Encoding()(x)[:, :2]) for x, _ in made.batches]
    return made


def passing():
    """Phases in the thousands in the first batches alone, and on the first process alone."""
    made = lessons(20)
    inputs = [x * (1.0 if RANK == 0 and number < 4 else 1e-3) for number, (x, _) in enumerate(made.batches)]
    made.batches = [(x, Encoding()(x)[:, :2]) for x in inputs]
    return made


def relapsing():
    """Phases next to nothing; in the second half, and on the second process alone, in the thousands."""
    return phases(*((1e-4,) if RANK == 0 else (1e-4, 1.0)), seed=7 + RANK)


def run(name, folder, make, batches, adaptive=None, policy="fp16", callbacks=()):
    folder = Path(folder) / name
    seen = []
    look = Call("on_before_zero_grad", lambda run, model: seen.append(run.precision_plugin.policy.to_dict()))
    options = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, "default_root_dir": folder}
    plugin = PerLayerPrecision(policy, loss_scaling={"init_scale": 1024} if policy == "fp16" else "auto")
    result = adapt(make, adaptive, plugin, [*callbacks, look], batches, use_distributed_sampler=False, **options)
    return {
        "moves": result.moves,
        "decisions": result.adaptive.decisions,
        "history": result.plugin.history,
        "policies": seen,
        "state": {each: result.adaptive.state_dict()["steered"].get(each) for each in ("controller", "demotions")},
        "weights": result.module.state_dict(),
        "skipped": result.plugin.skipped_steps,
        "finite": result.is_finite,
        "rows": (folder / "mixprec.jsonl").read_text().splitlines() if RANK == 0 else None,
        "files": sorted(path.name for path in folder.iterdir()) if RANK == 0 else None,
    }


def main(folder):
    restless = AdaptivePrecision(every_n_steps=1, dwell_steps=3)
    results = {
        "overflow": run("overflow", folder, Spiked, lessons()),
        "one": run("one", folder, silent, passing(), restless),
        "undoing": run("undoing", folder, solved, lessons(encoded=True)),
        "uneven": run("uneven", folder, silent, lessons(encoded=True, size=16 if RANK == 0 else 5)),
        "advice": run("advice", folder, silent, lessons(encoded=True), AdaptivePrecision("advise")),
        "damaged": run(
            "damaged", folder, silent, lessons(encoded=True), AdaptivePrecision(every_n_steps=2), "fp32",
            [Call("on_train_batch_end", spoil, at=6)],
        ),
        "planned": run(
            "planned", folder, silent, relapsing(), AdaptivePrecision(every_n_steps=2, plan=planned()), "fp32",
        ),
    }  # fmt: skip
    torch.save(results, Path(folder) / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
