"""``AdaptivePrecision``: moves layers to the formats that the run turns out to need."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_mixprec.callbacks.adaptive_run import NOT_FINITE, AdaptiveRun
from lightning_mixprec.callbacks.failure_monitor import FailureMonitor, note
from lightning_mixprec.callbacks.monitor import ROWS, check_count, check_patterns, check_share, is_quiet, takes_iterator
from lightning_mixprec.errors import MixPrecError, SupportError
from lightning_mixprec.evidence.buffers import Broken
from lightning_mixprec.evidence.comparison import Wanted
from lightning_mixprec.evidence.failures import FailureWatch, Found, diagnosed_error
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import PluginFormats
from lightning_mixprec.evidence.step_window import KeptBatch, Outcome, StepWindow
from lightning_mixprec.numerics.devices import native_support
from lightning_mixprec.planning.controller_state import Options
from lightning_mixprec.planning.demotions import Steered, targets_of
from lightning_mixprec.planning.plan import PrecisionPlan, as_plan
from lightning_mixprec.plugin.arguments import check_choice
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.plugin.state import policy_version
from lightning_mixprec.plugin.step_errors import Remedy
from lightning_mixprec.policy.idle_rules import covered_layers
from lightning_mixprec.policy.policy import PrecisionPolicy
from lightning_mixprec.records.changes import Decision, Made, Refused, moves_table
from lightning_mixprec.records.schema import matches
from lightning_mixprec.records.words import written

LEARNED, ADVISED = "learned_policy.yaml", "advised_policy.yaml"


class AdaptivePrecision(FailureMonitor):
    """Watches a run under :class:`PerLayerPrecision` and moves layers to the formats that it turns out to need.

    Two things make it act. A step that fails is looked into when failures repeat: the layer that overflowed is found,
    and what the smallest set of promotions is with which the same batch is finite and agrees with fp32. And now and
    then a step is compared with fp32 before it is taken: its loss, and by layer the gradient of the weights. Where two
    in a row disagree, a larger loss scale or the smallest set of promotions is looked for that restores agreement.
    Layers move to bf16 (for its range) where a trial says that this is enough, to fp32 otherwise, alone: a container's
    own operations, or the LightningModule's (its loss), move without the layers inside. A promoted layer is taken back
    when steps agree without it again, on probation. A healthy model is not touched; trials change
    nothing of the run but its time, and take the memory of a monitor's sample. Besides, a copy of weights and optimizer
    states is kept where it takes at most a quarter of the free memory, to undo steps whose gradients were wrong.

    The policy arrived at is written to ``learned_policy.yaml`` in the run's log directory, with every checkpoint and at
    the end; a later run takes it as its policy and needs no controller.

    Logs ``mixprec/low_precision_share`` (share of the matrix products' flops in at most 16 bits, once a step was looked
    at) and ``mixprec/policy_version`` (policy changes so far). Rows of the JSONL file: ``sample``, ``decision``,
    ``verdict`` or ``problem``.

    Args:
        mode: ``"act"``, or ``"advise"`` to say only what would be done; the policy is then ``advised_policy.yaml``.
        pin: Patterns of layers that are left alone.
        min_low_precision_share: Share of the matrix products' flops that has to stay in at most 16 bits (of those that
            your policy has there, if it has fewer): half of them by default, and 0 or None for no bound. A move that
            trials find necessary and that would leave less is not made, which is told once: such a model is better
            trained in bf16 or fp32 as a whole. Layers that move to bf16 stay in 16 bits.
        every_n_steps: Batches between two comparisons with fp32 once the run has settled; they are denser at first and
            after a move (the 1st, 10th, 30th, 100th and 300th batch).
        dwell_steps: Batches that a promoted layer stays as it is, at least; four times as long after each relapse.
        max_trials: Steps that are tried for one decision, at most, beside the diagnosis of a failed one.
        max_assignments: Different assignments under one base policy, at most: each one costs a compiled model a
            recompilation.
        plan: A :class:`~lightning_mixprec.PrecisionPlan` of this model, or the path of its file. With it layers also
            move to formats narrower than your policy's, the safest first: what the plan chose, then others until
            ``min_low_precision_share`` is reached. Each group is tried before; at the first relapse some go back.

    Attributes:
        decisions: One plain dict per decision: ``step``, ``kind`` (``"promote"``, ``"demote"``, ``"scale"`` or
            ``"restore"``), ``moves`` (layer, from, to), ``scale`` (a loss scale, or None), ``restores`` (whether
            weights and optimizers went back to the last good copy), ``reason``, ``evidence``.

    Raises:
        MixPrecError: An argument is malformed.
    """

    _NAME = "adaptive"
    _KEYS = ("low_precision_share", "policy_version")
    _STATE = {"decisions": list[Made], "_steered": dict[str, Any], "_said": list[str]}

    def __init__(
        self,
        mode: Literal["act", "advise"] = "act",
        pin: str | Sequence[str] = (),
        min_low_precision_share: float | None = 0.5,
        every_n_steps: int = 1000,
        dwell_steps: int = 1000,
        max_trials: int = 48,
        max_assignments: int = 8,
        plan: str | os.PathLike[str] | PrecisionPlan | None = None,
    ) -> None:
        name, self.plan = type(self).__name__, as_plan(plan)
        check_choice("mode", mode, ("act", "advise"))
        self.mode = mode
        self.pin = check_patterns(name, pin)
        share = min_low_precision_share
        self._options = Options(
            every_n_steps=check_count(name, "every_n_steps", every_n_steps),
            dwell_steps=check_count(name, "dwell_steps", dwell_steps),
            max_trials=check_count(name, "max_trials", max_trials),
            max_assignments=check_count(name, "max_assignments", max_assignments),
            min_low_precision_share=None if share is None else check_share(name, "min_low_precision_share", share),
        )
        self.decisions: list[dict[str, Any]] = []
        self._steered: dict[str, Any] = {}
        self._said: list[str] = []
        super().__init__()

    @override
    def _forget_run(self) -> None:
        super()._forget_run()
        self._plugin: PerLayerPrecision | None = None
        self._run: AdaptiveRun | None = None
        self._looks = self._problems = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        plugin = trainer.precision_plugin
        if not isinstance(plugin, PerLayerPrecision):
            raise SupportError(
                f"AdaptivePrecision moves layers between formats, and this Trainer's precision plugin is "
                f"{type(plugin).__name__}; use Trainer(plugins=PerLayerPrecision('fp16'))."
            )
        super().setup(trainer, pl_module, stage)
        self._plugin = plugin

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._run is not None:
            self._steered = self._run.state_dict()  # for a checkpoint that is saved when the fit is over
        super().teardown(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the pinned layers and the plan: patterns have to match something, the plan to be of this model."""
        covered_layers(self.pin, pl_module, "AdaptivePrecision(pin=...)")
        if self.plan is not None:
            self.plan.check(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._plugin is not None
        bf16, fp16 = (native_support(format, pl_module.device).native for format in ("bf16", "fp16"))
        options = replace(self._options, has_bf16=bf16 or not fp16)  # where both are emulated, they cost the same
        acts, targets = self.mode == "act", None if self.plan is None else targets_of(self.plan)
        self._run = AdaptiveRun(trainer, self._plugin, options, self.pin, self._take_in, acts=acts, targets=targets)
        if self._steered:
            self._go_on(self._run)
        self._failures = FailureWatch(
            PluginFormats(self._plugin),
            pl_module.device,
            pl_module.automatic_optimization,
            on_failure=self._see_failure,
            on_outcome=self._run.see_outcome,
        )
        super().on_train_start(trainer, pl_module)

    @override
    def _contradictions(self, state: Mapping[str, Any]) -> Iterator[str]:
        yield from super()._contradictions(state)
        if state["steered"] and not matches(state["steered"], Steered):
            yield "steered"

    def _go_on(self, run: AdaptiveRun) -> None:
        """Takes over what a checkpoint kept of the controller."""
        state, self._steered = self._steered, {}
        try:
            run.load_state_dict(state)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise MixPrecError(
                f"The checkpoint's AdaptivePrecision state cannot be read ({type(error).__name__}: {error}); it is "
                "damaged or of another model. Resume from another checkpoint, or without the callback."
            ) from error

    def rebase(self, policy: PrecisionPolicy, reason: str) -> None:
        """Another policy to start from, in a running fit; promotions that are wider than it are kept.

        Args:
            policy: The policy, without what was promoted.
            reason: Goes into the history.
        """
        assert self._run is not None
        self._settle()
        self._run.rebase(policy, reason)

    @property
    def base(self) -> PrecisionPolicy:
        """The policy of the running fit without what was promoted."""
        assert self._run is not None
        return self._run.base

    @override
    def _begin_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        assert (watch := self._failures) is not None and (run := self._run) is not None
        may_sample = watch.window is None and not self._has_no_batches(trainer, "nothing will move")
        settle_buffers = partial(self._settle_buffers, pl_module)
        run.begin_batch(KeptBatch(batch, batch_idx, None), watch.settle, settle_buffers, may_sample=may_sample)
        self._follow_up()
        if not takes_iterator(trainer):
            watch.begin_batch(batch, batch_idx, self._made)
            self._begin_buffers(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        assert (watch := self._failures) is not None and (run := self._run) is not None
        if watch.window is not None and watch.window.steps:
            run.release()
        super().on_train_batch_end(trainer, *args)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._write_policy()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._run is not None:
            self._steered = self._run.state_dict()
            self._write_policy()
        self._forget_run()  # Lightning calls no teardown

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._write_policy()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        if (run := self._run) is None:
            return super().state_dict()
        if self._failures is not None and self._failures.is_waiting:
            run.hold()  # so that saving changes no decision
        super()._settle()
        self._steered = run.state_dict()
        state = self._state()
        state["steered"]["copy"] = run.copy()
        return state

    @override
    def _settle(self) -> None:
        if self._run is not None:
            self._run.release()
        super()._settle()

    @override
    def _follow_up(self) -> None:
        assert (run := self._run) is not None and (watch := self._failures) is not None
        if run.pending is None or run.is_held or watch.window is not None:
            return
        if self.mode == "act":
            decision = run.carry_out()
            self._say(decision, "")
        else:
            self._advise(run.withdraw())
        self._log_progress()

    @override
    def _look_into_error(self, window: StepWindow, error: Exception, is_over: bool) -> Remedy | None:
        assert (trainer := self._trainer) is not None and (run := self._run) is not None
        may_repeat = not is_over and trainer.accumulate_grad_batches == 1 and run.pending is None
        replay = StepReplay(trainer.lightning_module, window.formats, window.device)
        found = diagnosed_error(replay, window, error, run.wanted(statistics=may_repeat))
        if found is None:
            return None
        note(error, found.diagnosis.cause["message"])
        if may_repeat and found.diagnosis.cause["verdict"] == "precision":
            run.decide(found, float(window.formats.scale))
        if run.pending is None:
            return None
        if self.mode == "advise":
            self._advise(run.withdraw())
            return None

        def take_again() -> None:
            self._say(run.carry_out(), "")
            self._log_progress()
            window.begin_anew()

        return take_again

    def _see_failure(self, window: StepWindow, outcome: Outcome) -> None:
        assert self._run is not None
        buffers = self._buffers.as_they_were(if_late=True) if self._buffers is not None else contextlib.nullcontext()
        with buffers:  # what the last batch left may be why this one failed
            self._run.see_failure(window, outcome)

    @override
    def _see_buffers(self, pl_module: pl.LightningModule, broken: Broken) -> bool:
        is_damage = super()._see_buffers(pl_module, broken)
        assert self._run is not None and self._buffers is not None
        if not is_damage:
            self._run.excuse(broken.names)
        elif self.mode == "act":
            self._buffers.put_back()
        return is_damage

    @override
    def _wanted_of_failure(self) -> Wanted:
        assert self._run is not None
        return self._run.wanted(statistics=True)

    @override
    def _explain(self, found: Found, stage: Literal["validation"] | None = None) -> None:
        """Moves what overflows: in validation at once, unless that has a policy of its own; else if it repeats."""
        assert (run := self._run) is not None and (plugin := self._plugin) is not None
        is_ours = plugin.eval_policy is None and found.comparison is not None
        if (run.controller.accuse() if stage is None else is_ours) and run.pending is None:
            run.decide(found, plugin.scaler.get_scale())

    def _take_in(
        self, place: Mapping[str, int], decision: Decision | None = None, passes: int | None = None, **seen: Any
    ) -> None:
        """Takes over what was seen or decided."""
        if isinstance(refused := seen.get("refused"), Refused):
            self._write(place, refused=refused.to_dict(), passes=passes)
            self._warn_once("bound", f"step {place['step']}: {refused.in_words()}")
        elif decision is None:
            self._write(place, **seen)
            self._looks += "sample" in seen
            if seen.get("problem", NOT_FINITE) != NOT_FINITE:
                self._problems += 1
                self._tell_problem(
                    self._run_trainer,
                    f"AdaptivePrecision could not look at step {place['step']} ({seen['problem']}); training goes on, "
                    "and nothing moves because of it.",
                )
        else:
            row = decision.to_dict()
            is_known = self.mode == "advise" and any(row["moves"] == made["moves"] for made in self.decisions)
            if not is_known:
                self.decisions.append({"step": place["step"], **row})
            self._write(place, decision=row, passes=passes)
        self._log_progress()
        self._journal.flush()

    def _advise(self, decision: Decision) -> None:
        """Says what would be done, once."""
        what = str([decision.moves, decision.scale is not None])
        if what not in self._said:
            self._said.append(what)
            self._say(decision, "would move ")
        self._write_policy()

    def _say(self, decision: Decision | None, would: str) -> None:
        trainer = self._trainer
        if decision is None or trainer is None or not trainer.is_global_zero or is_quiet(trainer):
            return
        print(f"AdaptivePrecision: step {self.decisions[-1]['step']}: {would}{decision.in_words()} ({decision.reason})")

    def _log_progress(self) -> None:
        assert self._trainer is not None and self._run is not None and self._plugin is not None
        version = policy_version(self._plugin.history)
        share = self._run.low_share
        self._log(self._trainer, {"low_precision_share": share, "policy_version": float(version)})

    def _write_policy(self) -> None:
        trainer, plugin = self._trainer, self._plugin
        if trainer is None or plugin is None or self._folder is None or not trainer.is_global_zero:
            return
        advised = self._run.advised_policy if self._run is not None else None
        policy = plugin.policy if self.mode == "act" else advised
        name = LEARNED if self.mode == "act" else ADVISED
        if policy is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            policy.to_file(self._folder / name)
        except (OSError, MixPrecError) as error:
            self._warn_once("file", f"{name} cannot be written ({error}); training goes on.")

    @override
    def _summary(self) -> tuple[str, list[list[str]]]:
        moves = [(made["step"], *move, made["reason"]) for made in self.decisions for move in made["moves"]]
        share = written(self._values["low_precision_share"], ".1%")
        what = ("move" if len(moves) == 1 else "moves") + ("" if self.mode == "act" else " advised")
        title = f"{len(moves)} {what}, {share} of the matrix products' flops in at most 16 bits"
        if self._problems:
            title += f"; {self._looks} of {self._looks + self._problems} steps could be looked at"
        return title, moves_table(moves, ROWS)

    @override
    def _draw(self, ax: Any) -> Any:
        raise SupportError("AdaptivePrecision draws nothing; read its .decisions.")
