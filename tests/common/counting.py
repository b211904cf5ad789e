"""What a step costs, counted and not timed: calls of Python functions of the package, by function."""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from lightnings import pl

import lightning_mixprec

HOME = str(Path(lightning_mixprec.__file__).parent)


class CallsOfSteps(pl.Callback):
    """Counts calls into the package over some batches, from one's start to another's; the first callback of a run.

    Args:
        begin: The first batch that is counted.
        end: The first one that is no more.
    """

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.calls: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: pl.Trainer, model: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.begin:
            sys.setprofile(self._see)
        elif batch_idx == self.end:
            sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            self.calls[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_qualname}"] += 1

    @property
    def per_step(self) -> float:
        """Calls per batch."""
        return self.calls.total() / (self.end - self.begin)


def more_in(first: Counter[str], second: Counter[str]) -> dict[str, int]:
    """What was called more often in the second."""
    return dict(second - first)
