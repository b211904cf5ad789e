"""One thing to know about a run, and the words that alerts share."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["error", "warning", "note"]

LEVELS: Sequence[Level] = ("error", "warning", "note")
"""The most severe first."""


@dataclass(frozen=True)
class Alert:
    """One thing to know.

    Attributes:
        level: ``"error"``: the run is damaged by it; ``"warning"``: it may be; ``"note"``: worth knowing.
        title: What happened, in a few words.
        text: What was seen, with numbers.
        advice: What to do.
        layer: The layer it is about, or the worst of several.
        step: The optimizer step at which it was seen.
        count: How many times it was seen, or how many layers it is seen of.
        of: What is counted, ``"times"`` or ``"layers"``.
    """

    level: Level
    title: str
    text: str
    advice: str = ""
    layer: str | None = None
    step: int | None = None
    count: int = 1
    of: Literal["times", "layers"] = "times"

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def counted(count: int, one: str, many: str = "") -> str:
    """A number and its noun.

    >>> counted(1, "step"), counted(1200, "batch", "batches")
    ('1 step', '1,200 batches')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def quoted(layer: str | None) -> str:
    """A layer's name in a sentence."""
    return "the LightningModule itself" if layer == "" else repr(layer)
