"""``PrecisionReport``: what precision did in a run, as one HTML file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mixprec.callbacks.loss_curve import LossCurve, loss_in
from lightning_mixprec.callbacks.monitor import is_quiet, monitors
from lightning_mixprec.callbacks.report_rows import described, environment, sampled
from lightning_mixprec.callbacks.sampling import MAX_LAYERS, SamplingMonitor
from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.evidence.comparison import MAX_ELEMENTS, Wanted
from lightning_mixprec.evidence.findings import Findings
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.policy.idle_rules import covered_layers
from lightning_mixprec.records import runs
from lightning_mixprec.records.changes import told_shortly
from lightning_mixprec.records.words import short
from lightning_mixprec.report.writing import write_report


class PrecisionReport(SamplingMonitor):
    """Leaves one self-contained HTML file that shows what precision did, and a JSON file with the same content.

    Shown are alerts in plain words, loss and loss scale with skipped steps and moves, the format of each layer over
    time, heat maps of underflow and headroom, exponent histograms, the assignment, the history, the share of
    arithmetic in each format and the environment. What other monitors of this package find is in it too. The files are
    written to the run's log directory when fit ends, by an exception too; ``python -m lightning_mixprec.report
    RUN_DIR`` makes them from the rows of a run that was killed, and shows two runs side by side.

    Works with any precision plugin of Lightning and with ``PerLayerPrecision``. On sampled steps the batch is replayed
    in fp32 as by :class:`UnderflowMonitor`; monitors that are due together share one replay. Loss, loss scale and
    skipped steps of every batch are collected without waiting for the device. The loss is that of the first rank; in
    manual optimization it is what ``training_step`` returns, if it does.

    Rows of the JSONL file: ``run`` once, ``curve``, ``change`` after a change of the policy, ``sample`` and ``end``, as
    :mod:`lightning_mixprec.records.runs` has them.

    Args:
        every_n_steps: Sample every n-th batch, the first included.
        histograms: A pattern of layers, or several, whose exponent histograms are kept; by default the eight layers
            whose gradients fit their formats worst at the sample; an empty list for none.
        filename: Name of the HTML file; the JSON file has the same name with ``.json``.
        max_layers: How many layers a sample looks at; where a model has more, each sample looks at the next ones. None
            for all.

    Raises:
        MixPrecError: An argument is malformed.
    """

    _NAME = "report"
    _KEYS = ()
    _STATE = SamplingMonitor._SAMPLING

    def __init__(
        self,
        every_n_steps: int = 1000,
        histograms: str | Sequence[str] | None = None,
        filename: str = "precision_report.html",
        max_layers: int | None = MAX_LAYERS,
    ) -> None:
        if not isinstance(filename, str) or not filename.endswith(".html") or Path(filename).name != filename:
            raise MixPrecError(
                f"PrecisionReport(filename=...) is {filename!r}; it has to be a file's name that ends in .html."
            )
        self.filename = filename
        self.histograms = [histograms] if isinstance(histograms, str) else histograms
        if not _are_patterns(self.histograms):
            raise MixPrecError(
                f"PrecisionReport(histograms=...) is {histograms!r}; it has to be a pattern of layers or a list."
            )
        super().__init__(every_n_steps, max_layers)

    @override
    def _forget_run(self) -> None:
        super()._forget_run()
        self._curve: LossCurve | None = None
        self._layers: dict[str, runs.DescribedLayer] = {}
        self._told_history = 0
        self._chosen: set[str] | None = None
        self._has_flops = False
        self._step = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Says so if there is no folder to write to."""
        super().setup(trainer, pl_module, stage)
        if trainer.state.fn == TrainerFn.FITTING and self._folder is None and not is_quiet(trainer):
            rank_zero_warn(
                "PrecisionReport has no folder to write to, since the first logger has none; put a CSVLogger or a "
                "TensorBoardLogger first, or drop the callback."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the layers whose histograms are asked for.

        Raises:
            PolicyError: A pattern is malformed or matches nothing.
        """
        if self.histograms is not None:
            self._chosen = covered_layers(self.histograms, pl_module, "PrecisionReport(histograms=...)")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._curve = LossCurve(self._run_formats, pl_module.device)
        self._layers = described(trainer.precision_plugin, self._run_formats, pl_module)
        run: runs.Run = {
            "environment": environment(trainer, pl_module.device),
            "layers": list(self._layers.values()),
            "watched": [type(callback).__name__ for callback in monitors(trainer)],
            "counts_skipped": not isinstance(trainer.precision_plugin, PerLayerPrecision),
        }
        self._write(self._place(trainer), run=run)
        self._tell_changes(trainer, pl_module)
        self._is_asked_again = True  # the first batch of every fit is sampled, that of a resumed one too

    @override
    def _begin_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._curve is not None:
            self._step = trainer.global_step
            self._tell_changes(trainer, pl_module)
            self._curve.begin_batch()
        super()._begin_batch(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._curve is not None:
            self._curve.before_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._curve is not None:
            loss = loss_in(outputs)
            if pl_module.automatic_optimization:
                loss = loss * trainer.accumulate_grad_batches  # Lightning has divided it
            self._write_curve(trainer, self._curve.end_batch(self._step, loss))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the report."""
        self._close(trainer, "finished", "")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        lines = [line for line in str(exception).splitlines() if line.strip()]
        message = ": ".join([type(exception).__name__, *lines[:1]])
        self._close(trainer, "stopped" if isinstance(exception, KeyboardInterrupt) else "failed", message)
        super().on_exception(trainer, pl_module, exception)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._write_rest(trainer)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write_rest(trainer)
        self._tell_changes(trainer, pl_module)
        self._journal.flush()

    def _close(self, trainer: pl.Trainer, state: runs.State, message: str) -> None:
        """Writes what is left and makes the report; a report that cannot be made ends no run."""
        if self._curve is None or self._folder is None or not trainer.is_global_zero:
            return
        try:
            self._write_rest(trainer)
            end: runs.End = {"state": state, "message": message}
            self._write(self._place(trainer), end=end)
            self._journal.flush()
            path, alerts = write_report([self._folder], self._folder / self.filename)
        except Exception as error:
            rank_zero_warn(f"PrecisionReport could not write {self.filename} ({type(error).__name__}: {error}).")
            return
        if not is_quiet(trainer):
            print("\n".join([f"PrecisionReport: {path.resolve()}", *(f"  {alert}" for alert in alerts)]))

    def _write_rest(self, trainer: pl.Trainer) -> None:
        for chunk in self._curve.rest() if self._curve is not None else ():
            self._write_curve(trainer, chunk)

    def _write_curve(self, trainer: pl.Trainer, chunk: dict[str, list[Any]] | None) -> None:
        if chunk is not None:
            curve: runs.Curve = {
                "steps": chunk["steps"],
                "loss": [short(loss) for loss in chunk["loss"]],
                "scale": chunk["scale"],
                "skipped": chunk["skipped"],
                "infinite": [place for place, loss in enumerate(chunk["loss"]) if math.isinf(loss)],
            }
            self._write(self._place(trainer), curve=curve)
            self._journal.flush()

    def _tell_changes(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes what is new in the history, and the layers whose formats differ from those told last."""
        plugin = trainer.precision_plugin
        history = plugin.history if isinstance(plugin, PerLayerPrecision) else []
        new, self._told_history = history[self._told_history :], len(history)
        if new:
            before, self._layers = self._layers, described(plugin, self._run_formats, pl_module)
            changed = [layer for name, layer in self._layers.items() if layer != before.get(name)]
            change: runs.Change = {"layers": changed, "history": [told_shortly(move) for move in new]}
            self._write(self._place(trainer), change=change)

    @staticmethod
    def _place(trainer: pl.Trainer) -> dict[str, int]:
        batch_idx = trainer.fit_loop.epoch_loop.batch_idx
        step = max(trainer.global_step, 0)  # a first step that was skipped, and then ended the run, leaves it at -1
        return {"step": step, "epoch": trainer.current_epoch, "batch_idx": batch_idx}

    @override
    def _wanted(self, pl_module: pl.LightningModule) -> Wanted:
        only = self._only(pl_module)
        return Wanted(statistics=True, max_elements=MAX_ELEMENTS, flops=not self._has_flops, only=only)

    @override
    def _take_in(self, trainer: pl.Trainer, found: Findings) -> None:
        sample = sampled(found, lambda layer: self._run_formats.precision_of(layer).region, self._chosen)
        self._has_flops = self._has_flops or "flops" in sample
        self._write(found.place, sample=sample)

    @override
    def _draw(self, ax: Any) -> Any:
        raise MixPrecError("PrecisionReport draws nothing; open its HTML file.")


def _are_patterns(value: object) -> bool:
    return value is None or (isinstance(value, Sequence) and all(isinstance(each, str) for each in value))
