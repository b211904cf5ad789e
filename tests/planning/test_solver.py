"""The choice of formats, against every choice there is, dynamic programming, and the bound of the relaxation."""

import itertools
import math
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mixprec.errors import PlanError
from lightning_mixprec.planning.solver import Meeting, Option, Problem, solve

FORMATS = ("fp32", "bf16", "fp16", "fp8")


def made(count, options, seed, *, size=1.0, border=0.0, budget=0.5):
    """A problem as planning has them: what is narrower is faster and loses more; neighbours meet at borders."""
    draw = random.Random(seed)
    variables = []
    for _ in range(count):
        loss, time = size * 10 ** draw.uniform(-4, 0), draw.uniform(0.5, 2)
        variables.append(
            [
                Option(
                    name, {"loss": loss * (4**k - 1) * draw.uniform(0.5, 1.5), "time": time / (1 + k), "memory": time}
                )
                for k, name in enumerate(FORMATS[:options])
            ]
        )
    pairs = {(one, two): {"time": border} for one in FORMATS for two in FORMATS if one != two}
    meetings = [Meeting(place, place + 1, pairs) for place in range(count - 1)] if border else []
    most = budget * sum(each[0].costs["time"] for each in variables)
    return Problem(variables, meetings, at_most={"time": most})


def every_choice(problem):
    return itertools.product(*(range(len(options)) for options in problem.variables))


def least_of_all(problem):
    return min(
        (problem.total(problem.least, each) for each in every_choice(problem) if problem.is_within(each)), default=None
    )


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 5),
    options=st.integers(1, 4),
    seed=st.integers(0, 1 << 30),
    size=st.sampled_from([1e-12, 1e-9, 1.0, 1e6]),
    border=st.sampled_from([0.0, 0.05, 0.5]),
    budget=st.floats(0.2, 1.2),
)
def test_it_is_as_good_as_the_best_of_all_choices(count, options, seed, size, border, budget):
    problem = made(count, options, seed, size=size, border=border, budget=budget)
    best = least_of_all(problem)
    if best is None:
        with pytest.raises(PlanError):
            solve(problem)
        return
    solution = solve(problem)
    assert problem.is_within(solution.chosen)
    assert solution.totals["loss"] == problem.total("loss", solution.chosen)
    assert solution.totals["loss"] <= best * 1.01 + 1e-300
    assert solution.totals["loss"] * (1 - solution.gap) <= best * (1 + 1e-6) + 1e-300  # the gap is no idle word


def test_with_eight_layers_and_four_formats_it_is_within_one_percent_of_the_best():
    problem = made(8, 4, seed=7, size=1e-9)
    assert solve(problem).totals["loss"] <= least_of_all(problem) * 1.01


def test_several_budgets_hold_at_once():
    problem = made(5, 4, seed=3)
    both = Problem(problem.variables, problem.meetings, at_most={**problem.at_most, "loss": 0.3})
    timed = Problem(both.variables, both.meetings, least="time", at_most={"loss": 0.3})
    best = min(timed.total("time", each) for each in every_choice(timed) if timed.is_within(each))
    assert math.isclose(solve(timed).totals["time"], best, rel_tol=0.01)
    if best <= problem.at_most["time"]:
        assert both.is_within(solve(both).chosen)


def by_dynamic_programming(problem, steps):
    """The least loss with whole-numbered times within a whole-numbered budget."""
    least = [0.0] * (steps + 1)
    for options in problem.variables:
        least = [
            min(
                (
                    least[left - int(option.costs["time"])] + option.costs["loss"]
                    for option in options
                    if option.costs["time"] <= left
                ),
                default=math.inf,
            )
            for left in range(steps + 1)
        ]
    return least[steps]


@pytest.mark.parametrize("seed", range(4))
def test_for_one_budget_it_is_as_good_as_dynamic_programming(seed):
    draw = random.Random(seed)
    variables = [
        [Option("fp32", {"loss": 0.0, "time": 9.0})]
        + [Option(name, {"loss": draw.random() * 1e-9, "time": draw.randint(1, 8)}) for name in FORMATS[1:]]
        for _ in range(60)
    ]
    problem = Problem(variables, at_most={"time": 240.0})
    best = by_dynamic_programming(problem, 240)
    assert best * (1 - 1e-9) <= solve(problem).totals["loss"] <= best * 1.01


def test_small_scores_are_not_taken_for_solved():
    """HiGHS ends at an absolute gap of 1e-6: scores of 1e-9 are all alike to it unless they are scaled."""
    problem = made(40, 4, seed=1, size=1e-10)
    large = made(40, 4, seed=1, size=1.0)
    assert math.isclose(solve(problem).totals["loss"] * 1e10, solve(large).totals["loss"], rel_tol=2e-3)


def test_borders_that_cost_keep_neighbours_together():
    """Alone each second layer would be narrow; where borders cost more than that saves, none is, or all are."""
    options = [
        [Option("fp32", {"time": 1.0}), Option("bf16", {"time": 0.9 if place % 2 else 1.1})] for place in range(6)
    ]
    pairs = {(one, two): {"time": 0.5} for one, two in (("fp32", "bf16"), ("bf16", "fp32"))}
    apart = Problem(options, least="time")
    joined = Problem(options, [Meeting(place, place + 1, pairs) for place in range(5)], least="time")
    assert solve(apart).chosen == (0, 1, 0, 1, 0, 1)
    assert set(solve(joined).chosen) in ({0}, {1})


def test_without_scipy_a_greedy_search_keeps_the_budgets_and_says_so():
    problem = made(200, 4, seed=5)
    greedy, exact = solve(problem, exactly=False), solve(problem)
    assert greedy.how == "greedy"
    assert problem.is_within(greedy.chosen)
    assert exact.totals["loss"] <= greedy.totals["loss"] <= exact.totals["loss"] * 1.1


@pytest.mark.parametrize("exactly", [True, False])
def test_a_budget_that_cannot_be_kept_is_answered_with_the_least_that_can_be_reached(exactly):
    problem = made(6, 3, seed=2)
    least = sum(min(option.costs["time"] for option in options) for options in problem.variables)
    tight = Problem(problem.variables, at_most={"time": least / 2, "loss": math.inf})
    with pytest.raises(
        PlanError, match=re.escape(f"time at most {least / 2:g}, where the least that can be reached is {least:g}")
    ):
        solve(tight, exactly=exactly)


@pytest.mark.parametrize("exactly", [True, False])
def test_budgets_that_exclude_one_another_are_told_as_such(exactly):
    options = [[Option("fp32", {"loss": 0.0, "time": 2.0}), Option("bf16", {"loss": 1.0, "time": 1.0})]]
    with pytest.raises(PlanError, match="at once, though each alone can be kept"):
        solve(Problem(options, at_most={"time": 1.5, "loss": 0.5}), exactly=exactly)


def test_nothing_that_costs_is_no_trouble():
    options = [[Option("fp32", {}), Option("bf16", {})]] * 3
    assert solve(Problem(options, at_most={"time": 0.0})).totals == {"loss": 0.0, "time": 0.0}


@pytest.mark.slow
def test_a_thousand_layers_are_solved_near_the_bound_of_the_relaxation():
    problem = made(1000, 4, seed=11, size=1e-9)
    solution = solve(problem)
    assert solution.how == "milp"
    assert solution.totals["loss"] <= _relaxed(problem) * 1.005


def best_of_a_chain(problem, weight):
    """The least of loss and weighed time over all choices for a chain of meetings, by dynamic programming."""
    between = {(meeting.first, meeting.second): meeting.costs for meeting in problem.meetings}

    def price(costs):
        return costs.get("loss", 0.0) + weight * costs.get("time", 0.0)

    least = [price(option.costs) for option in problem.variables[0]]
    for place, options in enumerate(problem.variables[1:], start=1):
        costs, before = between[place - 1, place], problem.variables[place - 1]
        least = [
            price(option.costs)
            + min(
                known + price(costs.get((other.format, option.format), {}))
                for other, known in zip(before, least, strict=True)
            )
            for option in options
        ]
    return min(least)


@pytest.mark.slow
@pytest.mark.parametrize("border", [0.02, 0.5])
def test_a_thousand_layers_with_borders_that_cost_take_less_than_five_seconds(border):
    """What is found is within one percent of a bound that dynamic programming gives, at whatever price of time."""
    problem = made(1000, 4, seed=1, size=1e-9, border=border, budget=0.6)
    start = time.process_time()
    solution = solve(problem)
    assert time.process_time() - start < 5
    assert problem.is_within(solution.chosen)
    prices = [1e-9 * 2.0**power for power in range(-12, 8)]
    bound = max(best_of_a_chain(problem, price) - price * problem.at_most["time"] for price in prices)
    assert bound <= solution.totals["loss"] * (1 + 1e-9)
    assert solution.gap <= 0.01
    assert solution.totals["loss"] * (1 - solution.gap) >= bound * 0.99


def test_what_costs_less_besides_is_taken_where_the_first_cost_stays():
    options = [[Option("fp32", {"loss": 0.0, "time": 2.0}), Option("bf16", {"loss": 0.0, "time": 1.0})]] * 4
    assert solve(Problem(options)).totals == {"loss": 0.0}
    assert solve(Problem(options), then="time").chosen == (1, 1, 1, 1)


def _relaxed(problem):
    """The bound by a linear programme of its own, of scaled losses."""
    from scipy.optimize import linprog

    flat = [option for options in problem.variables for option in options]
    owner = [place for place, options in enumerate(problem.variables) for _ in options]
    rows = [[float(owner[column] == place) for column in range(len(flat))] for place in range(len(problem.variables))]
    result = linprog(
        [option.costs["loss"] * 1e9 for option in flat],
        A_ub=[[option.costs["time"] for option in flat]],
        b_ub=[problem.at_most["time"]],
        A_eq=rows,
        b_eq=[1.0] * len(rows),
    )
    return result.fun / 1e9
