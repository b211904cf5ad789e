"""What went wrong in a run, or may: in plain words, with the layer and what to do. The most severe come first."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning_mixprec.report.alert import LEVELS, Alert, Level, counted, quoted
from lightning_mixprec.report.alerts_of_layers import layer_alerts
from lightning_mixprec.report.layers import Layer
from lightning_mixprec.report.reading import Records, Row
from lightning_mixprec.report.timeline import skipped_steps, steps_taken

_MANY_SKIPS, _SOME_SKIPS = 0.1, 0.02
_FEW = 2
_LOW_SCALE = 1.0
_NAMED = 4


def alerts(records: Records, layers: dict[str, Layer]) -> list[Alert]:
    """All alerts of a run, the most severe first."""
    found = [alert for look in _LOOKS for alert in look(records)]
    return sorted([*found, *layer_alerts(records, layers)], key=lambda alert: LEVELS.index(alert.level))


def _ending(records: Records) -> Iterator[Alert]:
    state, message, step = records.end.get("state"), records.end.get("message", ""), records.last_step
    if state == "failed":
        yield Alert("error", "The run ended by an exception", message, step=step)
    elif state == "stopped":
        yield Alert("note", "The run was stopped", f"{message}." if message else "By the user.", step=step)
    elif state is None and records.run:
        text = "Nobody wrote how it ended: it is still running, or the process was killed."
        yield Alert("note", "The run has no end", text, step=step)


def _overflows(records: Records) -> Iterator[Alert]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in records.overflow:
        if row["verdict"] != "scale":
            groups.setdefault((row["verdict"], row["layer"], row["direction"]), []).append(row)
    for (verdict, layer, direction), rows in groups.items():
        first = rows[0]
        level: Level = "warning" if verdict == "precision" and len(rows) == 1 else "error"
        advice = _FIXES[verdict](first)
        if (moved := _moved_since(records, layer, rows[-1])) is not None:
            level, advice = "note", f"Since step {moved['step']} it computes in {moved['to']} and has not failed."
        title = _TITLES[verdict].format(layer=quoted(layer), format=first["format"], direction=direction)
        text = first["message"].split(";")[0]
        yield Alert(level, _capital(title), f"{_capital(text)}.", advice, layer, first["step"], len(rows))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _moved_since(records: Records, layer: str | None, event: Row) -> Row | None:
    """The layer's last move, if it left the format of the event and came no sooner."""
    moves = [row for row in records.history if row["layer"] == layer and row["step"] >= event["step"]]
    return moves[-1] if moves and moves[-1]["to"] != event["format"] else None


def _move(row: Row) -> str:
    return f"Compute it, and what takes its result, in {row['fits'] or 'fp32'}; AdaptivePrecision does so by itself."


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


def _lost_loss(records: Records) -> Iterator[Alert]:
    if records.infinite:
        count, first = len(records.infinite), records.infinite[0]
        is_skipped = len(skipped_steps(records)) >= count
        level: Level = "error" if not is_skipped else "warning" if count > _FEW else "note"
        text = f"{counted(count, 'batch', 'batches')} had a loss that is not finite, the first at step {first}."
        text += " Such steps were skipped." if is_skipped else ""
        advice = "The alerts on overflows name the layer." if records.overflow else "OverflowMonitor() finds the layer."
        yield Alert(level, "The loss was not finite", text, advice, step=first, count=count)


def _scale(records: Records) -> Iterator[Alert]:
    scales = [(step, scale) for step, _, scale, _ in records.curve if scale is not None]
    was_scaled = any(scale > _LOW_SCALE for _, scale in scales)
    if scales and was_scaled and scales[-1][1] <= _LOW_SCALE:
        first = next(step for step, scale in scales if scale <= _LOW_SCALE)
        text = f"It was {scales[-1][1]:g} at the end; at so small a scale fp16 gradients vanish."
        advice = "A layer overflows whatever the scale: move it to bf16 or fp32."
        yield Alert("error", "The loss scale collapsed", text, advice, step=first)


def _skips(records: Records) -> Iterator[Alert]:
    skipped = skipped_steps(records)
    share = len(skipped) / max(steps_taken(records) + len(skipped), 1)
    if len(skipped) > _FEW and share >= _SOME_SKIPS:
        level: Level = "error" if share >= _MANY_SKIPS else "warning"
        text = f"{len(skipped)} optimizer steps were skipped for gradients that are not finite ({share:.1%} of all)."
        advice = "A few at the start are the search for the loss scale; more than that is a layer that overflows."
        yield Alert(level, "Many steps were skipped", text, advice, step=skipped[0], count=len(skipped))


def _moves(records: Records) -> Iterator[Alert]:
    moved = [row for row in records.history if row["reason"].startswith("adaptive: ")]
    if moved:
        names = list(dict.fromkeys(row["layer"] for row in moved))
        shown = ", ".join(map(quoted, names[:_NAMED]))
        shown += f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        text = f"AdaptivePrecision moved {shown}; reasons stand in the history."
        advice = "Take learned_policy.yaml as the policy of later runs."
        yield Alert("note", "Layers were moved", text, advice, names[0], moved[0]["step"], len(names), "layers")


def _unseen(records: Records) -> Iterator[Alert]:
    reasons = Counter(row["problem"] for row in records.problems)
    for reason, count in reasons.most_common(3):
        step = next(row["step"] for row in records.problems if row["problem"] == reason)
        yield Alert("note", "Steps could not be looked at", f"{reason}.", step=step, count=count)
    if not {"OverflowMonitor", "AdaptivePrecision"} & set(records.monitors):
        text = "Nobody looked for the layer behind a step that failed."
        yield Alert("note", "Overflows were not watched", text, "Add OverflowMonitor() to the callbacks.")


_LOOKS: Sequence[Callable[[Records], Iterator[Alert]]] = (
    _ending,
    _overflows,
    _lost_loss,
    _scale,
    _skips,
    _moves,
    _unseen,
)
