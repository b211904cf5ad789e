"""What a user asks of a plan, as the solver takes it: budgets, the objective, and what is least reachable.

Costs are as a user says them: time and memory as shares of all in the reference, arithmetic as a share of the flops.
What does not depend on formats is a variable with one option.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_mixprec.errors import PlanError
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.planning.cost import Costs
from lightning_mixprec.planning.sensitivity import Sensitivities
from lightning_mixprec.planning.solver import Meeting, Option, Problem, solve
from lightning_mixprec.policy.rules import did_you_mean

BUDGETS = ("loss_gap", "time", "memory", "low_precision_share")
"""The keys of a budget."""

Budget = Mapping[str, float]


def check_budget(budget: object) -> dict[str, float] | None:
    """A budget that was checked.

    Raises:
        PlanError: It is no mapping of budgets, or a value makes no sense.

    >>> check_budget({"time": 0.7})
    {'time': 0.7}
    >>> check_budget({"tme": 0.7})
    Traceback (most recent call last):
    lightning_mixprec.errors.PlanError: budget has the key 'tme', did you mean time? ...
    """
    if budget is None:
        return None
    if not isinstance(budget, Mapping) or not budget:
        raise PlanError(f"budget is {budget!r}; give a mapping such as {{'time': 0.7}}, with any of {_KEYS}, or None")
    for key, value in budget.items():
        if key not in BUDGETS:
            raise PlanError(f"budget has the key {key!r}{did_you_mean(str(key), BUDGETS)} the keys are {_KEYS}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise PlanError(f"budget {key} is {value!r}; it has to be a number that is not negative")
        if key == "low_precision_share" and value > 1:
            raise PlanError(f"budget low_precision_share is {value!r}; a share is between 0 and 1")
    return {key: float(budget[key]) for key in BUDGETS if key in budget}


_KEYS = ", ".join(BUDGETS)


@dataclass(frozen=True)
class Chosen:
    """What was chosen.

    Attributes:
        formats: The format of each variable.
        how: ``"milp"`` or ``"greedy"``.
    """

    formats: tuple[str, ...]
    how: str


class Choice:
    """The problem of choosing a format for each variable, asked with one budget or another.

    Args:
        sensitivities: What formats do to the loss.
        costs: What they take.
        formats: Those that are offered, the reference not included.
    """

    def __init__(self, sensitivities: Sensitivities, costs: Costs, formats: Sequence[str]) -> None:
        self._sensitivities, self._costs, self._formats = sensitivities, costs, tuple(formats)
        reference = sensitivities.reference
        everywhere = {layer: reference for layers in sensitivities.variables for layer in layers}
        wide = costs.predicted(dict.fromkeys(costs.layers, reference) | everywhere)
        self.reference = wide
        self._seconds, self._bytes = wide.seconds or 1.0, wide.memory_bytes or 1.0
        flops = sum(by_format[reference].flops for by_format in costs.layers.values())
        self._flops, self._has_products = flops or 1.0, flops > 0
        self._variables = [self._options(place) for place in range(len(sensitivities.variables))]
        self._meetings = list(self._made_meetings())
        fixed = {"time": costs.fixed_seconds / self._seconds, "memory": costs.fixed_bytes / self._bytes}
        self._rest = [self._rest_of(fixed)]

    def offered(self, place: int) -> tuple[str, ...]:
        """The formats that a variable may have, the reference first."""
        offers, reference = self._sensitivities.offers[place], self._sensitivities.reference
        timed = [self._costs.layers.get(name, offers) for name in self._sensitivities.variables[place]]
        usable = [each for each in self._formats if each in offers and not offers[each].problem]
        return reference, *(each for each in usable if each != reference and all(each in costs for costs in timed))

    def uniform(self) -> tuple[str, ...]:
        """The formats under the uniform 16-bit policy: the first offered one, where it can be used."""
        halves = [each for each in self._formats if get_format(each).is_half]
        low = [each for each in self._formats if get_format(each).is_low_precision]
        wanted = next(iter(halves or low), self._sensitivities.reference)
        return tuple(
            wanted if wanted in self.offered(place) else self._sensitivities.reference
            for place in range(len(self._variables))
        )

    def solved(self, budget: Budget | None) -> Chosen:
        """The choice with the least loss gap within a budget; where only a loss gap is said, with the least time.

        Without a budget: the least time at no more loss gap than under the uniform 16-bit policy.

        Raises:
            PlanError: Nothing is within the budget; one line that says what is least reachable.
        """
        if budget and budget.get("low_precision_share") and not self._has_products:
            raise PlanError(
                "low_precision_share is a share of the matrix products' flops, and the model has none; leave it out of "
                "the budget, or give time or memory"
            )
        at_most = {"loss": self._squared_gap(self.uniform())} if budget is None else dict(map(_as_cost, budget.items()))
        is_of_loss = budget is None or budget.keys() == {"loss_gap"}
        least, then = ("time", "loss") if is_of_loss else ("loss", "time")
        try:
            found = solve(self._problem(least, at_most), then=then)
        except PlanError:
            raise self._unreachable(budget or {}) from None
        count = len(self._variables)
        formats = tuple(self._variables[place][found.chosen[place]].format for place in range(count))
        return Chosen(formats, found.how)

    def least(self, cost: Literal["time", "memory"]) -> float:
        """The least of a cost that can be reached, as a share of the reference's."""
        return solve(self._problem(cost, {})).totals[cost]

    def _squared_gap(self, formats: Sequence[str]) -> float:
        offers = self._sensitivities.offers
        return math.fsum(
            offer.sensitivity
            for place, format in enumerate(formats)
            if (offer := offers[place].get(format)) is not None
        )

    def _options(self, place: int) -> list[Option]:
        layers, offers = self._sensitivities.variables[place], self._sensitivities.offers[place]
        options = []
        for format in self.offered(place):
            loss = offers[format].sensitivity if format in offers else 0.0
            costs = self._taken(layers, format)
            options.append(Option(format, {"loss": loss, **costs}))
        return options

    def _taken(self, layers: Sequence[str], format: str) -> dict[str, float]:
        taken = [self._costs.layers[name][format] for name in layers if name in self._costs.layers]
        flops = sum(each.flops for each in taken) / self._flops
        return {
            "time": sum(each.seconds for each in taken) / self._seconds,
            "memory": sum(each.weight_bytes + each.saved_bytes for each in taken) / self._bytes,
            "wide": 0.0 if get_format(format).is_low_precision else flops,
        }

    def _rest_of(self, fixed: Mapping[str, float]) -> Option:
        """What does not depend on formats, and layers that are in no variable: they stay in the reference."""
        known = set(self._sensitivities.variable_of)
        others = self._taken([name for name in self._costs.layers if name not in known], self._sensitivities.reference)
        return Option("", {cost: others[cost] + fixed.get(cost, 0.0) for cost in others})

    def _made_meetings(self) -> Any:
        """What borders cost, by two variables, for all that one hands to the other."""
        place_of, reference = self._sensitivities.variable_of, len(self._variables)
        between: dict[tuple[int, int], list[Any]] = {}
        for each in self._costs.handovers:
            places = place_of.get(each.first, reference), place_of.get(each.second, reference)
            if places[0] != places[1]:
                between.setdefault(places, []).append(each)
        for (first, second), handovers in between.items():
            costs: dict[tuple[str, str], dict[str, float]] = {}
            for one in self._formats_at(first):
                for other in self._formats_at(second):
                    casts = [self._costs.handover_cost(each, one, other) for each in handovers]
                    time, memory = (math.fsum(cast.get(key, 0.0) for cast in casts) for key in ("time", "memory"))
                    if time or memory:
                        pair = tuple("" if at == reference else each for at, each in ((first, one), (second, other)))
                        costs[pair] = {"time": time / self._seconds, "memory": memory / self._bytes}  # type: ignore[index]
            if costs:
                yield Meeting(first, second, costs)

    def _formats_at(self, place: int) -> tuple[str, ...]:
        return self.offered(place) if place < len(self._variables) else (self._sensitivities.reference,)

    def _problem(self, least: str, at_most: Mapping[str, float]) -> Problem:
        return Problem([*self._variables, self._rest], self._meetings, least=least, at_most=at_most)

    def _unreachable(self, budget: Budget) -> PlanError:
        """The error that says what of a budget cannot be reached, each part alone."""
        beyond = []
        for key, asked in budget.items():
            cost, bound = _as_cost((key, asked))
            least = solve(self._problem(cost, {})).totals[cost]
            if least > bound * (1 + 1e-9):
                beyond.append(_said(key, asked, least))
        if beyond:
            return PlanError(f"{'; '.join(beyond)}; ask for less, or offer narrower formats")
        all_asked = " and ".join(f"{key} {value:g}" for key, value in budget.items())
        return PlanError(f"no choice of formats keeps {all_asked} at once, though each alone can be; ask for less")


def _as_cost(item: tuple[str, float]) -> tuple[str, float]:
    """A budget as the solver's cost and its bound."""
    key, value = item
    if key == "loss_gap":
        return "loss", value**2
    return ("wide", 1 - value) if key == "low_precision_share" else (key, value)


def _said(key: str, asked: float, least: float) -> str:
    if key == "loss_gap":
        return f"a loss gap of {asked:g} cannot be kept: the least reachable is {math.sqrt(max(least, 0.0)):.3g}"
    if key == "low_precision_share":
        return f"a low_precision_share of {asked:g} cannot be reached: the largest reachable is {1 - least:.3g}"
    return f"a {key} of {asked:g} of the reference's cannot be kept: the least reachable is {least:.3g}"
