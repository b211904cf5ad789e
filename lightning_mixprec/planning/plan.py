"""``PrecisionPlan``: the formats that were chosen for a model, why, and what is promised of them.

A plan keeps what was measured, so that another budget needs no new measurement, and an outline of the model, so that
its policy can be written without it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from lightning_mixprec.errors import PlanError, PolicyError
from lightning_mixprec.numerics.plots import draw_plan
from lightning_mixprec.planning.budgets import Budget, Choice, check_budget
from lightning_mixprec.planning.cost import Costs, Predicted
from lightning_mixprec.planning.plan_files import Measured, read_plan, write_plan
from lightning_mixprec.planning.plan_table import plan_table
from lightning_mixprec.planning.sensitivity import Sensitivities
from lightning_mixprec.policy.policy import PrecisionPolicy
from lightning_mixprec.policy.rule_folding import LayerOutline, folded_policy, layers_off, outline_of, stand_in_of

_FACTOR = 2.0
"""The factor by which what is measured may be worse than what was promised."""

_FRONTIER = 9
"""Budgets of time for which the frontier is drawn."""


@dataclass(frozen=True, repr=False)
class PrecisionPlan:
    """The formats chosen for a model's layers: least predicted loss gap within budgets of time, memory, or share.

    Made by :func:`lightning_mixprec.plan`, read by :meth:`from_file`; printing it shows a table.

    Attributes:
        sensitivities: What each format does to the loss, as it was measured.
        costs: What each takes.
        outline: The layers of the model.
        model: The name of its class.
        formats: The formats that were offered beside the reference.
        budget: What was asked; None for the cheapest plan that is predicted no worse than the uniform 16-bit policy.
        chosen: The format of each variable.
        how: ``"milp"``, or ``"greedy"`` where scipy is not installed or found nothing better; ``"uniform"`` where one
            format wherever it can be is the best that was found.
        policy: The policy that gives layers these formats, with rules as a person would write them.
        measured: What the policy did on the batches; None if it was not run.
    """

    sensitivities: Sensitivities
    costs: Costs
    outline: tuple[LayerOutline, ...]
    model: str
    formats: tuple[str, ...]
    budget: Budget | None
    chosen: tuple[str, ...]
    how: str
    policy: PrecisionPolicy = field(compare=False)
    measured: Measured | None = None

    @classmethod
    def of(
        cls,
        module: nn.Module,
        sensitivities: Sensitivities,
        costs: Costs,
        formats: Sequence[str],
        budget: object = None,
    ) -> "PrecisionPlan":
        """The plan that solves a budget, from what was measured of a model.

        Args:
            module: The model, which is looked at, and neither run nor kept.
            sensitivities: What formats do to the loss.
            costs: What they take.
            formats: The formats that are offered.
            budget: As for :func:`lightning_mixprec.plan`.

        Raises:
            PlanError: The budget is malformed, or nothing is within it.
        """
        asked, reference = check_budget(budget), sensitivities.reference
        offered = tuple(dict.fromkeys(each for each in formats if each != reference))
        found = Choice(sensitivities, costs, offered).solved(asked)
        outline = tuple(outline_of(module))
        chosen = _by_layer(sensitivities, found.formats, outline)
        policy = folded_policy(module, chosen)
        name = type(module).__name__
        return cls(sensitivities, costs, outline, name, offered, asked, found.formats, found.how, policy)

    @cached_property
    def layer_formats(self) -> dict[str, str]:
        """The format of each layer with operations of its own, by its first name."""
        return _by_layer(self.sensitivities, self.chosen, self.outline)

    @cached_property
    def predicted(self) -> Predicted:
        """What is predicted of a step: ``loss_gap``, ``seconds``, ``memory_bytes``, ``low_precision_share``."""
        return self._choice.predicted(self.chosen)

    @cached_property
    def reference(self) -> Predicted:
        """The same of a step in the reference."""
        return self._choice.predicted((self.sensitivities.reference,) * len(self.chosen))

    @cached_property
    def uniform(self) -> Predicted:
        """The same of a step under the uniform 16-bit policy, where it can be used."""
        return self._choice.predicted(self._choice.uniform())

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A plain dict for each layer and offered format: ``layer, format, sensitivity, seconds, bytes, chosen``.

        Sensitivities add up: those of the chosen formats to the predicted squared loss gap. Layers that move together
        have equal parts of what was measured of them as a whole.
        """
        found, wide = [], {each.name for each in self.outline if each.stays_wide}
        for place, layers in enumerate(self.sensitivities.variables):
            offers = self.sensitivities.offers[place]
            for name in layers:
                for format in self._choice.offered(place):
                    cost = self.costs.layers.get(name, {}).get(format)
                    found.append(
                        {
                            "layer": name,
                            "format": "fp64" if name in wide else format,
                            "sensitivity": offers[format].sensitivity / len(layers) if format in offers else 0.0,
                            "seconds": 0.0 if cost is None else cost.seconds,
                            "bytes": 0.0 if cost is None else cost.weight_bytes + cost.saved_bytes,
                            "chosen": format == self.chosen[place],
                        }
                    )
        return found

    @property
    def problems(self) -> dict[tuple[str, str], str]:
        """By layer and format, why the format was not offered there."""
        return {
            (name, format): offer.problem
            for layers, offers in zip(self.sensitivities.variables, self.sensitivities.offers, strict=True)
            for format, offer in offers.items()
            if offer.problem and format in self.formats
            for name in layers
        }

    def solve(self, budget: Mapping[str, float] | None) -> "PrecisionPlan":
        """Another plan from the same measurements; its policy has not been run.

        Args:
            budget: As for :func:`lightning_mixprec.plan`.

        Raises:
            PlanError: The budget is malformed, or nothing is within it.
        """
        asked = check_budget(budget)
        found = self._choice.solved(asked)
        return self._with(found.formats, asked, found.how)

    def check(self, module: nn.Module) -> None:
        """Checks that the plan is of a model.

        Raises:
            PlanError: It is of another one; one line that says where they differ.
        """
        ours = {each.name: each.classes[0] for each in self.outline if each.has_forward and each.name}
        theirs = {each.name: each.classes[0] for each in outline_of(module) if each.has_forward and each.name}
        if ours == theirs:
            return
        name = next(each for each in (*ours, *theirs) if ours.get(each) != theirs.get(each))
        raise PlanError(
            f"the plan is of another model: its layer {name!r} is {ours.get(name, 'not there')} in the plan's "
            f"{self.model} and {theirs.get(name, 'not there')} in this {type(module).__name__}; plan this one"
        )

    @property
    def promise(self) -> list[str]:
        """What was measured more than twice as bad as it was promised, a sentence each; empty if all was kept."""
        told, measured, predicted = [], self.measured, self.predicted
        if measured is None:
            return []
        promised = predicted.loss_gap or 0.0
        if measured.loss_gap > max(_FACTOR * promised, _FACTOR * measured.rounding):
            times = f", {measured.loss_gap / promised:.1f} times" if promised else " instead of"
            told.append(f"the loss gap on the batches was {measured.loss_gap:.3g}{times} the predicted {promised:.3g}")
        if measured.seconds and measured.reference_seconds and self.reference.seconds:
            share, expected = measured.seconds / measured.reference_seconds, predicted.seconds / self.reference.seconds
            if share > _FACTOR * expected:
                told.append(
                    f"a step took {share:.2f} times as long as in {self.sensitivities.reference} instead of the "
                    f"predicted {expected:.2f}"
                )
        return told

    @cached_property
    def wider(self) -> "PrecisionPlan | None":
        """The next wider plan, where the loss gap was more than twice the predicted one; None where it was kept.

        Its predicted loss gap is as much smaller as the measured one was too large. What else was budgeted holds if
        that is possible, and is dropped if not.
        """
        if self.measured is None or not any("loss gap" in each for each in self.promise):
            return None
        promised = self.predicted.loss_gap or 0.0
        asked = self.budget if self.budget is not None else {"loss_gap": self.uniform.loss_gap or 0.0}
        aim = min(asked.get("loss_gap", math.inf), promised) * promised / self.measured.loss_gap
        for budget in ({**asked, "loss_gap": aim}, {"loss_gap": aim}):
            try:
                found = self.solve(budget)
            except PlanError:
                continue
            if found.chosen != self.chosen:
                return found
        return None

    def frontier(self, points: int = _FRONTIER) -> list[Predicted]:
        """Predictions of the plans that have the least loss gap within budgets of time, from least time to most."""
        least, most = self._choice.least("time"), 1.0
        steps = [least + (most - least) * place / max(points - 1, 1) for place in range(points)]
        found = [self._choice.solved({"time": step * (1 + 1e-9)}).formats for step in steps]
        return [self._choice.predicted(each) for each in dict.fromkeys(found)]

    def plot(self, ax: Any = None) -> Any:
        """Draws what each layer and format would save against what it would do to the loss, and the frontier.

        Args:
            ax: Two axes to draw in; by default those of a new figure.

        Returns:
            The figure and the two axes.

        Raises:
            SupportError: matplotlib is not installed.
        """
        rows, reference = self.rows, self.sensitivities.reference
        wide = {row["layer"]: row for row in rows if row["format"] == reference}
        points = [
            (wide[row["layer"]]["seconds"] - row["seconds"], row["sensitivity"], row["format"], row["chosen"])
            for row in rows
            if row["format"] != reference
        ]
        frontier = [(each.seconds, each.loss_gap or 0.0) for each in self.frontier()]
        marked = {"this plan": self.predicted, "uniform": self.uniform, reference: self.reference}
        marks = [(name, each.seconds, each.loss_gap or 0.0) for name, each in marked.items()]
        return draw_plan(points, frontier, marks, ax)

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a file, all or nothing: YAML where its name ends so, else JSON."""
        data = {
            "model": self.model,
            "policy": self.policy.to_dict(),
            "budget": None if self.budget is None else dict(self.budget),
            "predicted": asdict(self.predicted),
            "measured": None if self.measured is None else asdict(self.measured),
            "how": self.how,
            "formats": list(self.formats),
            "chosen": list(self.chosen),
            "sensitivities": self.sensitivities.to_dict(),
            "costs": self.costs.to_dict(),
            "outline": [asdict(each) for each in self.outline],
        }
        write_plan(path, data)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "PrecisionPlan":
        """Reads :meth:`to_file`.

        Raises:
            PlanError: The file cannot be read, or holds no plan.
        """
        data = read_plan(path)
        try:
            sensitivities, costs = Sensitivities.from_dict(data["sensitivities"]), Costs.from_dict(data["costs"])
            policy = PrecisionPolicy.from_dict(data["policy"])
            outline = tuple(LayerOutline(**each) for each in data["outline"])
            measured = None if data["measured"] is None else Measured(**data["measured"])
            chosen, formats = tuple(data["chosen"]), tuple(data["formats"])
            budget = check_budget(data["budget"])
            plan = cls(
                sensitivities, costs, outline, data["model"], formats, budget, chosen, data["how"], policy, measured
            )
            is_whole = not layers_off(policy, stand_in_of(outline), plan.layer_formats) and all(
                format in plan._choice.offered(place) for place, format in enumerate(chosen)
            )
        except (PlanError, PolicyError, LookupError, ValueError) as error:
            raise PlanError(f"{os.fspath(path)} holds a damaged plan ({error}); write it again") from error
        if not is_whole or len(chosen) != len(sensitivities.variables):
            raise PlanError(f"{os.fspath(path)} holds a damaged plan: its policy is not what it chose; write it again")
        return plan

    def __str__(self) -> str:
        """What is promised, a table with the layers that matter first, and the policy."""
        return plan_table(self)

    def __repr__(self) -> str:
        """Short, because pytest and debuggers print it."""
        return f"<PrecisionPlan of {self.model} for {self.costs.device}, {len(self.chosen)} variables>"

    @cached_property
    def _choice(self) -> Choice:
        return Choice(self.sensitivities, self.costs, self.formats)

    def _with(self, chosen: tuple[str, ...], budget: Budget | None, how: str) -> "PrecisionPlan":
        layers = _by_layer(self.sensitivities, chosen, self.outline)
        policy = folded_policy(stand_in_of(self.outline), layers)
        return replace(self, chosen=chosen, budget=budget, how=how, policy=policy, measured=None)


def as_plan(plan: object) -> PrecisionPlan | None:
    """The plan that a user means by a plan, the path of its file, or None.

    Raises:
        PlanError: It is none of these, or cannot be read.
    """
    if plan is None or isinstance(plan, PrecisionPlan):
        return plan
    if isinstance(plan, (str, os.PathLike)):
        return PrecisionPlan.from_file(plan)
    raise PlanError(f"plan is a {type(plan).__name__}; give a PrecisionPlan, the path of its file, or None")


def _by_layer(sensitivities: Sensitivities, chosen: Sequence[str], outline: Sequence[LayerOutline]) -> dict[str, str]:
    """The format of each layer: what is in fp64 stays there, and what is in no variable has the reference's."""
    known = {name: chosen[place] for name, place in sensitivities.variable_of.items()}
    first = {each.name: each.first_name for each in outline}
    known = {first.get(name, name): format for name, format in known.items()}
    known |= {each.first_name: "fp64" for each in outline if each.stays_wide}
    own = [each.name for each in outline if each.has_forward and each.name == each.first_name]
    return {name: known.get(name, sensitivities.reference) for name in own}
