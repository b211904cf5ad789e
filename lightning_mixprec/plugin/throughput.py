"""Tells Lightning's ``ThroughputMonitor`` in which formats a run computes; it takes an unknown plugin for fp32."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import throughput_monitor
from lightning.pytorch.trainer.states import RunningStage

from lightning_mixprec.numerics.formats import FORMATS, Format
from lightning_mixprec.plugin.lightnings import both

_MONITORS = both("callbacks", "ThroughputMonitor")


def tell_throughput_monitors(trainer: pl.Trainer, training: str, evaluation: str) -> None:
    """Has the monitors compare with the device's peak in the default formats, once they and the device are set up.

    Args:
        trainer: The Trainer, whose callbacks are set up.
        training: The default format of training.
        evaluation: That of validate, test and predict.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for monitor in callbacks:
        if not isinstance(monitor, _MONITORS):
            continue
        for stage, measured in monitor._throughputs.items():
            format = training if stage == RunningStage.TRAINING else evaluation
            measured.available_flops = _peak(trainer.strategy.root_device, format)
        monitor.available_flops = _peak(trainer.strategy.root_device, training if trainer.training else evaluation)


def _peak(device: torch.device, format: str) -> int | None:
    described = FORMATS[format]
    assert isinstance(described, Format)
    return throughput_monitor.get_available_flops(device, described.dtype)
