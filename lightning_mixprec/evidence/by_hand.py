"""``diagnose``: the same diagnosis by hand, without a Trainer."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.evidence.diagnosis import USUAL_SCALE, Judge
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import PolicyFormats
from lightning_mixprec.evidence.saved_batches import load_batch
from lightning_mixprec.evidence.step_window import KeptBatch
from lightning_mixprec.plugin.lightnings import is_lightning_module
from lightning_mixprec.policy.module_names import unwrap
from lightning_mixprec.policy.policy import PrecisionPolicy

_DEFAULT_POLICY = "fp16"


def diagnose(
    module: pl.LightningModule,
    batch: Any,
    policy: str | dict[str, Any] | PrecisionPolicy = _DEFAULT_POLICY,
    loss_scale: float = USUAL_SCALE,
    batch_idx: int = 0,
) -> dict[str, Any]:
    """Runs a module's training step on a batch under a policy and says whether it is finite, and if not, why.

    Nothing of the module changes. Needs no Trainer; a ``training_step`` that asks for one is answered with an error.

    Args:
        module: The LightningModule, with the weights that failed, on the device where it is to compute.
        batch: What its ``training_step`` takes, or the path of a file that ``OverflowMonitor(save_batch=True)`` wrote;
            such a file knows its index, its loss scale, its policy and its random numbers, but not the weights.
        policy: A format name, a path, a mapping or a ``PrecisionPolicy``; left at "fp16", a file's own counts.
        loss_scale: What the loss is multiplied by if a layer computes in fp16; left at 65536, a file's own counts.
        batch_idx: Index of the batch.

    Returns:
        A dict like those in ``OverflowMonitor.events``, with ``frames``, the operations around the first that failed.
        ``verdict`` is None if the step is finite.

    Raises:
        MixPrecError: The step cannot be run; one line that says why.

    >>> import torch
    >>> class Model(pl.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(2, 1)
    ...     def training_step(self, batch, batch_idx):
    ...         return self.layer(1e6 * batch).float().mean()
    >>> diagnosis = diagnose(Model(), torch.ones(3, 2))
    >>> diagnosis["verdict"], diagnosis["layer"], diagnosis["direction"], diagnosis["fits"]
    ('precision', 'layer', 'forward', 'bf16')
    """
    if isinstance(loss_scale, bool) or not isinstance(loss_scale, (int, float)) or not 0 < loss_scale < math.inf:
        raise MixPrecError(f"loss_scale is {loss_scale!r}; it has to be a positive finite number.")
    if isinstance(batch_idx, bool) or not isinstance(batch_idx, int) or batch_idx < 0:
        raise MixPrecError(f"batch_idx is {batch_idx!r}; it has to be an integer that is not negative.")
    module = module_of(module, "diagnose")
    random = None
    if isinstance(batch, (str, Path)):
        saved = load_batch(batch, module.device)
        batch, batch_idx, random = saved.kept
        loss_scale = saved.loss_scale if loss_scale == USUAL_SCALE else loss_scale
        policy = saved.policy if policy == _DEFAULT_POLICY else policy
    formats = PolicyFormats(module, policy, module.device, loss_scale)
    scale = float(formats.scale)
    kept = KeptBatch(batch, batch_idx, random)
    judge = Judge(StepReplay(module, formats, module.device), kept, scale, may_raise=True)
    found = judge.judge()
    if judge.problem is not None:
        missing = asks_for_trainer(judge.problem, "diagnose", "use the callback OverflowMonitor in a Trainer")
        raise MixPrecError(missing or f"the step could not be run: {judge.problem}")
    if found is None:
        nothing = dict.fromkeys(("verdict", "layer", "direction"))
        return {**nothing, "loss_scale": scale, "message": "the step is finite", "frames": []}
    return {**found.cause, "batch_idx": batch_idx, "frames": [frame.to_dict() for frame in found.frames]}


def module_of(module: object, asked: str) -> pl.LightningModule:
    """What is given to a function that runs a module's steps, looked through wrappers.

    Args:
        module: What was given.
        asked: The function.

    Raises:
        MixPrecError: It is no LightningModule.
    """
    module = unwrap(module) if isinstance(module, nn.Module) else module
    if is_lightning_module(module):
        return module
    raise MixPrecError(
        f"{asked}() got a {type(module).__name__}; it takes a LightningModule (of lightning.pytorch or "
        "pytorch_lightning), whose step it runs."
    )


def asks_for_trainer(error: Exception | str, asked: str, instead: str, step: str = "training_step") -> str | None:
    """What to say of a step that asks for a Trainer where there is none; None if its error is another.

    Args:
        error: What the step raised.
        asked: The function that ran it.
        instead: What to do.
        step: Which step it is.
    """
    if "not attached to a `Trainer`" not in str(error):
        return None
    return (
        f"{step} asks for its Trainer (self.trainer, or something that needs it), and {asked}() has none; "
        f"{instead}, or let it do without."
    )
