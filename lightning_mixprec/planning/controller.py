"""The adaptive controller: evidence of how a run computes in, decisions about which layer computes in what out.

It looks at nothing itself. It is told how steps went and how sampled steps agree with fp32, it asks for trials of other
formats on a captured batch, and it answers with decisions. Everything it knows is in its state, of plain types, so a
run that is resumed decides as one that was not interrupted.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from lightning_mixprec.planning.agreement import Agreement, Limits
from lightning_mixprec.planning.remedies import Layer, Remedies, Remedy, Try, format_in, is_wider
from lightning_mixprec.records.decisions import Decision, Options, quoted

_FIRST_SAMPLES = (0, 10, 30, 100, 300)
_WINDOW = 100
_DOUBTS = 2
_ACCUSATIONS, _SKIPS_IN_A_ROW, _SKIPS_IN_WINDOW = 2, 3, 6
_SMALL_SHARE = 0.05
_MOST_RESTORES = 3
_MOST_PATIENCE, _MOST_FRUITLESS = 4, 6
_BF16_TOLERANCE = 0.1
_MIN_COSINE_IN_BF16 = 0.9
_APPROVALS = 2

HasRoom = Callable[[Mapping[str, str]], bool]
"""Whether layers would fit into formats with room to spare."""


@dataclass
class ControllerState:
    """All that the controller remembers; plain types."""

    batches: int = 0
    steps: int = 0
    misses: int = 0
    origin: int = -1
    next_sample: int = 0
    doubts: int = 0
    failures: list[list[int]] = field(default_factory=list)
    accusations: list[int] = field(default_factory=list)
    skips_in_a_row: int = 0
    fruitless: int = 0
    next_look: int = 0
    promoted: dict[str, str] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)
    group: dict[str, int] = field(default_factory=dict)
    relapses: dict[str, int] = field(default_factory=dict)
    approvals: dict[str, int] = field(default_factory=dict)
    assignments: list[dict[str, str]] = field(default_factory=lambda: [{}])
    moves: int = 0
    restores: int = 0
    usual_loss: float = 0.0


class Controller:
    """Decides which layers compute wider than the user's policy says.

    Args:
        layers: The layers that have operations of their own, in the model's order.
        options: How to decide.
    """

    def __init__(self, layers: Sequence[Layer], options: Options) -> None:
        self.options = options
        self.state = ControllerState()
        self.layers = {layer.name: layer for layer in layers}
        self.adapt({layer.name: layer.format for layer in layers})

    # What it remembers

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain types."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Reads :meth:`state_dict`."""
        copied = ControllerState(**{each.name: state[each.name] for each in fields(ControllerState)})
        self.state = ControllerState(**asdict(copied))

    def rebase(self, formats: Mapping[str, str]) -> None:
        """The user's policy says something else from now on; promotions that are no wider than it are over."""
        self.adapt(formats)
        state = self.state
        state.promoted = {
            name: value
            for name, value in state.promoted.items()
            if is_wider(format_in(value), self.layers[name].format)
        }
        state.assignments = [dict(state.promoted)]
        self._settle_in()

    def adapt(self, formats: Mapping[str, str]) -> None:
        """What the user's policy has layers compute in, and so how well a step can agree with fp32."""
        self.limits = Limits(min_cosine=_MIN_COSINE_IN_BF16) if "bf16" in formats.values() else Limits()
        self.layers = {name: replace(layer, format=formats[name]) for name, layer in self.layers.items()}

    def measured(self, flops: Mapping[str, int]) -> None:
        """The layers' flops are known."""
        self.layers = {name: replace(layer, flops=flops.get(name, 0)) for name, layer in self.layers.items()}

    def low_share(self, promoted: Mapping[str, str] | None = None) -> float:
        """The share of the flops in at most 16 bits; NaN if the layers have no flops."""
        promoted = self.state.promoted if promoted is None else promoted
        formats = {name: layer.format for name, layer in self.layers.items()}
        formats |= {name: format_in(value) for name, value in promoted.items()}
        low = sum(layer.flops for name, layer in self.layers.items() if formats[name] in ("fp16", "bf16"))
        total = sum(layer.flops for layer in self.layers.values())
        return low / total if total else math.nan

    # What it is told

    def begin_batch(self) -> bool:
        """A batch begins. Whether its step is to be compared with fp32."""
        self.state.batches += 1
        is_settled = self.state.origin >= 0 and not self.state.skips_in_a_row
        return is_settled and self.state.batches >= self.state.next_sample

    def see_step(self, *, skipped: bool, loss_is_bad: bool) -> bool:
        """A step ended. Whether it is to be looked into."""
        state = self.state
        state.steps += 1
        state.skips_in_a_row = state.skips_in_a_row + 1 if skipped else 0
        if not (skipped or loss_is_bad):
            if state.origin < 0:
                self._settle_in()
            return False
        state.failures = [each for each in state.failures if state.steps - each[0] < _WINDOW]
        state.failures.append([state.steps, int(loss_is_bad)])
        patience = 2 ** min(state.fruitless, _MOST_PATIENCE)
        return state.steps >= state.next_look and bool(
            sum(bad for _, bad in state.failures) >= patience
            or state.skips_in_a_row >= _SKIPS_IN_A_ROW * patience
            or len(state.failures) >= _SKIPS_IN_WINDOW * max(patience / 2, 1)
        )

    def accuse(self) -> bool:
        """A step that was looked into failed for want of precision. Whether it is time to act: once is an outlier."""
        state = self.state
        state.accusations = [step for step in state.accusations if state.steps - step < _WINDOW]
        state.accusations.append(state.steps)
        is_persistent = state.skips_in_a_row >= _SKIPS_IN_A_ROW or self.scale_keeps_falling
        return is_persistent or len(state.accusations) >= _ACCUSATIONS

    def see_loss(self, size: float) -> None:
        """How large the losses of a sampled step are; what was seen before is forgotten by halves."""
        self.state.usual_loss = max(size, self.state.usual_loss / 2)

    def see_no_sample(self) -> None:
        """The batch that was to be sampled could not be, or told nothing: a later one, each time twice as far away."""
        state = self.state
        state.next_sample = state.batches + min(2**state.misses, self.options.every_n_steps)
        state.misses = min(state.misses + 1, 16)

    def give_up_looking(self) -> None:
        """Looking into a failed step came to nothing: the next looks come later and later."""
        self.state.fruitless = min(self.state.fruitless + 1, _MOST_FRUITLESS)
        self.state.next_look = self.state.steps + 2**self.state.fruitless

    @property
    def is_settling(self) -> bool:
        """Whether samples are still dense, so that wrong steps are undone at the price of few right ones."""
        return self.state.batches - self.state.origin <= _FIRST_SAMPLES[-1] + _DOUBTS

    # What it decides

    @property
    def scale_keeps_falling(self) -> bool:
        """Whether steps failed more often than a search for the loss scale explains."""
        return len(self.state.failures) >= _SKIPS_IN_WINDOW

    def decide_on_falling_scale(self, scale: float, attempt: Try) -> Decision | None:
        """The loss scale falls and falls. Whether few layers that cost little are all that needs a smaller one."""
        remedy = self._remedies(attempt).promotions(scale)
        if remedy is not None and not self._is_small(remedy):
            remedy = None
        return self._carried_out(remedy, scale, Agreement(False, math.nan, {}), {})

    def decide_on_failure(
        self, culprits: Sequence[str], scale: float, attempt: Try, evidence: Mapping[str, Any]
    ) -> Decision | None:
        """A step failed for want of precision. What is to change.

        Args:
            culprits: The layers that are suspected, the likeliest first.
            scale: The present loss scale.
            attempt: Tries formats on the failed step's batch.
            evidence: What goes into the history.
        """
        remedies = self._remedies(attempt)
        present = remedies.attempt({}, scale)
        remedy = None if self.limits.accepts(present) else remedies.promotions_or_less(scale, culprits)
        return self._carried_out(remedy, scale, present, evidence)

    def decide_on_sample(
        self, present: Agreement, scale: float, attempt: Try, has_room: HasRoom = lambda formats: True
    ) -> Decision | None:
        """A sampled step was compared with fp32. What is to change.

        Args:
            present: How it agrees.
            scale: The present loss scale.
            attempt: Tries formats on the sampled step's batch.
            has_room: Whether layers would fit into narrower formats with room to spare, on this batch.
        """
        state = self.state
        if not present.is_finite:
            self.see_no_sample()
            return None
        state.misses = 0
        failing = self.limits.failing(present)
        if not failing and not self.limits.gap_is_large(present):
            state.doubts = state.restores = 0
            state.fruitless //= 2
            self._next_sample()
            return self._demotion(scale, attempt, has_room)
        state.doubts += 1
        if state.doubts < _DOUBTS:
            state.next_sample = state.batches + 1
            return None
        state.doubts = 0
        self._next_sample()
        remedy = self._remedy(present, scale, self._remedies(attempt))
        return self._carried_out(remedy, scale, present, {"layers": failing[:8]})

    def decide_on_damage(self, names: Sequence[str]) -> Decision | None:
        """Weights or buffers are not finite. Whether to go back to the last good copy of them."""
        if self.state.restores >= _MOST_RESTORES:
            return None
        self.state.restores += 1
        self._settle_in()
        reason = f"{quoted(names)} not finite"
        return Decision("restore", (), dict(self.state.promoted), None, reason, {"damaged": list(names[:8])}, True)

    # How it decides

    def _remedies(self, attempt: Try) -> Remedies:
        options, promoted = self.options, self.state.promoted
        has_bf16, scales = options.has_bf16, options.scales
        return Remedies(self.layers, promoted, self.limits, has_bf16, scales, options.max_trials, attempt)

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

    def _cost(self, promotions: Mapping[str, str]) -> tuple[int, int]:
        """Flops that leave 16 bits, and layers that move."""
        wide = [name for name, value in promotions.items() if format_in(value) == "fp32"]
        return sum(self.layers[name].flops for name in wide), len(promotions)

    def _is_allowed(self, promoted: Mapping[str, str]) -> bool:
        least, share = self.options.min_low_precision_share, self.low_share(promoted)
        if least is not None and share < least and share < self.low_share():
            return False
        known = self.state.assignments
        return dict(promoted) in known or len(known) < self.options.max_assignments

    def _carried_out(
        self, remedy: Remedy | None, scale: float, present: Agreement, evidence: Mapping[str, Any]
    ) -> Decision | None:
        if remedy is None or not self._is_allowed({**self.state.promoted, **remedy.promotions}):
            self.give_up_looking()
            return None
        state = self.state
        moves = tuple((name, self._format(name), format_in(value)) for name, value in remedy.promotions.items())
        for name in remedy.promotions:
            if name in state.relapses:
                state.relapses[name] += 1
            state.since[name], state.group[name] = state.batches, state.moves
        state.promoted = {**state.promoted, **remedy.promotions}
        if moves:
            self._note_assignment()
        state.failures, state.accusations, state.fruitless = [], [], 0
        restores = present.is_finite and self.is_settling and bool(self.limits.poisoned(present))
        self._settle_in()
        told = {**evidence, **present.summary(), "loss_scale": scale}
        kind: Literal["promote", "scale"] = "promote" if moves else "scale"
        reason = _reason(present, self.limits)
        return Decision(kind, moves, dict(state.promoted), remedy.scale, reason, told, restores)

    def _demotion(self, scale: float, attempt: Try, has_room: HasRoom) -> Decision | None:
        """The group of promotions that has stayed longest, taken back if the step agrees without it time and again."""
        group = self._oldest_group()
        if not group:
            return None
        state = self.state
        remaining = {name: value for name, value in state.promoted.items() if name not in group}
        if not self._is_allowed(remaining):
            return None
        tried = attempt(remaining, scale)
        key = group[0]
        if not (self.limits.accepts(tried) and has_room({name: self.layers[name].format for name in group})):
            state.approvals.pop(key, None)
            for name in group:
                state.since[name] = state.batches
            return None
        state.approvals[key] = state.approvals.get(key, 0) + 1
        if state.approvals[key] < _APPROVALS:
            state.next_sample = state.batches + 1
            return None
        moves = tuple((name, self._format(name), self.layers[name].format) for name in group)
        state.approvals.pop(key)
        state.promoted = remaining
        for name in group:
            state.relapses.setdefault(name, 0)
        self._note_assignment()
        self._settle_in()
        return Decision("demote", moves, dict(remaining), None, "agrees with fp32 without it again", tried.summary())

    def _oldest_group(self) -> list[str]:
        state = self.state
        due = [
            name
            for name in state.promoted
            if not self.layers[name].is_pinned
            and state.batches - state.since.get(name, 0)
            >= self.options.dwell_steps * 4 ** min(state.relapses.get(name, 0), 8)
        ]
        if not due:
            return []
        number = min(state.group.get(name, 0) for name in due)
        whole = [name for name in state.promoted if state.group.get(name, 0) == number]
        return whole if set(whole) <= set(due) else []

    def _format(self, name: str) -> str:
        promoted = self.state.promoted
        return format_in(promoted[name]) if name in promoted else self.layers[name].format

    def _note_assignment(self) -> None:
        self.state.moves += 1
        if self.state.promoted not in self.state.assignments:
            self.state.assignments.append(dict(self.state.promoted))

    def _settle_in(self) -> None:
        """From here on samples are dense at first and sparse later."""
        self.state.origin = self.state.batches
        self._next_sample(is_first=True)

    def _next_sample(self, *, is_first: bool = False) -> None:
        state, every = self.state, self.options.every_n_steps
        passed = state.batches - state.origin
        later: Iterable[int] = (offset for offset in _FIRST_SAMPLES if offset < every and (is_first or offset > passed))
        offset = next(iter(later), (passed // every + 1) * every)
        state.next_sample = state.origin + offset


def _reason(present: Agreement, limits: Limits) -> str:
    if not present.is_finite:
        return "overflow"
    starved = limits.starved(present)
    if starved:
        return f"gradients of {quoted(starved)} vanish"
    failing = limits.failing(present)
    if failing:
        return f"gradients of {quoted(failing)} differ from fp32's"
    return "loss differs from fp32's"
