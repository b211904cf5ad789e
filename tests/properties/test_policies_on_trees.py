"""Random policies on random models of real layers: resolving answers for every layer, and attaching leaves no trace."""

import copy
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plugin_models import same, snapshot
from torch import nn

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.policy import PrecisionPolicy
from lightning_mixprec.policy.rules import Rule

WIDTH = 4
FORMATS = st.sampled_from(["fp64", "fp32", "bf16", "fp16"])


class Parallel(nn.Module):
    """Own operations, and children that are called in a loop, some of them under two names."""

    def __init__(self, **children):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return sum((child(x) for child in self.children()), x * self.gain) / 2


class Attention(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(WIDTH, 2)

    def forward(self, x):
        return super().forward(x, x, x)[0]


class Recurrent(nn.GRU):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)

    def forward(self, x):
        return super().forward(x)[0]


LEAVES = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "batchnorm": lambda: nn.BatchNorm1d(WIDTH),
    "attention": Attention,
    "recurrent": Recurrent,
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "activation": nn.GELU,
}


@st.composite
def models(draw):
    pool = []

    def grow(depth):
        kind = draw(st.sampled_from([*LEAVES, *LEAVES, "shared", "sequence", "parallel"])) if depth else "linear"
        if kind == "shared" and pool:
            return draw(st.sampled_from(pool))
        if kind == "sequence":
            module = nn.Sequential(*(grow(depth - 1) for _ in range(draw(st.integers(0, 3)))))
        elif kind in ("parallel", "shared"):
            names = draw(st.lists(st.sampled_from(["a", "b", "norm"]), unique=True, max_size=2))
            module = Parallel(**{name: grow(depth - 1) for name in names})
        else:
            module = LEAVES[kind]()
        pool.append(module)
        return module

    torch.manual_seed(0)
    return Parallel(**{name: grow(2) for name in ("body", "head", "norm")})


def saying():
    return st.fixed_dictionaries(
        {},
        optional={
            "param": st.sampled_from(["fp64", "fp32"]),
            "compute": FORMATS,
            "output": FORMATS | st.just("input"),
            "recurse": st.booleans(),
        },
    ).filter(lambda said: said.keys() - {"recurse"})


@st.composite
def policies(draw, model):
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    patterns = st.sampled_from([*names, "**", "*", "**.norm", "body.**", "re:.*a", "nowhere"])
    types = st.sampled_from(["Linear", "*Norm*", "Attention", "GRU", "Module"])
    rules = []
    for _ in range(draw(st.integers(0, 4))):
        which = draw(st.sampled_from(["layers", "types"]))
        rules.append(Rule(**{which: draw(patterns if which == "layers" else types)}, **draw(saying())))
    return PrecisionPolicy(draw(FORMATS), rules, draw(st.booleans()))


def resolved(policy, model):
    """The assignment, or None if the policy does not fit the model; then one line says why."""
    try:
        return policy.resolve(model)
    except PolicyError as error:
        assert "\n" not in str(error)
        return None


def table(assignment):
    return None if assignment is None else {name: layer.formats for name, layer in assignment.items()}


@given(st.data())
@settings(max_examples=80)
def test_every_layer_has_formats_and_a_rule_that_says_them_or_the_default(data):
    model = data.draw(models())
    policy = data.draw(policies(model))
    assignment = resolved(policy, model)
    again = PrecisionPolicy.from_dict(policy.to_dict())
    assert table(assignment) == table(resolved(again, copy.deepcopy(model)))
    assume(assignment is not None)
    assert assignment.keys() == {name for name, _ in model.named_modules(remove_duplicate=False)}
    for layer in assignment.values():
        said = layer.rule.said if layer.rule is not None else {}
        assert layer.rule is None or layer.rule in policy.rules
        assert layer.compute == said.get("compute", policy.default)
        assert layer.output == said.get("output")
        assert said.get("param", layer.param) == layer.param
    assert str(assignment)


@given(st.data())
@settings(max_examples=60)
def test_the_order_of_rules_for_different_layers_does_not_matter(data):
    model = data.draw(models())
    names = st.sampled_from([name for name, _ in model.named_modules()])
    chosen = data.draw(st.lists(names, unique=True, min_size=2, max_size=4))
    rules = [Rule(name, **data.draw(saying())) for name in chosen]
    default = data.draw(FORMATS)
    shuffled = data.draw(st.permutations(rules))
    assert table(resolved(PrecisionPolicy(default, rules), model)) == table(
        resolved(PrecisionPolicy(default, shuffled), model)
    )


def outputs(model, x):
    """What the model computes in evaluation and in training, without moving it."""
    model.eval()
    with torch.no_grad():
        evaluated = model(x)
    statistics = copy.deepcopy(dict(model.named_buffers()))
    model.train()
    torch.manual_seed(1)
    trained = model(x)
    gradients = torch.autograd.grad(trained.sum(), list(model.parameters()), allow_unused=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(statistics[name])
    return [evaluated, trained.detach(), list(gradients)]


@given(st.data())
@settings(max_examples=60)
def test_attaching_and_detaching_is_the_identity(data):
    model = data.draw(models())
    assignments = [resolved(data.draw(policies(model)), model) for _ in range(2)]
    assume(None not in assignments)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    names, state = [name for name, _ in model.named_parameters()], copy.deepcopy(model.state_dict())
    computed, before = outputs(model, x), snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attachment = attach(model, assignments[0], "cpu")
        except PolicyError as error:
            assert "\n" not in str(error)
        else:
            try:
                for assignment in assignments:
                    attachment.change(assignment)
                    assert [name for name, _ in model.named_parameters()] == names
                    assert list(model.state_dict()) == list(state)
                    model.eval()
                    with attachment.context(), torch.no_grad():
                        assert model(x.double() if assignment[""].compute == "fp64" else x).isfinite().all()
            finally:
                attachment.detach()
    model.train()
    assert snapshot(model) == before
    assert same(dict(model.state_dict()), dict(state))
    assert same(outputs(model, x), computed)


def test_a_recurrent_layer_knows_its_own_weights_again():
    model = nn.Sequential(Recurrent())
    model(torch.ones(3, WIDTH))
    before = snapshot(model)
    attachment = attach(model, PrecisionPolicy("fp64").resolve(model), "cpu")
    model(torch.ones(3, WIDTH, dtype=torch.float64))
    attachment.detach()
    assert snapshot(model) == before


def test_a_policy_that_fits_no_model_is_one_line():
    with pytest.raises(PolicyError) as caught:
        PrecisionPolicy("bf16", [Rule("haed", compute="fp32")]).resolve(Parallel(head=nn.Linear(WIDTH, WIDTH)))
    assert "did you mean" in str(caught.value)
