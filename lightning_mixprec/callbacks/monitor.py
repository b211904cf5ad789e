"""Base classes of the callbacks: logged values, rows of the run's file, state and summary; and of those that replay."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.evidence.run_formats import RunFormats, formats_of
from lightning_mixprec.evidence.step_window import Made
from lightning_mixprec.plugin.lightnings import Callback
from lightning_mixprec.plugin.stand_in import StandIn
from lightning_mixprec.policy.table import align
from lightning_mixprec.records.journal import Journal, new_run_id
from lightning_mixprec.records.schema import Place, Shapes
from lightning_mixprec.records.states import Layout

ROWS = 10
"""Layers that a summary shows."""

_RUN_ID = "mixprec_run_id"

C = TypeVar("C", bound="RunCallback")


class RunCallback(Callback):
    """Base of all callbacks: logs values, writes rows to the run's file, keeps a state, and ends with a summary.

    A fit that starts from its first step begins anew, also with a callback that has watched another one; what that
    has seen is forgotten. A fit that goes on, because the same Trainer has trained before or from a checkpoint, goes
    on with what was seen.

    A subclass sets up its attributes and then calls ``__init__``. It names its logged keys in ``_KEYS``, and in
    ``_STATE`` the attributes that a checkpoint keeps, with their shapes; these hold plain types alone.
    """

    _NAME: ClassVar[str]
    _KEYS: ClassVar[tuple[str, ...]]
    _STATE: ClassVar[Shapes]

    def __init__(self) -> None:
        self._values: dict[str, float] = dict.fromkeys(self._KEYS, math.nan)
        self._warned: list[str] = []
        self._run_id = ""
        self._at_first = _plain_copy({name: getattr(self, name) for name in self._shapes()})
        self._forget_run()

    def _begin(self) -> None:
        """Forgets all that it has seen."""
        self._run_id = ""
        for name, value in _plain_copy(self._at_first).items():
            setattr(self, name, value)

    def _forget_run(self) -> None:
        self._folder: Path | None = None
        self._logs_for: list[RunCallback] = []
        self._journal = Journal(None)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._forget_run()
        if trainer.global_step <= 0:
            self._begin()
        folder = trainer.log_dir
        self._folder = None if folder is None or is_quiet(trainer) else Path(folder)
        first = monitors(trainer)[0]  # has been set up: all write to one file, in the order of what they see
        self._run_id = (self._run_id or new_run_id()) if first is self else first._run_id
        written_to = self._folder if trainer.is_global_zero else None
        self._journal = Journal(written_to, self._run_id) if first is self else first._journal
        if first is self and self._folder is not None and not trainer.loggers:
            rank_zero_info(
                f"There is no logger: what callbacks of lightning_mixprec write goes to {self._folder.resolve()}."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._journal.flush()
        self._forget_run()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._journal.flush()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle()
        self._journal.flush()
        if trainer.is_global_zero and not is_quiet(trainer):
            title, rows = self._summary()
            print("\n".join([f"{type(self).__name__}: {title}", *(align(rows, right=rows[0][1:]) if rows else ())]))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show(trainer, {key: value for key, value in self._values.items() if not math.isnan(value)})
        every = monitors(trainer)
        self._logs_for = every if every[-1] is self else []

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show(trainer, self._values)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._show(trainer, self._values)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._journal.flush()  # a run that goes on from the checkpoint does not see again what these rows are about
        checkpoint[_RUN_ID] = self._run_id

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING and isinstance(run_id := checkpoint.get(_RUN_ID), str):
            self._run_id = self._journal.run_id = run_id

    @override
    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {"version": 1, **{name.lstrip("_"): _plain_copy(getattr(self, name)) for name in self._shapes()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        shapes = {name.lstrip("_"): shape for name, shape in self._shapes().items()}
        otherwise = "without the callback"
        layout = Layout(type(self).__name__, shapes, f"resume {otherwise}", otherwise)
        state = layout.check(state_dict, self._contradictions)
        for name in self._shapes():
            setattr(self, name, _plain_copy(state[name.lstrip("_")]))

    def _shapes(self) -> Shapes:
        return {"_values": dict[str, float], "_warned": list[str], **self._STATE}

    def _contradictions(self, state: Mapping[str, Any]) -> Iterator[str]:
        """Parts of a state that have their shapes, but cannot be gone on from together."""
        if state["values"].keys() != self._values.keys():
            yield "values"

    def _settle(self) -> None:
        """Takes in what is still on its way, before a run ends and before a checkpoint is written."""

    def plot(self, ax: Any = None) -> Any:
        """Draws what the class says of its plot.

        Args:
            ax: Axes of matplotlib to draw on; None for new ones.

        Returns:
            Figure and axes.

        Raises:
            SupportError: matplotlib is not installed.
        """
        return self._draw(ax)

    def _draw(self, ax: Any) -> Any:
        raise NotImplementedError

    def _summary(self) -> tuple[str, list[list[str]]]:
        """The line that is printed when fit ends, and a table that may be empty."""
        raise NotImplementedError

    def _log(self, trainer: pl.Trainer, values: Mapping[str, float]) -> None:
        """Takes over new values; they reach ``callback_metrics`` now and the loggers when Lightning logs."""
        changed = {key: value for key, value in values.items() if self._values[key] != value}
        if changed:
            self._values.update(changed)
            self._show(trainer, changed)

    def _show(self, trainer: pl.Trainer, values: Mapping[str, float]) -> None:
        trainer._logger_connector._callback_metrics.update(
            {f"mixprec/{key}": torch.tensor(value) for key, value in values.items()}
        )

    def _send_to_loggers(self, trainer: pl.Trainer) -> None:
        """Sends the values of all monitors when Lightning logs; the last monitor does it, so that they are one row."""
        if not self._logs_for or not trainer.loggers or not trainer._logger_connector.should_update_logs:
            return
        metrics = {f"mixprec/{key}": value for each in self._logs_for for key, value in each._values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _write(self, place: Place | Mapping[str, int], **row: Any) -> None:
        """Writes a row; the place says which step it is about: step, epoch and batch_idx."""
        self._journal.write(monitor=self._NAME, **place, **row)

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.append(key)
            rank_zero_warn(message)

    def _not_warned_of(self, key: str, layers: list[str]) -> Iterator[tuple[str, list[str]]]:
        """The first of the layers that were not warned of yet, and the others; nothing if there are none."""
        new = [layer for layer in layers if f"{key} {layer}" not in self._warned]
        self._warned += [f"{key} {layer}" for layer in new]
        if new:
            yield new[0], new[1:]


class BatchStart(StandIn):
    """Has a LightningModule's ``on_train_batch_start`` run once, and something else after it.

    Lightning calls the callbacks' hook of this name first and the module's last, so this is how a callback comes to act
    on what all of them made of the batch, just before its step. Takes itself away as soon as it is called, before
    anything else. What is beside it is called with what the hook has made; not if that answers -1, which skips the rest
    of the epoch.
    """

    _METHOD = "on_train_batch_start"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls both."""
        self.remove()
        begin, self._beside = self._beside, None  # somebody who wrapped this one may call it again and again
        before = dict(vars(self._module))
        answer = self._own(*args, **kwargs)
        if begin is not None and answer != -1:
            begin(Made(self._module, {n: v for n, v in vars(self._module).items() if before.get(n, self) is not v}))
        return answer


class Monitor(RunCallback):
    """Base of the callbacks that replay steps of the run in the formats that it computes in, and in fp32."""

    @override
    def _forget_run(self) -> None:
        super()._forget_run()
        self._formats: RunFormats | None = None
        self._start: BatchStart | None = None
        self._made: Made | None = None

    @property
    def _run_formats(self) -> RunFormats:
        assert self._formats is not None
        return self._formats

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks that steps of the run can be replayed, before it starts.

        Raises:
            SupportError: The run's strategy does not allow it, or its precision plugin is not known.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        formats = formats_of(trainer, type(self).__name__)
        super().setup(trainer, pl_module, stage)
        first = monitors_of(trainer, Monitor)[0]  # what one finds, all know
        self._formats = formats if first is self else first._formats

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        every = monitors_of(trainer, Monitor)
        if self is every[0]:  # the first one acts for all

            def begin(made: Made) -> None:
                for each in every:
                    each._made = made
                    each._begin_batch(trainer, pl_module, batch, batch_idx)

            self._start = BatchStart(pl_module, begin)

    def _begin_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """The step of a batch is about to be taken: every hook that prepares it has run."""

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._leave_module()  # Lightning calls no teardown
        super().on_exception(trainer, pl_module, exception)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave_module()
        super().teardown(trainer, pl_module, stage)

    def _tell_problem(self, trainer: pl.Trainer, message: str) -> None:
        """Tells why a step could not be looked into: once in a run, whoever of its callbacks finds it first."""
        monitors(trainer)[0]._warn_once("problem", message)

    def _has_no_batches(self, trainer: pl.Trainer, so: str) -> bool:
        """True where only the training_step sees batches, which is said once, with what follows from it."""
        if takes_iterator(trainer):
            self._warn_once(
                "iterator",
                f"{type(self).__name__} needs batches, and this training_step takes an iterator over them "
                f"(dataloader_iter): {so}.",
            )
        return takes_iterator(trainer)

    def _leave_module(self) -> None:
        if self._start is not None:
            self._start.remove()


def monitors(trainer: pl.Trainer) -> list[RunCallback]:
    """The callbacks of this package in a run, in their order."""
    return monitors_of(trainer, RunCallback)


def monitors_of(trainer: pl.Trainer, kind: type[C]) -> list[C]:
    """Those of them that are of a kind."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, kind)]


def is_quiet(trainer: pl.Trainer) -> bool:
    """True for a run that leaves neither files nor lines: a trial of a few batches, or one measured bare."""
    return trainer.barebones or bool(getattr(trainer, "fast_dev_run", False))


def check_count(owner: str, name: str, value: object) -> int:
    """A positive integer, or one line that says what came.

    Raises:
        MixPrecError: It is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MixPrecError(f"{owner}({name}=...) is {value!r}; it has to be a positive integer.")
    return value


def check_share(owner: str, name: str, value: object) -> float:
    """A number from 0 to 1, or one line that says what came.

    Raises:
        MixPrecError: It is something else.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise MixPrecError(f"{owner}({name}=...) is {value!r}; it has to be a number from 0 to 1.")
    return float(value)


def check_patterns(owner: str, pin: object) -> list[str]:
    """Patterns of layers, from one or a list, or one line that says what came.

    Raises:
        MixPrecError: It is something else.
    """
    patterns = [pin] if isinstance(pin, str) else pin
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(each, str) for each in patterns):
        raise MixPrecError(f"{owner}(pin=...) is {pin!r}; it has to be a pattern of layer names or a list of them.")
    return list(patterns)


def _plain_copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_copy(item) for key, item in value.items()}
    return [_plain_copy(item) for item in value] if isinstance(value, list) else value


def takes_iterator(trainer: pl.Trainer) -> bool:
    """True if the training_step takes an iterator over batches, so that nobody else sees them."""
    return type(trainer.fit_loop._data_fetcher).__name__ == "_DataLoaderIterDataFetcher"


def is_validated_next(trainer: pl.Trainer) -> bool:
    """True if Lightning may validate after this training batch; the same on all ranks."""
    # By the clock, it decides on each rank for itself.
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return True
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
