"""A plan as text: what is promised and what was measured, the layers that matter first, and the policy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lightning_mixprec.planning.cost import Costs, Predicted
from lightning_mixprec.planning.plan_files import Measured
from lightning_mixprec.planning.sensitivity import Sensitivities
from lightning_mixprec.policy.policy import PrecisionPolicy
from lightning_mixprec.policy.table import align
from lightning_mixprec.records.words import cell, counted, printable, written

_MOST_ROWS = 24
_MOST_PROBLEMS = 5


class _Plan(Protocol):
    """What is shown of a plan."""

    @property
    def sensitivities(self) -> Sensitivities: ...
    @property
    def costs(self) -> Costs: ...
    @property
    def model(self) -> str: ...
    @property
    def formats(self) -> tuple[str, ...]: ...
    @property
    def budget(self) -> Mapping[str, float] | None: ...
    @property
    def chosen(self) -> tuple[str, ...]: ...
    @property
    def how(self) -> str: ...
    @property
    def policy(self) -> PrecisionPolicy: ...
    @property
    def measured(self) -> Measured | None: ...
    @property
    def predicted(self) -> Predicted: ...
    @property
    def reference(self) -> Predicted: ...
    @property
    def uniform(self) -> Predicted: ...
    @property
    def rows(self) -> Sequence[Mapping[str, Any]]: ...
    @property
    def problems(self) -> Mapping[tuple[str, str], str]: ...
    @property
    def promise(self) -> Sequence[str]: ...
    @property
    def wider(self) -> "_Plan | None": ...


def plan_table(plan: _Plan) -> str:
    """The text of a plan."""
    return "\n".join([*_heading(plan), "", *_layers(plan), "", *_policy(plan), *_remarks(plan)])


def _heading(plan: _Plan) -> list[str]:
    predicted, reference, measured = plan.predicted, plan.reference, plan.measured
    asked = "no worse than uniform" if plan.budget is None else ", ".join(f"{k} {v:g}" for k, v in plan.budget.items())
    share = None
    if measured is not None and measured.seconds is not None and measured.reference_seconds:
        share = measured.seconds / measured.reference_seconds
    rows = [
        ["", "loss gap", "step time", "share of reference", "memory", "share of reference", "in <= 16 bits"],
        *(
            [
                name,
                written(each.loss_gap, ".2e"),
                _seconds(each.seconds),
                written(each.seconds / reference.seconds if reference.seconds else None, ".0%"),
                _bytes(each.memory_bytes),
                written(each.memory_bytes / reference.memory_bytes if reference.memory_bytes else None, ".0%"),
                written(each.low_precision_share, ".0%"),
            ]
            for name, each in (
                ("predicted", predicted),
                ("uniform 16-bit", plan.uniform),
                (plan.sensitivities.reference, reference),
            )
        ),
    ]
    if measured is not None:
        seconds = "-" if measured.seconds is None else _seconds(measured.seconds)
        rows.insert(2, ["measured", written(measured.loss_gap, ".2e"), seconds, written(share, ".0%"), "-", "-", "-"])
    lines = align(rows, right=rows[0][1:])
    cosine = "" if measured is None else f"; gradient cosine {measured.grad_cosine:.5f}"
    batches = counted(plan.sensitivities.batches, "batch", "batches")
    return [f"Plan of {plan.model} for {plan.costs.device}, asked for {asked} ({batches}{cosine})", *lines]


def _layers(plan: _Plan) -> list[str]:
    """The layers by what they could do to the loss, the largest first."""
    reference = plan.sensitivities.reference
    by_layer: dict[str, list[Mapping[str, Any]]] = {}
    for row in plan.rows:
        by_layer.setdefault(row["layer"], []).append(row)
    formats = [each for each in plan.formats if any(row["format"] == each for row in plan.rows)]
    ordered = sorted(by_layer, key=lambda name: -max(row["sensitivity"] for row in by_layer[name]))
    rows = [["layer", "format", *(f"gap in {each}" for each in formats), "step time", "saved", "bytes", "saved"]]
    for name in ordered[:_MOST_ROWS]:
        own = {row["format"]: row for row in by_layer[name]}
        chosen = next(row for row in own.values() if row["chosen"])
        wide = own[reference]
        gaps = [f"{math.sqrt(own[each]['sensitivity']):.1e}" if each in own else "-" for each in formats]
        rows.append(
            [
                printable(cell(name)),
                chosen["format"],
                *gaps,
                _seconds(chosen["seconds"]),
                _seconds(wide["seconds"] - chosen["seconds"]),
                _bytes(chosen["bytes"]),
                _bytes(wide["bytes"] - chosen["bytes"]),
            ]
        )
    more = len(ordered) - _MOST_ROWS
    rest = [f"... and {more} more layers, each of which matters less"] if more > 0 else []
    return [*align(rows, right=rows[0][2:]), *rest]


def _policy(plan: _Plan) -> list[str]:
    lines = [f"policy: default {plan.policy.default}"]
    return lines + [f"  {rule.label} -> {rule.value}" for rule in plan.policy.rules]


def _remarks(plan: _Plan) -> list[str]:
    problems = [f"{cell(layer)} not in {format}: {why}" for (layer, format), why in plan.problems.items()]
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"... and {len(problems) - _MOST_PROBLEMS} more that cannot be used"]
    lines = [printable(each) for each in problems]
    if plan.how == "greedy":
        lines.append("found by a greedy search: scipy is not installed (pip install scipy), or found nothing better")
    if plan.costs.note:
        lines.append(printable(f"Costs: {plan.costs.note}."))
    for each in plan.promise:
        lines.append(f"The promise was not kept: {each}.")
    if (wider := plan.wider) is not None:
        changed = sum(one != other for one, other in zip(plan.chosen, wider.chosen, strict=True))
        gap = wider.predicted.loss_gap
        lines.append(
            f"plan.wider is the next wider one: {counted(changed, 'change')}, predicted loss gap {gap:.2e}, step time "
            f"{_seconds(wider.predicted.seconds)}."
        )
    return lines


def _seconds(seconds: float) -> str:
    """A time in milliseconds, in three digits."""
    return f"{1e3 * seconds:.3g} ms"


def _bytes(count: float) -> str:
    """A number of bytes, in three digits."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
