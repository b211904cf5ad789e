"""The record of a comparison of policies, which ``Comparison.add_to`` writes to a run's rows for the report."""

from typing_extensions import TypedDict

from lightning_mixprec.records.schema import Count


class ComparedPolicy(TypedDict):
    """A policy of a comparison, or its reference; the keys are those of a row of ``Comparison``.

    Keys:
        columns: Metrics, and what the step logged.
    """

    policy: str
    loss: float
    loss_gap: float
    loss_gap_low: float
    loss_gap_high: float
    output_sqnr_db: float | None
    equal_decisions: float | None
    time_ratio: float
    memory_ratio: float | None
    saved_ratio: float | None
    columns: dict[str, float]


class Compared(TypedDict):
    """A comparison.

    Keys:
        made: When, as ISO 8601 has it.
        step: The step of the module that was run.
        batches: On how many batches.
        same_weights: Whether all policies computed with the same weights.
        seconds: How long a step of the reference took.
        bytes: What it took at its peak.
        reference: The reference.
        policies: The policies that were compared with it.
        notes: What is to be known before the numbers are believed.
    """

    made: str
    step: str
    batches: Count
    same_weights: bool
    seconds: float
    bytes: Count | None
    reference: ComparedPolicy
    policies: list[ComparedPolicy]
    notes: list[str]
