"""From a report's content to what its page shows: every text, path and place that the templates print."""

import math
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning_mixprec.report import charts, histograms

# The classes of formats in the style sheet; any other format is drawn in grey.
FORMAT_CLASSES = {
    "fp64": "f64",
    "fp32": "f32",
    "bf16": "fbf",
    "fp16": "f16",
    "fp8": "f43",
    "e4m3": "f43",
    "e5m2": "f52",
    "int8": "fi8",
}
SEVERAL_CLASS = {"several": "fsv"}
OTHER_CLASS = "fot"
STATE_WORDS = {"finished": "finished", "failed": "failed", "stopped": "was stopped", "unfinished": "did not finish"}
MAX_NAMED_LAYERS = 3
NAMED_FROM_SHARE = 0.09  # a format is named in its band where that covers this share of the time
CODE_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
NO_VALUE = 64 * 64 - 1
MOST_ASSIGNED = 1200  # layers in the table of the assignment


def format_class(name: str) -> str:
    """The style sheet's class of a format.

    >>> format_class("bf16"), format_class("int3")
    ('fbf', 'fot')
    """
    return {**FORMAT_CLASSES, **SEVERAL_CLASS}.get(name, OTHER_CLASS)


def view(content: dict[str, Any]) -> dict[str, Any]:
    """The values that the page template shows, and `data`, which its script reads."""
    runs = content["runs"]
    start, end = min(run["span"][0] for run in runs), max(run["span"][1] for run in runs)
    heats = [heat for heat in charts.HEATS if any(row[heat.key] for run in runs for row in run["rows"])]
    scales = {
        "loss": charts.loss_scale_of([run["curve"] for run in runs]),
        "scale": charts.scaling_scale_of([run["curve"] for run in runs]),
    }
    return {
        "title": content["title"],
        "made": content["made"],
        "start": start,
        "end": end,
        "ticks": charts.step_ticks(start, end),
        "scales": scales,
        "heats": heats,
        "formats": _formats_of(runs),
        "runs": [_run_view(run, index, content, heats, scales, (start, end)) for index, run in enumerate(runs)],
        "most_named": MAX_NAMED_LAYERS,
        "most_assigned": MOST_ASSIGNED // len(runs) ** 2,  # the table is the largest part of a page
        "comparison": _comparison(*runs) if len(runs) == 2 else None,
        "data": {
            "span": [start, end],
            "heats": [{"key": heat.key, "title": heat.title} for heat in heats],
            "runs": [_run_data(run, heats) for run in runs],
        },
    }


def _formats_of(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The formats that the precision charts show; known ones first."""
    names = {span[2] for run in runs for row in run["rows"] for span in row["spans"]}
    order = [*FORMAT_CLASSES, *sorted(names - {*FORMAT_CLASSES, *SEVERAL_CLASS}), *SEVERAL_CLASS]
    return [name for name in order if name in names]


def _run_view(
    run: dict[str, Any],
    index: int,
    content: dict[str, Any],
    heats: Sequence[charts.Heat],
    scales: dict[str, charts.Scale | None],
    span: tuple[int, int],
) -> dict[str, Any]:
    return {
        **run,
        "index": index,
        "state_words": STATE_WORDS.get(run["status"]["state"], run["status"]["state"]),
        "alert_counts": Counter(alert["level"] for alert in run["alerts"]),
        "curve": _curve_view(run["curve"], scales),
        "marks": _marks(run["moves"], span),
        "cells": _cells_box(run["samples"]["edges"], span),
        "rows": [_row_view(row, run["samples"]["edges"], heats, span) for row in run["rows"]],
        "histograms": _histogram_views(run["histograms"], content),
        "arithmetic": _bar(run["arithmetic"]),
        "compared": [_compared(each) for each in run.get("compared", ())],
    }


def _curve_view(curve: dict[str, Any], scales: dict[str, charts.Scale | None]) -> dict[str, Any]:
    edges, loss, scaling = curve["edges"], scales["loss"], scales["scale"]
    known = {key: [x for x in curve[key] if x is not None] for key in ("loss", "scale")}
    return {
        "line": charts.line_path(edges, curve["loss"], loss) if loss else "",
        "band": charts.band_path(edges, curve["loss_min"], curve["loss_max"], loss) if loss else "",
        "stairs": charts.stairs_path(edges, curve["scale"], scaling) if scaling else "",
        "skips": charts.ticks_path(edges, curve["skipped"]),
        "skipped": sum(curve["skipped"]),
        "last_loss": charts.digits(known["loss"][-1], 4) if known["loss"] else "",
        "last_scale": charts.digits(known["scale"][-1], 6) if known["scale"] else "",
    }


def _marks(moves: Sequence[dict[str, Any]], span: tuple[int, int]) -> list[dict[str, Any]]:
    """The steps at which layers moved: place in percent and a text that says it all."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for move in moves:
        by_step.setdefault(move["step"], []).append(move)
    return [
        {
            "step": step,
            "at": charts.coordinate(100 * (step - span[0]) / (span[1] - span[0])),
            "lines": [f"step {step:,}", *(_move_line(move) for move in by_step[step][:6])],
            "more": max(len(by_step[step]) - 6, 0),
        }
        for step in sorted(by_step)
    ]


def _move_line(move: dict[str, Any]) -> str:
    named, count = ", ".join(move["layers"][:MAX_NAMED_LAYERS]), len(move["layers"])
    more = f" and {count - MAX_NAMED_LAYERS} more" if count > MAX_NAMED_LAYERS else ""
    return f"{move['from']} → {move['to']}: {named}{more} ({move['reason']})"


def _cells_box(edges: Sequence[int], span: tuple[int, int]) -> str:
    """The viewBox of the rows of a run's heat maps."""
    start, end = charts.in_cells(span, edges)
    return f"{charts.coordinate(start, 2)} -.5 {charts.coordinate(end - start, 2)} 1"


def _row_view(
    row: dict[str, Any], edges: Sequence[int], heats: Sequence[charts.Heat], span: tuple[int, int]
) -> dict[str, Any]:
    length = span[1] - span[0]
    return {
        "label": row["label"],
        "band": [(format_class(name), path) for name, path in charts.band(row["spans"])],
        "names": [
            {"at": charts.coordinate(100 * ((start + end) / 2 - span[0]) / length), "name": name}
            for start, end, name in row["spans"]
            if (end - start) / length > NAMED_FROM_SHARE and len(row["spans"]) > 1  # else the last column says it
        ],
        "last": row["spans"][-1][2] if row["spans"] else "",
        "strips": {heat.key: charts.strip(heat, row[heat.key], edges) for heat in heats},
        "worst": {heat.key: charts.worst(heat, row[heat.key]) for heat in heats},
    }


def _histogram_views(each_run: Sequence[dict[str, Any]], content: dict[str, Any]) -> list[dict[str, Any]]:
    everything = [histogram for run in content["runs"] for histogram in run["histograms"]]
    windows = {key: histograms.window(everything, content["formats"], key) for key in histograms.QUANTITIES}
    return [
        {
            **each,
            "charts": [
                histograms.chart(each, key, content["formats"], windows[key])
                for key in histograms.QUANTITIES
                if each[key]
            ],
        }
        for each in each_run
    ]


def _bar(shares: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of a stacked bar: place and width in percent, and a label where it fits."""
    parts, start = [], 0.0
    for each in shares:
        share = each["share"]
        parts.append(
            {
                **each,
                "at": charts.coordinate(100 * start),
                "width": charts.coordinate(100 * share),
                "middle": charts.coordinate(100 * (start + share / 2)),
                "fits": share > 0.06,
            }
        )
        start += share
    return parts


def _compared(told: dict[str, Any]) -> dict[str, Any]:
    """A comparison of policies: a row for each, the reference first, and the columns that some of them have."""
    rows = [told["reference"], *told["policies"]]
    columns = list(dict.fromkeys(name for row in rows for name in row["columns"]))
    zero, bars = charts.gap_bars(rows)
    return {
        **told,
        "milliseconds": charts.digits(1e3 * told["seconds"]),
        "mebibytes": charts.digits(told["bytes"] / 2**20) if told["bytes"] is not None else None,
        "columns": columns,
        "zero": zero,
        "rows": [_compared_row(row, columns, bar) for row, bar in zip(rows, bars, strict=True)],
    }


def _compared_row(row: dict[str, Any], columns: Sequence[str], bar: str) -> dict[str, Any]:
    shares = ("time_ratio", "memory_ratio", "saved_ratio")
    return {
        "policy": row["policy"],
        "loss": _digits(row["loss"], 4),
        "gap": _digits(row["loss_gap"]),
        "ends": [_digits(row[f"loss_gap_{end}"]) for end in ("low", "high")],
        "bar": bar,
        "sqnr": _digits(row["output_sqnr_db"]),
        "equal": charts.percent(row["equal_decisions"]) if row["equal_decisions"] is not None else "–",
        "ratios": [_digits(row[name]) for name in shares],
        "columns": [_digits(row["columns"].get(name), 4) for name in columns],
    }


def _digits(value: float | None, significant: int = 3) -> str:
    """A number for people; a dash where there is none, or none that is finite."""
    return "–" if value is None else charts.digits(value, significant)


def _comparison(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two runs' facts side by side, and the layers whose formats at the end differ."""
    facts = [{fact["label"]: fact for fact in run["facts"]} for run in (first, second)]
    formats = [{each["layer"]: each["compute"] for each in run["assignment"]} for run in (first, second)]
    layers = list({**formats[0], **formats[1]})
    values = {label: [fact.get(label) for fact in facts] for label in {**facts[0], **facts[1]}}
    return {
        "facts": [
            {"label": label, "values": pair, "differs": len({each and each["value"] for each in pair}) > 1}
            for label, pair in values.items()
        ],
        "layers": [
            {"layer": name, "formats": [each.get(name) for each in formats]}
            for name in layers
            if formats[0].get(name) != formats[1].get(name)
        ],
        "total": len(layers),
    }


def _run_data(run: dict[str, Any], heats: Sequence[charts.Heat]) -> dict[str, Any]:
    """Data of a run for the script: exact values for tooltips, and the names that the filter searches."""
    curve = run["curve"]
    assigned = {each["layer"]: place for place, each in enumerate(run["assignment"])}
    return {
        "edges": run["samples"]["edges"],
        "rows": [
            {
                "label": row["label"],
                **_members(row, assigned),
                "spans": row["spans"],
                "cells": [pack(heat.key, row[heat.key]) for heat in heats],
            }
            for row in run["rows"]
        ],
        "curve": {
            "edges": curve["edges"],
            **{key: [_rounded(x) for x in curve[key]] for key in ("loss", "loss_min", "loss_max")},
            "scale": curve["scale"],
            "skipped": curve["skipped"],
        },
        "histograms": [{key: each[key] for key in histograms.QUANTITIES if each[key]} for each in run["histograms"]],
    }


def _members(row: dict[str, Any], assigned: dict[str, int]) -> dict[str, Any]:
    """A row's layers for the filter: none beside the label, a piece of the assignment (from, to), or their names."""
    layers = row["layers"]
    if layers == [row["label"]]:
        return {}
    places = [assigned.get(layer, -1) for layer in layers]
    if layers and places[0] >= 0 and places == list(range(places[0], places[0] + len(places))):
        return {"assigned": [places[0], places[0] + len(places)]}
    return {"layers": layers}


def _rounded(value: float | None) -> float | int | None:
    if value is None:
        return None
    rounded = float(f"{value:.4g}")
    return int(rounded) if rounded.is_integer() else rounded


def pack(key: str, values: Sequence[float | None]) -> str:
    """A row's values as the script reads them, two characters each: rounded, and a quarter of the size of JSON numbers.

    Bits and decibels are whole tenths above -100. Rates, and of a cosine its distance from 1, have two significant
    digits: 90 codes for each power of ten from 1e-30 on, and 0 for less.

    >>> pack("headroom_bits", [-100.0, -99.9, None]), pack("underflow_rate", [0.0, 1e-30])
    ('AAAB__', 'AAAB')
    """
    codes = [NO_VALUE if value is None else _code(key, value) for value in values]
    return "".join(CODE_DIGITS[code // 64] + CODE_DIGITS[code % 64] for code in codes)


def _code(key: str, value: float) -> int:
    if key in ("headroom_bits", "sqnr_db"):
        return min(max(round(10 * value) + 1000, 0), NO_VALUE - 1)
    share = 1 - value if key == "grad_cosine" else value
    if share < 1e-30:
        return 0
    rounded = float(f"{share:.1e}")
    exponent = math.floor(math.log10(rounded) + 1e-9)
    return 90 * (exponent + 30) + round(rounded / 10.0 ** (exponent - 1)) - 9
