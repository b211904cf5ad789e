"""Models with parts that torch has made a program of, and what of them is made of a model with formats."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.engine.border_plan import survey
from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.policy import as_policy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # Dynamo looks at it
]


class Block(nn.Module):
    """A part with parts."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def forward(self, x):
        return torch.relu(self.body(x))


MADE = {
    "scripted": torch.jit.script,
    "traced": lambda module: torch.jit.trace(module, torch.randn(2, 4)),
    "fx": torch.fx.symbolic_trace,
    "exported": lambda module: torch.export.export(module, (torch.randn(2, 4),)).module(),
    "compiled": lambda module: torch.compile(module, backend="eager"),
}


def model_with(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), MADE[kind](Block()), nn.Linear(4, 4))


def trained(model, x, attachment):
    attachment.begin_first_step()
    with attachment.context():
        y = model(x)
    attachment.end_first_step()
    y.float().square().sum().backward()
    return [y, *(parameter.grad for parameter in model.parameters())]


def by_hand(model, x, wide=()):
    """The layers one by one, each in its own autocast state."""
    for name, layer in model.named_children():
        with torch.autocast("cpu", torch.bfloat16, enabled=name not in wide, cache_enabled=False):
            x = layer(x.float() if name in wide else x)
    x.float().square().sum().backward()
    return [x, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("policy", ["bf16", {"default": "bf16", "0": "fp32"}, {"default": "bf16", "2": "fp32"}])
def test_a_model_with_such_a_part_trains(policy, kind, attached):
    model, x = model_with(kind), torch.randn(2, 4)
    with attached(model, policy) as attachment:
        got = trained(model, x, attachment)
    expected = by_hand(model_with(kind), x, wide=[] if policy == "bf16" else list(policy)[1:])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_a_container_of_torchscript_has_a_format(kind, attached):
    model, x = nn.Sequential(model_with(kind)), torch.randn(2, 4)
    with attached(model, {"default": "bf16", "0": "fp32", "0.2": "bf16"}) as attachment:
        got = trained(model, x, attachment)
    expected = model_with(kind)
    h = expected[1](expected[0](x))
    with torch.autocast("cpu", torch.bfloat16):
        y = expected[2](h)
    assert torch.equal(got[0].float(), y.float())


@pytest.mark.parametrize("kind", ["scripted", "traced"])
@pytest.mark.parametrize(
    ("rule", "said"),
    [("1", "is for 1,"), ("1.body", "is for 1.body,"), ("1.body.0", "is for 1.body.0,"), ("*", "is for 1,")],
)
def test_a_rule_for_torchscript_is_refused_in_one_line(rule, said, kind, attached):
    with pytest.raises(PolicyError, match=said) as error, attached(model_with(kind), {"default": "bf16", rule: "fp32"}):
        pass
    assert "\n" not in str(error.value) and "use the module it was" in str(error.value)


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_torchscript_is_one_site_whatever_is_inside_it(kind):
    assert [site.name for site in survey(model_with(kind))] == ["", "0", "1", "2"]


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_weights_of_torchscript_are_stored_as_a_rule_says(kind, attached):
    model = nn.Sequential(model_with(kind).half())
    with attached(model, {"default": "fp32", "0": "p=fp32"}):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model(torch.randn(2, 4)).dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


@pytest.fixture
def mixed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 4))
    attachment = attach(model, as_policy({"default": "bf16", "0": "fp32", "1.body": "fp32"}).resolve(model), "cpu")
    yield model, attachment
    attachment.detach()


@pytest.mark.parametrize("part", ["", "0", "1"])
def test_scripting_a_model_with_formats_says_what_to_do(part, mixed):
    model, attachment = mixed
    part, x = model.get_submodule(part), torch.randn(2, 4)
    for each in (part, copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        with pytest.raises(PolicyError, match="script it after the run") as error:
            torch.jit.script(each)
        assert "\n" not in str(error.value)
    attachment.detach()
    assert torch.equal(torch.jit.script(part)(x), part(x)) and "__prepare_scriptable__" not in vars(part)


def test_a_trace_of_a_model_with_formats_computes_in_them_by_itself(mixed):
    model, attachment = mixed
    x = torch.randn(2, 4)
    with attachment.context():
        expected, traced = model(x), torch.jit.trace(model, x, check_trace=False)
    assert expected.dtype == torch.bfloat16 and torch.equal(traced(x), expected)


def test_an_export_of_a_model_with_formats_has_its_borders_and_the_roots_context_around_it(mixed):
    model, attachment = mixed
    x = torch.randn(2, 4)
    with attachment.context():
        expected, exported = model(x), torch.export.export(model, (x,)).module()
        assert torch.equal(exported(x), expected)
