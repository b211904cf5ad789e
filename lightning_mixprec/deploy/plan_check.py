"""The check of a plan: its policy is run on the batches, beside fp32, and what comes out stands beside the promise."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mixprec.errors import MixPrecError, PlanError, TraceLeftError, one_line
from lightning_mixprec.evidence.by_hand import asks_for_trainer
from lightning_mixprec.evidence.comparison import is_finite
from lightning_mixprec.evidence.diagnosis import USUAL_SCALE
from lightning_mixprec.evidence.half_only import in_fp32
from lightning_mixprec.evidence.instruments.sandbox import RandomState, Sandbox
from lightning_mixprec.evidence.replay import Replayed, StepReplay
from lightning_mixprec.evidence.run_formats import PolicyFormats
from lightning_mixprec.numerics.devices.timing import seconds_of
from lightning_mixprec.numerics.formats import REFERENCE
from lightning_mixprec.planning.plan_files import Measured
from lightning_mixprec.policy.policy import PrecisionPolicy

T = TypeVar("T")

_SCALES = (USUAL_SCALE, 2.0**12, 2.0**8, 2.0**4, 1.0)
"""Loss scales that are tried, the largest first, until the step is finite."""

_ROUNDING = 2.0**-20
"""The part of a loss that fp32's own rounding may come to."""

_TURNS, _REPEATS = 2, 3
"""How often fp32 and the policy are timed in turns, and the steps of each turn."""


class PlanCheck:
    """Runs a module's training step on batches, in fp32 and under policies; nothing of the module changes.

    Args:
        module: The LightningModule.
        batches: What its ``training_step`` takes, on its device.
        seed: Of the random numbers that each batch begins with, the same in all formats.
    """

    def __init__(self, module: pl.LightningModule, batches: Sequence[Any], seed: int) -> None:
        self._module, self._batches = module, batches
        self._random = _random_numbers(module.device, seed)
        self._wide = StepReplay(module, PolicyFormats(module, REFERENCE, module.device, 1.0), module.device)

    def check_reference(self) -> None:
        """Checks that every batch can be run and is finite in fp32.

        Raises:
            PlanError: One cannot, or is not; one line that says which and why.
        """
        name = type(self._module).__name__
        for number in range(len(self._batches)):
            found = self._reference(number)
            if not found.losses:
                raise PlanError(
                    f"training_step of {name} returns no loss for batch {number}; a plan is for steps that have one"
                )
            if not bool(is_finite(found)):
                raise PlanError(
                    f"{name} is not finite in fp32 on batch {number}, which no choice of formats mends; give a batch "
                    "and weights that are, or ask diagnose(module, batch, 'fp32') where it begins"
                )

    def measured(self, policy: PrecisionPolicy, *, timed: bool) -> Measured:
        """What a policy does on the batches.

        Args:
            policy: The policy.
            timed: Whether a step is timed, in it and in fp32.
        """
        squares: list[float] = []
        cosines: list[float] = []
        largest = 0.0
        for number in range(len(self._batches)):
            wide, low = self._reference(number), self._low(policy, number)
            expected = _sum(wide.losses)
            squares.append((_sum(low.losses) - expected) ** 2)
            cosines.append(_cosine(wide, low))
            largest = max(largest, abs(expected))
        low_seconds, wide_seconds = self._seconds(policy) if timed else (None, None)
        mean = sum(squares) / len(squares)
        gap = math.sqrt(mean) if math.isfinite(mean) else math.inf
        return Measured(gap, _least(cosines), low_seconds, wide_seconds, _ROUNDING * largest)

    def _reference(self, number: int) -> Replayed:
        return self._told(
            number, lambda: in_fp32(self._wide, lambda stand_ins: self._run(self._wide, stand_ins, number))
        )

    def _low(self, policy: PrecisionPolicy, number: int) -> Replayed:
        """The step under a policy, at the largest loss scale at which it is finite, else at the smallest."""

        def run() -> Replayed:
            for scale in _SCALES:
                replay = self._under(policy, scale)
                with replay.opened() as stand_ins:
                    found = self._run(replay, stand_ins, number)
                if bool(is_finite(found)) or float(replay.formats.scale) < scale:
                    break
            return found

        return self._told(number, run)

    def _under(self, policy: PrecisionPolicy, scale: float) -> StepReplay:
        return self._wide.in_formats(PolicyFormats(self._module, policy, self._module.device, scale))

    def _run(self, replay: StepReplay, stand_ins: Sandbox, number: int) -> Replayed:
        scale = replay.formats.scale if replay is not self._wide else 1.0
        return replay.run(stand_ins, self._batches[number], number, scale=scale, random=self._random)

    def _seconds(self, policy: PrecisionPolicy) -> tuple[float, float]:
        """The time of a step under a policy, and in fp32: in turns, the least of all."""
        low, wide = self._under(policy, 1.0), self._wide
        times: dict[StepReplay, list[float]] = {low: [], wide: []}
        for replay in (low, wide) * _TURNS:
            with replay.opened(reference=replay is wide) as stand_ins:
                self._timed(replay, stand_ins)  # with what is done once
                times[replay] += [self._timed(replay, stand_ins) for _ in range(_REPEATS)]
        return min(times[low]), min(times[wide])

    def _timed(self, replay: StepReplay, stand_ins: Sandbox) -> float:
        return seconds_of(lambda: self._run(replay, stand_ins, 0), self._module.device)

    def _told(self, number: int, run: Callable[[], T]) -> T:
        """What a run gives; an error of the step as one line."""
        try:
            return run()
        except TraceLeftError:
            raise
        except Exception as error:
            problem = asks_for_trainer(error, "plan", "give it trainer=...")
            if isinstance(error, MixPrecError):
                problem = str(error)
            problem = problem or f"{one_line(error)}; give batches as its training_step takes them, on its device"
            name = type(self._module).__name__
            raise PlanError(f"batch {number} cannot be run through {name}.training_step: {problem}") from error


def _random_numbers(device: torch.device, seed: int) -> RandomState:
    """The state of the generators after seeding them; they go on as if nothing had been."""
    before = RandomState(device)
    torch.manual_seed(seed)
    made = RandomState(device)
    before.restore()
    return made


def _sum(losses: Sequence[Tensor]) -> float:
    return sum(float(loss.double().sum()) for loss in losses)


def _least(values: Sequence[float]) -> float:
    """The least of some numbers; NaN if one is."""
    return math.nan if any(map(math.isnan, values)) else min(values)


def _cosine(wide: Replayed, low: Replayed) -> float:
    """The cosine between two gradients of all weights; NaN if one is nothing or not finite."""
    parts = [
        (torch.dot(one, other), torch.dot(one, one), torch.dot(other, other))
        for name, gradient in wide.gradients.items()
        if name in low.gradients
        for one, other in [(_flat(gradient), _flat(low.gradients[name]))]
    ]
    if not parts:
        return math.nan
    mixed, of_one, of_other = (float(torch.stack(each).sum()) for each in zip(*parts, strict=True))
    return mixed / math.sqrt(of_one * of_other) if of_one * of_other > 0 else math.nan


def _flat(gradient: Tensor) -> Tensor:
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return dense.detach().double().flatten()
