"""The controller's options, and what it remembers."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Options:
    """Options of the controller.

    Attributes:
        every_n_steps: Batches between two samples, once a run has settled.
        dwell_steps: Batches that a promoted layer stays as it is, at least; four times as long after each relapse.
        max_trials: Trials for one decision.
        max_assignments: Different assignments in a run.
        min_low_precision_share: Share of the flops that has to stay in at most 16 bits, or of those that the user's
            policy has there if it has fewer; None for any.
        has_bf16: Whether the device computes in bf16.
        scales: The smallest and the largest loss scale; None where it is not searched for.
    """

    every_n_steps: int = 1000
    dwell_steps: int = 1000
    max_trials: int = 48
    max_assignments: int = 8
    min_low_precision_share: float | None = None
    has_bf16: bool = True
    scales: tuple[float, float] | None = (2.0**-14, 2.0**24)


@dataclass
class ControllerCounts:
    """The controller's counters and dates; plain types.

    Attributes:
        batches: Batches begun.
        steps: Steps that ended, skipped ones included.
        misses: Samples in a row that told nothing.
        origin: Batch since which samples are dense at first and sparse later; -1 before the first good step.
        next_sample: Batch of the next sample.
        doubts: Samples in a row that disagreed with fp32.
        failures: Steps that failed lately, each with 1 where the loss was not finite.
        accusations: Steps that failed lately for want of precision.
        skips_in_a_row: Steps skipped since the last one that was taken.
        fruitless: Looks in a row that came to nothing.
        next_look: Step before which no failed step is looked into.
        since: Batch of each layer's last move.
        group: Number of the move in which each layer was promoted.
        relapses: Times that each layer that was taken back had to be promoted again.
        approvals: Samples in a row that agreed without a group of promotions, by the group's first layer.
        moves: Changes of formats.
        restores: Returns to the last good copy since the last sample that agreed.
        usual_loss: Size of the losses seen lately.
    """

    batches: int = 0
    steps: int = 0
    misses: int = 0
    origin: int = -1
    next_sample: int = 0
    doubts: int = 0
    failures: list[list[int]] = field(default_factory=list)
    accusations: list[int] = field(default_factory=list)
    skips_in_a_row: int = 0
    fruitless: int = 0
    next_look: int = 0
    since: dict[str, int] = field(default_factory=dict)
    group: dict[str, int] = field(default_factory=dict)
    relapses: dict[str, int] = field(default_factory=dict)
    approvals: dict[str, int] = field(default_factory=dict)
    moves: int = 0
    restores: int = 0
    usual_loss: float = 0.0

    @contextlib.contextmanager
    def as_of(self, batches: int) -> Iterator[None]:
        """Dates within are those of so many batches ago, when what is told now has happened."""
        self.batches -= batches
        try:
            yield
        finally:
            self.batches += batches


@dataclass
class ControllerState(ControllerCounts):
    """All that a checkpoint keeps of the controller; promotions by layer, in the short form of a policy.

    Attributes:
        promoted: The promotions in force.
        assignments: The sets of promotions that have been in force, this one and none included.
    """

    promoted: dict[str, str] = field(default_factory=dict)
    assignments: list[dict[str, str]] = field(default_factory=list)
