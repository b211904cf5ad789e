"""``FidelityMonitor``: how far the run's steps are from what they would be in fp32."""

import math
from collections.abc import Mapping, Set
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_mixprec.callbacks.monitor import ROWS, check_count, check_share
from lightning_mixprec.callbacks.sampling import MAX_LAYERS, SamplingMonitor
from lightning_mixprec.engine.border_plan import survey
from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.evidence.comparison import MAX_BYTES, Wanted
from lightning_mixprec.evidence.findings import Findings
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.numerics.plots import draw_layers
from lightning_mixprec.records import advice
from lightning_mixprec.records.samples import Closeness, Fidelity, LossRow
from lightning_mixprec.records.schema import Count
from lightning_mixprec.records.words import MEASURED, cell, listed, short, written


class FidelityMonitor(SamplingMonitor):
    """Compares sampled steps with the same steps in fp32: losses, gradients per layer, and outputs of a few layers.

    On a sampled step the batch is replayed twice before the step itself, once in the run's formats and once in fp32, on
    copies of the weights. The step itself is not changed by a bit. Works with any precision plugin of Lightning and
    with ``PerLayerPrecision``.

    Logs ``mixprec/loss_gap`` (``|L_low - L_fp32| / |L_fp32|``) and ``mixprec/min_grad_cosine`` (of the worst layer).
    Rows of the JSONL file: ``loss_gap`` with ``loss_scale``, ``too_large`` (the layers that ``max_bytes`` left out) and
    ``not_compared`` (those whose call could not be run again, with the reasons), ``not_in_fp32`` (those that fail in
    fp32 and were left in the run's format), and by layer ``grad_cosine`` and ``sqnr_db``. A step that could not be
    replayed has ``problem``, and ``is_sampled`` says whether a part of it could. With several ranks the cosine is
    that of all ranks' gradients side by side, and the loss gap is the largest.

    Warns of gradients and losses that are off in two samples in a row, and names a layer whose output is noise, at the
    limits and in the sentences of the report (:mod:`lightning_mixprec.records.advice`).

    A gradient or a loss that is zero but for rounding, in fp32, too, is no evidence: where a layer's gradient is next
    to nothing and far off, fp32 is run again with the last bits of the weights changed. If its gradient is another one
    then, the layer has no cosine (a bias before a normalization, the keys' of an attention). The gap of a loss whose
    terms cancel (an advantage that is normalized) is weighed by those terms before it is warned of.

    ``plot()`` draws the cosine of each layer's gradient with fp32's, the worst first.

    Args:
        every_n_steps: Sample every n-th batch, the first included; and the next one, too, where the gradients overflow.
        layers_per_sample: How many layers' outputs are compared on a sampled step, in rotation.
        min_cosine: Warn when a layer's gradient has a smaller cosine with fp32's in two samples in a row; before the
            first step rounding is amplified in healthy runs, too. None for 0.99, and 0.9 where some layer computes in
            bf16: it rounds 8 times as coarsely as fp16, and harmless rounding takes from the cosine by the square of
            that. Healthy fp16 runs stay above 0.999; a ResNet-18 in bf16 begins at 0.95.
        max_loss_gap: Warn when the loss differs by more than this share in two samples in a row. Healthy runs stay
            below 0.02.
        max_bytes: Memory for the inputs and outputs of the layers that are compared; larger ones are left out.
        max_layers: How many layers a sample compares by their gradients; where a model has more, each sample
            compares the next ones. None for all.

    Attributes:
        latest: ``{"loss_gap": float, "layers": {name: {"sqnr_db": float | None, "grad_cosine": float | None}}}``, the
            newest value of each; the SQNR is that of the layer's latest turn.

    Raises:
        MixPrecError: An argument is malformed.
    """

    _NAME = "fidelity"
    _KEYS = ("loss_gap", "min_grad_cosine")
    _STATE = {
        "latest": Fidelity,
        "_turn": Count,
        "_off": list[str],
        "_gap_is_large": bool,
        **SamplingMonitor._SAMPLING,
    }

    def __init__(
        self,
        every_n_steps: int = 1000,
        layers_per_sample: int = 8,
        min_cosine: float | None = None,
        max_loss_gap: float = advice.MAX_LOSS_GAP,
        max_bytes: int = MAX_BYTES,
        max_layers: int | None = MAX_LAYERS,
    ) -> None:
        name = type(self).__name__
        self.layers_per_sample = check_count(name, "layers_per_sample", layers_per_sample)
        self.min_cosine = None if min_cosine is None else check_share(name, "min_cosine", min_cosine)
        is_number = isinstance(max_loss_gap, (int, float)) and not isinstance(max_loss_gap, bool)
        if not is_number or not max_loss_gap > 0:
            raise MixPrecError(f"{name}(max_loss_gap=...) is {max_loss_gap!r}; it has to be a positive number.")
        self.max_loss_gap = max_loss_gap
        self.max_bytes = check_count(name, "max_bytes", max_bytes)
        self.latest: Fidelity = {"loss_gap": math.nan, "layers": {}}
        self._turn = 0
        self._off: list[str] = []
        self._gap_is_large = False
        super().__init__(every_n_steps, max_layers)

    @override
    def _forget_run(self) -> None:
        super()._forget_run()
        self._not_compared: dict[str, str] = {}
        self._is_zero_but_for_rounding = False

    @override
    def _wanted(self, pl_module: pl.LightningModule) -> Wanted:
        names = [site.name for site in survey(pl_module) if site.name]
        count = min(self.layers_per_sample, len(names))
        chosen = [names[(self._turn + offset) % len(names)] for offset in range(count)]
        self._turn = (self._turn + len(chosen)) % max(len(names), 1)
        only = self._only(pl_module)
        only = None if only is None else tuple(dict.fromkeys((*only, *chosen)))
        return Wanted(agreement=True, layers=tuple(chosen), max_bytes=self.max_bytes, only=only)

    @override
    def _take_in(self, trainer: pl.Trainer, found: Findings) -> None:
        assert found.agreement is not None
        gap, cosines = found.agreement.loss_gap, found.agreement.cosines
        if cosines and all(map(math.isnan, cosines.values())) and self._ask_again():
            cosines = {}  # the gradients overflowed, as in the first steps of nearly every fp16 run
        layers = self.latest["layers"]
        reasons = {**self._not_compared, **found.not_compared}
        self._not_compared = {layer: why for layer, why in reasons.items() if layer not in found.sqnr_db}
        compared = [layer for layer in found.layers if layer in cosines or layer in found.sqnr_db]
        for layer in compared:
            layers.setdefault(layer, {"sqnr_db": None, "grad_cosine": None})
        for layer in layers.keys() & set(found.noise):
            layers[layer]["grad_cosine"] = None
        for layer, cosine in cosines.items():
            layers[layer]["grad_cosine"] = cosine
        for layer, ratio in found.sqnr_db.items():
            layers[layer]["sqnr_db"] = ratio
        self.latest["loss_gap"] = gap
        self._is_zero_but_for_rounding = found.agreement.gap_to_judge <= self.max_loss_gap < gap
        self._log(trainer, {"loss_gap": gap})
        if cosines:
            known = [cosine for cosine in cosines.values() if not math.isnan(cosine)]
            self._log(trainer, {"min_grad_cosine": min(known, default=math.nan)})
        self._write(found.place, **self._row(found, gap))
        for layer in compared:
            sqnr = short(found.sqnr_db.get(layer), MEASURED)
            closeness: Closeness = {"grad_cosine": short(cosines.get(layer)), "sqnr_db": sqnr}
            self._write(found.place, layer=layer, **closeness)
        self._warn(f"step {found.place['step']}", cosines, set(found.layers))

    def _row(self, found: Findings, gap: float) -> LossRow:
        row: LossRow = {"loss_gap": gap, "loss_scale": found.scale, "too_large": found.too_large}
        if self._is_zero_but_for_rounding:
            row["is_noise"] = True
        if found.not_in_fp32:
            row["not_in_fp32"] = found.not_in_fp32
        if found.not_compared:
            row["not_compared"] = found.not_compared
        if (limit := self._limit()) != advice.MIN_COSINE or self.min_cosine is not None:
            row["min_cosine"] = limit
        if self.max_loss_gap != advice.MAX_LOSS_GAP:
            row["max_loss_gap"] = self.max_loss_gap
        return row

    def _warn(self, at: str, cosines: Mapping[str, float], looked_at: Set[str]) -> None:
        limit = self._limit()
        off = {layer: cosine for layer, cosine in cosines.items() if cosine < limit}
        again = sorted(off.keys() & self._off, key=lambda layer: off[layer])
        self._off = [*(layer for layer in self._off if layer not in looked_at), *off] if cosines else self._off
        for layer, others in self._not_warned_of("cosine", again):
            rank_zero_warn(f"{at}: {advice.gradient(layer, off[layer], limit, others, self._noise())}.")
        gap, was_large = self.latest["loss_gap"], self._gap_is_large
        self._gap_is_large = self.max_loss_gap < gap < math.inf and not self._is_zero_but_for_rounding
        if self._gap_is_large and was_large:
            self._warn_once("gap", f"{at}: {advice.loss_gap(gap)}.")

    def _noise(self) -> advice.Advice | None:
        """Advice on the output that is most noise, as far as outputs were compared; None if none is."""
        known = {name: values["sqnr_db"] for name, values in self.latest["layers"].items()}
        noisy = {name: ratio for name, ratio in known.items() if ratio is not None and ratio < advice.NOISE_DB}
        if not noisy:
            return None
        layer = advice.causes(sorted(noisy, key=lambda name: noisy[name]))[0]
        format = self._run_formats.of(layer)
        return advice.noise(layer, noisy[layer], format, get_format(format).use)

    def _limit(self) -> float:
        if self.min_cosine is not None:
            return self.min_cosine
        in_use = () if self._formats is None else self._formats.in_use
        return advice.min_cosine(is_coarse=any(get_format(format).is_coarse for format in in_use))

    @override
    def _summary(self) -> tuple[str, list[list[str]]]:
        layers = self.latest["layers"]
        if not layers:
            return self._no_sample, []
        ranked = sorted(layers.items(), key=lambda item: _closeness(item[1]))
        title = f"loss gap to fp32 {self.latest['loss_gap']:.2e}; the {min(len(ranked), ROWS)} layers farthest off"
        if len(ranked) > ROWS:
            title += f" ({len(ranked) - ROWS:,} more not shown)"
        if self._not_compared:
            title += f"; outputs that could not be compared: {listed([*self._not_compared])}"
        rows = [["layer", "gradient cosine", "SQNR (dB)"]]
        for layer, values in ranked[:ROWS]:
            rows.append([cell(layer), written(values["grad_cosine"], ".5f"), written(values["sqnr_db"], ".1f")])
        return title + self._share_sampled, rows

    @override
    def _draw(self, ax: Any) -> Any:
        ranked = sorted(self.latest["layers"].items(), key=lambda item: _closeness(item[1]))
        cosines = {layer: values["grad_cosine"] for layer, values in ranked if values["grad_cosine"] is not None}
        return draw_layers(cosines, "cosine of the gradient with fp32's", limit=self._limit(), ax=ax)


def _closeness(values: Closeness) -> tuple[float, float, float]:
    """Layers whose output is noise first, the others by their gradients."""
    sqnr = _or(values["sqnr_db"], 999.0)
    return min(sqnr, advice.NOISE_DB), _or(values["grad_cosine"], 2.0), sqnr


def _or(value: float | None, other: float) -> float:
    return other if value is None or math.isnan(value) else value
