"""Alerts: what went wrong in a run, or may, and what to do. Symptoms are told in the words of ``records.advice``.

Of single layers the latest sample counts. A layer that has moved since is passed over: what was seen of it is past.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning_mixprec.numerics.formats import FORMATS, Use, get_format
from lightning_mixprec.records import advice
from lightning_mixprec.records.advice import Advice
from lightning_mixprec.records.words import counted, listed, quoted, sentence
from lightning_mixprec.report.layers import LayerLife
from lightning_mixprec.report.reading import Records, Row
from lightning_mixprec.report.timeline import skipped_steps, steps_taken

Level = Literal["error", "warning", "note"]

LEVELS: Sequence[Level] = ("error", "warning", "note")
"""The most severe first."""

_MANY_SKIPS, _SOME_SKIPS = 0.1, 0.02
_FEW = 2
_LOW_SCALE = 1.0


@dataclass(frozen=True)
class Alert:
    """One thing to know.

    Attributes:
        level: ``"error"``: the run is damaged by it; ``"warning"``: it may be; ``"note"``: worth knowing.
        title: What happened, in a few words.
        text: What was seen, with numbers.
        advice: What to do.
        layer: The layer it is about, or the worst of several.
        step: The optimizer step at which it was seen.
        count: How many times it was seen, or how many layers it is seen of.
        of: What is counted, ``"times"`` or ``"layers"``.
        line: All of it in one line, for a terminal.
    """

    level: Level
    title: str
    text: str
    advice: str = ""
    layer: str | None = None
    step: int | None = None
    count: int = 1
    of: Literal["times", "layers"] = "times"
    line: str = ""

    @classmethod
    def of_layers(cls, level: Level, title: str, told: Advice, layer: str, step: int, count: int) -> "Alert":
        """A symptom of so many layers, the worst of which is named."""
        return cls(level, title, sentence(told.seen), sentence(told.do), layer, step, count, "layers", f"{told}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {**asdict(self), "line": self.line or f"{self.title}. {self.advice}".rstrip()}


def alerts(records: Records, layers: dict[str, LayerLife]) -> list[Alert]:
    """All alerts of a run, the most severe first."""
    found = [
        *_ending(records),
        *_overflows(records),
        *_lost_loss(records),
        *_scale(records),
        *_skips(records),
        *_moves(records),
        *_unseen(records),
        *_noise(records, layers),
        *_underflow(records, layers),
        *_operands(records, layers),
        *_gradients(records, layers),
        *_loss_gap(records),
        *_headroom(records, layers),
        *_stagnation(records),
    ]
    return sorted(found, key=lambda alert: LEVELS.index(alert.level))


# The run


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
        first, told = rows[0], advice.overflow(rows[0])
        level: Level = "warning" if verdict == "precision" and len(rows) == 1 else "error"
        what_to_do = sentence(told.do)
        if (moved := _moved_since(records, layer, rows[-1])) is not None:
            level, what_to_do = "note", f"Since step {moved['step']} it computes in {moved['to']} and has not failed."
        title = _TITLES[verdict].format(layer=quoted(layer), format=first["format"], direction=direction)
        where = (layer, first["step"], len(rows))
        yield Alert(level, sentence(title)[:-1], sentence(told.seen), what_to_do, *where, line=f"{told}.")


def _moved_since(records: Records, layer: str | None, event: Row) -> Row | None:
    """The layer's last move, if it left the format of the event and came no sooner."""
    moves = [row for row in records.history if row["layer"] == layer and row["step"] >= event["step"]]
    return moves[-1] if moves and moves[-1]["to"] != event["format"] else None


_TITLES = {
    "precision": "{layer} overflows in {format} ({direction})",
    "data": "A batch is not finite itself",
    "model": "{layer} is not finite in fp32 either",
}


def _lost_loss(records: Records) -> Iterator[Alert]:
    if records.infinite:
        count, first = len(records.infinite), records.infinite[0]
        is_skipped = len(skipped_steps(records)) >= count
        level: Level = "error" if not is_skipped else "warning" if count > _FEW else "note"
        text = f"{counted(count, 'batch', 'batches')} had a loss that is not finite, the first at step {first}."
        text += " Such steps were skipped." if is_skipped else ""
        what_to_do = "The alerts on overflows name the layer."
        what_to_do = what_to_do if records.overflow else "OverflowMonitor() finds the layer."
        yield Alert(level, "The loss was not finite", text, what_to_do, step=first, count=count)


def _scale(records: Records) -> Iterator[Alert]:
    scales = [(step, scale) for step, _, scale, _ in records.curve if scale is not None]
    was_scaled = any(scale > _LOW_SCALE for _, scale in scales)
    if scales and was_scaled and scales[-1][1] <= _LOW_SCALE:
        first = next(step for step, scale in scales if scale <= _LOW_SCALE)
        text = f"It was {scales[-1][1]:g} at the end; at so small a scale fp16 gradients vanish."
        what_to_do = "A layer overflows whatever the scale: move it to bf16 or fp32."
        yield Alert("error", "The loss scale collapsed", text, what_to_do, step=first)


def _skips(records: Records) -> Iterator[Alert]:
    skipped = skipped_steps(records)
    share = len(skipped) / max(steps_taken(records) + len(skipped), 1)
    if len(skipped) > _FEW and share >= _SOME_SKIPS:
        level: Level = "error" if share >= _MANY_SKIPS else "warning"
        text = f"{len(skipped)} optimizer steps were skipped for gradients that are not finite ({share:.1%} of all)."
        what_to_do = "A few at the start are the search for the loss scale; more than that is a layer that overflows."
        yield Alert(level, "Many steps were skipped", text, what_to_do, step=skipped[0], count=len(skipped))


def _moves(records: Records) -> Iterator[Alert]:
    decided = {(layer, to) for row in records.decided for layer, _, to in row["decision"]["moves"]}
    moved = [row for row in records.history if (row["layer"], row["to"]) in decided]
    if moved:
        names = list(dict.fromkeys(row["layer"] for row in moved))
        text = f"AdaptivePrecision moved {listed(names, most=4)}; reasons stand in the history."
        what_to_do = "Take learned_policy.yaml as the policy of later runs."
        where = (names[0], moved[0]["step"], len(names))
        yield Alert("note", "Layers were moved", text, what_to_do, *where, "layers")


def _unseen(records: Records) -> Iterator[Alert]:
    reasons = Counter(row["problem"] for row in records.problems)
    for reason, count in reasons.most_common(3):
        step = next(row["step"] for row in records.problems if row["problem"] == reason)
        yield Alert("note", "Steps could not be looked at", f"{reason}.", step=step, count=count)
    if not {"OverflowMonitor", "AdaptivePrecision"} & set(records.monitors):
        text = "Nobody looked for the layer behind a step that failed."
        yield Alert("note", "Overflows were not watched", text, "Add OverflowMonitor() to the callbacks.")


# Single layers

Lives = dict[str, LayerLife]
Known = list[tuple[int, float]]


def _measured(records: Records, layers: Lives, kind: str, *, after_all_moves: bool = False) -> dict[str, Known]:
    """By layer the steps after its last move, or after that of any layer, and what was measured there."""
    last_move = _last_move(records) if after_all_moves else -1
    found = {}
    for name, layer in layers.items():
        since = max(last_move, layer.last_move)
        known = [(step, value) for step, value in layer.values[kind] if value is not None and step > since]
        if known:
            found[name] = known
    return found


def _last_move(records: Records) -> int:
    return max((entry["step"] for entry in records.history), default=-1)


def _worst_first(latest: dict[str, tuple[int, float]], *, largest: bool = False) -> list[str]:
    return sorted(latest, key=lambda name: -latest[name][1] if largest else latest[name][1])


def _use(format: str) -> Use:
    return get_format(format).use if format in FORMATS else Use()


def _noisy(records: Records, layers: Lives) -> tuple[list[str], dict[str, tuple[int, float]]]:
    """The layers whose outputs are noise, the worst first, and their latest samples."""
    measured = _measured(records, layers, "sqnr_db", after_all_moves=True)
    latest = {name: known[-1] for name, known in measured.items() if known[-1][1] < advice.NOISE_DB}
    return advice.causes(_worst_first(latest)), latest


def _noise(records: Records, layers: Lives) -> Iterator[Alert]:
    """Outputs that are noise, in which silent failures have their cause."""
    names, latest = _noisy(records, layers)
    if names:
        worst, *others = names
        step, ratio = latest[worst]
        told = advice.noise(worst, ratio, layers[worst].compute, _use(layers[worst].compute), others)
        yield Alert.of_layers("error", "An output is not fp32's", told, worst, step, len(names))


def _underflow(records: Records, layers: Lives) -> Iterator[Alert]:
    limit = _underflow_limit(records)
    measured = _measured(records, layers, "underflow_rate")
    latest = {name: known[-1] for name, known in measured.items() if known[-1][1] > limit}
    if latest:
        worst, *others = _worst_first(latest, largest=True)
        step, rate = latest[worst]
        told = _vanishing(records, worst, step, others)
        level: Level = "error" if rate > advice.STARVED else "warning"
        yield Alert.of_layers(level, "Gradients vanish", told, worst, step, len(latest))


def _operands(records: Records, layers: Lives) -> Iterator[Alert]:
    """Operands of products in 8 bits, at the latest sample of each layer that still computes in them."""
    rows: dict[str, Row] = {}
    for row in records.underflow:
        name = row.get("layer")
        if "operands" in row and name in layers and layers[name].compute == row["operands"]["format"]:
            rows[name] = row
    rates = {name: advice.worst_operand(row["operands"])[0] for name, row in rows.items()}
    lossy = sorted((name for name in rows if rates[name] > _underflow_limit(records)), key=lambda name: -rates[name])
    if lossy:
        worst, *others = lossy
        told = advice.narrow_operand(worst, rows[worst]["operands"], others)
        level: Level = "error" if rates[worst] > advice.STARVED else "warning"
        yield Alert.of_layers(level, "Operands vanish", told, worst, rows[worst]["step"], len(lossy))


def _underflow_limit(records: Records) -> float:
    rows = [row for row in records.underflow if "format" in row]
    return float(rows[-1].get("threshold", advice.MAX_UNDERFLOW)) if rows else advice.MAX_UNDERFLOW


def _vanishing(records: Records, layer: str, step: int, others: Sequence[str]) -> Advice:
    """As ``UnderflowMonitor`` told of it, or ``PrecisionReport``, which knows less."""
    measured = [(scale, name, losses) for at, scale, name, losses in records.measured if at == step]
    scale, losses = next((scale, losses) for scale, name, losses in reversed(measured) if name == layer)
    use, is_whole = _use(losses["format"]), "what_if" in losses
    every = [each for _, _, each in measured if ("what_if" in each) == is_whole]
    if is_whole:
        return advice.underflow(layer, losses, scale, others, use, advice.largest_scale(every))
    what_if = {losses["format"]: {"best_scale": losses["best_scale"], "fits": losses["best_scale"] is not None}}
    what_if |= {use.for_range: {"underflow_rate": 0.0}} if use.for_range else {}
    best = [each["best_scale"] for each in every if _use(each["format"]).needs_scaling]
    largest = min((scale for scale in best if scale is not None), default=math.inf)
    return advice.underflow(layer, {**losses, "what_if": what_if}, scale, others, use, largest)


def _gradients(records: Records, layers: Lives) -> Iterator[Alert]:
    formats = {layer.compute for layer in layers.values()} & FORMATS.keys()
    is_coarse = any(get_format(format).is_coarse for format in formats)
    limit = _latest_loss(records).get("min_cosine", advice.min_cosine(is_coarse=is_coarse))
    measured = _measured(records, layers, "grad_cosine", after_all_moves=True)
    latest = {
        name: known[-1]
        for name, known in measured.items()
        if len(known) > 1 and max(cosine for _, cosine in known[-2:]) < limit
    }
    if latest:
        worst, *others = _worst_first(latest)
        step, cosine = latest[worst]
        noisy, samples = _noisy(records, layers)
        noise = None
        if noisy:
            cause = layers[noisy[0]]
            noise = advice.noise(noisy[0], samples[noisy[0]][1], cause.compute, _use(cause.compute))
        told = advice.gradient(worst, cosine, limit, others, noise)
        yield Alert.of_layers("warning", "Gradients point elsewhere than fp32's", told, worst, step, len(latest))


def _latest_loss(records: Records) -> Row:
    return next((row for row in reversed(records.fidelity) if "loss_gap" in row), {})


def _loss_gap(records: Records) -> Iterator[Alert]:
    last_move, limit = _last_move(records), _latest_loss(records).get("max_loss_gap", advice.MAX_LOSS_GAP)
    known = [row for row in records.fidelity if row.get("loss_gap") is not None]
    gaps = [(row["step"], 0.0 if row.get("is_noise") else row["loss_gap"]) for row in known]
    gaps = [(step, gap) for step, gap in gaps if step > last_move]
    if len(gaps) > 1 and min(gap for _, gap in gaps[-2:]) > limit:
        step, gap = gaps[-1]
        told = advice.loss_gap(gap)
        text, what_to_do = sentence(told.seen), sentence(told.do)
        yield Alert("warning", "The loss is not fp32's", text, what_to_do, step=step, line=f"{told}.")


def _headroom(records: Records, layers: Lives) -> Iterator[Alert]:
    latest = {name: told for name, told in _room(records, layers).items() if told[1] < advice.MIN_HEADROOM_BITS}
    if latest:
        worst = _worst_first(latest)[0]
        step, bits = latest[worst]
        level: Level = "error" if bits < 0 else "warning"
        title = "Values overflow" if bits < 0 else "Close to an overflow"
        told = advice.headroom(worst, bits, layers[worst].compute, _use(layers[worst].compute))
        yield Alert.of_layers(level, title, told, worst, step, len(latest))


def _room(records: Records, layers: Lives) -> dict[str, tuple[int, float]]:
    """By layer its latest sample and the headroom there, that of gradients at the loss scale that holds.

    A scale that was lowered since gives gradients more room, and one that is above 1 is searched for: it is the largest
    that fits, and comes down where gradients grow.
    """
    scales = [(step, scale) for step, _, scale, _ in records.curve if scale]
    seen = sorted(records.measured, key=lambda each: each[0])
    now = max(scales or [(step, scale) for step, scale, *_ in seen], default=(0, 1.0))[1]
    found = {}
    for step, scale, name, told in seen:
        if step > layers[name].last_move and told["headroom_bits"] is not None:
            gradient = told["headroom_bits"] + max(math.log2(scale / now), 0.0)
            gradient = math.inf if now > _LOW_SCALE and gradient >= 0 else gradient
            output = told["output_headroom_bits"]
            found[name] = step, gradient if output is None else min(gradient, output)
    return found


def _stagnation(records: Records) -> Iterator[Alert]:
    still = _latest_of(records, "still_rate")
    if still:
        worst, *others = _worst_first(still, largest=True)
        step, rate = still[worst]
        told = advice.still(worst, rate, others)
        yield Alert.of_layers("warning", "Weights in 16 bits stand still", told, worst, step, len(still))
    latest = _latest_of(records, "stagnation_rate")
    latest = {name: seen for name, seen in latest.items() if name not in still}
    if latest:
        worst = _worst_first(latest, largest=True)[0]
        step, rate = latest[worst]
        told = advice.stagnation(worst, rate)
        yield Alert.of_layers("warning", "Weights do not move", told, worst, step, len(latest))


def _latest_of(records: Records, key: str) -> dict[str, tuple[int, float]]:
    """By layer the step and the rate of the latest row that has one, where that is too much."""
    known = {row["layer"]: (row["step"], row[key]) for row in records.underflow if row.get(key) is not None}
    return {name: seen for name, seen in known.items() if seen[1] > advice.MAX_STAGNATION}
