"""Base class of the callbacks that are told the outcome of every optimizer step."""

import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_mixprec import ranks
from lightning_mixprec.callbacks.monitor import Monitor, is_validated_next
from lightning_mixprec.evidence.failures import FailureWatch


class FailureMonitor(Monitor):
    """A monitor with a :class:`FailureWatch`, which a subclass makes and begins batches with."""

    @override
    def _forget_run(self) -> None:
        super()._forget_run()
        self._trainer: pl.Trainer | None = None
        self._failures: FailureWatch | None = None
        self._ranks_end_together = True

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        lengths = set(ranks.all_values(trainer.num_training_batches))
        self._ranks_end_together = not ranks.are_many() or (len(lengths) == 1 and math.inf not in lengths)
        super().on_train_start(trainer, pl_module)

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
        if self._failures is not None:
            self._failures.end_batch(partial(is_validated_next, trainer))
            self._follow_up()
        self._send_to_loggers(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._ranks_end_together:  # else the others are in the middle of a step, and settling waits for them
            self._settle()
        super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle()
        super().on_train_end(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return super().state_dict()

    def _settle(self) -> None:
        """Takes in an outcome that is still on its way, and does what follows."""
        if self._failures is not None:
            self._failures.settle()
            self._follow_up()

    def _follow_up(self) -> None:
        """Acts on outcomes that have come in; between steps."""
