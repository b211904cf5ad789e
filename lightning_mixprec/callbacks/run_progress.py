"""Progress of a run and the metrics that it logged, for phases that wait for them."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_mixprec import ranks
from lightning_mixprec.errors import PolicyError
from lightning_mixprec.planning.phases import Moment, Phase, Plateau
from lightning_mixprec.policy.rules import did_you_mean


def learning_rate(trainer: pl.Trainer) -> float:
    """The largest of all parameter groups, the same on all ranks."""
    groups: Sequence[dict[str, Any]] = [group for each in trainer.optimizers for group in each.param_groups]
    rate = max((float(group["lr"]) for group in groups), default=0.0)
    # What a metric decides may differ from rank to rank.
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        _, first = ranks.first_found(rate)
        return rate if first is None else first
    return rate


def share_done(trainer: pl.Trainer) -> Fraction:
    """The share of training that is done, by whichever limit is nearer; in batches, because a skipped step ends one."""
    done = Fraction(0)
    if trainer.max_steps > 0:
        done = Fraction(trainer.global_step, trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        in_epoch = Fraction(0)
        if not math.isinf(trainer.num_training_batches):
            in_epoch = Fraction(trainer.fit_loop.epoch_loop.batch_idx, int(trainer.num_training_batches))
        done = max(done, (trainer.current_epoch + in_epoch) / trainer.max_epochs)
    return done


def follows_epochs(trainer: pl.Trainer, phase: Phase) -> bool:
    """True if the step at which a phase comes depends on the lengths of epochs."""
    when = phase.when
    if isinstance(when, Moment):
        ends = trainer.max_epochs not in (None, -1)
        return when.value > 0 and (when.kind == "epoch" or (when.kind == "share" and ends))
    configs = trainer.lr_scheduler_configs
    return isinstance(when, Plateau) or any(each.interval == "epoch" or each.reduce_on_plateau for each in configs)


def looks_once_per_epoch(trainer: pl.Trainer) -> bool:
    """True if metrics are looked at when an epoch ends, where those of training and of validation are both there."""
    interval = trainer.val_check_interval
    is_usual = isinstance(interval, float) and interval == 1.0 and trainer.check_val_every_n_epoch == 1
    return is_usual or not trainer.enable_validation


def metric(trainer: pl.Trainer, number: int, name: str) -> float:
    """A logged metric as the first rank that has it sees it."""
    metrics = trainer.callback_metrics
    own: Tensor | None = metrics.get(name)
    _, value = ranks.first_found(None if own is None else float(own))
    if value is None:
        near = did_you_mean(name, metrics)
        known = f"logged are {', '.join(sorted(metrics))}" if metrics else "nothing is logged"
        raise PolicyError(
            f"phase {number}: no metric {name!r} is logged{near} {known}. Log it in training_step, validation_step or "
            "on_validation_epoch_end."
        )
    return value
