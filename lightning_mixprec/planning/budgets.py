"""What a user asks of a plan, as the solver takes it: budgets, the objective, and what is least reachable.

Costs are as a user says them: time and memory as shares of all in the reference, arithmetic as a share of the flops.
What does not depend on formats is a variable with one option.

The solver adds up, and what is predicted of a step is no sum (``Costs.of_step``). So what was chosen is predicted, and
the solver is asked again, with the bounds of its sums moved, until the prediction keeps what was asked.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from lightning_mixprec.errors import PlanError
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.planning.cost import Costs, Handover, Predicted
from lightning_mixprec.planning.sensitivity import Border, Sensitivities
from lightning_mixprec.planning.solver import Meeting, Option, Problem, Solution, solve
from lightning_mixprec.policy.rules import did_you_mean

BUDGETS = ("loss_gap", "time", "memory", "low_precision_share")
"""The keys of a budget."""

Budget = Mapping[str, float]

_OF_A_STEP = ("time", "memory")
"""The costs whose prediction is no sum."""

_ROUNDS = 6
"""How often the solver is asked, at most, until what is predicted keeps a budget."""

_CHANGES = 20_000
"""How many changes of a choice are predicted, at most, times the variables there are: a second or two."""

_SLACK = 1e-9
"""The share by which a prediction may exceed its budget, which sums of rounded numbers do."""

_ROOM = 1e-3
"""The share of a budget for which the solver is asked once more."""


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
        how: ``"milp"`` or ``"greedy"``; ``"uniform"`` if one format wherever it can be is best.
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
        layers = dict.fromkeys(costs.layers, reference)
        wide, self._wide = costs.predicted(layers), costs.of_step(layers)
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
        return self._all_in(next(iter(halves or low), self._sensitivities.reference))

    def _all_in(self, wanted: str) -> tuple[str, ...]:
        """A format, where it can be used."""
        offered = map(self.offered, range(len(self._variables)))
        return tuple(wanted if wanted in each else self._sensitivities.reference for each in offered)

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
        found = self._within(least, then, at_most)
        if found is None:
            raise self._unreachable(budget or {})
        if not at_most.keys().isdisjoint(_OF_A_STEP):
            found = self._improved(found, at_most)
        return Chosen(self._named(found), found.how)

    def predicted(self, chosen: Sequence[str]) -> Predicted:
        """What is predicted of a step.

        Args:
            chosen: The format of each variable.
        """
        formats = self._by_layer(chosen)
        gap = math.sqrt(max(self._sensitivities.squared_gap(formats), 0.0))
        return replace(self._costs.of_step(formats), loss_gap=gap)

    def _by_layer(self, chosen: Sequence[str]) -> dict[str, str]:
        formats = dict.fromkeys(self._costs.layers, self._sensitivities.reference)
        return formats | {name: chosen[place] for name, place in self._sensitivities.variable_of.items()}

    def least(self, cost: str) -> float:
        """The least of a cost that is reached; time and memory as shares of the reference's."""
        return self._reached(solve(self._problem(cost, {})), [cost])[cost]

    def _named(self, found: Solution) -> tuple[str, ...]:
        return tuple(each[place].format for each, place in zip(self._variables, found.chosen, strict=False))

    def _reached(self, found: Solution, costs: Iterable[str]) -> dict[str, float]:
        """What costs come to in a solution: what is predicted of its step, and the sums of the others."""
        step = self.predicted(self._named(found))
        shares = {
            "time": step.seconds / (self._wide.seconds or 1.0),
            "memory": step.memory_bytes / (self._wide.memory_bytes or 1.0),
        }
        return {cost: shares[cost] if cost in shares else self._sum(cost, found) for cost in costs}

    def _places(self, formats: Sequence[str]) -> tuple[int, ...]:
        """The options of some formats, and of the rest."""
        variables = zip(self._variables, formats, strict=True)
        return (*([each.format for each in options].index(format) for options, format in variables), 0)

    def _sum(self, cost: str, found: Solution) -> float:
        return self._problem(cost, {}).total(cost, found.chosen)

    def _within(self, least: str, then: str, at_most: Mapping[str, float]) -> Solution | None:
        """The best solution within bounds, of those that the solver was asked for and uniform ones; None if none is.

        The bound of a sum begins as what is asked. Then it is what is asked by the ratio of sum and prediction in the
        solution before: this excludes one that exceeds what is asked, and makes room where one is below it. Where
        nothing keeps the sums' bounds, that ratio is the one of the least sum.
        """
        asked = {cost: at_most[cost] for cost in _OF_A_STEP if cost in at_most}
        if not asked:
            return _solved(self._problem(least, at_most), then)
        others = {cost: most for cost, most in at_most.items() if cost not in asked}
        uniform = [Solution(self._places(self._all_in(each)), {}, "uniform") for each in self._formats]
        kept = [each for each in uniform if self._keeps(each, at_most)]
        bounds, has_least = dict(at_most), False
        for _ in range(_ROUNDS):
            found = [_solved(self._problem(least, bounds), then)]
            if found == [None] and not has_least:
                has_least = True
                found = [_solved(self._problem(cost, others), least) for cost in asked]
            moved, is_kept = dict[str, float](), False
            for each in filter(None, found):
                reached, is_kept = self._reached(each, asked), self._keeps(each, asked)
                kept += [each] if is_kept else []
                moved |= {cost: asked[cost] * self._sum(cost, each) / (reached[cost] or 1.0) for cost in asked}
            if not moved or (is_kept and all(moved[cost] <= bounds[cost] * (1 + _ROOM) for cost in asked)):
                break
            bounds |= moved
        return min(kept, key=lambda each: self._sum(least, each), default=None)

    def _keeps(self, found: Solution, at_most: Mapping[str, float]) -> bool:
        reached = self._reached(found, at_most)
        return all(reached[cost] <= most + abs(most) * _SLACK for cost, most in at_most.items())

    def _improved(self, found: Solution, at_most: Mapping[str, float]) -> Solution:
        """A solution with less loss within the same bounds, by changes of one variable or of two, the best first."""
        left = _CHANGES // len(self._variables)
        moves = iter(self._moves(found.chosen, left))
        while left > 0 and (move := next(moves, None)) is not None:
            left -= 1
            chosen = list(found.chosen)
            for place, option in move:
                chosen[place] = option
            changed = replace(found, chosen=tuple(chosen))
            if self._sum("loss", changed) < self._sum("loss", found) and self._keeps(changed, at_most):
                found, moves = changed, iter(self._moves(changed.chosen, left))
        return found

    def _moves(self, chosen: Sequence[int], most: int) -> list[tuple[tuple[int, int], ...]]:
        """Changes of one variable, and where there are not too many of two, by how much loss they save."""
        adds = {
            (place, option): each.costs["loss"] - options[chosen[place]].costs["loss"]
            for place, options in enumerate(self._variables)
            for option, each in enumerate(options)
            if option != chosen[place]
        }
        saving, adding = ([move for move, added in adds.items() if (added < 0) == is_less] for is_less in (True, False))
        found: dict[tuple[tuple[int, int], ...], float] = {(move,): adds[move] for move in saving}
        if len(saving) * len(adding) <= most:
            pairs = [(one, other) for one in saving for other in adding if one[0] != other[0]]
            found |= {pair: added for pair in pairs if (added := adds[pair[0]] + adds[pair[1]]) < 0}
        return sorted(found, key=found.__getitem__)

    def _squared_gap(self, formats: Sequence[str]) -> float:
        return self._sensitivities.squared_gap(self._by_layer(formats))

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

    def _made_meetings(self) -> Iterator[Meeting]:
        """What borders cost, by two variables: for all that one hands to the other, and where one is around it."""
        between: dict[tuple[int, int], list[Handover | Border]] = {}
        borders: list[Handover | Border] = [*self._costs.handovers, *self._sensitivities.borders]
        for each in borders:
            ends = (each.first, each.second) if isinstance(each, Handover) else (each.inner, each.outer)
            first, second = (self._sensitivities.variable_of.get(name, len(self._variables)) for name in ends)
            if first != second:
                between.setdefault((first, second), []).append(each)
        for places, met in between.items():
            costs: dict[tuple[str, str], dict[str, float]] = {}
            for formats in product(*map(self._formats_at, places)):
                found = self._met(met, *formats)
                if any(found.values()):
                    named = [
                        "" if place == len(self._variables) else each
                        for place, each in zip(places, formats, strict=True)
                    ]
                    costs[named[0], named[1]] = found
            if costs:
                yield Meeting(*places, costs)

    def _met(self, borders: Sequence[Handover | Border], first: str, second: str) -> dict[str, float]:
        """What borders between two formats come to."""
        casts = [self._costs.handover_cost(each, first, second) for each in borders if isinstance(each, Handover)]
        losses = [self._sensitivities.border_loss(each, first, second) for each in borders if isinstance(each, Border)]
        return {
            "time": math.fsum(cast.get("time", 0.0) for cast in casts) / self._seconds,
            "memory": math.fsum(cast.get("memory", 0.0) for cast in casts) / self._bytes,
            "loss": math.fsum(losses),
        }

    def _formats_at(self, place: int) -> tuple[str, ...]:
        return self.offered(place) if place < len(self._variables) else (self._sensitivities.reference,)

    def _problem(self, least: str, at_most: Mapping[str, float]) -> Problem:
        return Problem([*self._variables, self._rest], self._meetings, least=least, at_most=at_most)

    def _unreachable(self, budget: Budget) -> PlanError:
        """The error that says what of a budget cannot be reached, and what can."""
        asked = {key: _as_cost((key, value)) for key, value in budget.items()}
        beyond = [
            _said(key, budget[key], least)
            for key, (cost, most) in asked.items()
            if (least := self.least(cost)) > most + abs(most) * _SLACK
        ]
        if beyond:
            return PlanError(f"{'; '.join(beyond)}, or offer narrower formats")
        all_asked = " and ".join(f"{key} {value:g}" for key, value in budget.items())
        told = []
        for key, (cost, _) in asked.items():
            others = dict(each for name, each in asked.items() if name != key)
            if (found := self._within(cost, "loss", others)) is not None:
                told.append(_reachable(key, self._reached(found, [cost])[cost], key))
        way_out = (
            f"where the others are kept, {', and '.join(told)}; go to that with one of them" if told else "drop one"
        )
        return PlanError(f"no choice of formats keeps {all_asked} at once, though each alone can be: {way_out}")


def _solved(problem: Problem, then: str) -> Solution | None:
    """The solution of a problem; None if there is none."""
    try:
        return solve(problem, then=then)
    except PlanError:
        return None


def _as_cost(item: tuple[str, float]) -> tuple[str, float]:
    """A budget as the solver's cost and its bound."""
    key, value = item
    if key == "loss_gap":
        return "loss", value**2
    return ("wide", 1 - value) if key == "low_precision_share" else (key, value)


def _said(key: str, asked: float, least: float) -> str:
    """What cannot be kept, what can, and in which direction that is."""
    if key == "low_precision_share":
        return f"a {key} of {asked:g} cannot be reached: {_reachable(key, least)}; lower it to that"
    of = "" if key == "loss_gap" else " of the reference's"
    return f"a {key} of {asked:g}{of} cannot be kept: {_reachable(key, least)}; raise it to that"


def _reachable(key: str, least: float, what: str = "reachable") -> str:
    """The least of a cost in a user's units, rounded so that it can be reached."""
    if key == "low_precision_share":
        return f"the largest {what} is {_rounded(max(1 - least, 0.0), down=True):g}"
    value = math.sqrt(max(least, 0.0)) if key == "loss_gap" else least
    return f"the least {what} is {_rounded(value, down=False):g}"


def _rounded(value: float, *, down: bool) -> float:
    """Three digits, not above or not below."""
    if not value:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 2)
    return (math.floor(value / unit * (1 + _SLACK)) if down else math.ceil(value / unit * (1 - _SLACK))) * unit
