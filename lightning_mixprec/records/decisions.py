"""Decisions of the adaptive controller."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Decision:
    """What is to change.

    Attributes:
        kind: Whether layers are promoted or demoted, or only the loss scale is moved or damage undone.
        moves: The layers that change, each with the format until now and from now on.
        promoted: All layers that compute wider than the user's policy says, from now on, as a policy writes it.
        scale: The loss scale to go on with; None for the present one.
        reason: One line.
        evidence: Plain values for the history.
        restores: Whether weights and optimizers go back to the last good copy, because the steps since then were wrong.
    """

    kind: Literal["promote", "demote", "scale", "restore"]
    moves: tuple[tuple[str, str, str], ...]
    promoted: Mapping[str, str]
    scale: float | None
    reason: str
    evidence: Mapping[str, Any]
    restores: bool = False

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

    def to_dict(self) -> dict[str, Any]:
        """Plain types; of ``promoted`` only what moves now."""
        moves = [list(move) for move in self.moves]
        rest = {"scale": self.scale, "restores": self.restores, "reason": self.reason}
        return {"kind": self.kind, "moves": moves, **rest, "evidence": dict(self.evidence)}


def quoted(names: Sequence[str], most: int = 3) -> str:
    """A few names in a sentence.

    >>> quoted(["a", "b", "", "c"])
    "'a', 'b', the module's own operations and 1 more"
    """
    shown = [repr(name) if name else "the module's own operations" for name in names[:most]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
