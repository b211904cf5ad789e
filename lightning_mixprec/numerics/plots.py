"""Drawings: exponents under the ranges of the formats, and values of layers; and the formats' colours.

The one file that knows matplotlib.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.formats import Format, get_format, low_precision_formats
from lightning_mixprec.records.words import cell, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import FigureBase as FigureBase

COLORS = {
    "fp64": "#E69F00",
    "fp32": "#56B4E9",
    "bf16": "#0072B2",
    "fp16": "#D55E00",
    "fp8": "#CC79A7",
    "e4m3": "#CC79A7",
    "e5m2": "#009E73",
    "int8": "#F0E442",
}
"""The palette of Okabe and Ito (2008), which readers with any of the common colour blindnesses tell apart; fp32 and
bf16, which have one range, are a light and a dark blue, and fp8 has the colour of what it is forward. Formats are named
next to their colours all the same."""

OTHER = "#979FA6"
"""The colour of a format that has none of its own."""

_BARS = "#8C8C8C"
# The view shows all that fp16 holds, whatever the data; and of wider formats as much as the data asks for.
_LEAST_VIEW = (-26, 18)
_MARGIN = 2
_MOST_LAYERS = 40
# The ranges lie above the bars, in the upper part of the axes.
_LANES_FROM, _LANES_TO = 0.74, 0.97


def draw_exponents(result: Mapping[str, Tensor], ax: "Axes | None" = None) -> "tuple[FigureBase | None, Axes]":
    """Draw what ``ExponentHistogram.compute()`` returned: one bar per exponent, and the formats' ranges above.

    A range is a thick line from a format's smallest normal number to its largest, and a thin one below, down to its
    smallest subnormal number, where precision is lost bit by bit. Dotted lines carry the ends down to the bars. Zeros,
    infinities and NaNs, which have no exponent, are counted in the title.

    Raises:
        SupportError: matplotlib is not installed.
    """
    figure, ax = _axes(ax, height=4.5)
    exponents, counts = result["exponent"].tolist(), result["count"].tolist()
    seen = [(exponent, count) for exponent, count in zip(exponents, counts, strict=True) if count]
    low = min([_LEAST_VIEW[0], *(exponent - _MARGIN for exponent, _ in seen)])
    high = max([_LEAST_VIEW[1], *(exponent + 1 + _MARGIN for exponent, _ in seen)])
    _draw_bars(ax, seen)
    ax.set_xlim(low, high)
    formats = [get_format(name).forward for name in low_precision_formats(in_parts=True)]
    formats.sort(key=lambda format: -format.max)
    for place, format in enumerate(formats):
        _draw_range(ax, format, (place + 0.5) / len(formats))
    ax.set_xlabel("log2 of the magnitude; on top what each format holds, thin where subnormal")
    ax.set_ylabel("elements")
    ax.set_title(_title(result), fontsize="medium")
    return figure, ax


def draw_layers(
    values: Mapping[str, float], label: str, limit: float | None = None, ax: "Axes | None" = None
) -> "tuple[FigureBase | None, Axes]":
    """Draw one bar per layer, in the order given, the first on top; of very many only the first.

    Args:
        values: by the name of the layer.
        label: what the values are.
        limit: where to draw a dashed line.
        ax: the axes to draw in; by default those of a new figure.

    Raises:
        SupportError: matplotlib is not installed.
    """
    shown = dict(list(values.items())[:_MOST_LAYERS])
    figure, ax = _axes(ax, height=1.2 + 0.22 * max(len(shown), 4))
    places = range(len(shown))
    ax.barh(places, list(shown.values()), color=_BARS)
    ax.set_yticks(places, [printable(cell(name)) for name in shown], fontsize="small", parse_math=False)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    if limit is not None:
        ax.axvline(limit, color=COLORS["fp16"], linestyle="--")
    ax.set_xlabel(label)
    if len(shown) < len(values):
        ax.set_title(f"{len(shown)} of {len(values)} layers", fontsize="medium")
    return figure, ax


def draw_plan(
    points: "Sequence[tuple[float, float, str, bool]]",
    frontier: "Sequence[tuple[float, float]]",
    marks: "Sequence[tuple[str, float, float]]",
    axes: "Sequence[Axes] | None" = None,
) -> "tuple[FigureBase | None, Sequence[Axes]]":
    """Draw what formats would save against what they would do to the loss, and what is least reachable.

    Args:
        points: for each layer and format the seconds saved, its part of the squared loss gap, the format, and whether
            it was chosen.
        frontier: seconds of a step and the loss gap, of choices that are the best for their time.
        marks: further choices: a name, seconds of a step, the loss gap.
        axes: two axes to draw in; by default those of a new figure.

    Raises:
        SupportError: matplotlib is not installed.
    """
    figure, axes = _two_axes(axes)
    for format in dict.fromkeys(point[2] for point in points):
        for is_chosen in (False, True):
            own = [point for point in points if point[2:] == (format, is_chosen)]
            color, label = COLORS.get(format, OTHER), f"{format}, chosen" if is_chosen else format
            saved, squared = [1e3 * point[0] for point in own], [point[1] for point in own]
            face = color if is_chosen else "none"
            axes[0].scatter(saved, squared, s=36, facecolors=face, edgecolors=color, label=label if own else None)
    _set_log_scale(axes[0], [point[1] for point in points])
    axes[0].set_xlabel("time saved in a step (ms)")
    axes[0].set_ylabel("part of the squared loss gap")
    seconds, gaps = [1e3 * time for time, _ in frontier], [gap for _, gap in frontier]
    axes[1].plot(seconds, gaps, "o-", color=_BARS, label="frontier")
    for place, (name, time, gap) in enumerate(marks):
        axes[1].plot(1e3 * time, gap, "*sD^"[place % 4], markersize=10, label=name)
    _set_log_scale(axes[1], gaps + [gap for *_, gap in marks])
    axes[1].set_xlabel("time of a step (ms)")
    axes[1].set_ylabel("predicted loss gap")
    for each in axes:
        if each.get_legend_handles_labels()[0]:
            each.legend(fontsize="small")
    return figure, axes


def _two_axes(axes: "Sequence[Axes] | None") -> "tuple[FigureBase | None, Sequence[Axes]]":
    """The two axes given, or those of a new figure."""
    if axes is not None:
        return axes[0].get_figure(), axes
    figure, first = _axes(None, height=4.5)
    assert figure is not None
    first.remove()
    return figure, list(figure.subplots(1, 2))


def _set_log_scale(ax: "Axes", values: "Sequence[float]") -> None:
    """A logarithmic scale on which zeros stand at the bottom."""
    above = [value for value in values if value > 0]
    if above:
        ax.set_yscale("symlog", linthresh=min(above))


def tint(color: str, white: float = 0.3) -> str:
    """A colour mixed with white, light enough to be written on in black.

    >>> tint("#0072B2"), tint("#000000", white=1.0)
    ('#4c9cc9', '#ffffff')
    """
    parts = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(part + white * (255 - part)):02x}" for part in parts)


def _axes(ax: "Axes | None", height: float) -> "tuple[FigureBase | None, Axes]":
    """The axes given, or those of a new figure."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        message = 'plotting needs matplotlib, which is not installed: pip install "lightning_mixprec[plot]"'
        raise SupportError(message) from error
    return plt.subplots(figsize=(9, height), layout="constrained") if ax is None else (ax.get_figure(), ax)


def _draw_bars(ax: "Axes", seen: list[tuple[int, int]]) -> None:
    """Draw bars on a logarithmic axis whose upper quarter stays free."""
    edges, counts = [exponent for exponent, _ in seen], [count for _, count in seen]
    ax.bar(edges, counts, width=1.0, align="edge", color=_BARS, edgecolor="white", linewidth=0.5)
    ax.set_yscale("log")
    bottom = 0.5
    decades = math.log10(max([10, *counts]) / bottom)
    ax.set_ylim(bottom, bottom * 10 ** (decades / (_LANES_FROM - 0.04)))


def _draw_range(ax: "Axes", format: Format, place: float) -> None:
    low, high = ax.get_xlim()
    subnormal, normal, largest = (
        math.log2(value) for value in (format.smallest_subnormal, format.smallest_normal, format.max)
    )
    height = _LANES_TO - (_LANES_TO - _LANES_FROM) * place
    color, where = COLORS.get(format.name, OTHER), ax.get_xaxis_transform()
    for start, end, width in ((subnormal, normal, 1.5), (normal, largest, 5.0)):
        ax.plot([start, end], [height] * 2, color=color, linewidth=width, solid_capstyle="butt", transform=where)
    for end in (subnormal, normal, largest):
        if low < end < high:
            ax.plot([end, end], [0, height], color=color, linewidth=1.0, linestyle=":", transform=where)
    for edge, marker, goes_on in ((low, "<", subnormal < low), (high, ">", largest > high)):
        if goes_on:
            ax.plot(edge, height, marker, color=color, markersize=9, clip_on=False, transform=where)
    ax.text(1.02, height, format.name, color=color, transform=ax.transAxes, va="center", weight="bold")


def _title(result: Mapping[str, Tensor]) -> str:
    elements, zeros, infs, nans = (int(result[name]) for name in ("elements", "zero", "inf", "nan"))
    return f"{elements:,} elements, of which {zeros:,} zero, {infs:,} infinite, {nans:,} NaN"


def draw_steps(
    scales: "Sequence[Sequence[float]]", steps: int, marks: "Sequence[tuple[int, str]]", ax: "Axes | None" = None
) -> "tuple[FigureBase | None, Axes]":
    """Draw a loss scale over the optimizer steps, and marks at steps that failed.

    Args:
        scales: pairs of the step from which on a scale held, and the scale.
        steps: how many steps there were.
        marks: steps, and what is to be said of them.
        ax: the axes to draw in; by default those of a new figure.

    Raises:
        SupportError: matplotlib is not installed.
    """
    figure, ax = _axes(ax, height=4.5)
    at, values = [step for step, _ in scales], [scale for _, scale in scales]
    ax.step([*at, steps], [*values, *values[-1:]], where="post", color=_BARS, linewidth=2)
    colors = list(dict.fromkeys(COLORS.values()))[::-1]
    for place, kind in enumerate(dict.fromkeys(kind for _, kind in marks)):
        where = [step for step, each in marks if each == kind]
        color = colors[place % len(colors)]
        ax.plot(where, [0.03] * len(where), "^", color=color, label=kind, transform=ax.get_xaxis_transform())
    ax.set_yscale("log", base=2)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("loss scale")
    if marks:
        ax.legend(title="failed steps")
    return figure, ax


def draw_gaps(
    rows: "Sequence[Mapping[str, Any]]", reference: str, ax: "Axes | None" = None
) -> "tuple[FigureBase | None, Axes]":
    """Draw loss gaps to a reference, each with its interval, against the time that they take.

    Args:
        rows: dicts with ``policy``, ``loss_gap``, ``loss_gap_low``, ``loss_gap_high`` and ``time_ratio``; one whose gap
            is not finite is named below the axes.
        reference: what the reference is called.
        ax: the axes to draw in; by default those of a new figure.

    Raises:
        SupportError: matplotlib is not installed.
    """
    figure, ax = _axes(ax, height=4.5)
    shown = [row for row in rows if math.isfinite(row["loss_gap"])]
    colors = [color for color in dict.fromkeys(COLORS.values()) if color != COLORS["fp32"]]
    ax.plot([1.0], [0.0], "o", color=COLORS["fp32"], label=printable(reference), markersize=9)
    for place, row in enumerate(shown):
        gap, color = row["loss_gap"], COLORS.get(row["policy"], colors[place % len(colors)])
        bars = [[gap - row["loss_gap_low"]], [row["loss_gap_high"] - gap]]
        is_known = math.isfinite(bars[0][0]) and math.isfinite(bars[1][0])
        ax.errorbar(
            [row["time_ratio"]], [gap], yerr=bars if is_known else None, fmt="s", color=color, capsize=4,
            label=printable(row["policy"]),
        )  # fmt: skip
    ax.axhline(0.0, color=_BARS, linestyle=":", zorder=0)
    ax.axvline(1.0, color=_BARS, linestyle=":", zorder=0)
    ax.set_xlabel("time of a step, as a ratio to the reference's")
    ax.set_ylabel("loss gap, with its 95 % interval")
    if left_out := [printable(row["policy"]) for row in rows if row not in shown]:
        ax.set_title(f"not finite: {', '.join(left_out)}", fontsize="medium", parse_math=False)
    legend = ax.legend()
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure, ax
