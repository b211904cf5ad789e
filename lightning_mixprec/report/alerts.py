"""What went wrong in a run, or may: in plain words, with the layer and what to do. The most severe come first."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning_mixprec.report.layers import Layer
from lightning_mixprec.report.reading import Records, Row
from lightning_mixprec.report.timeline import with_skips

Level = Literal["error", "warning", "note"]

_LEVELS = ("error", "warning", "note")
_LOSSY, _VERY_LOSSY = 0.1, 0.5
_FEW_BITS = 1.0
_OFF = 0.9
_LOSS_GAP = 0.05
_NOISY_DB = 10.0
_MANY_SKIPS, _SOME_SKIPS = 0.1, 0.02
_LOW_SCALE = 1.0
_STUCK = 0.5
_FEW = 2


@dataclass(frozen=True)
class Alert:
    """One thing to know.

    Attributes:
        level: ``"error"``: the run is damaged by it; ``"warning"``: it may be; ``"note"``: worth knowing.
        title: What happened, in a few words.
        text: What was seen, with numbers.
        advice: What to do.
        layer: The layer it is about, or the worst of several.
        step: The optimizer step at which it was seen first.
        count: How many times it was seen, or how many layers it is seen of.
        of: What is counted, ``"times"`` or ``"layers"``.
    """

    level: Level
    title: str
    text: str
    advice: str = ""
    layer: str | None = None
    step: int | None = None
    count: int = 1
    of: Literal["times", "layers"] = "times"

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def alerts(records: Records, layers: dict[str, Layer]) -> list[Alert]:
    """All alerts of a run, the most severe first."""
    found = [alert for look in _LOOKS for alert in look(records, layers)]
    return sorted(found, key=lambda alert: _LEVELS.index(alert.level))


def _ending(records: Records, layers: dict[str, Layer]) -> Iterator[Alert]:
    state = records.end.get("state")
    if state == "failed":
        yield Alert("error", "The run ended by an exception", records.end["message"], step=records.last_step)
    elif state is None and records.run:
        text = "Nobody wrote how it ended: it is still running, or the process was killed."
        yield Alert("note", "The run has no end", text, step=records.last_step)


def _lost_loss(records: Records, layers: dict[str, Layer]) -> Iterator[Alert]:
    if records.infinite:
        count, first = len(records.infinite), records.infinite[0]
        skipped = sum(was_skipped for *_, was_skipped in with_skips(records.curve))
        level: Level = "error" if skipped < count else "warning" if count > _FEW else "note"
        text = f"{counted(count, 'batch', 'batches')} had a loss that is not finite, the first at step {first}."
        text += " Such steps were skipped." if level != "error" else ""
        advice = "The alerts on overflows name the layer." if records.overflow else "OverflowMonitor() finds the layer."
        yield Alert(level, "The loss was not finite", text, advice, step=first, count=count)


def _overflows(records: Records, layers: dict[str, Layer]) -> Iterator[Alert]:
    events = [row for row in records.overflow if row["verdict"] != "scale"]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in events:
        groups.setdefault((row["verdict"], row["layer"], row["direction"]), []).append(row)
    for (verdict, layer, direction), rows in groups.items():
        first = rows[0]
        level: Level = "warning" if verdict == "precision" and len(rows) == 1 else "error"
        advice = _FIXES[verdict](first)
        if (moved := _moved_since(records, layer, rows[-1])) is not None:
            level, advice = "note", f"Since step {moved['step']} it computes in {moved['to']} and has not failed."
        title = _TITLES[verdict].format(layer=_quoted(layer), format=first["format"], direction=direction)
        title = title[0].upper() + title[1:]
        text = first["message"].split(";")[0]
        yield Alert(level, title, f"{text[0].upper()}{text[1:]}.", advice, layer, first["step"], len(rows))


def _moved_since(records: Records, layer: str | None, event: Row) -> Row | None:
    """The layer's last move, if it left the format of the event and came no sooner."""
    moves = [row for row in records.history if row["layer"] == layer and row["step"] >= event["step"]]
    return moves[-1] if moves and moves[-1]["to"] != event["format"] else None


def _move(row: Row) -> str:
    wider = row["fits"] or "fp32"
    return f"Compute it, and what takes its result, in {wider}; AdaptivePrecision does so by itself."


_TITLES = {
    "precision": "{layer} overflows in {format} ({direction})",
    "data": "A batch is not finite itself",
    "model": "{layer} is not finite in fp32 either",
}
_FIXES: dict[str, Callable[[Row], str]] = {
    "precision": _move,
    "data": lambda row: "Clean the data; no format helps.",
    "model": lambda row: "Look for a division by zero, a logarithm of zero or weights that diverged; no format helps.",
}


def _skips(records: Records, layers: dict[str, Layer]) -> Iterator[Alert]:
    told = with_skips(records.curve)
    skipped = [step for step, *_, was_skipped in told if was_skipped]
    steps = len({step for step, *_ in told}) + len(skipped)
    share = len(skipped) / steps if steps else 0.0
    if len(skipped) <= _FEW or share < _SOME_SKIPS:
        return
    level: Level = "error" if share >= _MANY_SKIPS else "warning"
    text = (
        f"{len(skipped)} optimizer steps were skipped for gradients that are not finite ({share:.1%} of those tried)."
    )
    advice = (
        "A few at the start are the search for the loss scale; more than that is a layer that overflows: see above."
    )
    yield Alert(level, "Many steps were skipped", text, advice, step=skipped[0], count=len(skipped))


def _scale(records: Records, layers: dict[str, Layer]) -> Iterator[Alert]:
    scales = [(step, scale) for step, _, scale, _ in records.curve if scale is not None]
    was_scaled = any(scale > _LOW_SCALE for _, scale in scales)
    if scales and was_scaled and scales[-1][1] <= _LOW_SCALE:
        first = next(step for step, scale in scales if scale <= _LOW_SCALE)
        text = f"It was {scales[-1][1]:g} at the end; at so small a scale fp16 gradients vanish."
        advice = "A layer overflows whatever the scale: move it to bf16 or fp32."
        yield Alert("error", "The loss scale collapsed", text, advice, step=first)


def _underflows(records: Records, layers: dict[str, Layer]) -> Iterator[Alert]:
    rates = {
        name: layer.values["underflow_rate"][-1] for name, layer in layers.items() if layer.values["underflow_rate"]
    }
    lossy = {name: told for name, told in rates.items() if (told[1] or 0.0) > _LOSSY}
    if not lossy:
        return
    worst = max(lossy, key=lambda name: lossy[name][1] or 0.0)
    step, rate = lossy[worst]
    format = _format_at(layers[worst], step)
    others = f", and of {len(lossy) - 1} more layers over {_LOSSY:.0%}" if lossy.keys() - {worst} else ""
    text = f"At its latest sample {rate:.0%} of the gradient of {_quoted(worst)} rounds to zero in {format}{others}."
    level: Level = "error" if (rate or 0.0) > _VERY_LOSSY else "warning"
    advice = _against_underflow(records, worst, format)
    yield Alert(level, "Gradients vanish", text, advice, worst, step, len(lossy), "layers")


def _against_underflow(records: Records, layer: str, format: str) -> str:
    wider = "bf16" if format in ("fp16", "fp8") else "fp32"
    told = [row["sample"]["layers"][layer] for row in records.samples if layer in row["sample"]["layers"]]
    scale = records.samples[-1]["sample"]["loss_scale"] if records.samples else 0.0
    best = told[-1][5] if told and len(told[-1]) > 5 else None
    if format == "fp16" and best is not None and best > scale:
        return f"A loss scale of {best:g} would suit it (it was {scale:g}); raise init_scale, or compute it in {wider}."
    return f"Compute it in {wider}."


def _headroom(records: Records, layers: dict[str, Layer]) -> Iterator[Alert]:
    near = {}
    for name, layer in layers.items():
        known = [(step, bits) for step, bits in layer.values["headroom_bits"] if bits is not None]
        if known and known[-1][1] < _FEW_BITS:
            near[name] = known[-1]
    if near:
        worst = min(near, key=lambda name: near[name][1])
        step, bits = near[worst]
        what = f"grow {2**bits:.1f} times" if bits >= 0 else "not even stay"
        text = f"At its latest sample values of {_quoted(worst)} could {what} before they overflow ({bits:.1f} bits)."
        advice = "Watch it, or compute it in bf16, which has fp32's range."
        yield Alert("warning", "Close to an overflow", text, advice, worst, step, len(near), "layers")


def _quality(records: Records, layers: dict[str, Layer]) -> Iterator[Alert]:
    """Layers whose output is mostly noise: what goes wrong without a sound has its cause there."""
    noisy = {}
    for name, layer in layers.items():
        known = [(step, ratio) for step, ratio in layer.values["sqnr_db"] if ratio is not None]
        if known and known[-1][1] < _NOISY_DB:
            noisy[name] = known[-1]
    if noisy:
        worst = min(noisy, key=lambda name: noisy[name][1])
        step, ratio = noisy[worst]
        format = _format_at(layers[worst], step)
        text = f"At its latest sample the output of {_quoted(worst)} in {format} has an SQNR of {ratio:.1f} dB: noise."
        advice = f"Compute it in {'bf16 if its range is too small, or in ' if format == 'fp16' else ''}fp32."
        yield Alert("error", "An output is not fp32's", text, advice, worst, step, len(noisy), "layers")


def _agreement(records: Records, layers: dict[str, Layer]) -> Iterator[Alert]:
    off = {}
    for name, layer in layers.items():
        known = [(step, cosine) for step, cosine in layer.values["grad_cosine"] if cosine is not None]
        if len(known) > 1 and max(cosine for _, cosine in known[-2:]) < _OFF:
            off[name] = known[-1]
    if off:
        worst = min(off, key=lambda name: off[name][1])
        step, cosine = off[worst]
        text = f"In the last two samples the gradient of {_quoted(worst)} has a cosine of {cosine:.2f} with fp32's."
        advice = "Compute it in fp32 if its SQNR is low, else the layers between it and the loss."
        yield Alert("warning", "Gradients point elsewhere than fp32's", text, advice, worst, step, len(off), "layers")
    gaps = [(row["step"], row["loss_gap"]) for row in records.fidelity if row.get("loss_gap") is not None]
    if len(gaps) > 1 and min(gap for _, gap in gaps[-2:]) > _LOSS_GAP:
        text = f"In the last two samples the loss differs from fp32's by {gaps[-1][1]:.1%} (healthy is below 2 %)."
        advice = "Compute the loss in fp32 (layers: '', recurse: false) and look which layers have a low SQNR."
        yield Alert("warning", "The loss is not fp32's", text, advice, step=gaps[-1][0])


def _stagnation(records: Records, layers: dict[str, Layer]) -> Iterator[Alert]:
    rates = {row["layer"]: row for row in records.underflow if row.get("stagnation_rate") is not None}
    stuck = {name: row for name, row in rates.items() if row["stagnation_rate"] > _STUCK}
    if stuck:
        worst = max(stuck, key=lambda name: float(stuck[name]["stagnation_rate"]))
        row = stuck[worst]
        text = f"An optimizer step left {row['stagnation_rate']:.0%} of the weights of {_quoted(worst)} as they were."
        advice = (
            "Its updates are smaller than the weights' last bit: store the weights in fp32, or raise the learning rate."
        )
        yield Alert("warning", "Weights do not move", text, advice, worst, row["step"], len(stuck), "layers")


def _moves(records: Records, layers: dict[str, Layer]) -> Iterator[Alert]:
    moved = [row for row in records.history if str(row["reason"]).startswith("adaptive: ")]
    if moved:
        names = list(dict.fromkeys(row["layer"] for row in moved))
        text = f"AdaptivePrecision moved {_listed(names)}; reasons stand in the history."
        advice = "Take learned_policy.yaml as the policy of later runs."
        yield Alert("note", "Layers were moved", text, advice, names[0], moved[0]["step"], len(names), "layers")


def _unseen(records: Records, layers: dict[str, Layer]) -> Iterator[Alert]:
    reasons = Counter(row["problem"] for row in records.problems)
    for reason, count in reasons.most_common(3):
        step = next(row["step"] for row in records.problems if row["problem"] == reason)
        yield Alert("note", "Steps could not be looked at", str(reason), step=step, count=count)
    if "OverflowMonitor" not in records.monitors and "AdaptivePrecision" not in records.monitors:
        text = "Nobody looked for the layer behind a step that failed."
        yield Alert("note", "Overflows were not watched", text, "Add OverflowMonitor() to the callbacks.")


_Look = Callable[[Records, dict[str, Layer]], Iterator[Alert]]
_LOOKS: Sequence[_Look] = (
    _ending,
    _overflows,
    _lost_loss,
    _scale,
    _skips,
    _underflows,
    _quality,
    _agreement,
    _headroom,
    _stagnation,
    _moves,
    _unseen,
)


def _format_at(layer: Layer, step: int) -> str:
    return next((format for start, end, format in layer.spans if start <= step < end), layer.compute)


def counted(count: int, one: str, many: str = "") -> str:
    """A number and its noun.

    >>> counted(1, "step"), counted(1200, "batch", "batches")
    ('1 step', '1,200 batches')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _quoted(layer: str | None) -> str:
    return "the LightningModule itself" if layer == "" else repr(layer)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(_quoted, names[:4]))
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
