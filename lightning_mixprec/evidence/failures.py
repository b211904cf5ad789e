"""Failed optimizer steps: noticed while their weights are in place, explained by the batches that led to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mixprec import ranks
from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.evidence.comparison import Comparison, Wanted
from lightning_mixprec.evidence.diagnosis import Diagnosis, Judge
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import RunFormats
from lightning_mixprec.evidence.step_window import BatchUse, KeptBatch, Made, Outcome, RandomUse, StepWindow, received

OnStep = Callable[[StepWindow, Outcome], None]


class FailureWatch:
    """Learns how optimizer steps went without waiting for the device; a callback hands on its hooks.

    On the CPU the outcome is read before an optimizer steps, if it is known by then, else after. On a device it is sent
    to the host when the batch ends and read when the next step is about to be taken, so no gap is left in its work. In
    manual optimization all outcomes come after the batch's steps were taken.

    Args:
        formats: The formats of the run.
        device: The device of the run.
        is_automatic: Whether Lightning calls the optimizer.
        on_failure: Called for a step that is to be explained. In automatic optimization its weights and formats are
            still in place, except for weights that a step which is not guarded has already lost on a device.
        on_outcome: Called once for every batch with optimizer steps, after ``on_failure``.
    """

    def __init__(
        self,
        formats: RunFormats,
        device: torch.device,
        is_automatic: bool,
        on_failure: OnStep,
        on_outcome: OnStep,
    ) -> None:
        self._formats, self._device, self._is_automatic = formats, device, is_automatic
        self._on_failure, self._on_outcome = on_failure, on_outcome
        self._batch_use, self._random_use = BatchUse(), RandomUse(device)
        self._window: StepWindow | None = None
        self._outcome: Outcome | None = None
        self._late: tuple[StepWindow, Transfer] | None = None

    @property
    def window(self) -> StepWindow | None:
        """The batches since the last optimizer step; None if there are none."""
        return self._window

    @property
    def is_waiting(self) -> bool:
        """True while the outcome of a window that has ended is on its way."""
        return self._late is not None

    def begin_batch(self, batch: Any, batch_idx: int, made: Made | None = None) -> None:
        """Keeps a batch for the window of the next optimizer step."""
        if self._late is not None:
            self._late[0].age += 1
        if self._window is None:
            self._window = StepWindow(self._formats, self._device, self._is_automatic)
        self._window.add_batch(self._batch_use.begin(batch), batch_idx, self._random_use.begin(), made)

    def add_loss(self, loss: Tensor) -> None:
        """Notes a loss that goes backward."""
        if self._window is not None:
            self._window.add_loss(loss)

    def before_step(self, optimizer: Optimizer, step: int) -> None:
        """Notes that an optimizer is about to step.

        Args:
            optimizer: The optimizer.
            step: Optimizer steps taken so far.
        """
        window = self._window
        if window is None:
            return
        window.add_step(optimizer, step)
        if not self._is_automatic:
            return
        # The device has this step's work by now: waiting for the last one's outcome leaves it no gap.
        self.settle()
        is_explained = self._outcome is not None and self._outcome.is_bad  # an optimizer may evaluate more than once
        if window.is_known_before_step and not is_explained:
            self._outcome = window.read()
            self._explain(window, self._outcome)

    def end_batch(self, settles: Callable[[], bool]) -> None:
        """Closes the window if an optimizer stepped in it.

        Args:
            settles: Whether to wait for the outcome, because modules and formats will be others when the next step is
                taken; asked only of an outcome that has to be waited for.
        """
        self._batch_use.end()
        self._random_use.end()
        window, outcome = self._window, self._outcome
        if window is None or not window.steps:
            return
        self._window = self._outcome = None
        self.settle()
        if outcome is not None:
            self._on_outcome(window, outcome)
        elif window.is_late:
            self._late = window, window.send()
            if settles():
                self.settle()
        else:
            self._take_in(window, window.read())

    def settle(self) -> None:
        """Takes in the outcome that is still on its way."""
        if self._late is not None:
            (window, transfer), self._late = self._late, None
            outcome = received(transfer)
            if ranks.are_many() and window.formats.is_guarded and outcome.skipped:
                outcome = outcome._replace(loss_is_bad=ranks.is_any(outcome.loss_is_bad, self._device))
            self._take_in(window, outcome)

    def abandon(self) -> None:
        """Lets go of all batches, after an exception: what is still on its way can be counted, not replayed."""
        self._window = self._outcome = None
        if self._late is not None:
            self._late[0].batches.clear()

    def _take_in(self, window: StepWindow, outcome: Outcome) -> None:
        self._explain(window, outcome)
        self._on_outcome(window, outcome)

    def _explain(self, window: StepWindow, outcome: Outcome) -> None:
        if outcome.is_bad:
            with window.prepared():  # late, it is prepared for the next batch
                self._on_failure(window, outcome)


class Found(NamedTuple):
    """A diagnosis of a failed step, and the batch that it is of.

    Attributes:
        rank: The rank that made it.
        kept: The batch.
        diagnosis: The diagnosis.
        comparison: This rank's batch with its step in fp32, if all ranks still have theirs.
    """

    rank: int
    kept: KeptBatch
    diagnosis: Diagnosis
    comparison: Comparison | None

    @property
    def suspects(self) -> list[str]:
        """The layer that is accused, and those around it, the nearest first."""
        names = [self.diagnosis.cause["layer"] or ""]
        while names[-1]:
            names.append(names[-1].rpartition(".")[0])
        return names


class Problem(NamedTuple):
    """A batch that could not be replayed on some rank, and the reason."""

    batch_idx: int
    message: str


def diagnosed(
    replay: StepReplay, window: StepWindow, scale: float, wanted: Wanted | None = None
) -> tuple[Found | None, list[Problem]]:
    """Looks for the latest batch that a layer, the data or the model spoiled; else for one that the scale did.

    All ranks have to look together. They find the same.

    Args:
        replay: How to replay a batch.
        window: The batches of the failed step.
        scale: The loss scale of the step.
        wanted: What a decision will ask of the step in fp32; None if none is to be made.
    """
    found: Found | None = None
    problems: list[Problem] = []
    for place, kept in reversed(list(enumerate(window.batches))):
        with window.prepared(place):
            found = found and found._replace(comparison=None)  # its gradients make room for this batch's
            judge = Judge(replay, kept, scale, wanted)
            if found is not None and judge.is_finite_at(found.diagnosis.cause["smaller_scale"] or scale):
                continue
            rank, diagnosis = ranks.first_found(judge.judge())
            if judge.problem is not None:
                problems.append(Problem(kept.batch_idx, judge.problem))
            if diagnosis is not None and (found is None or diagnosis.cause["verdict"] != "scale"):
                lacks = wanted is None or ranks.is_any(judge.comparison is None, window.device)
                found = Found(rank, kept, diagnosis, None if lacks else judge.comparison)
                if diagnosis.cause["verdict"] != "scale":
                    break
    return found, [
        problem._replace(message=ranks.told_by(rank, problem.message))
        for rank, each in enumerate(ranks.all_values(problems))
        for problem in each
    ]


@dataclass
class ScaleSearch:
    """A run's search for its loss scale: failed steps in a row, each of which the scale alone explains.

    The first is diagnosed, which finds a scale at which it is finite. Of one that follows, whose loss is finite and
    whose gradients are not, one replay at that scale tells the same. Only what contradicts is diagnosed whole.

    Attributes:
        smaller: The scale at which the last failed step is finite; None if that was for another reason, or there is
            none.
    """

    smaller: float | None = None

    def end(self) -> None:
        """A step went well."""
        self.smaller = None

    def diagnosed(
        self, replay: StepReplay, window: StepWindow, outcome: Outcome, wanted: Wanted | None = None
    ) -> tuple[Found | None, list[Problem]]:
        """As :func:`diagnosed`, of a step with this outcome."""
        found, problems = self._followed(replay, window, outcome), list[Problem]()
        if found is None:
            found, problems = diagnosed(replay, window, outcome.scale, wanted)
        self.smaller = None if found is None else found.diagnosis.cause["smaller_scale"]
        return found, problems

    def _followed(self, replay: StepReplay, window: StepWindow, outcome: Outcome) -> Found | None:
        """What is said of a step of the search, unless it takes more than one look to say it."""
        smaller, scale = self.smaller, outcome.scale
        if smaller is None or not 1 <= smaller < scale or outcome.loss_is_bad or len(window.batches) > 1:
            return None
        with window.prepared():
            judge = Judge(replay, window.batches[-1], scale)
            if not judge.is_finite_at(smaller):
                return None
            is_here = not ranks.are_many() or judge.fails_at(scale)
            is_search = replay.formats.searches_scale
            told = judge.marked(Diagnosis.of("scale", scale, smaller_scale=smaller, is_search=is_search))
        rank, diagnosis = ranks.first_found(told if is_here else None)
        return None if diagnosis is None else Found(rank, window.batches[-1], diagnosis, None)


def diagnosed_error(
    replay: StepReplay, window: StepWindow, error: Exception, wanted: Wanted | None = None
) -> Found | None:
    """Says why the last batch's step raised, if it raises again in the run's formats and does not in fp32.

    For a single rank: others know nothing of the exception.

    Args:
        replay: How to replay a batch.
        window: The batches since the last optimizer step.
        error: The exception.
        wanted: As for :func:`diagnosed`.
    """
    judge = Judge(replay, window.batches[-1], float(window.formats.scale), wanted, may_raise=True)
    with window.prepared():
        diagnosis = judge.judge()
    if diagnosis is None or not diagnosis.cause.get("raised", "").startswith(f"{type(error).__name__}:"):
        return None
    return Found(0, window.batches[-1], diagnosis, judge.comparison)
