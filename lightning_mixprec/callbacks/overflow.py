"""``OverflowMonitor``: overflows, the loss scale and skipped steps, and which layer is to blame."""

import contextlib
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mixprec import ranks
from lightning_mixprec.callbacks.failure_monitor import FailureMonitor, note
from lightning_mixprec.callbacks.monitor import ROWS, check_count, takes_iterator
from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.evidence.diagnosis import Diagnosis
from lightning_mixprec.evidence.failures import FailureWatch, Found, ScaleSearch, diagnosed_error
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import StockFormats
from lightning_mixprec.evidence.saved_batches import save_batch
from lightning_mixprec.evidence.step_window import KeptBatch, Outcome, StepWindow
from lightning_mixprec.numerics.finite import all_finite
from lightning_mixprec.numerics.plots import draw_steps
from lightning_mixprec.optim.gradients import grads_of, params_of
from lightning_mixprec.plugin.hidden_infinities import HiddenInfinities
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.records.events import Event
from lightning_mixprec.records.schema import Count, Place
from lightning_mixprec.records.words import cell, written

_MOST_SCALES = 1000


class OverflowMonitor(FailureMonitor):
    """Counts overflows and skipped steps, and says of each which layer did it and whether precision is to blame.

    When a step is skipped or its loss is not finite, the step is replayed on copies of the weights, in the run's
    formats and in fp32, and the first operation that made a finite number non-finite is traced to its layer. Nothing of
    the run is touched. Works with any precision plugin of Lightning and with ``PerLayerPrecision``.

    Logs ``mixprec/loss_scale``, ``mixprec/overflow_rate`` (share of the last ``window`` optimizer steps) and
    ``mixprec/skipped_steps``. Rows of the JSONL file: an event each, with its ``frames``, the operations around it.

    In manual optimization the step is replayed after all of its optimizers stepped, so a culprit is looked for with
    weights that another optimizer may have moved. A batch is replayed as it came, also where a ``training_step`` takes
    something out of it or writes to its tensors; only the first such write after eight steps without one goes unseen.
    On CUDA, a run that is not guarded (stock bf16 and fp32) has NaN weights before its loss can be read, and the
    verdict says so; ``PerLayerPrecision`` guards every format.

    ``plot()`` draws the loss scale over the optimizer steps, and where a step failed.

    Args:
        save_batch: Write the batch and the random numbers of each diagnosed step to a file beside the JSONL file, which
            :func:`lightning_mixprec.diagnose` reads. ``"scale"`` verdicts are not saved.
        window: Optimizer steps that the overflow rate looks back on.
        max_diagnoses: Failed steps that are replayed in a run; later ones are only counted, and so are all that follow
            once the weights are not finite.

    Attributes:
        events: One plain dict per diagnosed overflow: ``step`` (optimizer steps taken before), ``epoch``,
            ``batch_idx``, ``layer`` (``""`` is the LightningModule's own operations; None for "scale" and "data"),
            ``direction``, ``verdict`` (``"precision"``, ``"scale"``, ``"data"`` or ``"model"``), ``op``, ``format``,
            ``value``, ``fits``, ``loss_scale``, ``smaller_scale``, ``detail``, ``message``; ``raised`` where the step
            raised (``op`` is None where nothing overflowed until then); ``stage`` where it was in validation.
        skipped_steps: Optimizer steps that were skipped. A fused optimizer under Lightning's own fp16 plugin skips by
            itself, which shows in the loss scale alone: one step for each time it falls.
        reasons: How many failed steps had each verdict; ``"unknown"`` for those that were not replayed or whose replay
            was finite.

    Raises:
        MixPrecError: An argument is malformed.
    """

    _NAME = "overflow"
    _KEYS = ("loss_scale", "overflow_rate", "skipped_steps")
    _STATE = {
        "events": list[Event],
        "skipped_steps": Count,
        "reasons": dict[str, Count],
        "_recent": list[Count],
        "_steps": Count,
        "_last_step": Count,
        "_diagnoses": Count,
        "_scales": list[tuple[float, float]],
    }

    def __init__(self, save_batch: bool = False, window: int = 100, max_diagnoses: int = 20) -> None:
        if not isinstance(save_batch, bool):
            raise MixPrecError(f"OverflowMonitor(save_batch=...) is {save_batch!r}; it has to be True or False.")
        self.save_batch = save_batch
        self.window = check_count("OverflowMonitor", "window", window)
        self.max_diagnoses = check_count("OverflowMonitor", "max_diagnoses", max_diagnoses)
        self.events: list[Event] = []
        self.skipped_steps = 0
        self.reasons: dict[str, int] = {}
        self._recent: list[int] = []
        self._scales: list[list[float]] = []
        self._steps = 0
        self._last_step = 0
        self._diagnoses = 0
        super().__init__()

    @override
    def _forget_run(self) -> None:
        super()._forget_run()
        self._has_lost_weights = False
        self._search = ScaleSearch()
        self._hidden: HiddenInfinities | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if isinstance(self._formats, StockFormats) and self._formats.is_guarded:  # ours looks by itself
            self._hidden = HiddenInfinities(pl_module)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        if self._hidden is not None:
            self._hidden.begin_backward()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._hidden is not None:
            self._hidden.end_backward()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._hidden is not None:
            skipped = self._hidden.is_looking and ~all_finite(grads_of(params_of(optimizer)))
            self._hidden.end_step(optimizer, skipped, is_scaled=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._hidden is not None:
            self._hidden.finish()
        super().on_train_end(trainer, pl_module)

    @override
    def _begin_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._failures is None:
            formats, is_automatic = self._run_formats, pl_module.automatic_optimization
            self._failures = FailureWatch(formats, pl_module.device, is_automatic, self._look_into, self._count)
        self._failures.begin_batch(batch, batch_idx, self._made)
        self._begin_buffers(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._failures is not None:
            self._failures.abandon()  # Lightning calls no teardown

    def _count(self, window: StepWindow, outcome: Outcome) -> None:
        if not outcome.is_bad:
            self._search.end()
        self.skipped_steps += outcome.skipped
        self._steps += window.steps
        bad = max(outcome.skipped, int(outcome.loss_is_bad))
        self._recent = [*self._recent, *[1] * bad, *[0] * (window.steps - bad)][-self.window :]
        if not self._scales or self._scales[-1][1] != outcome.scale:
            self._scales = [*self._scales, [float(window.step), outcome.scale]][-_MOST_SCALES:]
        self._last_step = window.step
        rate = sum(self._recent) / len(self._recent)
        self._log(
            self._run_trainer,
            {"loss_scale": outcome.scale, "overflow_rate": rate, "skipped_steps": float(self.skipped_steps)},
        )

    def _look_into(self, window: StepWindow, outcome: Outcome) -> None:
        """Finds out why a step failed."""
        found, verdict = None, "unknown"
        if self._has_lost_weights:
            verdict = "model"
        elif self._diagnoses < self.max_diagnoses and not takes_iterator(self._run_trainer):
            self._diagnoses += 1
            found = self._diagnosed(window, outcome)
        if found is not None:
            verdict, self._has_lost_weights = found.cause["verdict"], found.has_lost_weights
        self.reasons[verdict] = self.reasons.get(verdict, 0) + 1
        self._journal.flush()

    @override
    def _look_into_error(self, window: StepWindow, error: Exception, is_over: bool) -> None:
        if self._diagnoses >= self.max_diagnoses:
            return
        self._diagnoses += 1
        found = diagnosed_error(self._replay(window), window, error)
        if found is None:
            return
        verdict = found.diagnosis.cause["verdict"]
        self.reasons[verdict] = self.reasons.get(verdict, 0) + 1
        self._tell(self._run_trainer.global_step, found)
        self._journal.flush()
        note(error, found.diagnosis.cause["message"])

    @override
    def _explain(self, found: Found, stage: Literal["validation"] | None = None) -> None:
        if self._diagnoses < self.max_diagnoses:
            self._diagnoses += 1
            self._tell(self._run_trainer.global_step, found, stage)
            self._journal.flush()

    def _replay(self, window: StepWindow) -> StepReplay:
        return StepReplay(self._run_trainer.lightning_module, window.formats, window.device)

    def _diagnosed(self, window: StepWindow, outcome: Outcome) -> Diagnosis | None:
        with self._buffers.as_they_were() if self._buffers is not None else contextlib.nullcontext():
            found, problems = self._search.diagnosed(self._replay(window), window, outcome)
        for batch_idx, problem in problems:
            self._write(self._where(window.step, batch_idx), problem=problem)
            self._warn_once("problem", f"step {window.step} failed and could not be replayed ({problem}).")
        if found is None:
            return None
        self._tell(window.step, found)
        return found.diagnosis

    def _tell(self, step: int, found: Found, stage: Literal["validation"] | None = None) -> None:
        kept, diagnosis = found.kept, found.diagnosis
        event = cast(Event, {**self._where(step, kept.batch_idx), **diagnosis.cause})
        if stage is not None:
            event["stage"] = stage
        if ranks.are_many():
            event["rank"] = found.rank
        is_ours = found.rank == self._run_trainer.global_rank
        _, saved = ranks.first_found(self._save(kept, event) if is_ours else None)
        self.events.append(event)
        self._journal.write(monitor=self._NAME, **event, frames=[frame.to_dict() for frame in diagnosis.frames])
        if event["verdict"] == "scale" and diagnosis.is_search:
            return
        replay = f" Replay it with lightning_mixprec.diagnose(model, {str(saved)!r})." if saved is not None else ""
        key = f"{event['verdict']} {event['layer']} {event['direction']}"
        self._warn_once(key, f"step {step}, batch {kept.batch_idx}: {event['message']}.{replay}")

    def _where(self, step: int, batch_idx: int) -> Place:
        return {"step": step, "epoch": self._run_trainer.current_epoch, "batch_idx": batch_idx}

    def _save(self, kept: KeptBatch, event: Event) -> Path | None:
        if not self.save_batch or event["verdict"] == "scale" or "stage" in event or self._folder is None:
            return None
        path = self._folder / f"overflow-step{event['step']}-batch{event['batch_idx']}.pt"
        return save_batch(path, kept, event, self._policy())

    def _policy(self) -> dict[str, Any] | str:
        plugin = self._run_trainer.precision_plugin
        if isinstance(plugin, PerLayerPrecision) and plugin.policy is not None:
            return plugin.policy.to_dict()
        return self._run_formats.of("")

    @override
    def _summary(self) -> tuple[str, list[list[str]]]:
        if not self._steps:
            return "no optimizer step was taken", []
        counts = ", ".join(f"{verdict} {count}" for verdict, count in sorted(self.reasons.items()))
        title = f"{self.skipped_steps} of {self._steps} optimizer steps skipped{f' ({counts})' if counts else ''}"
        title += f", loss scale {self._scales[-1][1]:g} at the end"
        accused = [event for event in self.events if event["verdict"] != "scale"]
        if not accused:
            return title, []
        rows = [["layer", "step", "verdict", "direction", "operation", "format", "value", "fits"]]
        for event in accused[:ROWS]:
            cells = (event["step"], event["verdict"], event["direction"], event["op"], event["format"])
            shown = ["-" if each is None else str(each) for each in cells]
            rows.append([cell(event["layer"]), *shown, written(event["value"], ".3g"), event["fits"] or "-"])
        return title, rows

    @override
    def _draw(self, ax: Any) -> Any:
        marks = [(event["step"], event["verdict"]) for event in self.events]
        return draw_steps(self._scales, self._last_step + 1, marks, ax=ax)
