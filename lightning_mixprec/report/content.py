"""The content of a report, of JSON's types: what the JSON file has and the HTML file is drawn from.

``version``, ``title``, ``made``, ``formats`` (binary exponents of the ``smallest`` subnormal, the smallest ``normal``
and the ``largest`` number) and ``runs``; of each run

- ``name``, ``status`` (``state``: finished, failed, stopped or unfinished; ``message``), ``facts`` (``label``,
  ``value``, ``hint``), ``watched`` (callbacks), ``span`` (first step, and the one after the last);
- ``alerts``: see :class:`lightning_mixprec.report.alerts.Alert`;
- ``curve``: ``edges`` of cells in optimizer steps, and by cell ``loss``, ``loss_min``, ``loss_max``, ``scale``,
  ``skipped``;
- ``moves``: ``step``, ``from``, ``to``, ``layers``, ``reason``;
- ``rows``: one for each layer or group of alike ones: ``label``, ``layers``, ``spans`` (start, end, format), and by
  cell of ``samples.edges`` ``underflow_rate``, ``headroom_bits``, ``grad_cosine``, ``sqnr_db``, each empty if it was
  not measured;
- ``histograms``: ``layer``, ``format``, ``step``, ``loss_scale``, and of its ``gradient`` (unscaled) and ``output``
  ``lowest`` (binary exponent), ``counts`` from it on, ``zeros``;
- ``assignment``: ``layer``, ``type``, ``parameters``, ``param``, ``compute``, ``output``, ``rule``, ``flops`` (share);
- ``arithmetic``: ``format``, ``share`` of the matrix products' flops at the end;
- ``compared``: comparisons of policies made after the run, see :class:`lightning_mixprec.records.compared.Compared`;
- ``environment``: pairs.
"""

import math
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import groupby
from typing import Any

from lightning_mixprec.numerics.formats import FORMATS, get_format, low_precision_formats
from lightning_mixprec.records.journal import plain
from lightning_mixprec.records.words import counted
from lightning_mixprec.report.alerts import alerts
from lightning_mixprec.report.layers import LayerLife, layers_of, rows
from lightning_mixprec.report.reading import Records, Row
from lightning_mixprec.report.timeline import curve, skipped_steps, steps_taken

VERSION = 1
_MAX_MOVES = 200
_MAX_HISTOGRAMS = 12
_LAST = 20


def content_of(runs: Sequence[Records], title: str = "precision report") -> dict[str, Any]:
    """The content of a report of one run, or of several side by side."""
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {
        "version": VERSION,
        "title": title,
        "made": made,
        "formats": {name: _range(name) for name in low_precision_formats(in_parts=True)},
        "runs": [plain(_run(records, len(runs))) for records in runs],
    }


def _run(records: Records, runs: int) -> dict[str, Any]:
    steps = [step for step, *_ in records.curve]
    first = min(steps, default=0)
    end = max(records.last_step + 1, records.end.get("step", 0), first + 1)
    layers = layers_of(records, first, end)
    shares = _flops(records)
    arithmetic = _arithmetic(layers, shares)
    moves = _moves(records)
    edges, drawn = rows(layers, first, end, runs)
    return {
        "name": records.name,
        "status": {"state": records.end.get("state", "unfinished"), "message": records.end.get("message", "")},
        "facts": _facts(records, layers, moves, arithmetic),
        "alerts": [alert.to_dict() for alert in alerts(records, layers)],
        "watched": records.monitors,
        "span": [first, end],
        "curve": curve(records, first, end, runs),
        "moves": moves[:_MAX_MOVES],
        "rows": drawn,
        "samples": {"edges": edges},
        "histograms": _histograms(records),
        "assignment": [_assigned(name, layer, shares) for name, layer in layers.items()],
        "arithmetic": arithmetic,
        "compared": records.compared,
        "environment": [[key, str(value)] for key, value in records.run.get("environment", {}).items()],
    }


def _facts(
    records: Records, layers: dict[str, LayerLife], moves: Sequence[Row], arithmetic: Sequence[Row]
) -> list[dict[str, str]]:
    losses = [loss for _, loss, _, _ in records.curve if loss is not None][-_LAST:]
    scales = [scale for _, _, scale, _ in records.curve if scale is not None]
    facts = [("optimizer steps", f"{steps_taken(records):,}", f"{len(skipped_steps(records)):,} skipped")]
    if losses:
        facts.append(("loss", f"{sum(losses) / len(losses):.4g}", f"mean of the last {len(losses)} batches"))
    if scales and any(scale != 1 for scale in scales):
        facts.append(("loss scale", f"{scales[-1]:g}", f"{min(scales):g} to {max(scales):g}"))
    formats = sorted({layer.compute for layer in layers.values() if layer.compute})
    facts.append(("layers", f"{len(layers):,}", f"in {', '.join(formats)}" if formats else ""))
    if arithmetic:
        known = [row for row in arithmetic if row["format"] in FORMATS]
        low = sum(row["share"] for row in known if get_format(row["format"]).is_low_precision)
        facts.append(("arithmetic in 16 bits", f"{low:.1%}", "share of the matrix products' flops"))
    moved, moments = sum(len(move["layers"]) for move in moves), {move["step"] for move in moves}
    facts.append(("precision moves", f"{moved:,}", f"at {counted(len(moments), 'step')}" if moved else ""))
    if gaps := [row["loss_gap"] for row in records.fidelity if row.get("loss_gap") is not None]:
        facts.append(("loss gap to fp32", f"{gaps[-1]:.2g}", "at the latest sample"))
    return [{"label": label, "value": value, "hint": hint} for label, value, hint in facts]


def _moves(records: Records) -> list[Row]:
    """The history; layers that moved alike at one step for one reason are one move."""

    def alike(row: Row) -> tuple[Any, ...]:
        return row["step"], row["reason"], row["from"], row["to"]

    known = list({(row["layer"], *alike(row)): row for row in records.history}.values())
    moves = []
    for (step, reason, old, new), group in groupby(known, key=alike):
        names = [row["layer"] for row in group]
        moves.append({"step": step, "from": old, "to": new, "layers": names, "reason": reason})
    return moves


def _flops(records: Records) -> dict[str, float]:
    """Each layer's share of the matrix products' floating-point operations; empty if they were not counted."""
    counted = [row["sample"]["flops"] for row in records.samples if row["sample"].get("flops")]
    total = sum(counted[-1].values()) if counted else 0
    return {name: flops / total for name, flops in counted[-1].items()} if total else {}


def _arithmetic(layers: dict[str, LayerLife], shares: dict[str, float]) -> list[Row]:
    by_format: dict[str, float] = {}
    for name, share in shares.items():
        if name in layers:
            by_format[layers[name].compute] = by_format.get(layers[name].compute, 0.0) + share
    ranked = sorted(by_format.items(), key=lambda item: -item[1])
    return [{"format": format, "share": round(share, 6)} for format, share in ranked]


def _histograms(records: Records) -> list[Row]:
    """Those of the latest sample."""
    told = next((row for row in reversed(records.samples) if row["sample"].get("histograms")), None)
    if told is None:
        return []
    sample = told["sample"]
    return [
        {
            "layer": name,
            "format": sample["layers"][name].format,
            "step": told["step"],
            "loss_scale": sample["loss_scale"],
            **kinds,
        }
        for name, kinds in list(sample["histograms"].items())[:_MAX_HISTOGRAMS]
    ]


def _range(name: str) -> dict[str, int]:
    format = get_format(name).forward
    smallest = math.frexp(format.smallest_subnormal)[1] - 1
    return {"smallest": smallest, "normal": format.min_exponent, "largest": format.max_exponent}


def _assigned(name: str, layer: LayerLife, shares: dict[str, float]) -> Row:
    return {
        "layer": name,
        "type": layer.type_name,
        "parameters": layer.parameters,
        "param": layer.param,
        "compute": layer.compute,
        "output": layer.output,
        "rule": layer.rule,
        "flops": round(shares.get(name, 0.0), 6) if shares else None,
    }
