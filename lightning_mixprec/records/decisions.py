"""The record of a decision of ``AdaptivePrecision``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lightning_mixprec.records.schema import Count


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

    def to_dict(self) -> dict[str, Any]:
        """Plain types, of what every decision says."""
        row = {each: getattr(self, each) for each in Decided.__dataclass_fields__}
        return {**row, "moves": [list(move) for move in self.moves], "evidence": dict(self.evidence)}


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

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain types."""
        return {**asdict(self), "moves": [list(move) for move in self.moves]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Decision":
        """Reads :meth:`state_dict`."""
        return cls(**{**state, "moves": tuple(tuple(move) for move in state["moves"])})
