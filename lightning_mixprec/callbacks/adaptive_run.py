"""Between the controller, which decides, and the run: tries formats on captured batches and carries decisions out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
from torch import nn

from lightning_mixprec import ranks
from lightning_mixprec.engine.border_plan import heights, survey
from lightning_mixprec.evidence.comparison import MAX_BYTES, MAX_ELEMENTS, Comparison, Wanted
from lightning_mixprec.evidence.failures import Found, ScaleSearch
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import PluginFormats
from lightning_mixprec.evidence.snapshot import Snapshots
from lightning_mixprec.evidence.step_window import KeptBatch, Outcome, StepWindow
from lightning_mixprec.evidence.trials import Trials
from lightning_mixprec.planning.controller_state import Options
from lightning_mixprec.planning.demotions import Target, controller_for
from lightning_mixprec.planning.promotions import Promotion
from lightning_mixprec.planning.remedies import Candidate
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.policy.idle_rules import covered_layers
from lightning_mixprec.policy.module_names import is_scripted
from lightning_mixprec.policy.patterns import literal
from lightning_mixprec.policy.policy import PrecisionPolicy
from lightning_mixprec.records.changes import Decision
from lightning_mixprec.records.words import listed

NOT_FINITE = "not finite in fp32"
"""The reason that a batch tells nothing of precision: no problem of this callback's."""

_ACCUSED: tuple[Literal["layer", "direction", "op", "value"], ...] = ("layer", "direction", "op", "value")

Report = Callable[..., None]


class AdaptiveRun:
    """Steers the formats of one run.

    Args:
        trainer: The Trainer.
        plugin: Its precision plugin.
        options: How to decide.
        pin: Patterns of layers that are left alone.
        acts: Whether decisions are carried out; else steps are looked at as if they had been.
        report: Called with a place (step, epoch, batch_idx) and what was seen or decided there.
        targets: The narrower formats of a plan that layers may move to; None for no such moves.

    Attributes:
        controller: Who decides.
        pending: What is decided and not carried out yet.
        is_held: Whether that waits, too, although no step is in the way; see :meth:`hold`.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        plugin: PerLayerPrecision,
        options: Options,
        pin: Sequence[str],
        report: Report,
        *,
        acts: bool = True,
        targets: Sequence[Target] | None = None,
    ) -> None:
        assert plugin.policy is not None
        self._trainer, self._plugin, self._report, self._acts = trainer, plugin, report, acts
        self._module = trainer.lightning_module
        self._heights = heights(survey(self._module))
        self._base = self._adopted = plugin.policy
        self._flops: dict[str, int] = {}
        self._outputs: dict[str, str | None] = {}
        self.controller = controller_for(self._candidates(pin), options, targets)
        self._adapt()
        self.pending: Decision | None = None
        self.is_held = False
        self._is_due: bool | None = None
        self._step: int | None = None
        self._snapshots = Snapshots()
        self._search = ScaleSearch()
        self._remember()

    def _remember(self, *, is_sound: bool = False) -> None:
        """Keeps a copy of weights and optimizers that are as they would be in fp32, if it fits."""
        self._snapshots.take(self._trainer, self._module, self._trainer.global_step, is_sound=is_sound)

    def _candidates(self, pin: Sequence[str]) -> list[Candidate]:
        formats, pinned = self._base_formats(), covered_layers(pin, self._module, "AdaptivePrecision(pin=...)")
        return [
            Candidate(
                site.name,
                formats[site.name],
                is_pinned=site.name in pinned,
                is_plain=type(site.module).forward is nn.Sequential.forward,
                height=self._heights[site.name],
            )
            for site in survey(self._module)
            if not is_scripted(site.module)
        ]

    def _base_formats(self) -> dict[str, str]:
        assignment = self._base.resolve(self._module)
        self._outputs = {name: assignment.hands_on(name) for name in assignment}
        return {name: layer.compute for name, layer in assignment.items()}

    def _adapt(self) -> None:
        """Tells the controller between which bounds the loss scale is searched for, if it is."""
        scaling = self._plugin.scaler.options
        scales = None if scaling is None or scaling.is_static else (scaling.min_scale, scaling.max_scale)
        self.controller.options = replace(self.controller.options, scales=scales)

    def _take_over_change(self) -> None:
        """Takes a policy that somebody else set for the one to start from."""
        policy = self._plugin.policy
        if policy is not self._adopted and policy is not None:
            self.rebase(policy, "adaptive: kept over a change of the policy")

    # What a checkpoint keeps

    def state_dict(self) -> dict[str, Any]:
        """Plain types, but for what :meth:`copy` adds."""
        policy, pending = self._plugin.policy, self.pending
        return {
            "base": self._base.to_dict(),
            "in_force": None if policy is None else policy.to_dict(),
            "flops": self._flops,
            "controller": self.controller.state_dict(),
            **self.controller.further_state(),
            "pending": None if pending is None else pending.state_dict(),
            **({"held": True, "due": self._is_due} if self.is_held else {}),
        }

    def copy(self) -> dict[str, Any] | None:
        """The copy of weights and optimizers, while the controller undoes wrong steps; later it is not needed."""
        return self._snapshots.state_dict() if self.controller.is_settling else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint, unless the run has another policy than the one arrived at there."""
        if self._base.to_dict() != state["in_force"]:
            return
        self._base = PrecisionPolicy.from_dict(state["base"])
        self.controller.rebase(self._base_formats())
        self._flops = dict(state["flops"])
        self.controller.measured(self._flops)
        self.controller.load_further_state(state)
        self.controller.load_state_dict(state["controller"])
        self._policy_with(self.controller.in_force).resolve(self._module)  # fails here rather than in a step
        if state["pending"] is not None:
            self.pending = Decision.from_state(state["pending"])
        self.is_held, self._is_due = state.get("held", False), state.get("due")
        if state.get("copy") is not None:
            self._snapshots.load_state_dict(self._trainer, self._module, state["copy"])

    # What is seen

    def hold(self) -> None:
        """An outcome is about to be taken in sooner, for a checkpoint: nothing follows from it until it is due."""
        if not self.is_held:
            self.is_held, self._is_due = True, self.controller.is_sample_due

    def release(self) -> None:
        """The outcome has been due by now."""
        self.is_held, self._is_due = False, None

    def begin_batch(
        self, kept: KeptBatch, settle: Callable[[], None], settle_buffers: Callable[[], None], *, may_sample: bool
    ) -> None:
        """A batch begins; compares its step with fp32, if that is due.

        Args:
            kept: The batch.
            settle: Called before a comparison: takes in how the last step went.
            settle_buffers: So it is, and takes in what is on its way of the last batch's buffers.
            may_sample: Whether formats may change before it.
        """
        self._take_over_change()
        is_due = self.controller.is_sample_due if self._is_due is None else self._is_due
        self._is_due = None
        samples = is_due and may_sample
        if samples:
            self.release()
            settle()
        self.controller.begin_batch()
        if not samples:
            return
        settle_buffers()
        place = self._place(kept)
        if self.pending is not None or self._is_damaged():
            if self.pending is None:
                self.controller.see_no_sample()
            return
        trials = self._trials(self._comparison(kept, statistics=self.controller.is_near_decision))
        if not trials.is_possible:
            self.controller.see_no_sample()
            self._report(place, problem=trials.problem or NOT_FINITE)
            return
        scale = self._plugin.scaler.get_scale()
        present = trials.run_as_is(scale) if self._acts else trials.run(self.controller.in_force, scale)
        self._report(place, sample=present.summary(), loss_scale=scale)
        self.controller.see_loss(trials.loss_size)
        decision = self.controller.decide_on_sample(present, scale, trials.run, partial(trials.has_room, scale))
        if self.controller.limits.accepts(present):
            self._remember(is_sound=True)
        self._take(decision, kept, trials, scale)

    def see_outcome(self, window: StepWindow, outcome: Outcome) -> None:
        """A step ended well or badly; a bad one was told to :meth:`see_failure`."""
        if not outcome.is_bad:
            self._search.end()
            with self.controller.counts.as_of(window.age):
                self.controller.see_step(skipped=False, loss_is_bad=False)

    def see_failure(self, window: StepWindow, outcome: Outcome) -> None:
        """A step failed; looks into it if it is time to."""
        self._step = window.step if window.is_late else None
        with self.controller.counts.as_of(window.age):
            self._see_failure(window, outcome)
        self._step = None

    def _see_failure(self, window: StepWindow, outcome: Outcome) -> None:
        looks = self.controller.see_step(skipped=outcome.skipped > 0, loss_is_bad=outcome.loss_is_bad)
        if not looks or not window.batches:
            return
        replay = StepReplay(self._module, PluginFormats(self._plugin), window.device)
        found, problems = self._search.diagnosed(replay, window, outcome, self.wanted(statistics=True))
        for problem in problems:
            self._report({**self._now(), "batch_idx": problem.batch_idx}, problem=problem.message)
        verdict = None if found is None else found.diagnosis.cause["verdict"]
        smaller = None if found is None else found.diagnosis.cause["smaller_scale"]
        falls = smaller is not None and smaller < 1 and self.controller.fails_often
        if found is None or not (verdict == "precision" or falls):
            self.controller.give_up_looking()
            self._report(self._place(window.batches[-1]), verdict=verdict)
            if verdict == "model":
                self._is_damaged()
            return
        if falls or self.controller.accuse():
            self.decide(found, outcome.scale, falls=falls)

    def decide(self, found: Found, scale: float, *, falls: bool = False) -> None:
        """Decides on a step that failed for want of precision.

        Args:
            found: Its diagnosis.
            scale: Its loss scale.
            falls: True if the loss scale would have to fall below 1, and no layer is accused.
        """
        trials = self._trials(found.comparison or self._comparison(found.kept, statistics=True))
        if not trials.is_possible:
            self.controller.give_up_looking()
            return
        if falls:
            decision = self.controller.decide_on_falling_scale(scale, trials.run)
        else:
            told: dict[str, Any] = {key: found.diagnosis.cause[key] for key in _ACCUSED}
            decision = self.controller.decide_on_failure(found.suspects, scale, trials.run, told)
        self._take(decision, found.kept, trials, scale)
        if decision is None:
            verdict = found.diagnosis.cause["verdict"]
            self._report(self._place(found.kept), verdict=verdict, remedy=None, passes=trials.passes)

    def excuse(self, names: Sequence[str]) -> None:
        """Takes note of buffers that would not be finite in fp32 either, and so are no damage."""
        self._snapshots.excused.update(names)

    def _is_damaged(self) -> bool:
        """True if weights or buffers are not finite; they are to go back to the last good copy, if there is one."""
        damaged = self._snapshots.damaged(self._module)
        _, names = ranks.first_found(damaged or None)
        if names is None:
            return False
        if self._snapshots.step is not None:
            self.pending = self.controller.decide_on_damage(names)
        if self.pending is not None:
            self._report(self._now(), decision=self.pending)
        else:
            self._report(self._now(), problem=f"{listed(names)} not finite, and there is no good copy to go back to")
        return True

    def wanted(self, *, statistics: bool) -> Wanted:
        """The questions that a decision may ask of a step in fp32."""
        flops = not self._flops
        return Wanted(statistics, agreement=True, max_elements=MAX_ELEMENTS, max_bytes=MAX_BYTES, flops=flops)

    def _comparison(self, kept: KeptBatch, *, statistics: bool) -> Comparison:
        return Comparison(self._module, PluginFormats(self._plugin), kept, self.wanted(statistics=statistics))

    def _trials(self, comparison: Comparison) -> Trials:
        trials = Trials(comparison, self._plugin, self._policy_with, self.controller.counts.usual_loss)
        if not self._flops and trials.is_possible:
            _, flops = ranks.first_found(trials.flops)
            self._flops = flops or {}
            self.controller.measured(self._flops)
        return trials

    def _take(self, decision: Decision | None, kept: KeptBatch, trials: Trials, scale: float) -> None:
        place = self._place(kept)
        if (problem := ranks.first_told(trials.problem)) is not None:
            self._report(place, problem=problem, passes=trials.passes)
        if decision is None:
            if (refused := self.controller.take_refused()) is not None:
                self._report(place, refused=refused, passes=trials.passes)
            return
        seen = trials.told_of([name for name, _, _ in decision.moves], scale)
        self.pending = decision.with_evidence(statistics=seen) if seen else decision
        self._report(place, decision=self.pending, passes=trials.passes)

    def _place(self, kept: KeptBatch) -> dict[str, int]:
        return {**self._now(), "batch_idx": kept.batch_idx}

    def _now(self) -> dict[str, int]:
        loop = self._trainer.fit_loop.epoch_loop
        step = self._trainer.global_step if self._step is None else self._step
        return {"step": step, "epoch": self._trainer.current_epoch, "batch_idx": loop.batch_idx}

    # What is done

    def carry_out(self) -> Decision | None:
        """Brings what was decided into force, between steps; the decision, if there was one."""
        decision, self.pending = self.pending, None
        if decision is None:
            return None
        scale = self._plugin.scaler.get_scale() if decision.scale is None else decision.scale
        if decision.restores and self._snapshots.step is not None:
            self._snapshots.restore()
        if decision.moves:
            self._adopted = self._policy_with(self.controller.in_force)
            self._plugin.set_policy(self._adopted, f"adaptive: {decision.reason}", decision.evidence)
            self._adapt()
        if self._plugin.scaler.is_active and scale != self._plugin.scaler.get_scale():
            self._plugin.set_loss_scale(scale)
        return decision

    def withdraw(self) -> Decision:
        """A decision that is only advice, and is not carried out."""
        decision, self.pending = self.pending, None
        assert decision is not None
        return decision

    @property
    def advised_policy(self) -> PrecisionPolicy | None:
        """The policy with everything that was advised; None if nothing was."""
        in_force = self.controller.in_force
        return self._policy_with(in_force) if in_force and not self._acts else None

    @property
    def low_share(self) -> float:
        """The share of the matrix products' flops in at most 16 bits, as the run computes; NaN before it is known."""
        return self.controller.low_share() if self._acts else self.controller.low_share({})

    def rebase(self, policy: PrecisionPolicy, reason: str) -> None:
        """Another policy to start from; promotions that are wider than it are kept.

        Args:
            policy: The policy, without what was promoted.
            reason: Goes into the history.
        """
        self._base = policy
        self.controller.rebase(self._base_formats())
        self._adopted = self._policy_with(self.controller.in_force if self._acts else {})
        if self._adopted is not self._plugin.policy:
            self._plugin.set_policy(self._adopted, reason)
        self._adapt()

    @property
    def base(self) -> PrecisionPolicy:
        """The policy without what was promoted."""
        self._take_over_change()
        return self._base

    def _policy_with(self, promoted: Mapping[str, Promotion]) -> PrecisionPolicy:
        if not promoted:
            return self._base
        edits = {literal(name): self._edit(name, promotion) for name, promotion in promoted.items()}
        return self._base.amend(edits, self._module)

    def _edit(self, name: str, promotion: Promotion) -> dict[str, Any]:
        edit = promotion.said
        if self._outputs[name] is not None:
            edit.pop("output", None)  # the user's word on it holds
        return {**edit, "recurse": False} if self._heights[name] or not name else edit
