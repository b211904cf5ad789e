"""A module and batches as a run has them, for what is asked of a model without training it: THE way through a Trainer.

A run is begun by Lightning itself, ``Trainer.fit`` or ``Trainer.validate``, and ended before its first step, as
Lightning's tuner ends one: data are prepared and sharded, ``setup``, ``configure_model`` and the hooks of a beginning
run are called, the module is on its device (for training with its optimizers made), and batches have gone through the
hooks that move them. A step that asks for its Trainer finds it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_mixprec.errors import MixPrecError, one_line
from lightning_mixprec.evidence.instruments.restoring.attributes import replaced
from lightning_mixprec.optim.checkpoint_files import read_checkpoint
from lightning_mixprec.plugin.lightnings import PACKAGES, Callback, DummyLogger, FSDPPrecision, Precision, both
from lightning_mixprec.plugin.precision import PerLayerPrecision

T = TypeVar("T")
Data = Literal["train", "val"]

_DATA_MODULES = both("core", "LightningDataModule")
_TRAINERS = both("trainer.trainer", "Trainer")
_MISTAKES = both("utilities.exceptions", "MisconfigurationException")


class GivenBatch(NamedTuple):
    """A batch as a data loader gave it, on the module's device: its index there, and which of the loaders it was."""

    batch: Any
    batch_idx: int
    loader: int = 0


class _Ended(*both("utilities.exceptions", "_TunerExitException")):  # type: ignore[misc]
    """Ends a run before its first step; a Trainer takes it for the end of its tuner's."""


def prepared(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    work: Callable[[pl.LightningModule, list[Any]], T],
    *,
    datamodule: pl.LightningDataModule | None = None,
    data: Data = "train",
    batches: int = 4,
    ckpt_path: str | Path | None = None,
    is_quiet: bool = True,
) -> T:
    """Calls a function with a module and batches, as a run has them before its first step.

    Args:
        trainer: The Trainer; it has taken no step afterwards, and is fit for a run.
        module: The module; it is back on its device afterwards, in its mode, with the Trainer that it had.
        work: Given the module and the batches on its device; what it returns is returned.
        datamodule: The data, if they are not the module's own, nor those of the Trainer's run.
        data: Whose batches: of ``"train"`` or ``"val"``.
        batches: How many at most of each loader; the first ones.
        ckpt_path: The checkpoint whose weights the module gets; None for those it has.
        is_quiet: Whether the Trainer's callbacks and loggers take no part.

    Raises:
        MixPrecError: There are no such batches, the Trainer can begin no run, or the checkpoint's weights are not the
            module's.
    """
    check_count("batches", batches)

    def on_batches(module: pl.LightningModule, given: list[GivenBatch]) -> T:
        return work(module, [each.batch for each in given])

    options: Any = {"data": data, "most": batches, "ckpt_path": ckpt_path, "is_quiet": is_quiet}
    return prepared_run(trainer, module, on_batches, datamodule=datamodule, **options)


def prepared_run(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    work: Callable[[pl.LightningModule, list[GivenBatch]], T],
    *,
    datamodule: pl.LightningDataModule | None = None,
    data: Data = "train",
    most: int | None = None,
    ckpt_path: str | Path | None = None,
    is_quiet: bool = True,
) -> T:
    """As :func:`prepared`, for a function that is told each batch's index and loader; ``most`` None is for all."""
    check_trainer(trainer)
    if trainer.state.status == "running":
        raise MixPrecError("the Trainer is in a run; wait for its end, or give batches and no trainer.")
    before = _BeforeTheFirstStep(work, data, most, ckpt_path)
    datamodule = datamodule if datamodule is not None else getattr(trainer, "datamodule", None)
    try:
        with _lent(trainer, module, before, is_quiet):
            if data == "train":
                trainer.fit(module, datamodule=datamodule)
            else:
                lacks_step = not has_step(module, "validation_step")
                with replaced(vars(module), {"validation_step": _no_step} if lacks_step else {}):
                    trainer.validate(module, datamodule=datamodule, verbose=False)
    except _MISTAKES as error:
        raise MixPrecError(f"the Trainer cannot begin a run: {one_line(error)}") from error
    if not before.results:
        raise MixPrecError(_no_run(trainer, data))
    result: T = before.results[0]
    return result


def check_trainer(trainer: object) -> None:
    """Raises for what is no Trainer of either package."""
    if not isinstance(trainer, _TRAINERS):
        raise MixPrecError(f"trainer is a {type(trainer).__name__}; give the Trainer of a run, or leave it out.")


def plain_trainer(module: pl.LightningModule) -> pl.Trainer:
    """A Trainer for a module where it is, for one who has come with data and no Trainer."""
    package: Any = next(each for each in PACKAGES if isinstance(module, each.LightningModule))
    device = module.device
    trainer: pl.Trainer = package.Trainer(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer


def is_datamodule(data: object) -> bool:
    """True for a LightningDataModule of either package."""
    return isinstance(data, _DATA_MODULES)


def _no_run(trainer: pl.Trainer, data: Data) -> str:
    """Why a Trainer ended before it had a batch to give."""
    if data == "val":
        return "the module's val data have no batch; give data with one at least."
    loop = trainer.fit_loop
    if loop.max_batches and trainer.limit_train_batches:
        return (
            f"this Trainer has run to its end (max_epochs={loop.max_epochs}, max_steps={loop.max_steps}); give one "
            "that has not, or batches."
        )
    return "there are no training batches, without which no run begins; give data with one at least."


@contextlib.contextmanager
def _lent(trainer: pl.Trainer, module: pl.LightningModule, before: Callback, is_quiet: bool) -> Iterator[None]:
    """Within, the Trainer has a callback more, or alone, and no plugin of ours; afterwards all is as it was.

    Under :class:`PerLayerPrecision` the formats of its policy would be in force, beside those that are tried.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # it is set in another class
    kept, loggers, plugin = list(callbacks), trainer.loggers, trainer.strategy.precision_plugin
    connector, loop, had, device = trainer._logger_connector, trainer.validate_loop, module._trainer, module.device
    shown = dict(vars(connector))
    callbacks[:] = [before] if is_quiet else [*kept, before]
    if is_quiet:
        trainer.loggers = [DummyLogger() for _ in loggers]
    if isinstance(plugin, PerLayerPrecision) and not isinstance(plugin, FSDPPrecision):
        trainer.strategy.precision_plugin = Precision()
    inference_mode, loop.inference_mode = loop.inference_mode, False
    try:
        yield
    finally:
        callbacks[:] = kept
        trainer.loggers, trainer.strategy.precision_plugin, loop.inference_mode = loggers, plugin, inference_mode
        vars(connector).update(shown)
        if module.device != device:
            module.to(device)
        module._trainer = had


def has_step(module: pl.LightningModule, name: str) -> bool:
    """True if a module defines one of Lightning's steps itself."""
    return getattr(type(module), name) not in [getattr(each, name) for each in both("core", "LightningModule")]


def _no_step(batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
    """Stands in for the step that a Trainer asks for before it gives a module's data for validation."""


class _BeforeTheFirstStep(Callback):
    """Does a work when everything is set up, and ends the run."""

    def __init__(self, work: Callable[..., Any], data: Data, most: int | None, ckpt_path: str | Path | None) -> None:
        self.results: list[Any] = []
        self._work, self._data, self._most, self._ckpt_path = work, data, most, ckpt_path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._run(trainer, pl_module, trainer.fit_loop)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._data == "val":
            trainer.validate_loop._module_mode.restore(pl_module)
            self._run(trainer, pl_module, trainer.validate_loop)

    def _run(self, trainer: pl.Trainer, module: pl.LightningModule, loop: Any) -> None:
        if self._ckpt_path is not None:
            load_weights(module, self._ckpt_path)
        with torch.enable_grad():
            taken = list(self._batches(trainer, module, loop._combined_loader))
            if not taken:
                raise MixPrecError(f"the module's {self._data} data have no batch; give data with one at least.")
            self.results.append(self._work(module, taken))
        raise _Ended

    def _batches(self, trainer: pl.Trainer, module: pl.LightningModule, loader: Any) -> Iterator[GivenBatch]:
        """The batches, moved as the Trainer moves them."""
        if self._data == "val" and self._most is not None:
            loader.limits = [min(limit, self._most) for limit in trainer.validate_loop.max_batches]
        for batch, index, place in islice(iter(loader), self._most if self._data == "train" else None):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=place)
            yield GivenBatch(trainer.strategy.batch_to_device(batch, dataloader_idx=place), index, place)


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
