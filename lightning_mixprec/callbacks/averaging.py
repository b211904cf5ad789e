"""Averages of weights with all their bits, where a policy stores them in 16: Lightning's callbacks.

They read and write weights in the hooks below, and in these alone. There the plugin lends them the full weights, in
fp32, and keeps what they write: after a validation on the average the run goes on with the bits that it had, and in the
end the model has the average with all its bits.
"""

import contextlib
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks

from lightning_mixprec.plugin.precision import PerLayerPrecision


class FullWeights:
    """Makes a callback that averages weights one that averages full weights; to be named before it among the bases.

    Without :class:`~lightning_mixprec.PerLayerPrecision` nothing is different. Read by the plugin, which refuses other
    callbacks that average where a rule stores weights in 16 bits.

    >>> class Mean(FullWeights, callbacks.WeightAveraging):
    ...     def should_update(self, step_idx=None, epoch_idx=None):
    ...         return epoch_idx is not None and epoch_idx > 2
    """

    averages_full_weights = True

    def on_train_batch_end(self, trainer: "pl.Trainer", *args: Any) -> None:
        """Averages, if it is time to."""
        asked = getattr(self, "should_update", None)
        is_time = asked is None or asked(step_idx=trainer.global_step - 1)
        with full_weights(trainer) if is_time else contextlib.nullcontext():
            super().on_train_batch_end(trainer, *args)  # type: ignore[misc]

    def on_train_epoch_start(self, trainer: "pl.Trainer", *args: Any) -> None:
        """Averages, if it is time to."""
        with full_weights(trainer):
            super().on_train_epoch_start(trainer, *args)  # type: ignore[misc]

    def on_train_epoch_end(self, trainer: "pl.Trainer", *args: Any) -> None:
        """Averages, if it is time to."""
        with full_weights(trainer):
            super().on_train_epoch_end(trainer, *args)  # type: ignore[misc]

    def on_validation_epoch_start(self, trainer: "pl.Trainer", *args: Any) -> None:
        """Gives the model the average."""
        with full_weights(trainer):
            super().on_validation_epoch_start(trainer, *args)  # type: ignore[misc]

    def on_validation_epoch_end(self, trainer: "pl.Trainer", *args: Any) -> None:
        """Gives the model its weights back."""
        with full_weights(trainer):
            super().on_validation_epoch_end(trainer, *args)  # type: ignore[misc]

    def on_train_end(self, trainer: "pl.Trainer", *args: Any) -> None:
        """Gives the model the average."""
        with full_weights(trainer):
            super().on_train_end(trainer, *args)  # type: ignore[misc]


class WeightAveraging(FullWeights, callbacks.WeightAveraging):
    """Lightning's ``WeightAveraging``, of full weights."""


class EMAWeightAveraging(FullWeights, callbacks.EMAWeightAveraging):
    """Lightning's ``EMAWeightAveraging``, of full weights."""


class StochasticWeightAveraging(FullWeights, callbacks.StochasticWeightAveraging):
    """Lightning's ``StochasticWeightAveraging``, of full weights."""


def full_weights(trainer: "pl.Trainer") -> contextlib.AbstractContextManager[None]:
    """Weights that a policy stores in 16 bits are in fp32 within, with all their bits, if one does."""
    plugin = trainer.precision_plugin
    return plugin.full_weights() if isinstance(plugin, PerLayerPrecision) else contextlib.nullcontext()
