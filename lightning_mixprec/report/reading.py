"""The records that a run left, read: rows of ``mixprec.jsonl``, and the loss from ``metrics.csv`` if need be."""

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.records.journal import FILE_NAME, PARTS, ROWS, rows_in
from lightning_mixprec.records.runs import DescribedLayer, SampledLayer
from lightning_mixprec.records.schema import matches

_METRICS = "metrics.csv"

Row = dict[str, Any]
Batch = tuple[int, float | None, float | None, bool]
"""A batch: step, loss (None unless finite), loss scale (None if not known), and whether its step was skipped."""

_Point = tuple[int, float | None, float | None, int | None]
"""The same as it was written: None where nobody says whether the step was skipped."""


@dataclass
class Records:
    """The records of a run, in the order in which they were written.

    Attributes:
        name: The folder's name, with the run's id where that was asked for.
        run_id: The run whose rows these are; empty for a run of 0.1.0.
        run: What ``PrecisionReport`` wrote when the run began: ``environment`` and ``layers``.
        curve: The batches.
        infinite: Steps whose loss was infinite or NaN.
        changes: Rows with the layers whose formats changed, and ``step``.
        history: The plugin's history.
        samples: Rows with ``step`` and ``sample``.
        overflow: Events of ``OverflowMonitor``.
        underflow: Rows of ``UnderflowMonitor``, by layer and step.
        fidelity: Rows of ``FidelityMonitor``.
        decided: Rows of ``AdaptivePrecision`` with a ``decision``.
        problems: Why steps could not be looked at.
        compared: Comparisons of policies that were made after the run.
        end: How it ended, and after how many steps; empty if nobody wrote that.
        monitors: Who watched: who left rows, and whom ``PrecisionReport`` has seen among the callbacks.
        last_step: The last step of the curve; without one, the largest step of any row.
    """

    name: str
    run_id: str = ""
    run: Row = field(default_factory=dict)
    curve: list[Batch] = field(default_factory=list)
    infinite: list[int] = field(default_factory=list)
    changes: list[Row] = field(default_factory=list)
    history: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    overflow: list[Row] = field(default_factory=list)
    underflow: list[Row] = field(default_factory=list)
    fidelity: list[Row] = field(default_factory=list)
    decided: list[Row] = field(default_factory=list)
    problems: list[Row] = field(default_factory=list)
    compared: list[Row] = field(default_factory=list)
    end: Row = field(default_factory=dict)
    monitors: list[str] = field(default_factory=list)
    last_step: int = 0

    @property
    def measured(self) -> list[tuple[int, float, str, Row]]:
        """Losses of layers, by whichever monitor measured them: step, loss scale, layer, losses."""
        found = [
            (row["step"], row["sample"]["loss_scale"], layer, told._asdict())
            for row in self.samples
            for layer, told in row["sample"]["layers"].items()
        ]
        rows = [row for row in self.underflow if "format" in row]
        return [*found, *((row["step"], row["loss_scale"], row["layer"], row) for row in rows)]


_MONITORS = {
    "report": "PrecisionReport",
    "overflow": "OverflowMonitor",
    "underflow": "UnderflowMonitor",
    "fidelity": "FidelityMonitor",
    "schedule": "PrecisionScheduler",
    "adaptive": "AdaptivePrecision",
}
_KEPT = ("overflow", "underflow", "fidelity")


def read_records(folder: str | Path) -> Records:
    """Reads what a run left in its log directory. A line that a crash cut short is passed over.

    Args:
        folder: The log directory. Where several runs have written to it, its latest one is read; another one by
            ``folder@run_id``.

    Raises:
        MixPrecError: There is no such folder, no rows in it, or no such run.
    """
    folder, asked = Path(folder), ""
    if not folder.exists() and "@" in folder.name:
        name, _, asked = folder.name.rpartition("@")
        folder = folder.with_name(name)
    path = folder / FILE_NAME
    if not path.is_file():
        raise MixPrecError(_missing(folder))
    run_id, rows = _of_run(list(rows_in(path)), asked, folder)
    records = Records(f"{folder.resolve().name}{f'@{asked}' if asked else ''}", run_id)
    for row in rows:
        _take_in(records, row)
    records.curve = _with_skips(records.curve or _from_metrics(folder / _METRICS))
    if records.curve:
        records.last_step = max(step for step, *_ in records.curve)  # other rows may say how many steps were taken
    return records


def _missing(folder: Path) -> str:
    runs = sorted({path.parent for path in folder.glob(f"*/{FILE_NAME}")} if folder.is_dir() else (), key=_age)
    if runs:
        return f"no {FILE_NAME} in {str(folder)!r}; give one run's folder, such as {str(runs[-1])!r}."
    return (
        f"no {FILE_NAME} in {str(folder)!r}; give the log directory of a run with PrecisionReport or one of the "
        "monitors, such as 'lightning_logs/version_0'."
    )


def _age(folder: Path) -> float:
    return (folder / FILE_NAME).stat().st_mtime


def _of_run(rows: list[Row], asked: str, folder: Path) -> tuple[str, list[Row]]:
    """The rows of one run, and its id: of the one that is asked for, else of the latest."""
    ids = list(dict.fromkeys(str(row["run_id"]) for row in reversed(rows) if row.get("run_id")))
    if asked and asked not in ids:
        raise MixPrecError(f"no run {asked!r} in {str(folder / FILE_NAME)!r}; it has {', '.join(ids) or 'no run ids'}.")
    if not ids:
        return "", rows
    run_id = asked or ids[0]
    first = next(place for place, row in enumerate(rows) if row.get("run_id") == run_id)
    went_on = len(ids) == 1 and rows[first]["step"] > 0  # from a checkpoint of 0.1.0, whose rows have no id
    return run_id, [row for row in rows if row.get("run_id") == run_id or (went_on and not row.get("run_id"))]


def _take_in(records: Records, row: Row) -> None:
    kind = str(row.get("monitor"))
    name = _MONITORS.get(kind)
    if name is None and kind not in PARTS:
        return
    if name is not None and name not in records.monitors:
        records.monitors.append(name)
    records.last_step = max(records.last_step, row["step"])
    if isinstance(row.get("problem"), str):
        records.problems.append(row)
    elif kind in PARTS:
        for part in PARTS[kind].keys() & row.keys():
            if matches(row[part], PARTS[kind][part], in_json=True):
                _TAKE_IN[part](records, row)
    elif kind in _KEPT and matches(row, ROWS[kind], in_json=True):
        getattr(records, kind).append(row)


def _begin(records: Records, row: Row) -> None:
    """A run that begins, or goes on from a checkpoint: what an earlier one in this folder did later is undone."""
    step, run = row["step"], {**row["run"], "layers": _described(row["run"]["layers"])}
    # 0.1.0 did not say whether skipped steps are counted; its own plugins were those called so.
    plugin = run["environment"].get("plugin", "PerLayer")
    run.setdefault("counts_skipped", not plugin.startswith("PerLayer"))
    _forget_from(records, step)
    if records.run and step:  # the formats that the layers have now, they have from here on
        records.changes.append({"step": step, "layers": run["layers"]})
    else:
        records.run, records.monitors = run, ["PrecisionReport"]
    records.monitors = list(dict.fromkeys([*records.monitors, *run.get("watched", ())]))
    records.end, records.history = {}, []  # the history is told again, whole


def _forget_from(records: Records, step: int) -> None:
    records.curve = [point for point in records.curve if point[0] < step]
    records.infinite = [each for each in records.infinite if each < step]
    for name in ("changes", "samples", "overflow", "underflow", "fidelity", "decided", "problems"):
        setattr(records, name, [row for row in getattr(records, name) if row["step"] < step])
    records.last_step = step


def _add_batches(records: Records, row: Row) -> None:
    curve = row["curve"]
    records.curve += zip(curve["steps"], curve["loss"], curve["scale"], curve["skipped"], strict=False)
    steps = curve["steps"]
    records.infinite += [steps[place] for place in curve.get("infinite", ()) if place < len(steps)]


def _add_change(records: Records, row: Row) -> None:
    records.history += row["change"]["history"]
    records.changes.append({"step": row["step"], "layers": _described(row["change"]["layers"])})


def _described(rows: Iterable[Sequence[Any]]) -> list[DescribedLayer]:
    return [DescribedLayer(*row) for row in rows]


def _add_sample(records: Records, row: Row) -> None:
    layers = {name: SampledLayer(*values) for name, values in row["sample"]["layers"].items()}
    records.samples.append({**row, "sample": {**row["sample"], "layers": layers}})


def _add_decision(records: Records, row: Row) -> None:
    records.decided.append(row)


def _add_comparison(records: Records, row: Row) -> None:
    records.compared.append(row["compared"])


def _end(records: Records, row: Row) -> None:
    records.end = {"step": row["step"], **row["end"]}


_TAKE_IN: dict[str, Callable[[Records, Row], None]] = {
    "run": _begin,
    "curve": _add_batches,
    "change": _add_change,
    "sample": _add_sample,
    "end": _end,
    "decision": _add_decision,
    "compared": _add_comparison,
}


def _with_skips(points: Sequence[_Point]) -> list[Batch]:
    """The batches, each with whether its step was skipped.

    Where a plugin does not say so, a loss scale that is smaller in the next batch does: one skipped step each time.
    """
    told = []
    for place, (step, loss, scale, skipped) in enumerate(points):
        if skipped is None:
            later = points[place + 1][2] if place + 1 < len(points) else None
            skipped = scale is not None and later is not None and later < scale
        told.append((step, loss, scale, bool(skipped)))
    return told


def _from_metrics(path: Path) -> list[_Point]:
    """Loss and loss scale as CSVLogger wrote them."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    key = _loss_key(rows[0]) if rows else None
    points = [(row.get("step"), _number(row.get(key or "")), _number(row.get("mixprec/loss_scale"))) for row in rows]
    return [
        (int(step), loss, scale, None)
        for step, loss, scale in points
        if isinstance(step, str) and step.isdigit() and len(step) < 16 and (loss is not None or scale is not None)
    ]


def _loss_key(names: Iterable[str]) -> str | None:
    """The column of the training loss: ``train_loss``, or another that looks like it."""
    names = [
        name
        for name in names
        if name is not None and "loss" in name and not name.startswith(("mixprec/", "val", "test"))
    ]
    likely = sorted(names, key=lambda name: ("train" not in name, not name.startswith("train_loss"), name))
    return likely[0] if likely else None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
