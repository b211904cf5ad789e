"""``compare``: a module on the same batches under several policies and the reference, without training."""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl

from lightning_mixprec.deploy.bootstrap import FEW, interval
from lightning_mixprec.deploy.candidates import Candidate, batches_of, candidates_of
from lightning_mixprec.deploy.columns import Likeness, LoggedColumns, Metrics, Told, decisions_of, floats_of
from lightning_mixprec.deploy.comparison import Comparison
from lightning_mixprec.deploy.evaluated_steps import EvaluatedStep, Seen, Step, lacks_gradients
from lightning_mixprec.deploy.prepared import (
    GivenBatch,
    check_count,
    check_trainer,
    has_step,
    is_datamodule,
    plain_trainer,
    prepared_run,
)
from lightning_mixprec.deploy.used_memory import Peak, SavedBytes, bytes_held, peak_of
from lightning_mixprec.engine.backends import Emulate, check_emulate
from lightning_mixprec.errors import MixPrecError, NoLossError, TraceLeftError, one_line
from lightning_mixprec.evidence.by_hand import asks_for_trainer, module_of
from lightning_mixprec.evidence.instruments.sandbox import RandomState, Sandbox
from lightning_mixprec.evidence.run_formats import PolicyFormats
from lightning_mixprec.numerics.devices import native_support
from lightning_mixprec.records.words import counted

T = TypeVar("T")

_IN_FORCE = (
    "compare() got a module on which the formats of a run under PerLayerPrecision are in force; call it when the run "
    "is over, or without the plugin."
)


def compare(
    module: pl.LightningModule,
    policies: Mapping[str, Any],
    batches: Any = None,
    *,
    reference: Any = "fp32",
    metric: Any = None,
    repeats: int = 5,
    trainer: pl.Trainer | None = None,
    step: Step | None = None,
    weights: Mapping[str, Any] | None = None,
    max_batches: int | None = None,
    emulate: Emulate = "auto",
    seed: int = 0,
) -> Comparison:
    """Runs a module on the same batches under several policies and the reference, in eval mode and without gradients.

    Nothing of the module changes. Batch by batch, every policy begins with the same random numbers.

    Args:
        module: The LightningModule, on the device where it is to compute, outside a run.
        policies: By a name of yours, a policy: a format name, a path, a mapping or a ``PrecisionPolicy``.
        batches: What ``training_step`` takes: an iterable of batches, a ``DataLoader``, or a ``LightningDataModule``,
            whose data for validation are taken. All are kept in memory. None for the validation data of ``trainer``.
        reference: The policy that the others are compared with. In fp32 it computes without TF32.
        metric: A torchmetrics metric, which is given the outputs and the batch's second item, or its ``target``,
            ``label`` or ``y``; or a function of outputs and batch, of whose numbers the mean is taken; or a mapping
            of names to these. Each is a column.
        repeats: How often each policy is timed, in turns with the others.
        trainer: A Trainer, of whose run the module is: its validation data, as many batches as it validates on, and the
            module's ``validation_step``. They are set up as ``trainer.validate`` does, without its callbacks, loggers
            and plugin; of ``batches`` that are given the Trainer is only what a step finds that asks for it.
        step: Which of the module's steps is run: ``"training"`` or ``"validation"``. By default the second with a
            Trainer, if the module has one and it gives a loss, and the first without.
        weights: By the name of a policy, or ``"reference"``, a checkpoint or a state_dict: what it computes with in
            place of the module's own weights. So a run in mixed precision is compared with one in fp32.
        max_batches: How many batches of each loader at most.
        emulate: As for :class:`~lightning_mixprec.PerLayerPrecision`.
        seed: Of the random numbers of the intervals.

    Returns:
        A :class:`Comparison`; ``print`` it.

    Raises:
        MixPrecError: An argument is malformed, or a step cannot be run; one line that says why.

    >>> import torch
    >>> class Model(pl.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(2, 1)
    ...     def training_step(self, batch, batch_idx):
    ...         return self.layer(batch).float().mean()
    >>> comparison = compare(Model(), {"all bf16": "bf16"}, [torch.ones(3, 2)] * 2)
    >>> comparison.rows[0]["policy"], comparison.rows[0]["loss_gap"] < 0.1
    ('all bf16', True)
    """
    module = module_of(module, "compare")
    check_count("repeats", repeats)
    if max_batches is not None:
        check_count("max_batches", max_batches)
    if step not in ("training", "validation", None):
        raise MixPrecError(f"step is {step!r}; it has to be 'training' or 'validation'.")
    check_emulate(emulate)
    exact, others = candidates_of(policies, reference, weights)
    if trainer is not None:
        check_trainer(trainer)
    steps = steps_to_compare_by(module, step, is_validated=trainer is not None)

    def work(module: pl.LightningModule, given: list[GivenBatch]) -> Comparison:
        def by(step: Step) -> Comparison:
            return _Comparing(module, [exact, *others], given, step, metric).compare(repeats, emulate, seed)

        return by_the_first_with_a_loss(steps, by)

    if is_datamodule(batches) or (batches is None and trainer is not None):
        trainer = trainer or plain_trainer(module)
        return prepared_run(trainer, module, work, datamodule=batches, data="val", most=max_batches)
    with _in_run_of(trainer, module):
        return work(module, batches_of(module, batches, max_batches))


def steps_to_compare_by(module: pl.LightningModule, step: Step | None, *, is_validated: bool) -> tuple[Step, ...]:
    """The step asked for; else ``validation_step``, where validation is meant and there is one, and training."""
    if step is not None:
        return (step,)
    return ("validation", "training") if is_validated and has_step(module, "validation_step") else ("training",)


def by_the_first_with_a_loss(steps: Sequence[Step], compared_by: Callable[[Step], Comparison]) -> Comparison:
    """A comparison by the first of some steps that gives a loss."""
    for step in steps[:-1]:
        with contextlib.suppress(NoLossError):
            return compared_by(step)
    return compared_by(steps[-1])


@dataclass
class _Run:
    """All batches under one policy."""

    name: str
    losses: list[float] = field(default_factory=list)
    likeness: Likeness = field(default_factory=Likeness)
    columns: dict[str, float] = field(default_factory=dict)


class _Comparing:
    """The runs of one comparison; of the candidates the first is the reference."""

    def __init__(
        self, module: pl.LightningModule, everyone: list[Candidate], given: list[GivenBatch], step: Step, metric: Any
    ) -> None:
        self._module, self._everyone, self._given = module, everyone, given
        self._kind, self._metric = step, metric
        self._random: list[RandomState] = []
        self._expected: list[Told] = []
        self._steps: list[EvaluatedStep] = []
        self._not_counted: dict[str, str] = {}
        self._not_finite: list[str] = []

    def compare(self, repeats: int, emulate: Emulate, seed: int) -> Comparison:
        self._steps = [self._of(each, partial(self._step_of, each, emulate)) for each in self._everyone]
        places = range(len(self._everyone))
        rows = [self._of(self._everyone[place], partial(self._row, place)) for place in places]
        memory = [self._of(self._everyone[place], partial(self._memory, place)) for place in places]
        seconds = self._seconds(repeats)
        told = [self._told(row, rows[0], seed) for row in rows]
        self._tell_of_losses(rows)
        for row, time, used in zip(told, seconds, memory, strict=True):
            row["time_ratio"] = statistics.median(own / other for own, other in zip(time, seconds[0], strict=True))
            row["memory_ratio"], row["saved_ratio"] = map(_ratio, used, memory[0])
        columns = [{**row, **run.columns} for row, run in zip(told, rows, strict=True)]
        absolute = {"seconds": statistics.median(seconds[0]), "bytes": memory[0][0], "saved_bytes": memory[0][1]}
        return Comparison(
            rows=tuple(columns[1:]),
            reference={**columns[0], **absolute},
            batches=len(self._given),
            step=f"{self._kind}_step",
            same_weights=all(each.weights is self._everyone[0].weights for each in self._everyone),
            notes=tuple(self._notes(emulate)),
        )

    def _step_of(self, candidate: Candidate, emulate: Emulate) -> EvaluatedStep:
        formats = PolicyFormats(self._module, candidate.policy, self._module.device, 1.0, emulate)
        return EvaluatedStep(self._module, formats, self._module.device, self._kind)

    def _opened(self, place: int) -> contextlib.AbstractContextManager[Sandbox]:
        candidate = self._everyone[place]
        is_exact = place == 0 and candidate.is_exact(self._module)
        return self._steps[place].opened_for_evaluation(candidate.give_weights, is_exact=is_exact)

    def _row(self, place: int) -> _Run:
        """All batches under a policy; with gradients if the step takes some itself."""
        try:
            return self._run_of(place)
        except RuntimeError as error:
            if self._takes_gradients or not lacks_gradients(error):
                raise
            for step in self._steps:
                step.takes_gradients = True
            return self._run_of(place)

    @property
    def _takes_gradients(self) -> bool:
        return self._steps[0].takes_gradients

    def _run_of(self, place: int) -> _Run:
        """All batches under a policy: losses, and outputs as they differ from the reference's, which comes first."""
        if place == 0:
            self._random, self._expected = [], []
        step, run = self._steps[place], _Run(self._everyone[place].name)
        metrics, logged = Metrics(self._metric), LoggedColumns(len({given.loader for given in self._given}) > 1)
        with self._opened(place) as stand_ins, step.seeing_outputs():
            if step.is_validation:
                step.call("on_validation_start")
                step.call("on_validation_epoch_start")
            for number, given in enumerate(self._given):
                if place == 0:
                    self._random.append(RandomState(self._module.device))
                seen = step.see(stand_ins, given, self._random[number])
                run.losses.append(_loss_of(seen, step))
                told = floats_of(seen.output), decisions_of(seen.output, given.batch)
                if place == 0:
                    self._expected.append(told)
                run.likeness.add(self._expected[number], *told)
                metrics.add(seen.output, given.batch, self._module.device)
                if step.is_validation:
                    logged.add(seen.logged, given)
            if step.is_validation:
                logged.add({**step.call("on_validation_epoch_end"), **step.call("on_validation_end")})
            run.columns = {**logged.values(), **metrics.values()}
        return run

    def _told(self, run: _Run, reference: _Run, seed: int) -> dict[str, Any]:
        gaps = [own - other for own, other in zip(run.losses, reference.losses, strict=True)]
        gap, low, high = interval(gaps, seed)
        return {
            "policy": run.name,
            "loss": statistics.fmean(run.losses),
            "loss_gap": gap,
            "loss_gap_low": low,
            "loss_gap_high": high,
            "output_sqnr_db": run.likeness.sqnr_db,
            "equal_decisions": run.likeness.equal_decisions,
        }

    def _tell_of_losses(self, rows: list[_Run]) -> None:
        """Notes whose losses are not finite, so that there is no gap."""
        for place, row in enumerate(rows):
            bad = [number for number, loss in enumerate(row.losses) if not math.isfinite(loss)]
            if bad:
                of = counted(len(row.losses), "batch", "batches")
                self._not_finite.append(f"{row.name!r}: no finite loss on {len(bad)} of {of}, the first is {bad[0]}")
                if place == 0:
                    asked = f"diagnose(module, batch, {row.name!r})"
                    self._not_finite[-1] += f": without a reference there is no gap; {asked} says where it begins"
                    return

    def _seconds(self, repeats: int) -> list[list[float]]:
        """By policy the seconds of each repeat: all in turns, each warm, the first of a turn another one each time."""
        seconds: list[list[float]] = [[] for _ in self._everyone]
        for repeat in range(repeats):
            number = repeat % len(self._given)
            given, random = self._given[number], self._random[number]
            for start in range(len(self._everyone)):
                place = (repeat + start) % len(self._everyone)
                with self._opened(place) as stand_ins:
                    self._steps[place].see(stand_ins, given, random)
                    seconds[place].append(self._steps[place].see(stand_ins, given, random).seconds)
        return seconds

    def _memory(self, place: int) -> tuple[int | None, int | None]:
        """Bytes at the peak of a step, with the weights, and bytes that it would keep for its backward.

        Each None where a step that runs cannot be run so: with the count of tensors, or for want of room.
        """
        see, peak, device = self._steps[place].see, Peak(), self._module.device
        given, random = self._given[0], self._random[0]
        with self._opened(place) as stand_ins:
            held = [*self._module.parameters(), *self._module.buffers()]
            saved = SavedBytes(held)
            see(stand_ins, given, random)
            counted_peak = self._counting(
                place, partial(see, stand_ins, given, random, watch=partial(peak_of, device, peak))
            )
            with_gradients = partial(see, stand_ins, given, random, watch=saved.counting, with_gradients=True)
            counted_saved = self._counting(place, with_gradients)
            return bytes_held(held) + peak.bytes if counted_peak else None, saved.bytes if counted_saved else None

    def _counting(self, place: int, run: Callable[[], Seen]) -> bool:
        """Runs a step that could be run once more, counted; says if that could be done, and keeps the reason if not."""
        try:
            run()
        except TraceLeftError:
            raise
        except Exception as error:
            name = self._everyone[place].name
            self._not_counted[name] = f"memory of {name!r} could not be counted ({one_line(error)})"
            return False
        return True

    def _of(self, candidate: Candidate, run: Callable[[], T]) -> T:
        """Runs something for a policy; an error says for which."""
        try:
            return run()
        except MixPrecError as error:
            if "attached already" in str(error):
                raise MixPrecError(_IN_FORCE) from error
            raise type(error)(f"policy {candidate.name!r}: {error}") from error
        except Exception as error:
            problem = asks_for_trainer(error, "compare", "give it trainer=...", f"{self._kind}_step")
            problem = problem or f"the step could not be run: {one_line(error)}"
            raise MixPrecError(f"policy {candidate.name!r}: {problem}") from error

    def _notes(self, emulate: Emulate) -> Iterator[str]:
        """What is to be known before the numbers are believed."""
        yield from self._not_finite
        yield from self._not_counted.values()
        if self._takes_gradients:
            yield "the step takes gradients itself and was run with them: time and memory are of such steps"
        if len(self._given) < FEW:
            told = counted(len(self._given), "batch", "batches")
            yield f"{told}: with fewer than {FEW} an interval of 95 % holds less than that"
        used = {name for each in self._everyone for name in each.policy.resolve(self._module).compute_formats}
        for format in sorted(used):
            support = native_support(format, self._module.device)
            if not support.native:
                how = "is slow" if emulate is False else "is emulated"
                yield f"{format} {how} here ({support.reason}): time and memory are not those of hardware that has it"


def _ratio(own: int | None, other: int | None) -> float | None:
    """A ratio of bytes; 1 of equally many, none included."""
    if own is None or other is None:
        return None
    return own / other if other else 1.0 if own == other else None


def _loss_of(seen: Seen, step: EvaluatedStep) -> float:
    if seen.loss is not None:
        return seen.loss
    if step.is_validation:
        raise NoLossError(
            f"validation_step returns no loss and logs none (it logs {', '.join(seen.logged) or 'nothing'}); let it "
            "return one, or log one as 'val_loss', or give step='training'."
        )
    raise MixPrecError("training_step returns no loss; give batches for which it returns one.")


@contextlib.contextmanager
def _in_run_of(trainer: pl.Trainer | None, module: pl.LightningModule) -> Iterator[None]:
    """Within, the module finds its Trainer."""
    if trainer is None or module._trainer is not None:
        yield
        return
    try:
        module.trainer = trainer
        yield
    finally:
        module.trainer = None
