"""The records of changes of precision: moves, decisions of ``AdaptivePrecision``, phases of ``PrecisionScheduler``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

from typing_extensions import NotRequired, TypedDict

from lightning_mixprec.records.schema import Count, Place

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
        evidence: Plain values that the change rests on, if it rests on something.
    """

    output: NotRequired[str]
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
