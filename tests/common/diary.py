"""A list for what steps and replays of them do, which no replay puts back."""

from collections.abc import Iterable, Iterator
from typing import Any


class Diary:
    """A list; of a class that a replay looks into as little as into torch's own."""

    __module__ = "torch.notes"
    __slots__ = ("_notes",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, notes: Iterable[Any] = ()) -> None:
        self._notes = list(notes)

    def append(self, note: Any) -> None:
        self._notes.append(note)

    def clear(self) -> None:
        self._notes.clear()

    def count(self, note: Any) -> int:
        return self._notes.count(note)

    def __len__(self) -> int:
        return len(self._notes)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._notes)

    def __getitem__(self, place: Any) -> Any:
        return self._notes[place]

    def __setitem__(self, place: Any, note: Any) -> None:
        self._notes[place] = note

    def __eq__(self, other: object) -> bool:
        return self._notes == (other._notes if isinstance(other, Diary) else other)
