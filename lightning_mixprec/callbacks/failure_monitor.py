"""Base class of the callbacks that are told the outcome of every optimizer step."""

import math
import traceback
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mixprec import ranks
from lightning_mixprec.callbacks.monitor import Monitor, is_validated_next, monitors_of
from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.evidence.buffers import Broken, BufferReplay, BufferWatch, diagnosed_buffers
from lightning_mixprec.evidence.comparison import Wanted
from lightning_mixprec.evidence.evaluation import EvaluationWatch, Seen, diagnosed_evaluation, values_of
from lightning_mixprec.evidence.failures import FailureWatch, Found
from lightning_mixprec.evidence.instruments.memory import is_out_of_memory
from lightning_mixprec.evidence.step_window import KeptBatch, StepWindow
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.plugin.step_errors import Remedy

_NOT_LOOKED_INTO = (
    "validation gives outputs or logged values that are not finite, not looked into where several ranks train; "
    "validate on one to have the layer named."
)

_NOT_REPLAYED = (
    "a step that raises on one of several ranks is not replayed, as the others' steps go on until this process ends; "
    "lightning_mixprec.diagnose can look into it"
)


class FailureMonitor(Monitor):
    """A monitor with a :class:`FailureWatch`, which a subclass makes and begins batches with."""

    @override
    def _forget_run(self) -> None:
        super()._forget_run()
        self._trainer: pl.Trainer | None = None
        self._failures: FailureWatch | None = None
        self._ranks_end_together = True
        self._looked_into: int | None = None
        self._evaluation = EvaluationWatch()
        self._buffers: BufferWatch | None = None

    @property
    def _run_trainer(self) -> pl.Trainer:
        assert self._trainer is not None
        return self._trainer

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        lengths = set(ranks.all_values(trainer.num_training_batches))
        self._ranks_end_together = not ranks.are_many() or (len(lengths) == 1 and math.inf not in lengths)
        if isinstance(trainer.precision_plugin, PerLayerPrecision):
            trainer.precision_plugin.step_errors.asked.append(self._see_error)
        super().on_train_start(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Exception) and self._looked_into != id(exception) and _is_of_step(exception):
            self._see_error(exception, is_over=True)
        super().on_exception(trainer, pl_module, exception)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._failures is not None:
            self._failures.add_loss(loss)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._failures is not None:
            self._failures.before_step(optimizer, trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        watch = self._failures
        if watch is not None:
            kept = watch.window.batches[-1] if watch.window is not None else None
            watch.end_batch(partial(is_validated_next, trainer))
            broken = self._buffers.end(kept) if self._buffers is not None and kept is not None else None
            if broken is not None:
                self._see_buffers(pl_module, broken)
            self._follow_up()
        self._send_to_loggers(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._ranks_end_together:  # else the others are in the middle of a step, and settling waits for them
            self._settle()
        super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            kept = KeptBatch(batch, batch_idx, None)
            self._evaluation.add(kept, dataloader_idx, values_of(trainer, outputs))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seen = self._evaluation.finish()
        if ranks.are_many():
            if ranks.is_any(seen is not None, pl_module.device):
                self._warn_once("validation", _NOT_LOOKED_INTO)
        elif seen is not None:
            with torch.inference_mode(False):
                self._see_evaluation(pl_module, seen)
            self._follow_up()
        super().on_validation_end(trainer, pl_module)

    def _see_evaluation(self, pl_module: pl.LightningModule, seen: Seen) -> None:
        """Looks into a batch of validation that is not finite."""
        formats = self._run_formats.in_evaluation(pl_module)
        found = diagnosed_evaluation(pl_module, formats, seen, self._wanted_of_failure())
        if found is None:
            self._evaluation.acquit(seen)
        else:
            self._explain(found, "validation")

    def _explain(self, found: Found, stage: Literal["validation"] | None = None) -> None:
        """Acts on what was not finite for want of precision although no step failed: buffers, or validation."""
        raise NotImplementedError

    @override
    def _settle(self) -> None:
        """Takes in an outcome that is still on its way, and does what follows."""
        if self._failures is not None:
            self._failures.settle()
            self._follow_up()

    def _begin_buffers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watches the buffers of a batch that begins; the first of these monitors does it for all."""
        first = monitors_of(trainer, FailureMonitor)[0]
        if first is not self:
            self._buffers = first._buffers
        elif not ranks.are_many():
            self._buffers = self._buffers or BufferWatch(pl_module)
            self._buffers.begin()

    def _see_buffers(self, pl_module: pl.LightningModule, broken: Broken) -> bool:
        """Looks into a step that left buffers not finite; true unless they would not be in fp32 either."""
        assert self._buffers is not None
        if self._buffers.acquitted.issuperset(broken.names):
            return False
        with self._buffers.as_they_were():
            replay = BufferReplay(pl_module, self._run_formats, pl_module.device, self._buffers)
            found = diagnosed_buffers(replay, broken, self._wanted_of_failure())
            verdict = "precision" if found is None else found.diagnosis.cause["verdict"]
            if found is not None and verdict == "precision":
                self._explain(found)
        if verdict != "precision":
            self._buffers.acquit(broken.names)
        return verdict == "precision"

    def _wanted_of_failure(self) -> Wanted | None:
        """The questions that a decision may ask of a batch in fp32; None if none is to be made."""
        return None

    def _settle_buffers(self, pl_module: pl.LightningModule) -> None:
        """Takes in what is still on its way of the last batch's buffers."""
        broken = self._buffers.settle() if self._buffers is not None else None
        if broken is not None:
            self._see_buffers(pl_module, broken)

    def _see_error(self, error: Exception, is_over: bool = False) -> Remedy | None:
        """Looks into what a step raised, while its weights are in place.

        Args:
            error: The exception.
            is_over: Whether the run has ended, so that no remedy is asked for.
        """
        self._looked_into = id(error)
        window = self._failures.window if self._failures is not None else None
        if window is None or isinstance(error, MixPrecError) or is_out_of_memory(error):
            return None
        if not ranks.are_many():
            return self._look_into_error(window, error, is_over)
        if any(get_format(format).is_low_precision for format in window.formats.in_use):
            note(error, _NOT_REPLAYED)
        return None

    def _look_into_error(self, window: StepWindow, error: Exception, is_over: bool) -> Remedy | None:
        """Says why the last batch's step raised; what makes it worth taking again, if there is something."""
        raise NotImplementedError

    def _follow_up(self) -> None:
        """Acts on outcomes that have come in; between steps."""


def note(error: Exception, message: str) -> None:
    """Adds what is known of an exception to it, once."""
    notes, text = vars(error).setdefault("__notes__", []), f"lightning_mixprec: {message}."
    if text not in notes:
        notes.append(text)  # Python 3.10 has no ``add_note``, and shows none


def _is_of_step(error: Exception) -> bool:
    """True if a training step raised it, or its backward."""
    return any(
        frame.f_code.co_name in ("training_step", "backward") for frame, _ in traceback.walk_tb(error.__traceback__)
    )
