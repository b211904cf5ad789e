"""``UnderflowMonitor``: what the run's formats lose of each layer's gradient."""

import math
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mixprec.callbacks.monitor import ROWS, check_count, check_share
from lightning_mixprec.callbacks.sampling import MAX_LAYERS, SamplingMonitor
from lightning_mixprec.callbacks.stagnation import StagnationCheck, StillWeights
from lightning_mixprec.evidence.comparison import MAX_ELEMENTS, Wanted
from lightning_mixprec.evidence.findings import Findings, describe
from lightning_mixprec.evidence.instruments.probe import layers_of, own_parameters
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.numerics.plots import draw_layers
from lightning_mixprec.records import advice
from lightning_mixprec.records.samples import (
    KnownLosses,
    KnownStagnation,
    NotObservedRow,
    StagnationRow,
    UnderflowRow,
)
from lightning_mixprec.records.words import MEASURED, cell, short, written


class UnderflowMonitor(SamplingMonitor):
    """Measures on sampled steps which part of each layer's gradient its format turns to zero at the present loss scale.

    An underflow cannot be seen in the gradients of a low-precision step: what vanished is a zero like any other. So on
    a sampled step the batch is replayed in fp32 before the step itself, on copies of the weights, and the true
    gradients tell what is lost in the layer's format, and what would be in others. The step itself is not changed by a
    bit. Works with any precision plugin of Lightning and with ``PerLayerPrecision``.

    Logs ``mixprec/underflow_rate``, that of the worst layer or operand. Rows of the JSONL file: by layer what
    ``latest`` has, with ``loss_scale``; ``stagnation_rate`` in a row of its own, once the optimizer has stepped. A step
    that could not be replayed has ``problem``, and ``is_sampled`` says whether a part of it could.

    Warns, too, of layers that are stored in 16 bits and most of whose weights have not moved for three sampled steps
    although their gradient is not zero (``still_rate`` in the row).

    ``plot()`` draws the underflow rate of each layer, the worst first.

    Args:
        every_n_steps: Sample every n-th batch, the first included.
        threshold: Warn when a layer loses more than this share of its gradient.
        max_elements: How many elements of a tensor are looked at; the standard error of a rate is at most 0.4 % at the
            default. None for all. Largest values are always of all elements.
        max_layers: How many layers a sample looks at; where a model has more, each sample looks at the next ones. None
            for all.

    Attributes:
        latest: By layer a dict with

            - ``format``: what it computes in, or the wider format that its own gradient has all the same, as that of a
              norm or a loss that autocast computes in fp32. Each number below is judged in its own format;
            - ``underflow_rate``: of the elements of the gradient of its own weights that are not zero in fp32, times
              the loss scale, the share that rounds to zero; for a layer without weights, of the gradient at its output;
            - ``subnormal_share``: the share that does not, but loses bits;
            - ``headroom_bits``: log2 of how much larger that gradient may grow before it overflows;
            - ``flow_underflow_rate``, ``flow_subnormal_share``, ``flow_headroom_bits``: the same of the gradient that
              arrives at its output, which is what all layers before it learn from;
            - ``output_headroom_bits``: the same of its output;
            - ``stagnation_rate``: of its weights with a gradient, the share that the latest sampled optimizer step did
              not change, because the update is smaller than the weights' last bit; None before it is known. Steps
              that were skipped are not counted, bits that an optimizer keeps are, and weights that are rounded at
              random are passed over;
            - ``operands``: of a layer whose products are in 8 bits: ``format``, ``scaling``, and of its ``input``, its
              ``weight`` and the ``gradient`` at its output the share that rounds to zero after it was scaled, as far as
              it is cast. They overflow nothing, as each is scaled by its own maximum. All other numbers of the layer
              are judged in the 16-bit format around its products;
            - ``what_if``: for other formats ``underflow_rate``, ``overflow_rate`` (of outputs and gradients) at the
              present scale, ``best_scale`` (the power of two that uses the format's range best) and ``fits`` (whether
              some scale loses less than 1 % of the gradient and overflows nothing).

    Raises:
        MixPrecError: An argument is malformed.
    """

    _NAME = "underflow"
    _KEYS = ("underflow_rate",)
    _STATE = {"latest": dict[str, KnownLosses | KnownStagnation], **SamplingMonitor._SAMPLING}

    def __init__(
        self,
        every_n_steps: int = 1000,
        threshold: float = advice.MAX_UNDERFLOW,
        max_elements: int | None = MAX_ELEMENTS,
        max_layers: int | None = MAX_LAYERS,
    ) -> None:
        name = type(self).__name__
        self.threshold = check_share(name, "threshold", threshold)
        self.max_elements = None if max_elements is None else check_count(name, "max_elements", max_elements)
        self.latest: dict[str, Any] = {}
        super().__init__(every_n_steps, max_layers)

    @override
    def _forget_run(self) -> None:
        super()._forget_run()
        self._stagnation_check: StagnationCheck | None = None
        self._still = StillWeights()
        self._watched: tuple[StagnationCheck, dict[str, int]] | None = None

    @override
    def _wanted(self, pl_module: pl.LightningModule) -> Wanted:
        wanted = Wanted(statistics=True, max_elements=self.max_elements, only=self._only(pl_module))
        if self._stagnation_check is None:
            owned, looked_at = own_parameters(pl_module, layers_of(pl_module)), wanted.looked_at(pl_module)
            owned = {name: params for name, params in owned.items() if name in looked_at}
            self._stagnation_check = StagnationCheck(owned, self.max_elements, self._still)
        return wanted

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._stagnation_check is not None and self._formats is not None:
            flag = self._formats.found_inf(optimizer)
            may_be_skipped = flag is None and self._formats.is_guarded
            self._stagnation_check.before(pl_module, optimizer, flag, may_be_skipped=may_be_skipped)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._settle()
        if self._stagnation_check is not None and self._stagnation_check.has_stepped:
            place = {"step": trainer.global_step, "epoch": trainer.current_epoch, "batch_idx": batch_idx}
            self._stagnation_check.after()
            self._watched = self._stagnation_check, place
            self._stagnation_check = None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def _settle(self) -> None:
        """Takes in what is known of the latest sampled optimizer step, if that is still on its way."""
        if self._watched is not None:
            (watch, place), self._watched = self._watched, None
            found = watch.rates()
            for layer, (rate, still) in found.items():
                self.latest.setdefault(layer, {})["stagnation_rate"] = rate
                row = StagnationRow(layer=layer, stagnation_rate=short(rate, MEASURED))
                if still is not None:
                    row["still_rate"] = short(still, MEASURED)
                self._write(place, **row)
            rates = {layer: still for layer, (_, still) in found.items() if still is not None}
            stand = {layer: rate for layer, rate in rates.items() if rate > advice.MAX_STAGNATION}
            for worst, others in self._not_warned_of("still", sorted(stand, key=lambda layer: -stand[layer])):
                rank_zero_warn(f"step {place['step']}: {advice.still(worst, stand[worst], others)}.")

    @override
    def _take_in(self, trainer: pl.Trainer, found: Findings) -> None:
        measured = [layer for layer in found.layers if layer in found.weights or layer in found.gradients]
        for layer in measured:
            precision = self._run_formats.precision_of(layer)
            values = describe(layer, found, precision.region)
            stagnation = self.latest.get(layer, {}).get("stagnation_rate")
            latest = cast(KnownLosses, {"stagnation_rate": stagnation, **values})
            row = cast(UnderflowRow, {"layer": layer, "loss_scale": found.scale, **_in_short(values)})
            self.latest[layer] = latest
            if layer in found.operands:
                how = {"format": precision.compute, "scaling": precision.eight_bits.scaling}
                operands: Any = {**how, **found.operands[layer]}
                latest["operands"], row["operands"] = operands, _in_short(operands)
            if self.threshold != advice.MAX_UNDERFLOW:
                row["threshold"] = self.threshold
            self._write(found.place, **row)
        if found.not_observed:
            self._write(found.place, **NotObservedRow(not_observed=found.not_observed))
        rates = {layer: self.latest[layer]["underflow_rate"] for layer in measured}
        narrow = {layer: max(rates.values()) for layer, rates in found.operands.items()}
        self._log(trainer, {"underflow_rate": max([*rates.values(), *narrow.values()], default=math.nan)})
        self._warn_of_operands(found, {layer: rate for layer, rate in narrow.items() if rate > self.threshold})
        lossy = {layer: rate for layer, rate in rates.items() if rate > self.threshold}
        for worst, others in self._not_warned_of("underflow", sorted(lossy, key=lambda layer: -lossy[layer])):
            latest = self.latest[worst]
            use = get_format(latest["format"]).use
            largest = advice.largest_scale(self.latest[layer] for layer in measured)
            told = advice.underflow(worst, latest, found.scale, others, use, largest)
            rank_zero_warn(f"step {found.place['step']}: {told}.")

    def _warn_of_operands(self, found: Findings, lossy: dict[str, float]) -> None:
        for worst, others in self._not_warned_of("operands", sorted(lossy, key=lambda layer: -lossy[layer])):
            told = advice.narrow_operand(worst, self.latest[worst]["operands"], others)
            rank_zero_warn(f"step {found.place['step']}: {told}.")

    @override
    def _summary(self) -> tuple[str, list[list[str]]]:
        measured = {layer: values for layer, values in self.latest.items() if "underflow_rate" in values}
        if not measured:
            return self._no_sample, []
        ranked = sorted(measured.items(), key=lambda item: (-item[1]["underflow_rate"], item[1]["headroom_bits"]))
        rows = [["layer", "format", "underflow", "subnormal", "headroom (bits)", "underflow at output", "stagnating"]]
        for layer, values in ranked[:ROWS]:
            rows.append(
                [
                    cell(layer),
                    values["format"],
                    written(values["underflow_rate"], ".2%"),
                    written(values["subnormal_share"], ".2%"),
                    written(values["headroom_bits"], ".1f"),
                    written(values["flow_underflow_rate"], ".2%"),
                    written(values["stagnation_rate"], ".2%"),
                ]
            )
        title = f"gradients of the {len(rows) - 1} layers that lose most, at their latest sample"
        if len(measured) > ROWS:
            title += f" ({len(measured) - ROWS:,} more not shown)"
        return title + self._share_sampled, rows

    @override
    def _draw(self, ax: Any) -> Any:
        rates = {layer: values["underflow_rate"] for layer, values in self.latest.items() if "underflow_rate" in values}
        rates = dict(sorted(rates.items(), key=lambda item: -item[1]))
        return draw_layers(rates, "share of the gradient that rounds to zero", limit=self.threshold, ax=ax)


def _in_short(values: Any) -> Any:
    """Measured numbers as a row has them; scales are powers of two, and stay."""
    if isinstance(values, dict):
        return {key: part if key == "best_scale" else _in_short(part) for key, part in values.items()}
    return short(values, MEASURED)
