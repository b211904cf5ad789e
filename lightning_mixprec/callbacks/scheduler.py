"""``PrecisionScheduler``: policies that come into force at given moments of a run."""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mixprec import ranks
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision
from lightning_mixprec.callbacks.monitor import RunCallback, is_quiet, monitors_of
from lightning_mixprec.callbacks.run_progress import (
    follows_epochs,
    learning_rate,
    looks_once_per_epoch,
    metric,
    share_done,
)
from lightning_mixprec.errors import PolicyError, SupportError
from lightning_mixprec.planning.phases import LowRate, Moment, Now, Phase, Plateau, naming, read_phases
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.plugin.state import policy_version
from lightning_mixprec.policy.policy import PrecisionPolicy, describe_difference
from lightning_mixprec.records.changes import Came, Looks


class PrecisionScheduler(RunCallback):
    """Changes the policy of ``PerLayerPrecision`` at given moments of training.

    Each phase comes once, before the first step that it is for: never within a step, nor between the batches whose
    gradients one optimizer step accumulates. Phases that are due at the same moment come in the order listed. Moments
    of the same kind have to be listed in the order of time. A resumed run goes on with the phases that have not come;
    those that have come must be listed as they were.

    Logs ``mixprec/policy_version``, the number of policy changes so far. Rows of the JSONL file: ``phase``, ``at`` and
    ``change`` of each phase that came. List it before monitors that sample, so that they see a step in the formats that
    it has.

    Args:
        phases: Mappings with ``at`` and either ``policy`` or ``edit``.
            ``at`` is a number of optimizer steps (a skipped step is none), ``"80%"`` of training, ``{"step": 100}``,
            ``{"epoch": 3}`` (its start), or an event:
            ``{"event": "plateau", "monitor": "val_loss", "mode": "min", "patience": 3, "min_delta": 0.0}``, when a
            logged metric has not improved for ``patience`` looks at it: after each epoch, or after each validation
            where a run does not validate once per epoch; a second plateau of the same metric counts from the first on;
            ``{"event": "lr_below", "share": 0.1}``, when the learning rate, the largest of all parameter groups, has
            fallen below a share of its peak so far.
            ``policy`` is what ``PerLayerPrecision`` takes as a policy, except ``"auto"``; ``"configured"`` is the one
            that it was given. ``edit`` is what ``PerLayerPrecision.edit_policy`` takes.

    Attributes:
        phases: The phases as they were understood.
        came: One plain dict per phase that came: phase (its number), at, step, epoch, change.

    Raises:
        PolicyError: A phase is malformed; one line that says which.
    """

    _NAME = "schedule"
    _KEYS = ("policy_version",)
    _STATE = {
        "came": list[Came],
        "_listed": list[dict[str, Any]],
        "_looks": list[Looks],
        "_peak": float,
        "_begins_window": bool,
    }

    def __init__(self, phases: list[dict[str, Any]]) -> None:
        self.phases = read_phases(phases)
        self.came: list[dict[str, Any]] = []
        self._listed = [phase.to_plain() for phase in self.phases]
        self._looks = _no_looks(len(self.phases))
        self._peak = 0.0
        self._begins_window = True
        super().__init__()

    # Checks before training

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        _plugin(trainer)
        super().setup(trainer, pl_module, stage)
        if trainer.max_epochs == -1 and trainer.max_steps == -1:
            self._refuse_shares("but this training has no end (max_epochs=-1 and max_steps=-1); set one of them")

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that the phases go on from the checkpoint, if there is one, and fit the model.

        Raises:
            PolicyError: They do not.
            SupportError: A phase asks for loss scaling, which an optimizer does not allow.
        """
        self._go_on()
        plugin = _plugin(trainer)
        start = policy = _policy(trainer)
        # An event may come later than what is listed after it, so an edit has to fit the policy of the start, too.
        has_events = not all(isinstance(phase.when, Moment) for phase in self.phases)
        for phase in self.phases:
            with naming(phase.number):
                for base in (start, policy) if has_events else (policy,):
                    policy = self._target(plugin, phase, base, pl_module)
                    plugin.check_policy(policy)

    def _target(
        self, plugin: PerLayerPrecision, phase: Phase, policy: PrecisionPolicy, model: pl.LightningModule
    ) -> PrecisionPolicy:
        """The policy that a phase makes of another one."""
        if phase.edit is not None:
            return policy.amend(phase.edit, model)
        wanted = phase.policy if isinstance(phase.policy, PrecisionPolicy) else plugin.configured_policy
        assert wanted is not None
        return wanted

    @override
    def _contradictions(self, state: Mapping[str, Any]) -> Iterator[str]:
        yield from super()._contradictions(state)
        numbers, count = [each["phase"] for each in state["came"]], len(state["listed"])
        if len(set(numbers)) != len(numbers) or not all(1 <= number <= count for number in numbers):
            yield "came"
        if len(state["looks"]) != count:
            yield "looks"

    def _go_on(self) -> None:
        """Takes the state of a checkpoint for the phases listed now."""
        listed = [phase.to_plain() for phase in self.phases]
        settled = max((each["phase"] for each in self.came), default=0)
        for number in range(1, settled + 1):
            if listed[number - 1 : number] != self._listed[number - 1 : number]:
                raise PolicyError(
                    f"phase {number} is not the checkpoint's, {self._listed[number - 1]!r}, whose phase {settled} has "
                    f"come; list phases 1 to {settled} as they were (later ones may change)."
                )
        looks = _no_looks(len(listed))
        for place, (old, new) in enumerate(zip(self._listed, listed, strict=False)):
            if old == new:
                looks[place] = self._looks[place]
        self._listed, self._looks = listed, looks

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if math.isinf(trainer.num_training_batches) and trainer.max_steps == -1:
            whole = Fraction(trainer.max_epochs or 1)
            self._refuse_shares("but the training data has no length to take a share of; set max_steps", of=whole)
        self._refuse_epochs_that_differ(trainer)
        if not getattr(trainer, "fast_dev_run", False):
            self._warn_of_what_never_comes(trainer, pl_module)
        self._values["policy_version"] = float(policy_version(_plugin(trainer).history))
        super().on_train_start(trainer, pl_module)

    def _refuse_shares(self, why: str, of: Fraction | None = None) -> None:
        """Raises for shares of training, except for those that are a whole number of epochs."""
        for phase in self._waiting():
            when = phase.when
            if not isinstance(when, Moment) or when.kind != "share":
                continue
            if of is None or (when.value * of).denominator != 1:
                raise PolicyError(
                    f"phase {phase.number}: it comes at {when}, {why}, or write {{'step': 1000}} or {{'epoch': 3}}."
                )

    def _refuse_epochs_that_differ(self, trainer: pl.Trainer) -> None:
        """Raises for phases that would come at other steps on other ranks, because their epochs have other lengths."""
        phase = next((each for each in self._waiting() if follows_epochs(trainer, each)), None)
        if phase is None:
            return
        lengths = ranks.all_values(trainer.num_training_batches)
        if len(set(lengths)) > 1:
            raise PolicyError(
                f"phase {phase.number}: it comes at {phase.when}, but the ranks' epochs have {_listing(lengths)} "
                "batches, so that it would come at another step on each; write {'step': 1000}, or give all ranks as "
                f"many batches (limit_train_batches={min(lengths)})."
            )

    def _warn_of_what_never_comes(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # In manual optimization several optimizers may step in a batch.
        most = trainer.estimated_stepping_batches if pl_module.automatic_optimization else trainer.max_steps
        ends = {"step": most, "epoch": trainer.max_epochs}
        for phase in self._waiting():
            when = phase.when
            end = ends.get(when.kind) if isinstance(when, Moment) else None
            if isinstance(when, Moment) and end not in (None, -1) and when.value >= end:
                rank_zero_warn(
                    f"phase {phase.number} never comes: it is for {when}, and this training ends after {end} "
                    f"{when.kind}s."
                )
            if isinstance(when, LowRate) and not trainer.lr_scheduler_configs:
                rank_zero_warn(
                    f"phase {phase.number} waits for the learning rate to fall, and configure_optimizers returned no "
                    "schedule of it; it comes only if something else lowers it."
                )

    # The phases

    def _waiting(self) -> Iterator[Phase]:
        """The phases that have not come."""
        came = {each["phase"] for each in self.came}
        return (phase for phase in self.phases if phase.number not in came)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begins_window = True

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._begins_window = True

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        begins_window, self._begins_window = self._begins_window, False
        if not begins_window:
            return
        due = self._due(trainer)
        if due and _plugin(trainer).skipped_steps:  # which waits for the outcome of the last step
            due = self._due(trainer)
        for phase in due:
            place = {"step": trainer.global_step, "epoch": trainer.current_epoch, "batch_idx": batch_idx}
            self._come(trainer, phase, place)

    def _due(self, trainer: pl.Trainer) -> list[Phase]:
        waiting = list(self._waiting())
        if not waiting:
            return []
        rate = learning_rate(trainer) if any(isinstance(phase.when, LowRate) for phase in waiting) else 0.0
        self._peak = max(self._peak, rate)
        now = Now(trainer.global_step, trainer.current_epoch, share_done(trainer), rate, self._peak)
        return [phase for phase in waiting if phase.is_due(now, self._looks[phase.number - 1]["looks"])]

    def _come(self, trainer: pl.Trainer, phase: Phase, place: dict[str, int]) -> None:
        before = _policy(trainer)
        with naming(phase.number):
            self._adopt(trainer, phase)
        row = {"phase": phase.number, "at": str(phase.when), "change": describe_difference(before, _policy(trainer))}
        self.came.append({**row, "step": place["step"], "epoch": place["epoch"]})
        self._write(place, **row)
        if trainer.is_global_zero and not is_quiet(trainer):
            where = f"step {place['step']}, epoch {place['epoch']}"
            print(f"{type(self).__name__}: {where}: {row['change']} ({row['at']})")

    def _adopt(self, trainer: pl.Trainer, phase: Phase) -> None:
        """Brings a phase into force."""
        plugin, reason = _plugin(trainer), f"schedule: {phase.when}"
        controller = next(iter(monitors_of(trainer, AdaptivePrecision)), None)
        before = _policy(trainer) if controller is None else controller.base
        policy = self._target(plugin, phase, before, trainer.lightning_module)
        if controller is None:
            plugin.set_policy(policy, reason=reason)
        else:
            controller.rebase(policy, reason)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._log(trainer, {"policy_version": float(policy_version(_plugin(trainer).history))})
        self._send_to_loggers(trainer)

    # Looks at metrics

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if looks_once_per_epoch(trainer):
            self._look(trainer)
        super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_look = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if is_look and not looks_once_per_epoch(trainer):
            self._look(trainer)
        super().on_validation_end(trainer, pl_module)

    def _look(self, trainer: pl.Trainer) -> None:
        looked_at: set[str] = set()
        for phase in self._waiting():
            when = phase.when
            if not isinstance(when, Plateau) or when.monitor in looked_at:
                continue
            looked_at.add(when.monitor)
            value, seen = metric(trainer, phase.number, when.monitor), self._looks[phase.number - 1]
            if when.improves(value, seen["best"]):
                seen.update(best=value, looks=0)
            else:
                seen["looks"] += 1

    @override
    def _summary(self) -> tuple[str, list[list[str]]]:
        came = {each["phase"]: each for each in self.came}
        rows = [["phase", "came", "change"]]
        for phase in self.phases:
            each = came.get(phase.number)
            shown = ["did not come", "-"] if each is None else [f"step {each['step']}", each["change"]]
            rows.append([f"{phase.number}: {phase.when}", *shown])
        return f"{len(came)} of {len(self.phases)} phases came", rows

    @override
    def _draw(self, ax: Any) -> Any:
        raise SupportError("PrecisionScheduler draws nothing; read its .came, or the .history of PerLayerPrecision.")


def _no_looks(count: int) -> list[dict[str, Any]]:
    return [{"best": None, "looks": 0} for _ in range(count)]


def _plugin(trainer: pl.Trainer) -> PerLayerPrecision:
    plugin = trainer.precision_plugin
    if not isinstance(plugin, PerLayerPrecision):
        raise SupportError(
            f"PrecisionScheduler changes the policy of PerLayerPrecision, and this Trainer's precision plugin is "
            f"{type(plugin).__name__}; use Trainer(plugins=PerLayerPrecision(...))."
        )
    return plugin


def _policy(trainer: pl.Trainer) -> PrecisionPolicy:
    policy = _plugin(trainer).policy
    assert policy is not None
    return policy


def _listing(numbers: Sequence[float]) -> str:
    *others, last = (f"{number:g}" for number in sorted(set(numbers)))
    return f"{', '.join(others)} and {last}"
