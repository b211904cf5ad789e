"""What one of two processes does in test_ddp_decisions.py: what is to be seen is seen by one of them alone."""

import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from adaptive_models import ADAM, Lessons, Loud, adapt, send_outcomes
from ddp_cases import MIXED, RANK, data, gloo, trained
from plugin_models import Task, ours, save

from lightning_mixprec import (
    AdaptivePrecision,
    FidelityMonitor,
    OverflowMonitor,
    PerLayerPrecision,
    PrecisionScheduler,
    UnderflowMonitor,
)
from lightning_mixprec.evidence.replay import StepReplay


class Spiked(Task):
    """Overflows on the second process alone: its weights are within fp16, and what they make of large inputs is not."""

    def __init__(self, fused=False):
        super().__init__(Loud(1e4), partial(ADAM, fused=fused))
        torch.nn.init.zeros_(self.net.up.bias)

    def forward(self, x):
        return super().forward(x * (100.0 if RANK == 1 else 0.01))


def steered(folder, make=Spiked, phases=None, callbacks=(), **options):
    """A run that both the controller and a schedule steer."""
    scheduler, monitor = PrecisionScheduler(phases or [{"at": 5, "edit": {"net.head": "fp32"}}]), OverflowMonitor()
    more = {"strategy": gloo(), "devices": 2, "use_distributed_sampler": False, "default_root_dir": folder}
    plugin = PerLayerPrecision("fp16", loss_scaling={"init_scale": 1024})
    result = adapt(
        make,
        AdaptivePrecision(every_n_steps=2),
        plugin,
        [scheduler, monitor, *callbacks],
        Lessons(8, seed=7 + RANK),
        **{**more, **options},
    )
    return {
        "weights": result.module.state_dict(),
        "history": plugin.history,
        "policy": plugin.policy.to_dict(),
        "decisions": result.adaptive.decisions,
        "came": scheduler.came,
        "events": monitor.events,
        "skipped": plugin.skipped_steps,
        "scale": plugin.scaler.state_dict(),
        "step": result.trainer.global_step,
    }


def late(folder, **options):
    """The CPU stands in for a device, whose outcomes come with the next step."""
    with pytest.MonkeyPatch.context() as patch:
        send_outcomes(patch)
        return steered(folder, partial(Spiked, fused=True), **options)


def resumed(folder):
    path = str(Path(folder) / "first.ckpt")
    steered(folder, callbacks=[save(path)])
    return steered(folder, max_epochs=2, ckpt_path=path)


def failing(rank):
    """Replays fail on one process, after its step."""
    run = StepReplay.run_on_own

    def fails(self, *args, **options):
        result = run(self, *args, **options)
        if rank == RANK:
            raise KeyError("only here")
        return result

    return fails


def unreplayed(folder, rank):
    monitors = [OverflowMonitor(), UnderflowMonitor(2), FidelityMonitor(2), AdaptivePrecision(every_n_steps=2)]
    folder = Path(folder) / f"unreplayed {rank}"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(StepReplay, "run_on_own", failing(rank))
        result = trained(ours(MIXED), batches=data(spoiled=2), callbacks=monitors, default_root_dir=folder)
    result["warned"] = [str(each.message) for each in caught if "step " in str(each.message)]
    return result | {"seen": [monitors[1].latest, monitors[2].latest, monitors[0].reasons, monitors[3].decisions]}


def main(folder):
    scheduler = PrecisionScheduler([{"at": 2, "policy": "fp32"}, {"at": "75%", "policy": "bf16"}])
    results = {
        "unwatched": trained(ours(MIXED), batches=data(spoiled=2)),
        "unreplayed 0": unreplayed(folder, 0),
        "unreplayed 1": unreplayed(folder, 1),
        "skipping": trained(ours("fp16"), batches=data(spoiled=1, count=8), callbacks=[scheduler]),
        "prompt": steered(folder),
        "late": late(folder),
        "whole": steered(folder, max_epochs=2),
        "resumed": resumed(folder),
    }
    results["skipping"]["came"] = scheduler.came
    torch.save(results, Path(folder) / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
