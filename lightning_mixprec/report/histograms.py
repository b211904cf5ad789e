"""Geometry and words of the exponent histograms: what of a layer's numbers a format does not hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.report.charts import coordinate, digits, multiples, percent, power, round_step

LEAST_SHARE = 1e-4  # the bottom of the logarithmic axis of shares
SHARE_TICKS = (1.0, 0.1, 0.01, 0.001)
QUANTITIES = ("gradient", "output")
MAX_EXPONENT_TICKS = 4


@dataclass(frozen=True)
class Range:
    """The binary exponents that a format holds: smallest subnormal, smallest normal, largest finite."""

    smallest: float
    normal: float
    largest: float

    def place(self, exponent: int) -> str:
        """The place of numbers of this exponent: "below", "subnormal", "held" or "above"."""
        if exponent < self.smallest:
            return "below"
        if exponent < self.normal:
            return "subnormal"
        return "held" if exponent <= self.largest else "above"


def range_of(exponents: dict[str, int], loss_scale: float) -> Range:
    """A format's range as unscaled gradients see it: moved down by the exponent of the loss scale."""
    shift = math.log2(loss_scale)
    return Range(*(exponents[key] - shift for key in ("smallest", "normal", "largest")))


def shares(counted: dict[str, Any], held: Range) -> dict[str, float]:
    """Shares of the nonzero elements that are below, subnormal, held and above."""
    found = dict.fromkeys(("below", "subnormal", "held", "above"), 0)
    for exponent, count in enumerate(counted["counts"], start=counted["lowest"]):
        found[held.place(exponent)] += count
    total = sum(found.values())
    return {place: count / total if total else 0.0 for place, count in found.items()}


def window(histograms: Sequence[dict[str, Any]], formats: dict[str, Any], quantity: str) -> tuple[int, int]:
    """The exponents that the histograms of one quantity show, the same for all: from, to (exclusive)."""
    lows, highs = [], []
    for each in histograms:
        counted = each[quantity]
        filled = [k for k, count in enumerate(counted["counts"]) if count] if counted else []
        if filled:
            lows.append(counted["lowest"] + filled[0])
            highs.append(counted["lowest"] + filled[-1] + 1)
        if counted and each["format"] in formats and get_format(each["format"]).use.needs_scaling:
            held = range_of(formats[each["format"]], scale_for(each, quantity))
            lows.append(math.floor(held.smallest))
            highs.append(math.ceil(held.largest) + 1)
    return (min(lows) - 2, max(highs) + 2) if lows else (-24, 16)


def scale_for(histogram: dict[str, Any], quantity: str) -> float:
    """The loss scale where it matters: it multiplies gradients, not outputs."""
    return float(histogram["loss_scale"] or 1) if quantity == "gradient" else 1.0


def chart(histogram: dict[str, Any], quantity: str, formats: dict[str, Any], shown: tuple[int, int]) -> dict[str, Any]:
    """All that a histogram's chart shows: bars by where they fall, limits, a lane per format, ticks and words.

    x is the binary exponent; a bar stands from it to the next one.
    """
    counted, name = histogram[quantity], histogram["format"]
    scale = scale_for(histogram, quantity)
    own = range_of(formats[name], scale) if name in formats else None
    return {
        "quantity": quantity,
        "start": shown[0],
        "width": shown[1] - shown[0],
        "bars": _bars(counted, own),
        "limits": [coordinate(x) for x in (own.smallest, own.largest + 1)] if own else [],
        "lanes": [_lane(each, range_of(formats[each], scale), counted, shown) for each in formats],
        "ticks": _exponent_ticks(shown),
        "shares": [{"y": coordinate(_height(share)), "label": percent(share)} for share in SHARE_TICKS],
        "words": words(counted, name, own, quantity, scale),
    }


def _height(share: float) -> float:
    """The y of a share, on a logarithmic axis from 100 at LEAST_SHARE to 0 at all."""
    return 100 * math.log(max(share, LEAST_SHARE)) / math.log(LEAST_SHARE)


def _bars(counted: dict[str, Any], own: Range | None) -> list[tuple[str, str]]:
    total = sum(counted["counts"])
    paths: dict[str, str] = {}
    for exponent, count in enumerate(counted["counts"], start=counted["lowest"]):
        if count:
            top = coordinate(min(_height(count / total), 98))
            place = own.place(exponent) if own else "held"
            paths[place] = paths.get(place, "") + f"M{exponent} 100V{top}"
    return list(paths.items())


def _lane(name: str, held: Range, counted: dict[str, Any], shown: tuple[int, int]) -> dict[str, Any]:
    """A format's range as a bar (thin where subnormal) inside the window, and the shares outside the range."""
    start, normal, end = (min(max(x, shown[0]), shown[1]) for x in (held.smallest, held.normal, held.largest + 1))
    found = shares(counted, held)
    return {
        "format": name,
        "subnormal": f"M{coordinate(start)} 0h{coordinate(normal - start)}" if normal > start else "",
        "held": f"M{coordinate(normal)} 0h{coordinate(end - normal)}" if end > normal else "",
        "range": f"{power(held.smallest)} to {power(held.largest + 1)}",
        "below": _roughly(found["below"]),
        "above": _roughly(found["above"]),
    }


def _roughly(share: float) -> str:
    """A percentage that is never long."""
    return "<\xa00.01\xa0%" if 0 < share < 1e-4 else percent(float(f"{share:.2g}"))


def _exponent_ticks(shown: tuple[int, int]) -> list[dict[str, str]]:
    low, high = shown
    stride = max(1.0, round_step((high - low) / MAX_EXPONENT_TICKS))
    return [
        {"at": coordinate(100 * (x - low) / (high - low)), "label": power(x)}
        for x in multiples(low, high, stride)
        if 0.03 < (x - low) / (high - low) < 0.97
    ]


def words(counted: dict[str, Any], name: str, own: Range | None, quantity: str, scale: float) -> str:
    """The histogram in one or two sentences."""
    nonzero, zeros = sum(counted["counts"]), counted["zeros"]
    if not nonzero:
        return f"All {zeros:,} elements are zero." if zeros else "No finite element was counted."
    rest = f" {percent(zeros / (zeros + nonzero))} of all elements are exact zeros." if zeros else ""
    if own is None:
        return f"Computed in {name}, whose range is not drawn.{rest}"
    found = shares(counted, own)
    scaled = f" at loss scale {digits(scale, 7)}" if quantity == "gradient" and scale != 1 else ""
    fates = [
        (found["below"], f"below {power(own.smallest)} and vanish"),
        (found["subnormal"], f"subnormal, below {power(own.normal)}"),
        (found["above"], f"above {power(own.largest + 1)} and overflow"),
    ]
    told = ", ".join(f"{percent(share)} {fate}" for share, fate in fates if share)
    if not told:
        return f"{name} holds all nonzero elements as normal numbers{scaled}.{rest}"
    return f"Of the nonzero elements in {name}{scaled}: {told}.{rest}"
