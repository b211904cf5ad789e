"""The records of changes of precision: moves, decisions of ``AdaptivePrecision``, phases of ``PrecisionScheduler``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

from typing_extensions import NotRequired, TypedDict

from lightning_mixprec.records.schema import Count, Place
from lightning_mixprec.records.words import cell, listed, quoted

_FEW = 4
"""Moves that a line tells one by one."""

MoveInShort = TypedDict("MoveInShort", {"step": Count, "layer": str, "from": str, "to": str, "reason": str})
"""A move as the report's rows have it."""


class Move(MoveInShort):
    """A layer that went from one compute format to another, or a subtree that changed as one.

    Keys:
        step: Optimizer steps taken before.
        layer: Its name, or that of the subtree's top.
        from: What it computed in.
        to: What it computes in.
        reason: Why.
        output: What its output is handed on in from now on, if that changes.
        scaling: What one scale of its products in 8 bits is of from now on, if that or the next changes.
        gradients: Which of its gradients are products in 8 bits from now on.
        evidence: Plain values that the change rests on, if it rests on something.
    """

    output: NotRequired[str]
    scaling: NotRequired[str]
    gradients: NotRequired[str]
    evidence: NotRequired[dict[str, Any]]


def told_shortly(move: Move) -> MoveInShort:
    """A move without what only the history keeps."""
    told: Mapping[str, Any] = move
    return cast(MoveInShort, {key: told[key] for key in MoveInShort.__annotations__})


@dataclass(frozen=True)
class Decided:
    """A decision as its row tells it.

    Attributes:
        kind: Whether layers are promoted or demoted, or only the loss scale is moved or damage undone.
        moves: The layers that change, each with the format until now and from now on.
        scale: The loss scale to go on with; None for the present one.
        restores: Whether weights and optimizers go back to the last good copy, because the steps since then were wrong.
        reason: One line.
        evidence: Plain values for the history.
    """

    kind: Literal["promote", "demote", "scale", "restore"]
    moves: tuple[tuple[str, str, str], ...]
    scale: float | None
    restores: bool
    reason: str
    evidence: Mapping[str, Any]

    def in_words(self) -> str:
        """What changes, in part of a line."""
        scale = [f"loss scale -> {self.scale:g}"] if self.scale is not None else []
        restored = ["wrong steps undone" if self.moves else "restored"] if self.restores else []
        return ", ".join(moves_in_words(self.moves) + scale + restored)


def moves_in_words(moves: Sequence[tuple[str, str, str]]) -> list[str]:
    """Moves of layers, in part of a line: the first few, and how many there are.

    >>> moves_in_words([("a", "fp16", "bf16")])
    ["'a' fp16 -> bf16"]
    """
    told = [f"{quoted(name)} {old} -> {new}" for name, old, new in moves[:_FEW]]
    return [f"{len(moves)} layers: {', '.join(told)}, ..."] if len(moves) > _FEW else told


def moves_table(moves: Sequence[tuple[int, str, str, str, str]], most: int) -> list[list[str]]:
    """Rows of a table, with a head, of moves (step, layer, from, to, reason): the latest; those alike are in one.

    >>> moves_table([(3, "a", "fp16", "fp32", "overflow"), (3, "b", "fp16", "fp32", "overflow")], 5)[1]
    ["'a', 'b'", '3', 'fp16', 'fp32', 'overflow']
    """
    alike: dict[tuple[int, str, str, str], list[str]] = {}
    for step, name, *rest in moves:
        alike.setdefault((step, rest[0], rest[1], rest[2]), []).append(name)
    rows = [["layer", "step", "from", "to", "reason"]] if moves else []
    for (step, old, new, reason), names in list(alike.items())[-most:]:
        rows.append([cell(names[0]) if len(names) == 1 else listed(names), str(step), old, new, reason])
    return rows


@dataclass(frozen=True)
class Refused:
    """Moves that were found necessary, and that a bound forbids.

    Attributes:
        moves: The layers, each with its format and the one that it would need.
        low_precision_share: The share of the matrix products' flops that they would leave in at most 16 bits.
        bound: Which argument forbids them, and its value.
        reason: Why they were found necessary, in one line.
    """

    moves: tuple[tuple[str, str, str], ...]
    low_precision_share: float
    bound: tuple[str, float]
    reason: str

    def in_words(self) -> str:
        """What does not happen, why, and what to do, in one line."""
        name, value = self.bound
        is_share = name == "min_low_precision_share"
        left = f", which leaves {self.low_precision_share:.1%} of the flops in at most 16 bits" if is_share else ""
        whole = "the whole model" if is_share else "these layers"
        return (
            f"{', '.join(moves_in_words(self.moves))} would be needed ({self.reason}){left}: {name}={value:g} forbids "
            f"it, nothing moves, and training goes on as it is. Train {whole} in bf16 or fp32, or set another {name}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {**asdict(self), "moves": [list(move) for move in self.moves], "bound": dict([self.bound])}


@dataclass(frozen=True)
class Made(Decided):
    """A decision that was made, after so many optimizer steps."""

    step: Count


@dataclass(frozen=True)
class Decision(Decided):
    """A decision, whole.

    Attributes:
        promoted: All layers that compute wider than the user's policy says, from now on, as a policy writes it.
    """

    promoted: Mapping[str, str]

    def with_evidence(self, **more: Any) -> "Decision":
        """The same decision with more evidence."""
        return replace(self, evidence={**self.evidence, **more})

    def to_dict(self) -> dict[str, Any]:
        """Plain types, of what its row tells."""
        return {key: value for key, value in self.state_dict().items() if key in Decided.__dataclass_fields__}

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain types."""
        return {**asdict(self), "moves": [list(move) for move in self.moves]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Decision":
        """Reads :meth:`state_dict`."""
        return cls(**{**state, "moves": tuple(tuple(move) for move in state["moves"])})


class Came(Place):
    """A phase that came.

    Keys:
        phase: Its number, from 1.
        at: Its moment in words.
        change: What differs from the policy before it.
    """

    phase: Count
    at: str
    change: str


class Looks(TypedDict):
    """Looks of a phase that waits for a plateau: the best value, and the looks since then."""

    best: float | None
    looks: Count
