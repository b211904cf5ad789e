"""The file of a run's per-layer rows: one JSON object a line, in the run's log directory.

Every row has ``"monitor"`` (a key of :data:`ROWS` or :data:`PARTS`, which name the definitions of what else is in it),
``"step"`` (optimizer steps taken), ``"epoch"``, ``"batch_idx"`` and ``"run_id"``, which tells the rows of one run from
those of another in the same file; rows of 0.1.0 have none. A number that is not finite is null. Lines are appended, so
a resumed run goes on in the same file, and under the same ``run_id``; a line that a crash cut short is closed first.

Where a sample has rows of sixteen layers or more these are one line, which has ``"rows"``, their number, and a list
under each key that differs (see :mod:`~lightning_mixprec.records.folding`). :func:`rows_in` reads both as rows.

A row of ``"adaptive"`` is one of

- a step that was compared with fp32: ``sample`` (``is_finite``, ``loss_gap``, ``min_grad_cosine``) and ``loss_scale``;
- what is to change: ``decision`` and, unless it is only to go back to a copy, ``passes``, the steps that were tried;
- a failed step in which nothing is to be moved: ``verdict`` (as in ``"overflow"``; null if there is none);
- ``problem``: why a batch could not be tried.
"""

import contextlib
import json
import math
import os
import uuid
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_mixprec.records.changes import Came, Decided
from lightning_mixprec.records.compared import Compared
from lightning_mixprec.records.events import Event
from lightning_mixprec.records.folding import folded, unfolded
from lightning_mixprec.records.runs import Change, Curve, End, Run, Sample
from lightning_mixprec.records.samples import ClosenessRow, LossRow, NotObservedRow, StagnationRow, UnderflowRow
from lightning_mixprec.records.schema import Count, matches

FILE_NAME = "mixprec.jsonl"

ROWS: dict[str, Any] = {
    "overflow": Event,
    "underflow": UnderflowRow | StagnationRow | NotObservedRow,
    "fidelity": ClosenessRow | LossRow,
    "schedule": Came,
}
"""The rows of monitors that write one kind, or a few that are told apart by their keys."""

PARTS: dict[str, dict[str, Any]] = {
    "report": {"run": Run, "curve": Curve, "change": Change, "sample": Sample, "end": End},
    "adaptive": {"decision": Decided},
    "compare": {"compared": Compared},
}
"""The rows of those that write several kinds, by the key that holds what a row tells."""


class Journal:
    """Rows on their way to a file.

    A file that cannot be written costs one warning and nothing else.

    Args:
        folder: The run's log directory; None for nowhere.
        run_id: What every row says of the run that it is of; see :func:`new_run_id`.
    """

    def __init__(self, folder: str | Path | None, run_id: str = "") -> None:
        self.run_id = run_id
        self.path = Path(folder) / FILE_NAME if folder is not None else None
        self._rows: list[dict[str, Any]] = []

    def write(self, **row: Any) -> None:
        """Adds a row; it is in the file after :meth:`flush`."""
        if self.path is not None:
            whose = {"run_id": self.run_id} if self.run_id else {}
            self._rows.append(plain({**row, **whose}))

    def flush(self) -> None:
        """Appends the rows to the file, all in one write."""
        if self.path is None or not self._rows:
            return
        rows, self._rows = self._rows, []
        try:
            _append_lines(self.path, map(_line, folded(rows)))
        except OSError as error:
            says = f"{self.path} cannot be written ({error}); the run goes on without per-layer rows."
            warnings.warn(says, stacklevel=2)
            self.path = None


def new_run_id() -> str:
    """Eight hexadecimal digits that no other run in the folder has; drawn from none of the run's generators."""
    return uuid.uuid4().hex[:8]


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, in order; a line that a crash cut short, or that is none of ours, is passed over."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if isinstance(row, dict) and matches(row.get("step"), Count):
                    yield from unfolded(row)


def add_row(folder: str | Path, row: dict[str, Any]) -> Path:
    """Adds a row to the file of a run that has ended, as one of its latest rows.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written; it is as it was.
    """
    path = Path(folder) / FILE_NAME
    rows = list(rows_in(path)) if path.is_file() else []
    last = rows[-1] if rows else {}
    whose = {"run_id": last["run_id"]} if last.get("run_id") else {}
    step = {"step": last.get("step", 0)}
    _append_lines(path, [_line(plain({**row, **step, **whose}))])
    return path


def plain(value: Any) -> Any:
    """A value of JSON's types; numbers that are not finite become None.

    >>> plain({"a": float("inf"), "b": (1, 2.5)})
    {'a': None, 'b': [1, 2.5]}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False, separators=(",", ":"))


def _append_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opening = "" if _ends_whole(path) else "\n"
    _append(path, opening + "".join(line + "\n" for line in lines))


def _append(path: Path, text: str) -> None:
    """Appends all of the text, or nothing where the disk is full."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        if path.is_file():
            os.truncate(path, size)
        raise


def _ends_whole(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
