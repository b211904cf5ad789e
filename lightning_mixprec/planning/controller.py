"""The adaptive controller: decides which layers are promoted and taken back.

It looks at nothing itself. It is told how steps went and how sampled steps agree with fp32, it asks for trials of other
formats on a captured batch, and it answers with decisions. All that it remembers is in its state, of plain types, so a
run that is resumed decides as one that was not interrupted.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, replace
from typing import Any, Literal

from lightning_mixprec.numerics.formats import get_format, is_wider
from lightning_mixprec.planning.agreement import Agreement, limits_for
from lightning_mixprec.planning.controller_state import ControllerCounts, ControllerState, Options
from lightning_mixprec.planning.promotions import Promotion, Promotions, read, written
from lightning_mixprec.planning.remedies import Candidate, Remedies, Remedy, Try
from lightning_mixprec.records.changes import Decision, Refused
from lightning_mixprec.records.words import listed

_FIRST_SAMPLES = (0, 10, 30, 100, 300)
_WINDOW = 100
_DOUBTS = 2
_ACCUSATIONS, _SKIPS_IN_A_ROW, _SKIPS_IN_WINDOW = 2, 3, 6
_SMALL_SHARE = 0.05
_MOST_RESTORES = 3
_MOST_PATIENCE, _MOST_FRUITLESS = 4, 6
_BF16_TOLERANCE = 0.1
_APPROVALS = 2

HasRoom = Callable[[Mapping[str, str]], bool]
"""Says whether layers would fit into formats with room to spare."""


class Controller:
    """Decides which layers compute wider than the user's policy says.

    Args:
        layers: The layers that have operations of their own, in the model's order.
        options: Its options.

    Attributes:
        promoted: The promotions in force.
        assignments: The sets of promotions that have been in force, none included.
        counts: Its counters and dates.
        refused: What the latest decision would have been, had a bound not forbidden it.
    """

    def __init__(self, layers: Sequence[Candidate], options: Options) -> None:
        self.options = options
        self.refused: Refused | None = None
        self.promoted: dict[str, Promotion] = {}
        self.counts = ControllerCounts()
        self.assignments: list[dict[str, Promotion]] = [{}]
        self.layers = {layer.name: layer for layer in layers}
        self.adapt({layer.name: layer.format for layer in layers})

    # Its memory

    def state_dict(self) -> dict[str, Any]:
        """Its :class:`ControllerState`, as a dict."""
        assignments = [written(promoted) for promoted in self.assignments]
        state = ControllerState(**asdict(self.counts), promoted=written(self.promoted), assignments=assignments)
        return asdict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Reads :meth:`state_dict`.

        Raises:
            LookupError, PolicyError, TypeError: It is damaged.
        """
        self.promoted, *self.assignments = (read(promoted) for promoted in (state["promoted"], *state["assignments"]))
        self.counts = ControllerCounts(**deepcopy({each.name: state[each.name] for each in fields(ControllerCounts)}))

    def further_state(self) -> dict[str, Any]:
        """What a further kind of controller remembers besides, by keys of its own."""
        return {}

    def load_further_state(self, state: Mapping[str, Any]) -> None:
        """Reads :meth:`further_state`, before :meth:`load_state_dict`."""

    def rebase(self, formats: Mapping[str, str]) -> None:
        """Starts from another policy of the user; promotions that are no wider than it are over.

        Args:
            formats: The format that the policy has each layer compute in.
        """
        self.adapt(formats)
        self.promoted = {name: each for name, each in self.promoted.items() if is_wider(each.compute, formats[name])}
        self.assignments = [self.in_force]
        self._settle_in()

    def adapt(self, formats: Mapping[str, str]) -> None:
        """Takes over the formats of the user's policy, which also say how well a step can agree with fp32."""
        self.limits = limits_for(formats.values())
        self.layers = {name: replace(layer, format=formats[name]) for name, layer in self.layers.items()}

    def measured(self, flops: Mapping[str, int]) -> None:
        """Takes over the layers' flops."""
        self.layers = {name: replace(layer, flops=flops.get(name, 0)) for name, layer in self.layers.items()}

    def low_share(self, promoted: Promotions | None = None) -> float:
        """The share of the flops in at most 16 bits; NaN if the layers have no flops."""
        promoted = self.promoted if promoted is None else promoted
        formats = {name: layer.format for name, layer in self.layers.items()}
        formats |= {name: promotion.compute for name, promotion in self.with_promoted(promoted).items()}
        low = sum(layer.flops for name, layer in self.layers.items() if get_format(formats[name]).is_low_precision)
        total = sum(layer.flops for layer in self.layers.values())
        return low / total if total else math.nan

    @property
    def in_force(self) -> dict[str, Promotion]:
        """The formats of layers that compute in others than the user's policy says."""
        return self.with_promoted(self.promoted)

    def with_promoted(self, promoted: Promotions) -> dict[str, Promotion]:
        """The same if these were the promotions."""
        return dict(promoted)

    # Told

    @property
    def is_sample_due(self) -> bool:
        """True if the step of the batch that begins next is to be compared with fp32."""
        is_settled = self.counts.origin >= 0 and not self.counts.skips_in_a_row
        return is_settled and self.counts.batches + 1 >= self.counts.next_sample

    def begin_batch(self) -> bool:
        """Counts a batch that begins; true if its step is to be compared with fp32."""
        is_due = self.is_sample_due
        self.counts.batches += 1
        return is_due

    def see_step(self, *, skipped: bool, loss_is_bad: bool) -> bool:
        """Counts a step that ended; true if it is to be looked into."""
        counts = self.counts
        counts.steps += 1
        counts.skips_in_a_row = counts.skips_in_a_row + 1 if skipped else 0
        if not (skipped or loss_is_bad):
            if counts.origin < 0:
                self._settle_in()
            return False
        counts.failures = [each for each in counts.failures if counts.steps - each[0] < _WINDOW]
        counts.failures.append([counts.steps, int(loss_is_bad)])
        patience = 2 ** min(counts.fruitless, _MOST_PATIENCE)
        return counts.steps >= counts.next_look and bool(
            sum(bad for _, bad in counts.failures) >= patience
            or counts.skips_in_a_row >= _SKIPS_IN_A_ROW * patience
            or len(counts.failures) >= _SKIPS_IN_WINDOW * max(patience / 2, 1)
        )

    def accuse(self) -> bool:
        """Counts a step that failed for want of precision; true if it is time to act, because one is an outlier."""
        counts = self.counts
        counts.accusations = [step for step in counts.accusations if counts.steps - step < _WINDOW]
        counts.accusations.append(counts.steps)
        is_persistent = counts.skips_in_a_row >= _SKIPS_IN_A_ROW or self.fails_often
        return is_persistent or len(counts.accusations) >= _ACCUSATIONS

    def see_loss(self, size: float) -> None:
        """Takes note of the size of a sampled step's losses; earlier ones are forgotten by halves."""
        self.counts.usual_loss = max(size, self.counts.usual_loss / 2)

    def see_no_sample(self) -> None:
        """Puts a sample off that could not be taken, or told nothing; each time in a row for twice as long."""
        counts = self.counts
        counts.next_sample = counts.batches + min(2**counts.misses, self.options.every_n_steps)
        counts.misses = min(counts.misses + 1, 16)

    def give_up_looking(self) -> None:
        """Puts the next look into a failed step off, because this one came to nothing; each time for longer."""
        self.counts.fruitless = min(self.counts.fruitless + 1, _MOST_FRUITLESS)
        self.counts.next_look = self.counts.steps + 2**self.counts.fruitless

    @property
    def is_settling(self) -> bool:
        """True while samples are dense, so that wrong steps are undone at the price of few right ones."""
        return self.counts.batches - self.counts.origin <= _FIRST_SAMPLES[-1] + _DOUBTS

    @property
    def is_near_decision(self) -> bool:
        """True if the step that is to be sampled may end in a move: of layers in doubt, or of promoted ones back."""
        return self.counts.doubts + 1 >= _DOUBTS or bool(self._oldest_group())

    # Decides

    @property
    def fails_often(self) -> bool:
        """True if steps of late failed more often than a search for a loss scale from 1 up explains."""
        return len(self.counts.failures) >= _SKIPS_IN_WINDOW

    def decide_on_falling_scale(self, scale: float, attempt: Try) -> Decision | None:
        """Decides on a loss scale that would have to fall below 1: gradients that do not fit even as they are.

        No layer is accused, but few that cost little may be all that holds the scale down.
        """
        remedy = self._remedies(attempt).promotions(scale)
        if remedy is not None and not self._is_small(remedy):
            remedy = None
        return self._carried_out(remedy, scale, Agreement(False, math.nan, {}), {})

    def decide_on_failure(
        self, culprits: Sequence[str], scale: float, attempt: Try, evidence: Mapping[str, Any]
    ) -> Decision | None:
        """Decides on a step that failed for want of precision.

        Args:
            culprits: The layers that are suspected, the likeliest first.
            scale: The present loss scale.
            attempt: Tries formats on the failed step's batch.
            evidence: Plain values for the history.
        """
        remedies = self._remedies(attempt)
        present = remedies.attempt({}, scale)
        remedy = None if self.limits.accepts(present) else remedies.promotions_or_less(scale, culprits)
        return self._carried_out(remedy, scale, present, evidence)

    def decide_on_sample(
        self, present: Agreement, scale: float, attempt: Try, has_room: HasRoom = lambda formats: True
    ) -> Decision | None:
        """Decides on a sampled step that was compared with fp32.

        Args:
            present: Its agreement with fp32.
            scale: The present loss scale.
            attempt: Tries formats on the sampled step's batch.
            has_room: Says whether layers would fit into narrower formats with room to spare, on this batch.
        """
        counts = self.counts
        if not present.is_finite:
            self.see_no_sample()
            return None
        counts.misses = 0
        failing = self.limits.failing(present)
        if not failing and not self.limits.gap_is_large(present):
            counts.doubts = counts.restores = 0
            counts.fruitless //= 2
            self._next_sample()
            return self._demotion(scale, attempt, has_room)
        counts.doubts += 1
        if counts.doubts < _DOUBTS:
            counts.next_sample = counts.batches + 1
            return None
        counts.doubts = 0
        self._next_sample()
        remedy = self._remedy(present, scale, self._remedies(attempt))
        return self._carried_out(remedy, scale, present, {"layers": failing[:8]})

    def take_refused(self) -> Refused | None:
        """What the latest decision would have been, had a bound not forbidden it; told once."""
        refused, self.refused = self.refused, None
        return refused

    def decide_on_damage(self, names: Sequence[str]) -> Decision | None:
        """Decides on weights or buffers that are not finite: back to the last good copy of them, a few times."""
        if self.counts.restores >= _MOST_RESTORES:
            return None
        self.counts.restores += 1
        self._settle_in()
        reason = f"{listed(names)} not finite"
        return Decision("restore", (), None, True, reason, {"damaged": list(names[:8])}, written(self.promoted))

    # Weighs

    def _remedies(self, attempt: Try) -> Remedies:
        layers = {name: replace(layer, format=self._format(name)) for name, layer in self.layers.items()}

        def on_top(more: Promotions, scale: float) -> Agreement:
            return attempt({**self.promoted, **more}, scale)

        return Remedies(layers, self.limits, self.options, on_top)

    def _remedy(self, present: Agreement, scale: float, remedies: Remedies) -> Remedy | None:
        """The least that helps: a larger loss scale, else few promotions, with a larger loss scale or without."""
        starved = self.limits.starved(present)
        if not starved:
            remedies.bf16_tolerance = _BF16_TOLERANCE  # it rounds more coarsely, and rounding may be what is wrong
        if starved and (larger := remedies.larger_scale(scale)) is not None:
            return larger
        promotions = remedies.promotions(scale)
        unpinned = remedies.unpinned(starved, scale) if starved else None
        found = [remedy for remedy in (promotions, unpinned) if remedy is not None]
        return min(found, key=lambda remedy: self._cost(remedy.promotions), default=None)

    def _is_small(self, remedy: Remedy) -> bool:
        flops, moved = self._cost(remedy.promotions)
        total = sum(layer.flops for layer in self.layers.values())
        return flops <= _SMALL_SHARE * total and moved <= max(1, _SMALL_SHARE * len(self.layers))

    def _cost(self, promotions: Promotions) -> tuple[int, int]:
        """Flops that leave 16 bits, and layers that move."""
        wide = [name for name, promotion in promotions.items() if not get_format(promotion.compute).is_low_precision]
        return sum(self.layers[name].flops for name in wide), len(promotions)

    def _forbidding(self, promoted: Promotions) -> tuple[str, float] | None:
        """The bound that forbids promotions, and its value; None if they are allowed."""
        least, share = self.options.min_low_precision_share, self.low_share(promoted)
        of_policy = self.low_share({})
        if least is not None and share < least * (of_policy if of_policy < least else 1) and share < self.low_share():
            return "min_low_precision_share", least
        known = self.assignments
        is_known = self.with_promoted(promoted) in known or len(known) < self.options.max_assignments
        return None if is_known else ("max_assignments", self.options.max_assignments)

    def _carried_out(
        self, remedy: Remedy | None, scale: float, present: Agreement, evidence: Mapping[str, Any]
    ) -> Decision | None:
        if remedy is None:
            self.give_up_looking()
            return None
        counts, promoted = self.counts, {**self.promoted, **remedy.promotions}
        moves = tuple((name, self._format(name), each.compute) for name, each in remedy.promotions.items())
        if (bound := self._forbidding(promoted)) is not None:
            self.refused = Refused(moves, self.low_share(promoted), bound, self.limits.reason(present))
            self.give_up_looking()
            return None
        for name in remedy.promotions:
            if name in counts.relapses:
                counts.relapses[name] += 1
            counts.since[name], counts.group[name] = counts.batches, counts.moves
        self.promoted = promoted
        if moves:
            self._note_assignment()
        counts.failures, counts.accusations, counts.fruitless = [], [], 0
        restores = present.is_finite and self.is_settling and bool(self.limits.poisoned(present))
        self._settle_in()
        told = {**evidence, **present.summary(), "loss_scale": scale}
        kind: Literal["promote", "scale"] = "promote" if moves else "scale"
        reason = self.limits.reason(present)
        return Decision(kind, moves, remedy.scale, restores, reason, told, written(self.promoted))

    def _demotion(self, scale: float, attempt: Try, has_room: HasRoom) -> Decision | None:
        """The group of promotions that has stayed longest, taken back if the step agrees without it time and again."""
        group = self._oldest_group()
        if not group:
            return None
        counts = self.counts
        remaining = {name: promotion for name, promotion in self.promoted.items() if name not in group}
        if self._forbidding(remaining) is not None:
            return None
        tried = attempt(remaining, scale)
        key = group[0]
        if not (self.limits.accepts(tried) and has_room({name: self.layers[name].format for name in group})):
            counts.approvals.pop(key, None)
            for name in group:
                counts.since[name] = counts.batches
            return None
        counts.approvals[key] = counts.approvals.get(key, 0) + 1
        if counts.approvals[key] < _APPROVALS:
            counts.next_sample = counts.batches + 1
            return None
        moves = tuple((name, self._format(name), self.layers[name].format) for name in group)
        counts.approvals.pop(key)
        self.promoted = remaining
        for name in group:
            counts.relapses.setdefault(name, 0)
        self._note_assignment()
        self._settle_in()
        reason = "agrees with fp32 without it again"
        return Decision("demote", moves, None, False, reason, tried.summary(), written(remaining))

    def _oldest_group(self) -> list[str]:
        counts = self.counts
        due = [
            name
            for name in self.promoted
            if not self.layers[name].is_pinned
            and counts.batches - counts.since.get(name, 0)
            >= self.options.dwell_steps * 4 ** min(counts.relapses.get(name, 0), 8)
        ]
        if not due:
            return []
        number = min(counts.group.get(name, 0) for name in due)
        whole = [name for name in self.promoted if counts.group.get(name, 0) == number]
        return whole if set(whole) <= set(due) else []

    def _format(self, name: str) -> str:
        in_force = self.in_force
        return in_force[name].compute if name in in_force else self.layers[name].format

    def _note_assignment(self) -> None:
        self.counts.moves += 1
        if self.in_force not in self.assignments:
            self.assignments.append(self.in_force)

    def _settle_in(self) -> None:
        """Makes samples dense from here on, and sparse later."""
        self.counts.origin = self.counts.batches
        self._next_sample(is_first=True)

    def _next_sample(self, *, is_first: bool = False) -> None:
        counts, every = self.counts, self.options.every_n_steps
        passed = counts.batches - counts.origin
        later: Iterable[int] = (offset for offset in _FIRST_SAMPLES if offset < every and (is_first or offset > passed))
        offset = next(iter(later), (passed // every + 1) * every)
        counts.next_sample = counts.origin + offset
