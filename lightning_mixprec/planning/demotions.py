"""Demotions by a plan: layers of the user's policy that find their narrower form during the run.

What the plan chose narrower than the policy is tried from its safest part on; where that leaves less than
``min_low_precision_share`` in at most 16 bits, layers that it left wide follow, by what they do to the loss. The first
group is half of all, the next half of the rest: a run has few assignments. A group that fails its trial is halved; a
single layer that fails is left alone for good. At the first relapse the smallest set goes back, and stays wide, without
which the step agrees again.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from typing_extensions import NotRequired, TypedDict

from lightning_mixprec.numerics.formats import get_format, is_scaling_needed, is_wider
from lightning_mixprec.planning.agreement import Agreement, limits_for
from lightning_mixprec.planning.controller import Controller, HasRoom
from lightning_mixprec.planning.controller_state import ControllerState, Options
from lightning_mixprec.planning.plan import PrecisionPlan
from lightning_mixprec.planning.promotions import Promotion, Promotions
from lightning_mixprec.planning.remedies import Candidate, Try
from lightning_mixprec.planning.smallest_set import smallest
from lightning_mixprec.records.changes import Decision
from lightning_mixprec.records.schema import Count
from lightning_mixprec.records.words import counted

_APPROVALS = 2
"""Samples in a row that have to agree with a group before it moves."""


@dataclass(frozen=True)
class Target:
    """A narrower format for layers that move together, as a plan has it.

    Attributes:
        layers: Their names.
        format: The format.
        sensitivity: Their part in the squared loss gap.
        is_chosen: Whether the plan chose it.
    """

    layers: tuple[str, ...]
    format: str
    sensitivity: float
    is_chosen: bool


@dataclass
class DemotionState:
    """What a checkpoint keeps of demotions; plain types.

    Attributes:
        narrowed: By layer the narrower format that is in force, in the order of the moves.
        refused: Layers that are left alone for good.
        group: The group that is tried at present.
        approvals: Samples in a row that agreed with it.
    """

    narrowed: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    group: list[str] = field(default_factory=list)
    approvals: int = 0


class Steered(TypedDict):
    """State of a run's controller; ``copy`` holds tensors and is checked where they are taken over.

    ``held`` and ``due`` are there if an outcome was waited for because of the checkpoint: see ``AdaptiveRun.hold``.
    """

    base: dict[str, Any]
    in_force: dict[str, Any] | None
    flops: dict[str, Count]
    controller: ControllerState
    pending: Decision | None
    demotions: NotRequired[DemotionState]
    copy: NotRequired[Any]
    held: NotRequired[bool]
    due: NotRequired[bool | None]


class DemotingController(Controller):
    """A controller that also looks for narrower formats, as a plan ranks them.

    Args:
        layers: The layers that have operations of their own, in the model's order.
        options: Its options; ``min_low_precision_share`` is the share to reach.
        targets: The narrower formats of the plan, in any order.

    Attributes:
        demotions: What was moved, and what is tried.
    """

    def __init__(self, layers: Sequence[Candidate], options: Options, targets: Sequence[Target]) -> None:
        self.demotions = DemotionState()
        self._targets = sorted(targets, key=lambda each: (not each.is_chosen, each.sensitivity))
        self._together = {name: target.layers for target in targets for name in target.layers}
        super().__init__(layers, options)

    # Its memory

    def further_state(self) -> dict[str, Any]:
        """A :class:`DemotionState`, as a dict, under its key."""
        return {"demotions": asdict(self.demotions)}

    def load_further_state(self, state: Mapping[str, Any]) -> None:
        """Reads :meth:`further_state`, if it is there."""
        self.demotions = DemotionState(**deepcopy(dict(state.get("demotions", {}))))
        self._adapt_limits()

    def adapt(self, formats: Mapping[str, str]) -> None:
        """Takes over the formats of the user's policy; what is no narrower than that is over."""
        super().adapt(formats)
        state = self.demotions
        state.narrowed = {name: each for name, each in state.narrowed.items() if is_wider(formats[name], each)}
        self._adapt_limits()

    def with_promoted(self, promoted: Promotions) -> dict[str, Promotion]:
        """The formats in force if these were the promotions: narrowed layers, and promoted ones over them."""
        return _narrow(self.demotions.narrowed) | dict(promoted)

    @property
    def is_near_decision(self) -> bool:
        """True if the step that is to be sampled may end in a move."""
        return super().is_near_decision or (self._may_go_on() and bool(self._formats_left()))

    # Decides

    def decide_on_sample(
        self, present: Agreement, scale: float, attempt: Try, has_room: HasRoom = lambda formats: True
    ) -> Decision | None:
        """Decides on a sampled step: back at the first relapse; where all agrees, a further group."""
        is_off = not present.is_finite or bool(self.limits.failing(present)) or self.limits.gap_is_large(present)
        if is_off and (back := self._back(present, scale, attempt, {})) is not None:
            return back
        if is_off:
            self.demotions.approvals = 0
        decision = super().decide_on_sample(present, scale, self._below(attempt), has_room)
        if decision is not None or is_off:
            return decision
        return self._further(scale, attempt, has_room)

    def decide_on_falling_scale(self, scale: float, attempt: Try) -> Decision | None:
        """Decides on a loss scale that would have to fall below 1."""
        present = attempt(self.in_force, scale) if self.demotions.narrowed else None
        back = None if present is None else self._back(present, scale, attempt, {})
        return back or super().decide_on_falling_scale(scale, self._below(attempt))

    def decide_on_failure(
        self, culprits: Sequence[str], scale: float, attempt: Try, evidence: Mapping[str, Any]
    ) -> Decision | None:
        """Decides on a step that failed for want of precision: back first, wider only if that does not help."""
        if self.demotions.narrowed:
            back = self._back(attempt(self.in_force, scale), scale, attempt, evidence)
            if back is not None:
                return back
        return super().decide_on_failure(culprits, scale, self._below(attempt), evidence)

    def _below(self, attempt: Try) -> Try:
        """Tries promotions over what is narrowed."""
        return lambda promotions, scale: attempt(self.with_promoted(promotions), scale)

    def _back(self, present: Agreement, scale: float, attempt: Try, evidence: Mapping[str, Any]) -> Decision | None:
        """The smallest set of layers whose return restores agreement, the latest first; None if not even all do."""
        narrowed = self.demotions.narrowed
        if not narrowed or self.limits.accepts(present):
            return None

        def without(names: Sequence[str]) -> dict[str, str]:
            back = {each for name in names for each in self._together[name]}
            return {name: format for name, format in narrowed.items() if name not in back}

        def works(names: Sequence[str]) -> bool:
            return self.limits.accepts(attempt(_narrow(without(names)) | self.promoted, scale))

        candidates = _first_of_each(reversed(narrowed), self._together)
        found = smallest(candidates, works, self.options.max_trials)
        return self._taken_back(without(found), present, scale, evidence) if found else None

    def _taken_back(
        self, left: dict[str, str], present: Agreement, scale: float, evidence: Mapping[str, Any]
    ) -> Decision:
        state, layers = self.demotions, self.layers
        group = [name for name in state.narrowed if name not in left]
        moves = tuple((name, state.narrowed[name], layers[name].format) for name in group if name not in self.promoted)
        told = {**evidence, **present.summary(), "loss_scale": scale}
        reason = f"{self.limits.reason(present)}, and agrees without what the plan narrowed"
        restores = present.is_finite and self.is_settling and bool(self.limits.poisoned(present))
        state.narrowed, state.refused = left, [*state.refused, *group]
        state.group, state.approvals = [], 0
        self._changed()
        return Decision("promote", moves, None, restores, reason, told, self._written_in_force())

    def _further(self, scale: float, attempt: Try, has_room: HasRoom) -> Decision | None:
        """The next group, if the step agrees with it and did so before; a group that fails is halved."""
        state = self.demotions
        if not self._may_go_on():
            return None
        formats = self._formats_left()
        state.group = [name for name in state.group if name in formats] or self._next_group(formats)
        if not state.group:
            return None
        tried = {name: formats[name] for name in state.group}
        found = attempt(_narrow(state.narrowed | tried) | self.promoted, scale)
        if not (limits_for(self._computing(tried)).accepts(found) and has_room(tried)):
            if len(_first_of_each(state.group, self._together)) == 1:
                state.refused += state.group
                state.group = []
            state.group, state.approvals = self._safer_half(state.group), 0
            self.counts.next_sample = self.counts.batches + 1
            return None
        state.approvals += 1
        if state.approvals < _APPROVALS:
            self.counts.next_sample = self.counts.batches + 1
            return None
        moves = tuple((name, self._format(name), format) for name, format in tried.items())
        state.narrowed |= tried
        state.group, state.approvals = [], 0
        self._changed()
        reason = f"agrees with fp32 in the narrower format of the plan, {counted(len(moves), 'layer')}"
        return Decision("demote", moves, None, False, reason, found.summary(), self._written_in_force())

    def _may_go_on(self) -> bool:
        """True unless layers are promoted, or a run has had all its assignments."""
        return not self.promoted and len(self.assignments) < self.options.max_assignments

    def _formats_left(self) -> dict[str, str]:
        """The layers that may be narrowed further, the safest first, with the plan's format of each."""
        found: dict[str, str] = {}
        goal = self.options.min_low_precision_share or 0.0
        flops = {name: layer.flops for name, layer in self.layers.items()}
        total = sum(flops.values())
        low = self.low_share() if total else math.inf
        for target in self._targets:
            if not target.is_chosen and low >= goal:
                break
            names = [name for name in target.layers if name in self.layers]
            is_free = all(self._may_have(self.layers[name], target.format) for name in names)
            if names and is_free and not set(target.layers) & set(self.demotions.refused):
                found |= dict.fromkeys((name for name in names if name not in found), target.format)
                low += sum(flops[name] for name in names if self._leaves_wide(name, target.format)) / (total or 1)
        return found

    def _leaves_wide(self, name: str, format: str) -> bool:
        return get_format(format).is_low_precision and not get_format(self._format(name)).is_low_precision

    def _may_have(self, layer: Candidate, format: str) -> bool:
        """True if a layer is free and computes wider than this; what needs a loss scale needs one that moves."""
        if layer.is_pinned or not is_wider(self._format(layer.name), format):
            return False
        return not is_scaling_needed({format}) or self.options.scales is not None

    def _next_group(self, formats: Mapping[str, str]) -> list[str]:
        """The safer half of what is left; all of it where only one more assignment may be had."""
        may_have = self.options.max_assignments - len(self.assignments)
        return list(formats) if may_have <= 1 else self._safer_half(list(formats))

    def _safer_half(self, names: Sequence[str]) -> list[str]:
        """The first half of some layers; those that move together stay together."""
        leading = _first_of_each(names, self._together)
        chosen = {each for name in leading[: (len(leading) + 1) // 2] for each in self._together[name]}
        return [name for name in names if name in chosen] if len(leading) > 1 else list(names)

    def _computing(self, more: Mapping[str, str]) -> list[str]:
        return [more.get(name, self._format(name)) for name in self.layers]

    def _changed(self) -> None:
        self._adapt_limits()
        self._note_assignment()
        self._settle_in()

    def _adapt_limits(self) -> None:
        if self.demotions.narrowed:
            self.limits = limits_for(self._computing({}))
        else:
            self.limits = limits_for(layer.format for layer in self.layers.values())

    def _written_in_force(self) -> dict[str, str]:
        return {name: each.to_text() for name, each in self.in_force.items()}


def _narrow(formats: Mapping[str, str]) -> dict[str, Promotion]:
    return {name: Promotion(format) for name, format in formats.items()}


def controller_for(layers: Sequence[Candidate], options: Options, targets: Sequence[Target] | None) -> Controller:
    """The controller of a run; one that looks for narrower formats if a plan says which."""
    return Controller(layers, options) if targets is None else DemotingController(layers, options, targets)


def _first_of_each(names: Iterable[str], together: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Of layers that move together, the one that comes first."""
    return list({together[name]: name for name in reversed(list(names))}.values())[::-1]


def targets_of(plan: PrecisionPlan) -> list[Target]:
    """The narrower formats of a plan: those that it chose, and for layers that it left wide the least harmful one."""
    with_products = {each.name for each in plan.outline if each.has_products}
    by_layers: dict[tuple[str, ...], dict[str, float]] = {}
    for layers, offers in zip(plan.sensitivities.variables, plan.sensitivities.offers, strict=True):
        usable = {each: offer.sensitivity for each, offer in offers.items() if each in plan.formats}
        by_layers[layers] = {each: found for each, found in usable.items() if not offers[each].problem}
    targets = []
    for (layers, usable), chosen in zip(by_layers.items(), plan.chosen, strict=True):
        is_chosen = chosen in usable
        format = chosen if is_chosen else min(usable, key=lambda each: usable[each], default=None)
        if format is None:
            continue
        own = tuple(name for name in layers if name in with_products or not get_format(format).use.products)
        targets.append(Target(own, format, usable[format], is_chosen))
    return [each for each in targets if each.layers]
