"""Events over optimizer steps, gathered into as many cells as can be drawn."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_mixprec.report.reading import Batch, Records

MAX_POINTS = 600
MAX_CELLS = 60


def curve(records: Records, first: int, end: int, runs: int = 1) -> dict[str, list[Any]]:
    """Loss (mean, smallest, largest), loss scale (the smallest of a cell) and skipped steps by cell.

    Several batches of one step, as under accumulation, fall into one cell.

    Args:
        records: What the run left.
        first: First step.
        end: The one after the last.
        runs: How many runs share the page.
    """
    edges = sample_edges((step for step, *_ in records.curve), first, end, MAX_POINTS // runs)
    cells: list[list[Batch]] = [[] for _ in edges[1:]]
    for batch in records.curve:
        cell = bisect_right(edges, batch[0]) - 1
        if 0 <= cell < len(cells):
            cells[cell].append(batch)
    losses = [[loss for _, loss, _, _ in cell if loss is not None] for cell in cells]
    scales = [[scale for _, _, scale, _ in cell if scale is not None] for cell in cells]
    return {
        "edges": edges,
        "loss": [_short(sum(cell) / len(cell)) if cell else None for cell in losses],
        "loss_min": [_short(min(cell)) if cell else None for cell in losses],
        "loss_max": [_short(max(cell)) if cell else None for cell in losses],
        "scale": [min(cell) if cell else None for cell in scales],
        "skipped": [sum(was_skipped for *_, was_skipped in cell) for cell in cells],
    }


def skipped_steps(records: Records) -> list[int]:
    """The step of each optimizer step that was skipped."""
    return [step for step, _, _, was_skipped in records.curve if was_skipped]


def steps_taken(records: Records) -> int:
    """The number of optimizer steps taken. Lightning's own plugins count those that were skipped among them."""
    first = min((step for step, *_ in records.curve), default=0)
    passed: int = records.end.get("step", records.last_step + 1) - first
    counts_skipped: bool = records.run.get("counts_skipped", False)
    return max(passed - counts_skipped * len(skipped_steps(records)), 0)


def sample_edges(steps: Iterable[int], first: int, end: int, most: int = MAX_CELLS) -> list[int]:
    """Borders of cells that begin with a given step each; if these are too many, with every second, third, ... of them.

    >>> sample_edges([0, 20, 40, 20], 0, 50)
    [0, 20, 40, 50]
    """
    begins = sorted({first, *(step for step in steps if first <= step < end)})
    return [*begins[:: math.ceil(len(begins) / most)], end]


def spread(values: Iterable[tuple[int, float | None]], edges: Sequence[int], *, worst: Any) -> list[float | None]:
    """Values at steps, one for each cell: what was measured in it, or else the last before.

    Args:
        values: Step and value, in any order.
        edges: Borders of the cells.
        worst: ``min`` or ``max``, which of a cell's values stands for it.
    """
    cells: list[float | None] = [None] * (len(edges) - 1)
    for step, value in values:
        place = bisect_right(edges, step) - 1
        if value is not None and 0 <= place < len(cells):
            known = cells[place]
            cells[place] = _short(value if known is None else worst(known, value))
    for place in range(1, len(cells)):
        cells[place] = cells[place - 1] if cells[place] is None else cells[place]
    return cells


def _short(value: float) -> float:
    return float(f"{value:.4g}")
