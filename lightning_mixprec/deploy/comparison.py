"""``Comparison``: what ``compare`` found, as rows, a table, a picture, and a record of a run."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mixprec.deploy.columns import all_columns
from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.policy.table import align
from lightning_mixprec.records.atomic_files import path_of, write_text
from lightning_mixprec.records.compared import Compared, ComparedPolicy
from lightning_mixprec.records.journal import add_row, plain
from lightning_mixprec.records.words import counted, printable

if TYPE_CHECKING:
    from lightning_mixprec.numerics.plots import Axes, FigureBase

_TITLES = {
    "policy": "policy",
    "loss": "loss",
    "loss_gap": "loss gap",
    "output_sqnr_db": "SQNR (dB)",
    "equal_decisions": "equal decisions",
    "time_ratio": "time",
    "memory_ratio": "memory",
    "saved_ratio": "saved",
}
_SPECS = {"output_sqnr_db": ".1f", "equal_decisions": ".2%", "time_ratio": ".2f", "memory_ratio": ".2f"}
_SPECS |= {"saved_ratio": ".2f", "loss_gap": "+.3g"}
_ABSOLUTE = ("loss_gap_low", "loss_gap_high", "seconds", "bytes", "saved_bytes")


@dataclass(frozen=True)
class Comparison:
    """What a module did under several policies, beside the reference.

    Attributes:
        rows: By policy a plain dict with

            - ``policy``: its name;
            - ``loss``: the mean over batches;
            - ``loss_gap``: the mean over batches of its loss less the reference's; ``loss_gap_low`` and
              ``loss_gap_high``: the 95 % interval, by resampling batches (paired bootstrap). Infinite from one batch;
            - ``output_sqnr_db``: signal to noise of the outputs, in decibels, the reference's being the signal; None
              without outputs;
            - ``equal_decisions``: the share of equal argmax, where outputs are logits; None otherwise;
            - ``time_ratio``: the median of ratios to the reference's time, both warm and in turns;
            - ``memory_ratio``: of a step's peak, weights included, to the reference's; None if it could not be counted;
            - ``saved_ratio``: of the bytes that a step with gradients keeps for its backward; None if it keeps none;
            - the metrics, and what ``validation_step`` logs.

        reference: The same of the reference, with ``seconds`` of a step, ``bytes`` at its peak and ``saved_bytes``.
        batches: On how many batches.
        step: The step that was run.
        same_weights: Whether all computed with the same weights.
        notes: What is to be known before the numbers are believed.
    """

    rows: tuple[dict[str, Any], ...]
    reference: dict[str, Any]
    batches: int
    step: str = "training_step"
    same_weights: bool = True
    notes: tuple[str, ...] = ()

    def best(self, tolerance: float) -> str | None:
        """The name of the cheapest policy whose interval stays within a tolerance; None if there is none.

        Cheapest is what takes the least time, and of equals the least memory. With the same weights a loss below the
        reference's is an error like one above it, so the interval has to be within on both sides; of policies with
        weights of their own it is the upper end alone.

        Args:
            tolerance: The largest loss gap that is no loss to you, in the loss's own unit.

        Raises:
            MixPrecError: It is not a positive number, or zero.
        """
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance >= 0:
            raise MixPrecError(f"tolerance is {tolerance!r}; it has to be a number that is not negative.")
        within = [row for row in self.rows if self._is_within(row, tolerance)]
        cheapest = min(within, key=_cost, default=None)
        return None if cheapest is None else str(cheapest["policy"])

    def _is_within(self, row: Mapping[str, Any], tolerance: float) -> bool:
        if not math.isfinite(row["loss_gap"]):
            return False
        return row["loss_gap_high"] <= tolerance and (not self.same_weights or row["loss_gap_low"] >= -tolerance)

    def __str__(self) -> str:
        """The table: the reference first, each policy's gap with its interval, and what to know of the numbers."""
        shown = [self.reference, *self.rows]
        names = [name for name in all_columns(shown) if name not in _ABSOLUTE]
        names = [name for name in names if any(row.get(name) is not None for row in shown)]
        cells = [[_cell(row, name) for name in names] for row in shown]
        titles = [_TITLES.get(name, name) for name in names]
        lines = align([titles, *cells], right=titles[1:])
        about = f"{self.step} on {counted(self.batches, 'batch', 'batches')}; of the reference "
        about += f"{self.reference['seconds'] * 1e3:.3g} ms"
        if self.reference["bytes"] is not None:
            about += f" and {self.reference['bytes'] / 2**20:.3g} MiB at the peak"
        return "\n".join([*map(str.rstrip, lines), about, *self.notes])

    def plot(self, ax: "Axes | None" = None) -> "tuple[FigureBase | None, Axes]":
        """Draws each policy's loss gap with its interval against its time.

        Args:
            ax: The axes to draw in; by default those of a new figure.

        Raises:
            SupportError: matplotlib is not installed.
        """
        from lightning_mixprec.numerics.plots import draw_gaps

        return draw_gaps(self.rows, str(self.reference["policy"]), ax=ax)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types; numbers that are not finite are None, as JSON has none."""
        told: dict[str, Any] = plain(vars(self))
        return told

    def to_file(self, path: str | Path) -> None:
        """Writes it to a JSON file, all or nothing.

        Raises:
            MixPrecError: The file cannot be written.
        """
        file = path_of(path, "a comparison")
        try:
            write_text(file, json.dumps(self.to_dict(), allow_nan=False, indent=2) + "\n")
        except OSError as error:
            raise MixPrecError(f"the comparison cannot be written to {str(path)!r}: {error}") from error

    def add_to(self, folder: str | Path) -> Path:
        """Adds the comparison to the rows of a run, so that its report has a section with it.

        Args:
            folder: The log directory of the run; ``python -m lightning_mixprec.report`` makes the report anew.

        Returns:
            The file of the rows.

        Raises:
            MixPrecError: There is no such folder, or its file cannot be written; it is as it was.
        """
        if not path_of(folder, "a run's folder").is_dir():
            raise MixPrecError(f"there is no folder {str(folder)!r}; give the log directory of a run.")
        told: Compared = {
            "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "step": self.step,
            "batches": self.batches,
            "same_weights": self.same_weights,
            "seconds": self.reference["seconds"],
            "bytes": self.reference["bytes"],
            "reference": _recorded(self.reference),
            "policies": [_recorded(row) for row in self.rows],
            "notes": list(self.notes),
        }
        try:
            return add_row(folder, {"monitor": "compare", "compared": told})
        except OSError as error:
            raise MixPrecError(f"the comparison cannot be added to {str(folder)!r}: {error}") from error


def _cost(row: Mapping[str, Any]) -> tuple[float, float]:
    return row["time_ratio"], math.inf if row["memory_ratio"] is None else row["memory_ratio"]


def _recorded(row: Mapping[str, Any]) -> ComparedPolicy:
    """A row of :class:`Comparison` as its record has it: what is no key of every row is a column of its own."""
    known = [name for name in ComparedPolicy.__annotations__ if name != "columns"]
    columns = {name: float(value) for name, value in row.items() if name not in {*known, *_ABSOLUTE}}
    record: Any = {**{name: row[name] for name in known}, "columns": columns}
    told: ComparedPolicy = record
    return told


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    if isinstance(value, str):
        return printable(value)
    text = format(value, _SPECS.get(name, ".4g"))
    if name == "loss_gap" and "seconds" not in row:
        return f"{text} [{row['loss_gap_low']:+.3g}, {row['loss_gap_high']:+.3g}]"
    return text
