"""From a report's content to geometry: scales, ticks, paths and levels, as plain numbers and strings without markup.

In time charts x is the optimizer step itself, so that a zoom only changes a viewBox. In charts with a vertical scale y
runs from 0 at the top to 100 at the bottom.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LOG_ABOVE_RATIO = 30  # a loss that spans more is drawn on a logarithmic scale
MAX_TICKS = 5


def digits(value: float, significant: int = 3) -> str:
    """The value with a few significant digits, for people.

    >>> digits(12345.6), digits(0.01234), digits(3e-9), digits(2.0)
    ('12,300', '0.0123', '3e-09', '2')
    """
    rounded = float(f"{value:.{significant}g}")
    if rounded and not 1e-4 <= abs(rounded) < 1e7:
        return f"{rounded:.{significant}g}"
    return f"{int(rounded):,}" if rounded == int(rounded) else f"{rounded:,.10f}".rstrip("0")


def percent(share: float) -> str:
    r"""A share of 0 to 1 as a percentage: never "0 %" for what is not zero, nor "100 %" for what is not all.

    >>> percent(0.0), percent(0.1234), percent(1e-7), percent(0.99999), percent(1.0)
    ('0\xa0%', '12.3\xa0%', '<\xa00.001\xa0%', '>\xa099.9\xa0%', '100\xa0%')
    """
    if 0 < share < 1e-5:
        return "<\xa00.001\xa0%"
    if 0.9995 < share < 1:
        return ">\xa099.9\xa0%"
    return f"{digits(100 * share)}\xa0%"


def power(exponent: float) -> str:
    """A power of two as people write it.

    >>> power(-24)
    '2⁻²⁴'
    """
    return "2" + f"{exponent:g}".translate(SUPERSCRIPTS) if float(exponent).is_integer() else digits(2.0**exponent)


def coordinate(value: float, decimals: int = 1) -> str:
    """A coordinate with at most so many decimals, as short as can be.

    >>> coordinate(12.0), coordinate(0.52), coordinate(-0.01), coordinate(-0.257, 2)
    ('12', '.5', '0', '-.26')
    """
    text = f"{value:.{decimals}f}".rstrip("0").rstrip(".")
    return "0" if text in ("", "-0", "-") else text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def round_step(raw: float) -> float:
    """The next larger of 1, 2, 5 times a power of ten."""
    base = 10.0 ** math.floor(math.log10(raw))
    return next(factor * base for factor in (1, 2, 5, 10) if factor * base >= raw * (1 - 1e-9))


def multiples(low: float, high: float, step: float) -> list[float]:
    """The multiples of step from low to high."""
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def step_ticks(start: int, end: int) -> list[dict[str, Any]]:
    """Ticks of the time axis: `at`, the place in percent, `label`, and the side of the place that the label takes."""
    stride = max(1.0, round_step((end - start) / MAX_TICKS))
    places = [(100 * (step - start) / (end - start), step) for step in multiples(start, end, stride)]
    return [
        {
            "at": coordinate(at),
            "label": f"{int(step):,}",
            "anchor": "start" if at < 3 else "end" if at > 97 else "middle",
        }
        for at, step in places
    ]


@dataclass(frozen=True)
class Scale:
    """A vertical axis: `low` at the bottom (y 100), `high` at the top (y 0), linear or in powers of `base`."""

    low: float
    high: float
    base: int | None = None

    def place(self, value: float) -> float:
        """The y of a value, clamped to the axis."""
        low, high, at = (self._bent(each) for each in (self.low, self.high, value))
        return 100 - 100 * min(max((at - low) / (high - low), 0), 1)

    def ticks(self) -> list[dict[str, str]]:
        """A few round values: `y` and `label`."""
        return [{"y": coordinate(self.place(value)), "label": digits(value, 7)} for value in self._tick_values()]

    def _bent(self, value: float) -> float:
        return math.log(max(value, 1e-300), self.base) if self.base else value

    def _tick_values(self) -> list[float]:
        if self.base is None:
            return multiples(self.low, self.high, round_step((self.high - self.low) / MAX_TICKS))
        low, high = self._bent(self.low), self._bent(self.high)
        if self.base == 10 and high - low < 2:
            fine = [factor * 10.0**k for k in range(math.floor(low), math.ceil(high)) for factor in (1, 2, 5)]
            return [value for value in fine if self.low <= value <= self.high]
        stride = max(1.0, round_step((high - low) / MAX_TICKS))
        return [float(self.base) ** exponent for exponent in multiples(low, high, stride)]


def loss_scale_of(curves: Sequence[dict[str, Any]]) -> Scale | None:
    """The axis of the losses of all curves; None where no loss is known."""
    known = [x for curve in curves for key in ("loss", "loss_min", "loss_max") for x in curve[key] if x is not None]
    if not known:
        return None
    low, high = min(known), max(known)
    if low > 0 and high / low > LOG_ABOVE_RATIO:
        return Scale(low / 1.2, high * 1.2, base=10)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low - margin, high + margin)


def scaling_scale_of(curves: Sequence[dict[str, Any]]) -> Scale | None:
    """The axis of the loss scales of all curves, in powers of two; None where the loss is not scaled."""
    known = [x for curve in curves for x in curve["scale"] if x is not None and x > 0]
    return Scale(min(known) / 2, max(known) * 2, base=2) if any(x != 1 for x in known) else None


def stretches(*columns: Sequence[float | None]) -> Iterator[range]:
    """Index ranges in which every column has a value."""
    is_known = [None not in values for values in zip(*columns, strict=True)]
    for known, places in groupby(range(len(is_known)), key=is_known.__getitem__):
        if known:
            first, *rest = places
            yield range(first, first + len(rest) + 1)


def _points(edges: Sequence[int], values: Sequence[float], indices: range, scale: Scale) -> list[str]:
    """Points at the middles of the bins, drawn level to the outer edges of the stretch."""
    xs = [edges[indices[0]], *((edges[k] + edges[k + 1]) / 2 for k in indices), edges[indices[-1] + 1]]
    ys = [values[indices[0]], *(values[k] for k in indices), values[indices[-1]]]
    return [f"{coordinate(x)} {coordinate(scale.place(y))}" for x, y in zip(xs, ys, strict=True)]


def line_path(edges: Sequence[int], values: Sequence[Any], scale: Scale) -> str:
    """A line through the values, broken where one is unknown."""
    return "".join("M" + " ".join(_points(edges, values, each, scale)) for each in stretches(values))


def band_path(edges: Sequence[int], low: Sequence[Any], high: Sequence[Any], scale: Scale) -> str:
    """The area between two rows of values."""
    parts = []
    for each in stretches(low, high):
        outline = _points(edges, high, each, scale) + _points(edges, low, each, scale)[::-1]
        parts.append("M" + " ".join(outline) + "z")
    return "".join(parts)


def stairs_path(edges: Sequence[int], values: Sequence[Any], scale: Scale) -> str:
    """A line that keeps each value for its whole bin."""
    parts = []
    for each in stretches(values):
        parts.append(f"M{edges[each[0]]} {coordinate(scale.place(values[each[0]]))}")
        parts += [f"V{coordinate(scale.place(values[k]))}H{edges[k + 1]}" for k in each]
    return "".join(parts)


def ticks_path(edges: Sequence[int], counts: Sequence[int]) -> str:
    """A vertical stroke from 0 to 1 in the middle of each bin that counted something."""
    return "".join(f"M{coordinate((edges[k] + edges[k + 1]) / 2)} 0v1" for k, count in enumerate(counts) if count)


@dataclass(frozen=True)
class Heat:
    """A quantity of layers over time, in six levels from harmless (0) to worst (5).

    `worse` maps a value to a number that grows as things get worse; `bounds` are what it exceeds from level to level.
    """

    key: str
    title: str
    what: str
    labels: tuple[str, ...]
    bounds: tuple[float, ...]
    worse: Callable[[float], float]
    show: Callable[[float], str]

    def level(self, value: float) -> int:
        """The level of a value, 0 to 5."""
        return sum(self.worse(value) > bound for bound in self.bounds)


HEATS = (
    Heat(
        "underflow_rate",
        "Underflow rate",
        "Share of a layer's gradient elements that turn to zero in its format, at the loss scale of the moment.",
        ("0", "to 0.1 %", "to 1 %", "to 10 %", "to 50 %", "above"),
        (0, 0.001, 0.01, 0.1, 0.5),
        lambda rate: rate,
        percent,
    ),
    Heat(
        "headroom_bits",
        "Headroom",
        "By how many bits the largest gradient or output may grow before it overflows the format.",
        ("8 bits and more", "4 to 8", "2 to 4", "1 to 2", "0 to 1", "below 0: overflow"),
        (-8, -4, -2, -1, 0),
        lambda bits: -bits,
        lambda bits: f"{digits(bits)} bits",
    ),
    Heat(
        "grad_cosine",
        "Gradient agreement with fp32",
        "Cosine c between a layer's gradient as the run computes it and in fp32; shown is how far it is from 1.",
        ("1 − c to 0.00001", "to 0.0001", "to 0.001", "to 0.01", "to 0.1", "above"),
        (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
        lambda cosine: 1 - cosine,
        lambda cosine: "> 0.999999" if 0.999999 < cosine < 1 else f"{cosine:.6f}".rstrip("0").rstrip("."),
    ),
    Heat(
        "sqnr_db",
        "Output accuracy (SQNR)",
        "Signal to quantization noise of a layer's output, against the same layer in fp32; 6 dB are about one bit.",
        ("50 dB and more", "40 to 50", "30 to 40", "20 to 30", "10 to 20", "below 10"),
        (-50, -40, -30, -20, -10),
        lambda decibels: -decibels,
        lambda decibels: f"{digits(decibels)} dB",
    ),
)


def in_cells(steps: Sequence[float], edges: Sequence[int]) -> list[float]:
    """The x of steps in a row of cells, whose unit is the average cell.

    On an even grid the borders of the cells are then small integers, and paths are short.
    """
    if len(edges) < 2:
        return list(steps)
    unit = (edges[-1] - edges[0]) / (len(edges) - 1)
    return [(step - edges[0]) / unit for step in steps]


def runs_path(pieces: Sequence[tuple[float, float]]) -> str:
    """Horizontal strokes for pieces of time (start, end), with neighbours joined."""
    joined: list[list[float]] = []
    for start, end in pieces:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    return "".join(f"M{coordinate(start, 2)} 0h{coordinate(end - start, 2)}" for start, end in joined)


def strip(heat: Heat, values: Sequence[float | None], edges: Sequence[int]) -> list[tuple[int, str]]:
    """One row of a heat map: for each level that occurs, the path of its pieces."""
    pieces: dict[int, list[tuple[float, float]]] = {}
    places = in_cells(edges, edges)
    for k, value in enumerate(values):
        if value is not None:
            pieces.setdefault(heat.level(value), []).append((places[k], places[k + 1]))
    return [(level, runs_path(pieces[level])) for level in sorted(pieces)]


def band(spans: Sequence[Sequence[Any]]) -> list[tuple[str, str]]:
    """One row of the precision chart: for each format that occurs, the path of its pieces."""
    pieces: dict[str, list[tuple[float, float]]] = {}
    for start, end, name in spans:
        pieces.setdefault(name, []).append((start, end))
    return [(name, runs_path(parts)) for name, parts in pieces.items()]


def worst(heat: Heat, values: Sequence[float | None]) -> str:
    """The worst value of a row, written out; empty where nothing was measured."""
    known = [value for value in values if value is not None]
    return heat.show(max(known, key=heat.worse)) if known else ""


def gap_bars(rows: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """Loss gaps with their intervals on one horizontal axis from 0 to 100, a path for each in a row 10 high.

    Returns:
        The place of a gap of zero, and by row the path: a line over the interval and an upright stroke at the gap;
        empty where the gap is not finite.

    >>> gap_bars([{"loss_gap": 1.0, "loss_gap_low": 0.0, "loss_gap_high": 2.0}])
    ('4', ['M4 5H96M50 1V9'])
    """
    keys = ("loss_gap_low", "loss_gap", "loss_gap_high")
    known = [row[key] for row in rows for key in keys if row[key] is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    span = (high - low) or 1.0

    def at(value: float) -> str:
        return coordinate(4 + 92 * (value - low) / span)

    paths = []
    for row in rows:
        start, gap, end = (row[key] for key in keys)
        line = "" if start is None or end is None else f"M{at(start)} 5H{at(end)}"
        paths.append("" if gap is None else f"{line}M{at(gap)} 1V9")
    return at(0.0), paths
