"""Layers over time, and groups of them where there are too many for a row each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lightning_mixprec.records.words import cell
from lightning_mixprec.report.reading import Records
from lightning_mixprec.report.timeline import MAX_CELLS, sample_edges, spread

MAX_ROWS = 150
_SPACE, _LEAST_CELLS = 4000, 24  # cells of one kind on a page, so that it stays under 500 KB
KINDS = {"underflow_rate": max, "headroom_bits": min, "grad_cosine": min, "sqnr_db": min}
"""Measures of layers that are shown by step, each with the function that picks the value of a group."""

Span = tuple[int, int, str]


@dataclass
class LayerLife:
    """A layer's life.

    Attributes:
        type_name: Its class.
        parameters: How many of its own; None if not known.
        param: The format that its weights are stored in.
        compute: The format that it computes in at the end.
        output: The format that it hands on in; empty for as computed.
        rule: Which rule decided.
        spans: Compute formats over steps: start, end (exclusive), format; without gaps.
        values: By kind, steps and values.
    """

    type_name: str = ""
    parameters: int | None = None
    param: str = ""
    compute: str = ""
    output: str = ""
    rule: str = ""
    spans: list[Span] = field(default_factory=list)
    values: dict[str, list[tuple[int, float | None]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    @property
    def last_move(self) -> int:
        """The step of its last move; -1 if it never moved."""
        return self.spans[-1][0] if len(self.spans) > 1 else -1


def layers_of(records: Records, first: int, end: int) -> dict[str, LayerLife]:
    """All layers that are known of, in the model's order as far as that is known."""
    layers: dict[str, LayerLife] = {}
    for told in records.run.get("layers", ()):
        layers[told.name] = LayerLife(*told[1:])
    formats: dict[str, list[tuple[int, str]]] = {name: [(first, layer.compute)] for name, layer in layers.items()}
    for change in records.changes:
        for told in change["layers"]:
            layer = layers.setdefault(told.name, LayerLife())
            layer.param, layer.compute, layer.output, layer.rule = told.param, told.compute, told.output, told.rule
            formats.setdefault(told.name, []).append((change["step"], told.compute))
    for step, _, name, losses in records.measured:
        layer = layers.setdefault(name, LayerLife())
        if not records.run:
            layer.compute = losses["format"]
            formats.setdefault(name, []).append((step, losses["format"]))
        layer.values["underflow_rate"].append((step, losses["underflow_rate"]))
        layer.values["headroom_bits"].append((step, _least(losses["headroom_bits"], losses["output_headroom_bits"])))
    for row in records.fidelity:
        if "layer" in row:
            layer = layers.setdefault(row["layer"], LayerLife())
            for kind in ("grad_cosine", "sqnr_db"):
                layer.values[kind].append((row["step"], row.get(kind)))
    for name, layer in layers.items():
        layer.spans = _spans(formats.get(name, []), first, end)
        for values in layer.values.values():
            values.sort(key=lambda told: told[0])
    return layers


def _least(*values: float | None) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _spans(formats: Sequence[tuple[int, str]], first: int, end: int) -> list[Span]:
    """Spans from the moments at which formats begin; a format known only later holds from the start."""
    begins = [first, *(max(first, step) for step, _ in formats[1:]), end]
    pieces = zip(formats, begins, begins[1:], strict=False)
    return _joined((start, min(max(stop, start), end), format) for (_, format), start, stop in pieces)


def _joined(pieces: Iterable[Span]) -> list[Span]:
    """Pieces of time, neighbours of one format as one."""
    spans: list[Span] = []
    for start, stop, format in pieces:
        if spans and spans[-1][2] == format:
            spans[-1] = (spans[-1][0], stop, format)
        elif stop > start:
            spans.append((start, stop, format))
    return spans


def rows(layers: dict[str, LayerLife], first: int, end: int, runs: int = 1) -> tuple[list[int], list[dict[str, Any]]]:
    """The borders of the cells, and one row a layer, or a group of neighbours that lived alike.

    Args:
        layers: All layers.
        first: First step.
        end: The one after the last.
        runs: How many runs share the page, and the space on it.
    """
    shown = {name: layer for name, layer in layers.items() if layer.spans or any(layer.values.values())}
    grouped = _grouped(shown, MAX_ROWS // runs)
    measured = (step for layer in layers.values() for values in layer.values.values() for step, _ in values)
    most_cells = min(MAX_CELLS, max(_LEAST_CELLS, _SPACE // runs // max(len(grouped), 1)))
    edges = sample_edges(measured, first, end, most_cells)
    was_measured = {kind: any(layer.values[kind] for layer in layers.values()) for kind in KINDS}
    drawn = []
    for label, members in grouped:
        row: dict[str, Any] = {"label": label, "layers": [name for name, _ in members]}
        row["spans"] = _common_spans([layer.spans for _, layer in members], first, end)
        for kind, worst in KINDS.items():
            values = [value for _, layer in members for value in layer.values[kind]]
            row[kind] = spread(values, edges, worst=worst) if was_measured[kind] else []
        drawn.append(row)
    return edges, drawn


def _grouped(layers: dict[str, LayerLife], most: int) -> list[tuple[str, list[tuple[str, LayerLife]]]]:
    """At most ``most`` groups: neighbours whose names begin alike, as deep as rows suffice.

    Layers whose format changed stay apart from those whose did not while that is possible.
    """
    depth = max((name.count(".") + 1 for name in layers), default=0)
    while len(layers) > most and depth > 0:
        depth -= 1
        for split_moved in (True, False):
            groups = _at_depth(layers, depth, split_moved)
            if len(groups) <= most:
                return [(_label(members, depth), members) for members in groups]
    if len(layers) <= most:
        return [(cell(name), [(name, layer)]) for name, layer in layers.items()]
    return [(f"all layers ({len(layers)})", list(layers.items()))]


def _at_depth(layers: dict[str, LayerLife], depth: int, split_moved: bool) -> list[list[tuple[str, LayerLife]]]:
    groups: dict[Any, list[tuple[str, LayerLife]]] = {}
    for name, layer in layers.items():
        prefix = ".".join(name.split(".")[:depth])
        groups.setdefault((prefix, tuple(layer.spans) if split_moved else ()), []).append((name, layer))
    return list(groups.values())


def _label(members: list[tuple[str, LayerLife]], depth: int) -> str:
    name = members[0][0]
    if len(members) == 1:
        return cell(name)
    prefix = ".".join(name.split(".")[:depth])
    return f"{prefix}.* ({len(members)} layers)" if prefix else f"* ({len(members)} layers)"


def _common_spans(lives: list[list[Span]], first: int, end: int) -> list[Span]:
    """The format of all members over time; ``"several"`` where they differ."""
    if all(life == lives[0] for life in lives):
        return lives[0]
    moments = sorted({first, end, *(moment for life in lives for start, stop, _ in life for moment in (start, stop))})
    pieces: list[Span] = []
    for start, stop in pairwise(moments):
        formats = {format for life in lives for begin, until, format in life if begin <= start < until}
        pieces.append((start, stop, formats.pop() if len(formats) == 1 else "several"))
    return _joined(pieces)
