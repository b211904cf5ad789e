"""What the scripts of this folder share: one short run under DDP, and everything that came out of it."""

import os
from typing import Any

import torch
from lightning.pytorch.overrides.distributed import _register_ddp_comm_hook
from lightning.pytorch.strategies import DDPStrategy
from plugin_models import Batches, Call, Task, fit, task
from typing_extensions import override

from lightning_mixprec import PerLayerPrecision

RANK = int(os.environ.get("LOCAL_RANK", 0))
MIXED = {"default": "fp16", "net.1": "c=fp32,o=input", "net.4": "bf16"}


class HookedDDP(DDPStrategy):
    """DDP with its communication hook on the CPU, too: torch takes one there, Lightning registers it on CUDA alone."""

    @override
    def _register_ddp_hooks(self) -> None:
        if self._ddp_comm_hook is not None:
            _register_ddp_comm_hook(self.model, self._ddp_comm_state, self._ddp_comm_hook, self._ddp_comm_wrapper)


def gloo(**options: Any) -> DDPStrategy:
    return HookedDDP(process_group_backend="gloo", **options)


def data(rank: int = RANK, count: int = 4, spoiled: int | None = None) -> Batches:
    """The batches of a rank; of the first rank's one may be infinite."""
    made = Batches(6, seed=7 + rank, count=count)
    if rank == 0 and spoiled is not None:
        made.batches[spoiled][0].fill_(float("inf"))
    return made


def trained(
    plugin: Any, kind: type[Task] = Task, batches: Any = None, callbacks: Any = (), strategy: Any = None, **options: Any
) -> dict[str, Any]:
    """Trains a task on two ranks, unless ``options`` say otherwise."""
    scales = Call("on_train_batch_end", lambda run, model: _scale(plugin))
    steps = Call("on_train_batch_end", lambda run, model: run.global_step)
    model = task(kind)
    options = {"strategy": strategy or gloo(), "devices": 2, "use_distributed_sampler": False, **options}
    run = fit(model, plugin, batches or data(), callbacks=[*callbacks, scales, steps], **options)
    return {
        "losses": torch.stack(model.losses).float(),
        "weights": [param.detach().clone() for param in model.parameters()],
        "step": run.global_step,
        "scales": scales.results,
        "steps": steps.results,
        **told(plugin),
    }


def told(plugin: Any) -> dict[str, Any]:
    """What the plugin says after a run, if it is this package's."""
    if not isinstance(plugin, PerLayerPrecision):
        return {}
    return {"skipped": plugin.skipped_steps, "history": plugin.history}


def _scale(plugin: Any) -> float:
    scaler = getattr(plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()
