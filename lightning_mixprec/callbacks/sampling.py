"""Monitors that look at a step now and then; those that are due at the same step share its replays."""

from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from typing_extensions import override

from lightning_mixprec.callbacks.monitor import Monitor, RunCallback, check_count, monitors, monitors_of, takes_iterator
from lightning_mixprec.evidence.comparison import Wanted
from lightning_mixprec.evidence.findings import Findings
from lightning_mixprec.evidence.instruments.probe import layers_of
from lightning_mixprec.evidence.instruments.sandbox import is_stopped
from lightning_mixprec.evidence.sampled_step import SampledStep
from lightning_mixprec.records.schema import Count, Shapes

MAX_LAYERS = 1000
"""Layers that a sample looks at, unless a user says how many."""

_MOST_RETRIES = 16
_EXPLAINED = ("ReplayError", "SupportError", "TraceLeftError", "memory")
"""Words of problems that say what to do, or where it is plain."""


class SamplingMonitor(Monitor):
    """Base of the monitors that look at every n-th batch, the first one included.

    _SAMPLING is what a checkpoint has to keep of this.

    Args:
        every_n_steps: n, in batches.
        max_layers: How many layers a sample looks at, in rotation where a model has more; None for all.
    """

    _SAMPLING: ClassVar[Shapes] = {"_batches_seen": Count, "_retries_left": Count, "_is_asked_again": bool}

    def __init__(self, every_n_steps: int, max_layers: int | None = MAX_LAYERS) -> None:
        self.every_n_steps = check_count(type(self).__name__, "every_n_steps", every_n_steps)
        self.max_layers = None if max_layers is None else check_count(type(self).__name__, "max_layers", max_layers)
        self._batches_seen = 0
        self._retries_left = 0
        self._is_asked_again = False
        super().__init__()

    @override
    def _forget_run(self) -> None:
        super()._forget_run()
        self._sampled: SampledStep | None = None
        self._tried = self._failed = self._turns = 0
        self._why = ""

    def _comes_due(self) -> bool:
        """True if the coming batch is to be sampled; counts it."""
        is_regular = self._batches_seen % self.every_n_steps == 0
        is_due = is_regular or self._is_asked_again
        self._batches_seen += 1
        self._is_asked_again = False
        if is_regular:
            self._retries_left = _MOST_RETRIES
        return is_due

    def _ask_again(self) -> bool:
        """Has the next batch sampled, too, because this one told too little; False after sixteen in a row."""
        self._is_asked_again = self._retries_left > 0
        self._retries_left -= self._is_asked_again
        return self._is_asked_again

    def _only(self, pl_module: pl.LightningModule) -> tuple[str, ...] | None:
        """The layers whose turn it is at this sample, in the order of the model; None for all."""
        names = list(layers_of(pl_module))
        if self.max_layers is None or len(names) <= self.max_layers:
            return None
        begin = (self._batches_seen - 1) // self.every_n_steps * self.max_layers
        return tuple(names[(begin + place) % len(names)] for place in range(self.max_layers))

    def _wanted(self, pl_module: pl.LightningModule) -> Wanted:
        """The questions of this monitor to the coming step."""
        raise NotImplementedError

    def _take_in(self, trainer: pl.Trainer, found: Findings) -> None:
        """Takes over what was found."""
        raise NotImplementedError

    @override
    def _begin_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        sharing = monitors_of(trainer, SamplingMonitor)
        if self is not sharing[0]:
            return  # the first one acts for all
        due = [each for each in sharing if each._comes_due()]
        if due and takes_iterator(trainer):
            for monitor in due:
                monitor._why = ": training_step takes an iterator over batches"
                monitor._has_no_batches(trainer, "no step is sampled")
        elif due:
            wanted = Wanted()
            for monitor in due:
                wanted |= monitor._wanted(pl_module)
            place = {"step": trainer.global_step, "epoch": trainer.current_epoch, "batch_idx": batch_idx}
            sampled = SampledStep(pl_module, self._run_formats, batch, place, wanted, turn=self._turns)
            self._turns += 1
            for monitor in due:
                monitor._sampled = sampled

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._sampled is not None:
            sampled, self._sampled = self._sampled, None
            found = sampled.findings()
            self._tried += 1
            if found.problem is not None:
                self._write(found.place, problem=found.problem, is_sampled=found.is_complete)
                if sampled.part:
                    monitors(trainer)[0]._warn_once("part", f"{sampled.part}.")
                if not found.is_complete:
                    self._failed += 1
                    self._why = f": of {self._tried} that were tried none could be ({found.problem})"
                    sharing = [each for each in monitors(trainer) if getattr(each, "_sampled", None) is sampled]
                    self._tell_problem(trainer, _apology([self, *sharing], found, is_stopped(trainer)))
            if found.is_any:
                self._take_in(trainer, found)
            self._journal.flush()
        self._send_to_loggers(trainer)

    @property
    def _no_sample(self) -> str:
        """The summary of a run of which nothing is known, with the reason."""
        return f"no step was sampled{self._why}"

    @property
    def _share_sampled(self) -> str:
        """The share of steps that could be sampled, for the end of a line; empty if all could."""
        return f"; {self._tried - self._failed} of {self._tried} steps could be sampled" if self._failed else ""


def _apology(who: Sequence[RunCallback], found: Findings, is_last: bool) -> str:
    names, problem = ", ".join(type(each).__name__ for each in who), str(found.problem)
    hint = "" if any(word in problem for word in _EXPLAINED) else "; a step can be sampled if it can be run twice"
    later = "" if is_last else ", and later steps are tried"
    return f"{names} could not sample step {found.place['step']} ({problem}); training goes on{later}{hint}."
