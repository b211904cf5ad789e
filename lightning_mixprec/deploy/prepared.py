"""A module and batches as the first step of a fit would have them, for what is asked of a model without training it.

A run is begun as ``Trainer.fit`` begins one, by Lightning itself, and ended before its first step: data are prepared
and sharded, ``setup``, ``configure_model`` and the hooks of a beginning fit are called, the module is on its device
with its optimizers made, and batches have gone through the hooks that move them. A ``training_step`` that asks for its
Trainer finds it.
"""

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
from torch import nn

from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.optim.checkpoint_files import read_checkpoint
from lightning_mixprec.plugin.lightnings import Callback

T = TypeVar("T")
Data = Literal["train", "val"]


def prepared(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    work: Callable[[pl.LightningModule, list[Any]], T],
    *,
    datamodule: pl.LightningDataModule | None = None,
    data: Data = "train",
    batches: int = 4,
    ckpt_path: str | Path | None = None,
) -> T:
    """Calls a function with a module and batches, as a run has them before its first step.

    The Trainer's own plugin, callbacks and loggers take part, as in any fit; one with ``precision="32-true"``, no
    logger and no callbacks writes nothing.

    Args:
        trainer: The Trainer; it has taken no step afterwards, and is fit for a run.
        module: The module.
        work: Given the module and the batches on its device; what it returns is returned.
        datamodule: The data, if they are not the module's own.
        data: Whose batches: of ``"train"`` or ``"val"``; of several loaders for validation, the first one's.
        batches: How many at most; the first ones.
        ckpt_path: The checkpoint whose weights the module gets; None for those it has.

    Raises:
        MixPrecError: There are no such batches, or the checkpoint's weights are not the module's.
    """
    check_count("batches", batches)
    before = _BeforeTheFirstStep(work, data, batches, ckpt_path)
    loops = trainer.fit_loop, trainer.fit_loop.epoch_loop
    least, callbacks = (loops[0].min_epochs, loops[1].min_steps), _callbacks(trainer)
    callbacks.append(before)
    try:
        trainer.fit(module, datamodule=datamodule)
    finally:
        callbacks.remove(before)
        trainer.should_stop = False
        loops[0].min_epochs, loops[1].min_steps = least
    if not before.results:
        raise MixPrecError("there are no training batches, without which no run begins; give data with one at least.")
    result: T = before.results[0]
    return result


def _callbacks(trainer: pl.Trainer) -> list[Any]:
    """The list of a Trainer's callbacks, which it reads anew at each hook."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # it is set in another class
    return callbacks


class _BeforeTheFirstStep(Callback):
    """Does a work when everything is set up, and ends the run."""

    def __init__(self, work: Callable[..., Any], data: Data, count: int, ckpt_path: str | Path | None) -> None:
        self.results: list[Any] = []
        self._work, self._data, self._count, self._ckpt_path = work, data, count, ckpt_path

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._ckpt_path is not None:
            load_weights(pl_module, self._ckpt_path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        taken = list(islice(self._batches(trainer, pl_module), self._count))
        if not taken:
            raise MixPrecError(f"the module's {self._data} data have no batch; give data with one at least.")
        self.results.append(self._work(pl_module, taken))
        trainer.should_stop = True
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = None, None

    def _batches(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        loop = trainer.fit_loop
        if self._data == "val":
            loop.epoch_loop.val_loop.setup_data()
            if (loader := loop.epoch_loop.val_loop._combined_loader) is None:
                return
        else:
            loader = loop._combined_loader
        for batch, _, place in iter(loader):  # type: ignore[arg-type]
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=place)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=place)


def check_count(name: str, value: object) -> None:
    """Raises for an argument that is no positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MixPrecError(f"{name} is {value!r}; it has to be a positive integer.")


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Gives a module the weights of a checkpoint: Lightning's, or a ``state_dict`` that was saved.

    Raises:
        MixPrecError: There is no such file, or its weights are not the module's; one line that says which.
    """
    give_weights(module, read_weights(path), repr(str(path)))


def read_weights(path: str | Path) -> dict[str, Any]:
    """The weights in a checkpoint of Lightning's, or in a ``state_dict`` that was saved.

    Raises:
        MixPrecError: There is no such file, or no weights in it.
    """
    read = read_checkpoint(path)
    weights = read.get("state_dict", read) if isinstance(read, dict) else None
    if not isinstance(weights, dict):
        raise MixPrecError(f"{str(path)!r} holds no weights; it has to be a checkpoint with a state_dict.")
    return weights


def give_weights(module: nn.Module, weights: Mapping[str, Any], whose: str) -> None:
    """Loads weights into a module.

    Raises:
        MixPrecError: They are not the module's; one line that says which.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise MixPrecError(f"the weights of {whose} are not those of {type(module).__name__}: {first}") from error
