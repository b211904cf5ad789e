"""The records of ``PrecisionScheduler``: phases that came, and looks of those that wait for a plateau."""

from typing_extensions import TypedDict

from lightning_mixprec.records.schema import Count, Place


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
