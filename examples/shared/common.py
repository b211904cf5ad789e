"""What the examples share: a MixPrecCLI that closes a fit with a summary, and errors that are one line."""

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lightning_mixprec import MixPrecCLI, MixPrecError, PerLayerPrecision

from .data import DataError

# What a user of these scripts could not act on.
QUIET = (
    ".*does not have many workers",  # the bundled data lies in memory, where loader processes only cost time
    ".*treespec, LeafSpec",  # between Lightning 2.6 and torch 2.15
    ".*not supported by the model summary",  # it counts the weights as 4 bytes each, as they are stored here
)


class ExampleCLI(MixPrecCLI):
    """MixPrecCLI that lets the data size the model and closes a fit with a summary.

    A model names in ``FROM_DATA`` the arguments that the data of the same name know, in ``EXPECT`` what the default
    config comes to, and in ``HEADLINES`` which logged metrics the summary shows: by key a title and a format.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link what the data knows to what the model asks."""
        for name in getattr(self._model_class, "FROM_DATA", ()):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def before_fit(self) -> None:
        """Say what the default config comes to."""
        if self.trainer.is_global_zero and hasattr(self.model, "EXPECT"):
            print(f"With the default config expect {self.model.EXPECT}.")

    def after_fit(self) -> None:
        """Say how well it went, what was skipped and where things were written."""
        lines = summary(self.trainer, getattr(self.model, "HEADLINES", {}))  # on every rank: log_dir is a broadcast
        if self.trainer.is_global_zero:
            print("\n".join(f"{name + ':':22}{value}" for name, value in lines.items()))


def summary(trainer: Trainer, headlines: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Return the lines that close a fit, by title."""
    plugin, checkpoint = trainer.precision_plugin, trainer.checkpoint_callback
    lines = {}
    for key, (title, style) in headlines.items():
        lines[title] = f"{float(trainer.callback_metrics.get(key, torch.nan)):{style}} at the end"
        if checkpoint is not None and checkpoint.monitor == key and checkpoint.best_model_score is not None:
            lines[title] += f", {float(checkpoint.best_model_score):{style}} at best"
    lines["optimizer steps"] = f"{trainer.global_step}"
    if isinstance(plugin, PerLayerPrecision):
        lines["optimizer steps"] += f", and {plugin.skipped_steps} skipped for non-finite gradients"
        if any(layer.compute == "fp16" for layer in plugin.assignment.values()):
            lines["loss scale"] = f"{plugin.scaler.get_scale():g}"
    log_dir = trainer.log_dir
    if trainer.fast_dev_run or not trainer.loggers:
        return lines | {"written": "nothing (fast_dev_run)" if trainer.fast_dev_run else "nothing (no logger)"}
    lines["metrics and config"] = f"{Path(log_dir).resolve()} (metrics.csv, config.yaml)"
    if checkpoint is not None and checkpoint.best_model_path:
        lines["last checkpoint" if checkpoint.monitor is None else "best checkpoint"] = str(
            Path(checkpoint.best_model_path).resolve()
        )
    return lines


def one_cycle(module: LightningModule, optimizer: torch.optim.Optimizer, peak: float, **options: object) -> dict:
    """Return the optimizer with one cycle of the learning rate, up to ``peak``, that moves with every step."""
    steps = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, **options)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(model: type[LightningModule], data: type, args: Sequence[str] | None = None, **options: object) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for; ``options`` are LightningCLI's."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    return ExampleCLI(model, data, auto_configure_optimizers=False, args=args, **options)


def start(main: Callable[[], object]) -> None:
    """Call a script's main function; of an error that is meant for the user print the one line and exit with 1."""
    try:
        main()
    except Exception as error:
        if (known := user_error(error)) is None:
            raise
        sys.exit(f"error: {known}")


def user_error(error: BaseException | None) -> BaseException | None:
    """Return the error meant for the user among an exception and its causes: the CLI wraps what a class raises."""
    while error is not None and not isinstance(error, (DataError, MixPrecError)):
        error = error.__cause__
    return error
