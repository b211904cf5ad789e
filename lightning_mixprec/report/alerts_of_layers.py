"""What samples say of single layers. A layer that has moved since is passed over: what was seen of it is past."""

from collections.abc import Iterator

from lightning_mixprec.numerics.formats import REFERENCE, get_format, promoted_for_range
from lightning_mixprec.report.alert import Alert, Level, quoted
from lightning_mixprec.report.layers import Layer
from lightning_mixprec.report.reading import Records

_LOSSY, _VERY_LOSSY = 0.1, 0.5
_FEW_BITS = 1.0
_OFF = 0.9
_LOSS_GAP = 0.05
_NOISY_DB = 10.0
_STUCK = 0.5

Known = list[tuple[int, float]]


def layer_alerts(records: Records, layers: dict[str, Layer]) -> Iterator[Alert]:
    """All alerts on single layers."""
    last_move = max((entry["step"] for entry in records.history), default=-1)
    yield from _quality(_measured(layers, "sqnr_db", last_move), layers)
    yield from _underflow(records, _measured(layers, "underflow_rate"), layers)
    yield from _agreement(_measured(layers, "grad_cosine", last_move))
    yield from _loss_gap(records, last_move)
    yield from _headroom(_measured(layers, "headroom_bits"), layers)
    yield from _stagnation(records)


def _measured(layers: dict[str, Layer], kind: str, after: int = -1) -> dict[str, Known]:
    """By layer the steps after a given one, and after its own last move, and what was measured there."""
    found = {}
    for name, layer in layers.items():
        since = max(after, layer.last_move)
        known = [(step, value) for step, value in layer.values[kind] if value is not None and step > since]
        if known:
            found[name] = known
    return found


def _quality(measured: dict[str, Known], layers: dict[str, Layer]) -> Iterator[Alert]:
    """Outputs that are mostly noise: what goes wrong without a sound has its cause there."""
    noisy = {name: known[-1] for name, known in measured.items() if known[-1][1] < _NOISY_DB}
    if noisy:
        worst = min(noisy, key=lambda name: noisy[name][1])
        step, ratio = noisy[worst]
        format = layers[worst].compute
        text = f"At its latest sample the output of {quoted(worst)} in {format} has an SQNR of {ratio:.1f} dB: noise."
        advice = f"Compute it in {'bf16 if its range is too small, or in ' if format == 'fp16' else ''}fp32."
        yield Alert("error", "An output is not fp32's", text, advice, worst, step, len(noisy), "layers")


def _underflow(records: Records, measured: dict[str, Known], layers: dict[str, Layer]) -> Iterator[Alert]:
    lossy = {name: known[-1] for name, known in measured.items() if known[-1][1] > _LOSSY}
    if lossy:
        worst = max(lossy, key=lambda name: lossy[name][1])
        step, rate = lossy[worst]
        format = layers[worst].compute
        others = f", and of {len(lossy) - 1} more layers over {_LOSSY:.0%}" if len(lossy) > 1 else ""
        text = f"At its latest sample {rate:.0%} of the gradient of {quoted(worst)} rounds to zero in {format}{others}."
        level: Level = "error" if rate > _VERY_LOSSY else "warning"
        advice = _against_underflow(records, worst, format)
        yield Alert(level, "Gradients vanish", text, advice, worst, step, len(lossy), "layers")


def _against_underflow(records: Records, layer: str, format: str) -> str:
    wider = promoted_for_range(format) if get_format(format).is_low_precision else REFERENCE
    samples = [row["sample"] for row in records.samples if layer in row["sample"]["layers"]]
    if get_format(format).use.needs_scaling and samples:
        best, scale = samples[-1]["layers"][layer][-1], samples[-1]["loss_scale"]
        if best is not None and best > scale:
            kept = f"A loss scale of {best:g} would suit it (it was {scale:g})"
            return f"{kept}: raise init_scale, or compute it in {wider}."
    return f"Compute it in {wider}."


def _agreement(measured: dict[str, Known]) -> Iterator[Alert]:
    twice = {name: known for name, known in measured.items() if len(known) > 1}
    off = {name: known[-1] for name, known in twice.items() if max(cosine for _, cosine in known[-2:]) < _OFF}
    if off:
        worst = min(off, key=lambda name: off[name][1])
        step, cosine = off[worst]
        text = f"In the last two samples the gradient of {quoted(worst)} has a cosine of {cosine:.2f} with fp32's."
        advice = "Compute it in fp32 if its SQNR is low, else the layers between it and the loss."
        yield Alert("warning", "Gradients point elsewhere than fp32's", text, advice, worst, step, len(off), "layers")


def _loss_gap(records: Records, last_move: int) -> Iterator[Alert]:
    gaps = [(row["step"], row["loss_gap"]) for row in records.fidelity if row.get("loss_gap") is not None]
    gaps = [(step, gap) for step, gap in gaps if step > last_move]
    if len(gaps) > 1 and min(gap for _, gap in gaps[-2:]) > _LOSS_GAP:
        text = f"In the last two samples the loss differs from fp32's by {gaps[-1][1]:.1%} (healthy is below 2 %)."
        advice = "Compute the loss in fp32 (layers: '', recurse: false) and look which layers have a low SQNR."
        yield Alert("warning", "The loss is not fp32's", text, advice, step=gaps[-1][0])


def _headroom(measured: dict[str, Known], layers: dict[str, Layer]) -> Iterator[Alert]:
    near = {name: known[-1] for name, known in measured.items() if known[-1][1] < _FEW_BITS}
    if not near:
        return
    worst = min(near, key=lambda name: near[name][1])
    step, bits = near[worst]
    format = layers[worst].compute
    if bits < 0:
        text = f"At its latest sample {quoted(worst)} has values that are {2**-bits:.3g} times too large for {format}."
        advice = f"Compute it in {'bf16, which has the range of fp32' if format in ('fp16', 'fp8') else 'fp32'}."
        yield Alert("error", "Values overflow", text, advice, worst, step, len(near), "layers")
    else:
        text = (
            f"At its latest sample {quoted(worst)} has values that overflow {format} if they grow {2**bits:.1f} times."
        )
        advice = "Watch it, or compute it in bf16, which has the range of fp32."
        yield Alert("warning", "Close to an overflow", text, advice, worst, step, len(near), "layers")


def _stagnation(records: Records) -> Iterator[Alert]:
    latest = {row["layer"]: row for row in records.underflow if row.get("stagnation_rate") is not None}
    stuck = {name: row for name, row in latest.items() if row["stagnation_rate"] > _STUCK}
    if stuck:
        worst = max(stuck, key=lambda name: float(stuck[name]["stagnation_rate"]))
        row = stuck[worst]
        text = f"An optimizer step left {row['stagnation_rate']:.0%} of the weights of {quoted(worst)} as they were."
        advice = "Its updates are smaller than the weights' last bit: store them in fp32, or raise the learning rate."
        yield Alert("warning", "Weights do not move", text, advice, worst, row["step"], len(stuck), "layers")
