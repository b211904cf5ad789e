"""A plan from hand-made measurements: its budgets against every choice there is, its rows, its file, its table."""

import itertools
import json
import math
import random
import re
from dataclasses import replace

import pytest
from torch import nn

from lightning_mixprec.errors import PlanError
from lightning_mixprec.planning.cost import Costs, Handover, LayerCost
from lightning_mixprec.planning.plan import PrecisionPlan
from lightning_mixprec.planning.plan_files import Measured
from lightning_mixprec.planning.sensitivity import Offer, Sensitivities

FORMATS = ("bf16", "fp16", "fp32")
BITS = {"fp32": 4, "bf16": 2, "fp16": 2}


class Net(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(blocks))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(x)


def names_of(model):
    return [name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)]


def measured_of(model, seed=0, tied=("blocks.0.0", "head"), problem=None, inner=True):
    """Measurements as they are made of a model: in 16 bits all is faster and loses something.

    Layers around others have operations of their own, which casts what goes through them on its way; without them all
    that is predicted is a sum.
    """
    draw, names = random.Random(seed), names_of(model)
    names = [name for name in names if inner or not list(model.get_submodule(name).children())]
    variables = [tuple(name for name in names if name in tied), *((name,) for name in names if name not in tied)]
    variables = [each for each in variables if each]
    offers = [
        {
            "fp32": Offer(0.0),
            "bf16": Offer(10 ** draw.uniform(-8, -3)),
            "fp16": Offer(10 ** draw.uniform(-9, -5), problem if draw.random() < 0.3 else None),
        }
        for _ in variables
    ]
    layers = {}
    for name in names:
        time, size, flops = draw.uniform(1, 2), draw.uniform(1e3, 1e4), draw.uniform(0, 1e6)
        layers[name] = {each: LayerCost(time * bits / 4, size, size * bits / 4, flops) for each, bits in BITS.items()}
    handovers = tuple(Handover(one, other, 50.0) for one, other in itertools.pairwise(names))
    return Sensitivities(tuple(variables), tuple(offers), "fp32", 3), Costs("h100", layers, handovers, 0.5, 5e3, 1e-3)


def plan_of(model=None, budget=None, seed=0, problem=None):
    model = model or Net()
    return PrecisionPlan.of(model, *measured_of(model, seed, problem=problem), FORMATS, budget)


def every_plan(plan):
    """The predictions of all choices."""
    places = [plan._choice.offered(place) for place in range(len(plan.chosen))]
    return [plan._choice.predicted(chosen) for chosen in itertools.product(*places)]


def is_within(each, reference, budget):
    kept = {
        "loss_gap": each.loss_gap <= budget.get("loss_gap", math.inf) * (1 + 1e-6),
        "time": each.seconds <= budget.get("time", math.inf) * reference.seconds * (1 + 1e-6),
        "memory": each.memory_bytes <= budget.get("memory", math.inf) * reference.memory_bytes * (1 + 1e-6),
        "low_precision_share": each.low_precision_share >= budget.get("low_precision_share", 0) - 1e-6,
    }
    return all(kept.values())


BUDGETS = [
    {"time": 0.7},
    {"memory": 0.9},
    {"low_precision_share": 0.6},
    {"time": 0.8, "memory": 0.93, "low_precision_share": 0.3},
    {"time": 0.9, "loss_gap": 0.02},
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_within_a_budget_the_loss_gap_is_the_least_of_all_choices(budget, seed):
    model = Net(3)
    plan = PrecisionPlan.of(model, *measured_of(model, seed, inner=False), FORMATS, budget)
    summed = plan.costs.predicted(plan.layer_formats)
    assert plan.predicted.memory_bytes == pytest.approx(summed.memory_bytes)
    assert plan.predicted.seconds == pytest.approx(summed.seconds)
    within = [each.loss_gap for each in every_plan(plan) if is_within(each, plan.reference, budget)]
    assert is_within(plan.predicted, plan.reference, budget)
    assert plan.predicted.loss_gap**2 <= min(within) ** 2 * 1.01


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_where_a_step_is_no_sum_its_budget_is_kept_and_no_change_of_two_layers_is_better(budget, seed):
    plan = plan_of(budget=budget, seed=seed)
    places = [plan._choice.offered(place) for place in range(len(plan.chosen))]
    near = [
        plan._choice.predicted(chosen)
        for chosen in itertools.product(*places)
        if sum(one != other for one, other in zip(chosen, plan.chosen, strict=True)) <= 2
    ]
    assert len(near) > 50
    within = [each.loss_gap for each in near if is_within(each, plan.reference, budget)]
    assert is_within(plan.predicted, plan.reference, budget)
    assert plan.predicted.loss_gap <= min(within) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_where_a_loss_gap_alone_is_budgeted_the_time_is_the_least(seed):
    plan = plan_of(budget={"loss_gap": 5e-3}, seed=seed)
    within = [each.seconds for each in every_plan(plan) if each.loss_gap <= 5e-3]
    assert plan.predicted.loss_gap <= 5e-3 * (1 + 1e-6)
    assert plan.predicted.seconds <= min(within) * 1.01


@pytest.mark.parametrize("seed", range(4))
def test_without_a_budget_it_is_the_cheapest_no_worse_than_uniform(seed):
    plan = plan_of(seed=seed)
    bound = plan.uniform.loss_gap
    assert plan.uniform.low_precision_share == pytest.approx(1.0)
    assert plan.predicted.loss_gap <= bound * (1 + 1e-6)
    assert plan.predicted.seconds <= min(e.seconds for e in every_plan(plan) if e.loss_gap <= bound) * 1.01


def test_rows_add_up_to_the_prediction_and_the_policy_gives_what_is_chosen():
    model = Net()
    plan = plan_of(model, {"time": 0.8})
    rows = plan.rows
    assert {(row["layer"], row["format"]) for row in rows} == set(itertools.product(names_of(model), FORMATS))
    chosen = [row for row in rows if row["chosen"]]
    assert sorted(row["layer"] for row in chosen) == sorted(names_of(model))
    assert math.fsum(row["sensitivity"] for row in chosen) == pytest.approx(plan.predicted.loss_gap**2)
    resolved = plan.policy.resolve(model)
    assert {row["layer"]: row["format"] for row in chosen} == {n: resolved[n].compute for n in names_of(model)}
    assert resolved["head"].compute == resolved["blocks.0.0"].compute  # one variable


def test_what_is_predicted_is_read_as_attributes_and_by_name():
    predicted = plan_of().predicted
    assert dict(predicted) == {name: getattr(predicted, name) for name in vars(predicted)}
    assert list(predicted) == ["loss_gap", "seconds", "memory_bytes", "low_precision_share"]
    assert predicted["loss_gap"] == predicted.loss_gap and predicted.get("vars") is None
    assert predicted == replace(predicted) and len({predicted, replace(predicted)}) == 1


def test_what_cannot_be_used_is_not_offered_and_told():
    plan = plan_of(budget={"time": 0.7}, seed=3, problem="its output overflows (amax 1e+06)")
    assert plan.problems
    rows = {(row["layer"], row["format"]) for row in plan.rows}
    assert not rows & plan.problems.keys()
    assert all(row["format"] == "fp32" or (row["layer"], row["format"]) not in plan.problems for row in plan.rows)
    assert "its output overflows (amax 1e+06)" in str(plan)


def test_another_budget_needs_no_model_and_no_measurement():
    model = Net()
    once, again = plan_of(model, {"time": 0.95}).solve({"time": 0.6}), plan_of(model, {"time": 0.6})
    assert (once.chosen, once.predicted, once.budget) == (again.chosen, again.predicted, again.budget)
    assert once.policy == again.policy


MEASURED = [
    *(pytest.param("plan.json", Measured(0.01, 0.999, 0.1, 0.2, 1e-7)), pytest.param("plan.yaml", Measured(0.01, 0.9))),
    *(pytest.param(name, Measured(math.inf, math.nan), id=f"{name}-nan") for name in ("plan.json", "plan.yaml")),
]


@pytest.mark.parametrize(("name", "measured"), MEASURED)
def test_a_file_gives_the_plan_back(name, measured, tmp_path):
    plan = replace(plan_of(budget={"time": 0.7}), measured=measured)
    plan.to_file(tmp_path / name)
    read = PrecisionPlan.from_file(tmp_path / name)
    assert read == plan
    assert (read.policy, read.rows, str(read)) == (plan.policy, plan.rows, str(plan))
    assert read.solve({"memory": 0.9}).chosen == plan.solve({"memory": 0.9}).chosen
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for place, reason in ((tmp_path, "Is a directory"), (tmp_path / "file" / "plan.json", ".*; give the path")):
        with pytest.raises(PlanError, match=f"cannot be written: {reason}") as raised:
            plan_of().to_file(place)
        assert "\n" not in str(raised.value)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_files_that_are_no_plans_are_one_line(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="cannot read .*plan.json: No such file"):
        PrecisionPlan.from_file(path)
    path.write_text("{")
    with pytest.raises(PlanError, match="is no plan: .*to_file wrote$"):
        PrecisionPlan.from_file(path)
    path.write_text('{"default": "bf16"}')
    with pytest.raises(PlanError, match="holds no plan"):
        PrecisionPlan.from_file(path)
    plan_of().to_file(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"version": "9"}))
    with pytest.raises(PlanError, match="has the version '9', and this reads '1'"):
        PrecisionPlan.from_file(path)
    path.write_text(json.dumps(data | {"policy": {"default": "fp32"}}))
    with pytest.raises(PlanError, match="its policy is not what it chose"):
        PrecisionPlan.from_file(path)
    path.write_text(json.dumps(data | {"chosen": data["chosen"][1:]}))
    with pytest.raises(PlanError, match="damaged plan"):
        PrecisionPlan.from_file(path)


def test_a_plan_of_another_model_is_refused():
    plan = plan_of()
    plan.check(Net())
    with pytest.raises(PlanError, match=r"'blocks.2' is not there in the plan's Net and Sequential in this Net"):
        plan.check(Net(3))


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (
            {"time": 0.1},
            r"a time of 0.1 of the reference's cannot be kept: the least reachable is 0\.\d+; raise it to that, or",
        ),
        ({"memory": 0.1}, "a memory of 0.1 .* the least reachable is"),
        (
            {"low_precision_share": 1.0, "loss_gap": 0.0},
            r"loss_gap 0 and low_precision_share 1 at once, though each alone can be: where the others are kept, "
            r"the least loss_gap is [\d.e-]+, and the largest low_precision_share is 0; go to that with one of them",
        ),
        ({"speed": 2}, "budget has the key 'speed'; the keys are loss_gap, time, memory, low_precision_share"),
        ({"tme": 2}, "did you mean time?"),
        ({"time": "fast"}, "budget time is 'fast'; it has to be a number"),
        ({"low_precision_share": 90}, "a share is between 0 and 1"),
        ("fast", "budget is 'fast'; give a mapping"),
        ({}, "budget is {}; give a mapping"),
    ],
)
def test_budgets_that_cannot_be_are_one_line(budget, said):
    with pytest.raises(PlanError, match=said) as raised:
        plan_of(budget=budget)
    assert "\n" not in str(raised.value)


ASKED_IN_VAIN = [
    *({"time": 0.1}, {"memory": 0.1}, {"time": 0.6, "loss_gap": 1e-4}, {"memory": 0.9, "low_precision_share": 0.1}),
    *({"loss_gap": 1e-4, "low_precision_share": 0.9}, {"time": 0.55, "memory": 0.8, "low_precision_share": 0.99}),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", ASKED_IN_VAIN, ids=str)
def test_what_an_error_says_can_be_reached_is_reached(budget, seed):
    plan = plan_of(seed=seed, problem="it overflows")
    try:
        plan.solve(budget)
    except PlanError as error:
        said = dict(re.findall(r"(?:a (\w+) of \S+ [^:]*: the \w+ reachable is ([\d.e-]+))", str(error)))
        said |= dict(re.findall(r"the (?:least|largest) (time|memory|loss_gap|\w+_share) is ([\d.e-]+)", str(error)))
        alone = "at once" not in str(error)
        assert said
        for key, value in said.items():
            found = plan.solve({key: float(value)} if alone else {**budget, key: float(value)})
            assert is_within(found.predicted, plan.reference, {key: float(value)})


def test_there_is_no_share_of_no_products():
    sensitivities, costs = measured_of(Net())
    layers = {name: {each: replace(cost, flops=0.0) for each, cost in of.items()} for name, of in costs.layers.items()}
    plan = PrecisionPlan.of(Net(), sensitivities, replace(costs, layers=layers), FORMATS, {"low_precision_share": 0})
    with pytest.raises(PlanError, match="a share of the matrix products' flops, and the model has none; leave it out"):
        plan.solve({"low_precision_share": 0.5})


def test_what_cannot_be_narrow_bounds_the_share():
    model = Net()
    sensitivities, costs = measured_of(model)
    narrow = replace(sensitivities, offers=tuple({"fp32": Offer(0.0)} for _ in sensitivities.offers))
    with pytest.raises(PlanError, match="a low_precision_share of 0.5 cannot be reached: the largest reachable is 0"):
        PrecisionPlan.of(model, narrow, costs, FORMATS, {"low_precision_share": 0.5})


def test_the_table_has_the_layers_that_matter_first_and_the_promise():
    plan = plan_of(budget={"time": 0.8})
    lines = str(plan).splitlines()
    assert lines[0].startswith("Plan of Net for h100, asked for time 0.8 (3 batches")
    most = max(plan.rows, key=lambda row: row["sensitivity"])["layer"]
    first = next(place for place, line in enumerate(lines) if line.startswith("layer "))
    assert lines[first + 1].startswith(most or '""')
    assert any(line.startswith("policy: default") for line in lines)
    assert "promise" not in str(plan)


def test_a_promise_that_was_not_kept_is_told_and_a_wider_plan_is_offered():
    plan = plan_of(budget={"time": 0.7})
    kept = replace(plan, measured=Measured(1.9 * plan.predicted.loss_gap, 0.999))
    assert (kept.promise, kept.wider) == ([], None)
    broken = replace(plan, measured=Measured(4 * plan.predicted.loss_gap, 0.99, 0.9, 1.0))
    assert len(broken.promise) == 1
    assert "4.0 times the predicted" in broken.promise[0]
    assert broken.wider.predicted.loss_gap <= plan.predicted.loss_gap / 4 * (1 + 1e-6)
    assert broken.wider.predicted.seconds > plan.predicted.seconds
    assert "The promise was not kept" in str(broken)
    assert "plan.wider is the next wider one" in str(broken)
    slow = replace(plan, measured=Measured(plan.predicted.loss_gap, 0.99, 3.0, 1.0))
    assert "a step took 3.00 times as long as in fp32" in slow.promise[0]
    assert slow.wider is None


def test_a_gap_that_is_fp32s_own_rounding_breaks_no_promise():
    plan = plan_of(budget={"loss_gap": 0.0})
    assert plan.predicted.loss_gap == 0
    assert replace(plan, measured=Measured(1e-7, 1.0, rounding=1e-7)).promise == []


def test_the_frontier_falls_and_is_drawn():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    plan = plan_of(budget={"time": 0.7})
    points = plan.frontier()
    assert len(points) > 3
    gaps = [each.loss_gap for each in sorted(points, key=lambda each: each.seconds)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == 0.0
    figure, axes = plan.plot()
    labels = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert any(label.endswith(", chosen") for label in labels)
    assert axes[1].get_ylabel() == "predicted loss gap"
    matplotlib.pyplot.close(figure)


def test_greedy_alone_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plan = plan_of(budget={"time": 0.8})
    assert plan.how == "greedy"
    assert "found by a greedy search: scipy is not installed" in str(plan)


def test_where_costs_come_from_is_said_if_not_from_a_trace() -> None:
    plan = plan_of(budget={"time": 0.7})
    told = replace(plan, costs=replace(plan.costs, note="shapes are those of a step on cpu"))
    assert "Costs:" not in str(plan)
    assert "Costs: shapes are those of a step on cpu." in str(told).splitlines()
