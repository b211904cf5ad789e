"""The choice of one option for each variable: least of one cost, within budgets of others.

A variable is a set of layers that move together, an option a format for them, and its costs what the format does to the
loss, to time, to memory. Costs add up, over variables and over the places where two of them meet in different formats.
With scipy the relaxation of a mixed-integer linear programme (HiGHS) says how good a choice can be at most. It is
rounded and mended; where that, or a greedy search, is not as good as the bound, the programme itself is solved, for a
few seconds. Without scipy there is the greedy search alone.
"""

import heapq
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

from lightning_mixprec.errors import PlanError

_SLACK = 1e-9
"""The share by which a total may exceed its budget, which sums of rounded numbers do."""

_BOUND = 1e4
"""What the bound of the relaxation is scaled to: HiGHS ends at an absolute gap of 1e-6, whatever the costs are."""

_GAP = 1e-3
"""The relative gap at which a solution is good enough."""

_SECONDS = 2.0
"""The time that HiGHS has to find a better choice than those that are known: 1,000 layers are solved in 5 s."""

_SECONDS_FOR_ANY = 20.0
"""The time that it has to find one that keeps the budgets at all."""


@dataclass(frozen=True)
class Option:
    """A format that a variable may have.

    Attributes:
        format: Its name.
        costs: What it costs, by the name of the cost; 0 where it is not said.
    """

    format: str
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Meeting:
    """Two variables of which one hands its output to the other.

    Attributes:
        first: The place of the one among the variables.
        second: The place of the other.
        costs: By their two formats, what it costs that these meet; nothing where they are missing.
    """

    first: int
    second: int
    costs: Mapping[tuple[str, str], Mapping[str, float]]


@dataclass(frozen=True)
class Problem:
    """Variables, by their places, each with its options; what the meetings of them cost; and what is asked for.

    Attributes:
        variables: The options of each variable, one at least.
        meetings: Where formats may meet.
        least: The name of the cost that is to be least.
        at_most: The budgets: by the name of a cost, what its total may be.
    """

    variables: Sequence[Sequence[Option]]
    meetings: Sequence[Meeting] = ()
    least: str = "loss"
    at_most: Mapping[str, float] = field(default_factory=dict)

    def total(self, cost: str, chosen: Sequence[int]) -> float:
        """The total of a cost, of options by their places."""
        options = [options[place] for options, place in zip(self.variables, chosen, strict=True)]
        own = math.fsum(option.costs.get(cost, 0.0) for option in options)
        return own + math.fsum(
            meeting.costs.get((options[meeting.first].format, options[meeting.second].format), {}).get(cost, 0.0)
            for meeting in self.meetings
        )

    def is_within(self, chosen: Sequence[int]) -> bool:
        """True if all budgets are kept."""
        return all(self.total(cost, chosen) <= most + abs(most) * _SLACK for cost, most in self.at_most.items())


@dataclass(frozen=True)
class Solution:
    """A choice within the budgets.

    Attributes:
        chosen: For each variable the place of its option.
        totals: The totals of the cost that is least and of those with a budget, added up from the choice.
        how: ``"milp"`` or ``"greedy"``: whether scipy's programme or the greedy search found it.
        gap: The share of the least total by which it may be above the best there is, at most; None if nobody knows.
    """

    chosen: tuple[int, ...]
    totals: Mapping[str, float]
    how: str
    gap: float | None = None


def solve(problem: Problem, *, exactly: bool | None = None, then: str | None = None) -> Solution:
    """The choice with the least total of one cost within the budgets, or the best that was found.

    Args:
        problem: The problem.
        exactly: Whether scipy is used; None for if it is installed.
        then: Another cost, which is made less, one variable after the other, where the first stays what it is.

    Raises:
        PlanError: No choice keeps the budgets; the message says what the least reachable is.

    >>> wide, narrow = Option("fp32", {"loss": 0.0, "time": 3.0}), Option("bf16", {"loss": 0.1, "time": 1.0})
    >>> solve(Problem([[wide, narrow]] * 3, at_most={"time": 6.0})).totals
    {'loss': 0.2, 'time': 5.0}
    """
    has_scipy = importlib.util.find_spec("scipy") is not None if exactly is None else exactly
    found: list[tuple[tuple[int, ...], str]] = [(_greedy(problem), "greedy")]
    bound: float | None = None
    if has_scipy:
        better, bound = _by_programme(problem, found[0][0])
        found = [*((each, "milp") for each in better), *found]
    within = [(chosen, how) for chosen, how in found if chosen and problem.is_within(chosen)]
    if not within:
        raise PlanError(_unreachable(problem, has_scipy))
    chosen, how = min(within, key=lambda each: problem.total(problem.least, each[0]))
    if then is not None:
        bounds = {**problem.at_most, problem.least: problem.total(problem.least, chosen)}
        walk = _Walk(replace(problem, least=then, at_most=bounds), chosen)
        _improve(walk)
        chosen = tuple(walk.chosen)
    totals = {cost: problem.total(cost, chosen) for cost in (problem.least, *problem.at_most)}
    return Solution(chosen, totals, how, None if bound is None else _gap(totals[problem.least], bound))


def _gap(total: float, bound: float) -> float:
    """How much of a total is above a bound."""
    return max(total - bound, 0.0) / abs(total) if total else 0.0


def _unreachable(problem: Problem, has_scipy: bool) -> str:
    """Why nothing was found: of each budget alone the least that can be reached."""
    beyond = []
    for cost, most in problem.at_most.items():
        alone = Problem(problem.variables, problem.meetings, least=cost)
        greedy = _greedy(alone)
        tried = [greedy, *(_by_programme(alone, greedy)[0] if has_scipy else [])]
        reached = min(problem.total(cost, chosen) for chosen in tried)
        if reached > most + abs(most) * _SLACK:
            beyond.append(f"{cost} at most {most:g}, where the least that can be reached is {reached:g}")
    if beyond:
        return f"no choice of formats keeps {'; nor '.join(beyond)}; raise the budget, or offer narrower formats"
    asked = " and ".join(f"{cost} at most {most:g}" for cost, most in problem.at_most.items())
    return f"no choice of formats keeps {asked} at once, though each alone can be kept; raise one of the budgets"


class _Walk:
    """A choice that changes by one variable at a time, with totals that follow.

    Args:
        problem: The problem.
        chosen: The choice to begin with.
    """

    def __init__(self, problem: Problem, chosen: Sequence[int]) -> None:
        self.problem, self.chosen = problem, list(chosen)
        self.costs = (problem.least, *problem.at_most)
        self.totals = {cost: problem.total(cost, chosen) for cost in self.costs}
        self._meetings: dict[int, list[Meeting]] = {}
        for meeting in problem.meetings:
            for place in {meeting.first, meeting.second}:
                self._meetings.setdefault(place, []).append(meeting)

    def moves_of(self, variable: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Every change of one variable: the option's place, and what it adds to the totals."""
        now = self._costs_of(variable, self.chosen[variable])
        for place in range(len(self.problem.variables[variable])):
            if place != self.chosen[variable]:
                then = self._costs_of(variable, place)
                yield place, {cost: then[cost] - now[cost] for cost in self.costs}

    def take(self, variable: int, place: int, adds: Mapping[str, float]) -> set[int]:
        """Takes a move; the variables whose moves add something else from now on."""
        self.chosen[variable] = place
        for cost, added in adds.items():
            self.totals[cost] += added
        met = {place for meeting in self._meetings.get(variable, ()) for place in (meeting.first, meeting.second)}
        return met | {variable}

    def exceeded(self, adds: Mapping[str, float] | None = None) -> tuple[str, ...]:
        """The budgets that are exceeded, or would be after a move."""
        return tuple(
            cost
            for cost, most in self.problem.at_most.items()
            if self.totals[cost] + (adds[cost] if adds else 0.0) > most + abs(most) * _SLACK
        )

    def excess(self, adds: Mapping[str, float] | None = None) -> float:
        """By how much budgets are exceeded, or would be after a move, each as a share of itself."""
        over = 0.0
        for cost, most in self.problem.at_most.items():
            over += max(0.0, self.totals[cost] + (adds[cost] if adds else 0.0) - most) / (abs(most) or 1.0)
        return over

    def _costs_of(self, variable: int, place: int) -> dict[str, float]:
        option = self.problem.variables[variable][place]
        costs = {cost: option.costs.get(cost, 0.0) for cost in self.costs}
        for meeting in self._meetings.get(variable, ()):
            first, second = (
                option.format if at == variable else self.problem.variables[at][self.chosen[at]].format
                for at in (meeting.first, meeting.second)
            )
            for cost, added in meeting.costs.get((first, second), {}).items():
                if cost in costs:
                    costs[cost] += added
        return costs


def _greedy(problem: Problem) -> tuple[int, ...]:
    """What is least for each variable alone, brought within the budgets, then made less as long as it stays there."""
    starts = [
        min(range(len(options)), key=lambda place: options[place].costs.get(problem.least, 0.0))
        for options in problem.variables
    ]
    return _mended(problem, starts)


def _mended(problem: Problem, chosen: Sequence[int]) -> tuple[int, ...]:
    """A choice brought within the budgets, and made less as long as it stays there."""
    walk = _Walk(problem, chosen)
    while (exceeded := walk.exceeded()) and _bring_within(walk, exceeded):
        pass
    _improve(walk)
    return tuple(walk.chosen)


def _bring_within(walk: _Walk, exceeded: tuple[str, ...]) -> bool:
    """Takes moves, those first that save the most for the least, while the same budgets are exceeded; False if none."""
    least, at_most = walk.problem.least, walk.problem.at_most
    waiting: list[tuple[float, int, int, int, dict[str, float]]] = []
    versions = [0] * len(walk.chosen)

    def offer(variable: int) -> None:
        for place, adds in walk.moves_of(variable):
            saved = -sum(adds[cost] / (abs(at_most[cost]) or 1.0) for cost in exceeded)
            if saved > 0:
                price = max(adds[least], 0.0) / saved
                heapq.heappush(waiting, (price, variable, place, versions[variable], adds))

    for variable in range(len(walk.chosen)):
        offer(variable)
    has_moved = False
    while waiting and walk.exceeded() == exceeded:
        _, variable, place, version, adds = heapq.heappop(waiting)
        if version != versions[variable] or walk.excess(adds) >= walk.excess():
            continue
        has_moved = True
        for changed in walk.take(variable, place, adds):
            versions[changed] += 1
            offer(changed)
    return has_moved


def _improve(walk: _Walk) -> None:
    """Takes moves that make the cost less and exceed no further budget, until there is none."""
    least, has_moved = walk.problem.least, True
    while has_moved:
        has_moved = False
        for variable in range(len(walk.chosen)):
            better = [
                (adds[least], place, adds)
                for place, adds in walk.moves_of(variable)
                if adds[least] < -abs(walk.totals[least]) * _SLACK and not walk.exceeded(adds)
            ]
            if better:
                _, place, adds = min(better, key=lambda each: each[:2])
                walk.take(variable, place, adds)
                has_moved = True


def _by_programme(problem: Problem, known: tuple[int, ...]) -> tuple[list[tuple[int, ...]], float | None]:
    """Choices by HiGHS, the better ones last, and the bound of the relaxation; none if there are none.

    Args:
        problem: The problem.
        known: A choice that is known.
    """
    programme, least = _Programme(problem), problem.least
    reached = problem.total(least, known) if problem.is_within(known) else math.inf
    guess = reached if 0 < reached < math.inf else programme.largest or 1.0
    relaxed = programme.run(_BOUND / guess, is_relaxed=True)
    if relaxed is None:
        return [], None
    bound = relaxed[0] * guess / _BOUND
    rounded = _mended(problem, programme.choice(relaxed[1]))
    if problem.is_within(rounded):
        reached = min(reached, problem.total(least, rounded))
    if reached < math.inf and _gap(reached, bound) <= _GAP:
        return [rounded], bound
    scale = _BOUND / (bound if bound > programme.largest * 1e-12 else programme.largest or 1.0)
    seconds = _SECONDS if reached < math.inf else _SECONDS_FOR_ANY
    solved = programme.run(scale, is_relaxed=False, seconds=seconds)
    return [rounded, *([programme.choice(solved[1])] if solved is not None else [])], bound


class _Programme:
    """A 0-1 column for each option, and for each meeting one for each two options, the share in which both hold.

    The shares of an option's pairs add up to its own column, on both sides of a meeting, which keeps the relaxation
    close.
    """

    def __init__(self, problem: Problem) -> None:
        import numpy
        from scipy.sparse import coo_array

        self._numpy, self._problem = numpy, problem
        self._starts = [0, *accumulate(len(options) for options in problem.variables)]
        self._count = self._starts[-1]
        costs: list[Mapping[str, float]] = [option.costs for options in problem.variables for option in options]
        entries: list[tuple[int, int, float]] = []
        sums: list[float] = []
        for first, end in pairwise(self._starts):
            entries += [(len(sums), column, 1.0) for column in range(first, end)]
            sums.append(1.0)
        for meeting in problem.meetings:
            sides = problem.variables[meeting.first], problem.variables[meeting.second]
            column = len(costs)
            costs += [meeting.costs.get((one.format, two.format), {}) for one in sides[0] for two in sides[1]]
            for side, place in enumerate((meeting.first, meeting.second)):
                for option in range(len(sides[side])):
                    step, begin = (1, option * len(sides[1])) if side == 0 else (len(sides[1]), option)
                    pairs = range(column + begin, column + begin + step * len(sides[1 - side]), step)
                    entries += [(len(sums), pair, 1.0) for pair in pairs]
                    entries.append((len(sums), self._starts[place] + option, -1.0))
                    sums.append(0.0)
        rows, columns, values = zip(*entries, strict=True)
        self._sums = numpy.array(sums)
        self._matrix = coo_array((values, (rows, columns)), shape=(len(sums), len(costs))).tocsr()
        self._costs = {
            cost: numpy.array([each.get(cost, 0.0) for each in costs]) for cost in (problem.least, *problem.at_most)
        }
        self.largest = float(abs(self._costs[problem.least]).max(initial=0.0))

    def run(self, scale: float, *, is_relaxed: bool, seconds: float = _SECONDS_FOR_ANY) -> tuple[float, Any] | None:
        """The least total, scaled, and the columns; None if no choice keeps the budgets, or none was found in time.

        Args:
            scale: What the costs to minimise are multiplied by.
            is_relaxed: Whether columns may be between 0 and 1.
            seconds: The time after which the best that was found is the answer.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        numpy, problem = self._numpy, self._problem
        constraints = [LinearConstraint(self._matrix, self._sums, self._sums)]
        for cost, most in problem.at_most.items():
            if math.isinf(most):
                continue
            unit = abs(most) or float(abs(self._costs[cost]).max(initial=0.0)) or 1.0
            constraints.append(LinearConstraint(self._costs[cost] / unit, -numpy.inf, most / unit))
        columns = self._matrix.shape[1]
        is_whole = numpy.arange(columns) < (0 if is_relaxed else self._count)
        result = milp(
            self._costs[problem.least] * (scale if self.largest else 1.0),
            integrality=is_whole.astype(int),
            bounds=Bounds(0.0, 1.0),
            constraints=constraints,
            options={"mip_rel_gap": _GAP, "time_limit": seconds},
        )
        return None if result.x is None else (float(result.fun), result.x)

    def choice(self, columns: Any) -> tuple[int, ...]:
        """The option of each variable whose column is largest."""
        return tuple(int(self._numpy.argmax(columns[first:end])) for first, end in pairwise(self._starts))
