"""Skipped optimizer steps: counters, learning rates and ``global_step`` do not move; many of them end the run.

On the CPU, and with optimizers that are not fused, the outcome of a step is known at once. A fused optimizer on an
accelerator is never waited for: its outcome is copied to the host in the background and taken in at the first
optimizer step of the next batch (always exactly then, so that all ranks agree), or when somebody asks.
"""

import contextlib
import weakref
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.errors import ScalingError
from lightning_mixprec.numerics.finite import are_nonfinite
from lightning_mixprec.optim.gradients import grads_of
from lightning_mixprec.optim.loss_scaling import LossScaler
from lightning_mixprec.optim.loss_scaling_options import LossScaling
from lightning_mixprec.plugin.formats_in_force import attributes_of_copy
from lightning_mixprec.plugin.hidden_infinities import HiddenInfinities
from lightning_mixprec.plugin.past_steps import PastSteps
from lightning_mixprec.plugin.stand_in import StandIn
from lightning_mixprec.plugin.strategies import forget_communication_errors
from lightning_mixprec.policy.module_names import walk


class _Late(NamedTuple):
    """The outcome of a batch's step on its way to the host: skipped, and whether the scale was at its minimum."""

    optimizer: Optimizer
    batch: int
    outcome: Transfer


@dataclass
class _Tally:
    """Steps of a schedule's optimizer: tried since the schedule was last due, taken and not yet spent on moving it."""

    tried: int = 0
    taken: int = 0

    def spend(self) -> bool:
        """True if the schedule moves: as many steps were taken as were tried for it."""
        moves = self.taken >= self.tried
        if moves:
            self.taken -= self.tried
        self.tried = 0
        return moves


class StepLedger:
    """Counts of the optimizer steps that were skipped, and the consequences of each.

    Args:
        scaler: Decides about the steps.
    """

    def __init__(self, scaler: LossScaler) -> None:
        self._scaler = scaler
        self._skipped_steps = 0
        self._late: list[_Late] = []
        self._owed_holds = 0
        self._last_skipped: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        self._in_a_row: dict[int, int] = {}
        self._tallies: list[_Tally] = []
        self._warned_at_minimum = False
        self._forget_run()

    def _forget_run(self) -> None:
        self._model: pl.LightningModule | None = None
        self._optimizers: list[Optimizer] = []
        self._schedulers: list[LRSchedulerConfig] = []
        self._past: PastSteps | None = None
        self._hidden: HiddenInfinities | None = None
        self._may_give_up = True

    def __getstate__(self) -> dict[str, Any]:
        """A copy counts on from here, in no training; references to optimizers that may die cannot be copied."""
        self.settle()
        return {name: value for name, value in attributes_of_copy(self).items() if name != "_last_skipped"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _last_skipped=weakref.WeakKeyDictionary())

    def connect(
        self, model: pl.LightningModule, optimizers: Sequence[Optimizer], schedulers: Sequence[LRSchedulerConfig]
    ) -> None:
        """Names the training that is about to start, and holds back schedules that move with its steps."""
        self._model, self._optimizers, self._schedulers = model, list(optimizers), list(schedulers)
        self._tallies = [_Tally() for _ in self._schedulers]
        self._in_a_row = {}
        self._past = PastSteps(self._optimizers, self._scaler)
        self._hidden = HiddenInfinities(model)
        if model.automatic_optimization and any(config.interval == "step" for config in schedulers):
            SchedulerGate(model, self)

    def disconnect(self) -> None:
        """Takes in what is still on its way and lets go of the training."""
        gate = vars(self._model).get("lr_scheduler_step") if self._model is not None else None
        if isinstance(gate, SchedulerGate):
            gate.remove()
        if self._past is not None:
            self._past.remove()
        if self._hidden is not None:
            self._hidden.finish()
        self._may_give_up = False
        self.settle()
        self._forget_run()

    @contextlib.contextmanager
    def batch(self) -> Generator[None, None, None]:
        """A training step is run within."""
        past = self._past if self._model is not None and not self._model.automatic_optimization else None
        if past is not None:
            past.begin_batch()
        yield
        if past is not None:
            past.end_batch()

    def begin_backward(self) -> None:
        """A loss is about to go backward."""
        if self._hidden is not None and self._is_guarded:
            self._hidden.begin_backward()

    def end_backward(self) -> None:
        """A loss went backward, and no hook of the run has seen its gradients."""
        if self._hidden is not None and self._is_guarded:
            self._hidden.end_backward()

    @property
    def _is_guarded(self) -> bool:
        return self._scaler.is_active or self._scaler.guards

    def begin(self) -> None:
        """The plugin is about to take a step, whose outcome it will :meth:`note`."""
        self._hold_global_step(self._owed_holds)
        self._owed_holds = 0
        if self._past is not None:
            self._past.begin_own()

    def note(self, optimizer: Optimizer, skipped: bool | Tensor, at_minimum: bool | Tensor) -> None:
        """Takes in the outcome of a step.

        Args:
            optimizer: Which optimizer stepped.
            skipped: The outcome, or the device's flag of it.
            at_minimum: Whether the loss scale was at its minimum during the step.

        Raises:
            ScalingError: Training cannot go on; names the layers and what to try.
        """
        if self._past is not None:
            self._past.end_own()
        if self._hidden is not None and self._is_guarded:
            self._hidden.end_step(optimizer, skipped, is_scaled=self._scaler.is_active)
        if isinstance(skipped, Tensor):
            self._tally(optimizer, tried=1, taken=1)
            self._late.append(_Late(optimizer, self._batch(), _send(skipped, at_minimum)))
            if self._is_last_step():
                self.settle()
        else:
            self._tally(optimizer, tried=1, taken=0 if skipped else 1)
            self._take_in(optimizer, skipped, skipped and bool(at_minimum))

    def settle_earlier_batches(self) -> None:
        """Takes in the outcomes of earlier batches. Once the device has this batch's work, waiting leaves it no gap."""
        if not self._late:
            return
        batch = self._batch()
        self._settle(sum(outcome.batch != batch for outcome in self._late))

    def settle(self) -> None:
        """Takes in every outcome that is on its way. Waits for the device if there is one."""
        self._settle(len(self._late))

    def _settle(self, count: int) -> None:
        arriving, self._late = self._late[:count], self._late[count:]
        for late in arriving:
            skipped, at_minimum = late.outcome.get()[0].tolist()
            if skipped:
                self._tally(late.optimizer, taken=-1)
            self._take_in(late.optimizer, bool(skipped), bool(skipped and at_minimum))

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped so far."""
        self.settle()
        return self._skipped_steps

    def was_skipped(self, optimizer: Optimizer) -> bool:
        """True if the optimizer's latest step was skipped."""
        self.settle()
        return self._last_skipped.get(optimizer, False)

    def lets_step(self, scheduler: Any) -> bool:
        """True if a learning-rate schedule that is due may move: per epoch always, per step after real steps only."""
        tallies = zip(self._schedulers, self._tallies, strict=False)
        mine = (tally for config, tally in tallies if config.scheduler is scheduler and config.interval == "step")
        return all(tally.spend() for tally in mine)

    def state_dict(self) -> dict[str, Any]:
        """Counters as plain numbers. A skip that comes in only now is not in the loops' saved progress: it is owed."""
        before = self._skipped_steps
        self.settle()
        return {
            "skipped_steps": self._skipped_steps,
            "in_a_row": [self._in_a_row.get(index, 0) for index in range(max(self._in_a_row, default=-1) + 1)],
            "owed_holds": self._skipped_steps - before,
            "schedules": [[tally.tried, tally.taken] for tally in self._tallies],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        self._skipped_steps = int(state["skipped_steps"])
        self._in_a_row = dict(enumerate(state["in_a_row"]))
        self._owed_holds = int(state["owed_holds"])
        if len(state["schedules"]) == len(self._tallies):
            self._tallies = [_Tally(*counts) for counts in state["schedules"]]

    def _take_in(self, optimizer: Optimizer, skipped: bool, at_minimum: bool) -> None:
        index = self._index(optimizer)
        self._last_skipped[optimizer] = skipped
        self._in_a_row[index] = self._in_a_row.get(index, 0) + 1 if skipped else 0
        if skipped:
            self._skipped_steps += 1
            if self._model is not None:
                forget_communication_errors(self._model.trainer.strategy)
            self._hold_global_step(1)
            if self._may_give_up:
                self._give_up_if_hopeless(self._in_a_row[index], at_minimum)

    def _give_up_if_hopeless(self, in_a_row: int, at_minimum: bool) -> None:
        options = self._scaler.options or LossScaling()
        if in_a_row >= options.max_consecutive_skips:
            raise ScalingError(self._explain(f"{in_a_row} optimizer steps in a row had non-finite gradients"))
        if not at_minimum:
            return
        reached = f"a step overflowed although the loss scale is at its minimum ({options.min_scale:g})"
        if options.at_min == "raise":
            raise ScalingError(self._explain(reached))
        if not self._warned_at_minimum:
            self._warned_at_minimum = True
            rank_zero_warn(self._explain(reached))

    def _explain(self, what: str) -> str:
        layers = self._nonfinite_layers()
        named = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
        return (
            f"{what}; layers with non-finite gradients: {named or 'none any more'}. Try: (1) compute these layers, or "
            "the loss (layers: '', recurse: false), in bf16 or fp32; (2) lower the learning rate or clip gradients; "
            "(3) look for inf or NaN in the batch and in the loss itself, for example in fp32 with detect_anomaly=True."
        )

    def _nonfinite_layers(self) -> list[str]:
        return [
            name or "the LightningModule itself"
            for name, module, _ in (walk(self._model) if self._model is not None else ())
            if any(are_nonfinite(grads_of([param for param in module._parameters.values() if param is not None])))
        ]

    def _tally(self, optimizer: Optimizer, tried: int = 0, taken: int = 0) -> None:
        for config, tally in zip(self._schedulers, self._tallies, strict=False):
            if config.scheduler.optimizer is optimizer:
                tally.tried += tried
                tally.taken += taken

    def _batch(self) -> int:
        return self._model.trainer.fit_loop.epoch_loop.total_batch_idx if self._model is not None else 0

    def _index(self, optimizer: Optimizer) -> int:
        return self._optimizers.index(optimizer) if optimizer in self._optimizers else -1

    def _is_last_step(self) -> bool:
        trainer = self._model.trainer if self._model is not None else None
        return trainer is not None and -1 < trainer.max_steps <= trainer.global_step + 1

    def _hold_global_step(self, steps: int) -> None:
        """Takes steps out of the loop's progress, which is what ``global_step`` and everything after it counts.

        The loop has no public way to say that a step was none. It counts a step as ready before and as completed after
        the optimizer; both are lowered here, in between.
        """
        if not steps or self._model is None or self._model.trainer.state.fn != TrainerFn.FITTING:
            return
        loop = self._model.trainer.fit_loop.epoch_loop
        automatic = self._model.automatic_optimization
        progress = (
            loop.automatic_optimization.optim_progress.optimizer.step
            if automatic
            else loop.manual_optimization.optim_step_progress
        )
        for tracker in (progress.total, progress.current):
            tracker.ready -= steps
            tracker.completed -= steps


class SchedulerGate(StandIn):
    """Lets a schedule advance only after a real step, if the ledger beside it says so."""

    _METHOD = "lr_scheduler_step"

    def __call__(self, scheduler: Any, metric: Any) -> None:
        """Steps the schedule if it may."""
        if self._beside is None or self._beside.lets_step(scheduler):
            self._own(scheduler, metric)


def _send(skipped: Tensor, at_minimum: bool | Tensor) -> Transfer:
    if not isinstance(at_minimum, Tensor):
        at_minimum = torch.full_like(skipped, at_minimum)
    return Transfer([torch.stack([skipped, at_minimum.to(skipped)])])
