"""Rules for products in 8 bits: which layers they are for, and what the other layers they cover compute in."""

import pytest
from torch import nn

from lightning_mixprec import PrecisionPolicy, Rule
from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.assignment import Assignment, EightBits


class Lora(nn.Linear):
    """A Linear of a user's own, with layers inside."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features)
        self.down = nn.Linear(features, 2, bias=False)
        self.drop = nn.Dropout(0.1)


def model() -> nn.ModuleDict:
    block = nn.Sequential(nn.LayerNorm(8), nn.MultiheadAttention(8, 2), Lora(8), nn.Linear(8, 8), nn.GELU())
    return nn.ModuleDict({"emb": nn.Embedding(4, 8), "blocks": nn.ModuleList([block]), "head": nn.Linear(8, 4)})


def resolved(default: str, **rules: str) -> Assignment:
    named = {name.replace("_", "."): value for name, value in rules.items()}
    return PrecisionPolicy.from_dict({"default": default, **named}).resolve(model())


@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.parametrize(
    ("default", "around"), [("fp64", "bf16"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")]
)
def test_linear_layers_have_it_and_others_the_16_bits_around(format: str, default: str, around: str) -> None:
    assignment = resolved(default, blocks=format)
    computes = {name: layer.compute for name, layer in assignment.items()}
    narrow = ["blocks.0.2", "blocks.0.2.down", "blocks.0.3"]
    assert [name for name, compute in computes.items() if compute == format] == narrow
    others = [name for name in computes if name.startswith("blocks") and name not in narrow]
    assert {computes[name] for name in others} == {around}
    assert "blocks.0.1.out_proj" in others, "attention computes with its weights itself"
    assert {assignment[name].region for name in [*narrow, *others]} == {around}
    assert {computes[name] for name in ("", "emb", "head")} == {default}
    assert assignment.compute_formats == {default, format, around}
    assert f"fp32/{format}/-" in str(assignment)


def test_the_nearest_format_around_counts() -> None:
    policy = PrecisionPolicy("fp16", [Rule("blocks", compute="bf16"), Rule("blocks.0.3", compute="fp8")])
    assert policy.resolve(model())["blocks.0.3"].region == "bf16"
    policy = PrecisionPolicy("fp16", [Rule("blocks", compute="fp32"), Rule("blocks.0.3", compute="fp8")])
    assert policy.resolve(model())["blocks.0.3"].region == "bf16"
    policy = PrecisionPolicy("bf16", [Rule("blocks", compute="fp16"), Rule("blocks.0.2", compute="int8")])
    assignment = policy.resolve(model())
    assert {name: assignment[name].region for name in assignment if name.startswith("blocks.0.2")} == {
        "blocks.0.2": "fp16",
        "blocks.0.2.down": "fp16",
        "blocks.0.2.drop": "fp16",
    }


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("fp8", EightBits("bf16", "tensor", "all")),
        ("c=fp8,s=row", EightBits("bf16", "row", "all")),
        ("c=fp8,s=tensor,g=input", EightBits("bf16", "tensor", "input")),
        ("int8", EightBits("bf16", "row", "none")),
        ("c=int8,g=all", EightBits("bf16", "row", "all")),
    ],
)
def test_what_a_rule_says_of_products(said: str, expected: EightBits) -> None:
    policy = PrecisionPolicy.from_dict({"default": "bf16", "head": said})
    assert policy.resolve(model())["head"].eight_bits == expected
    assert PrecisionPolicy.from_dict(policy.to_dict()) == policy
    [rule] = policy.rules
    assert PrecisionPolicy.from_dict({"default": "bf16", "head": rule.value}) == policy


def test_a_file_keeps_it(tmp_path) -> None:
    rule = Rule(types="Linear", compute="fp8", scaling="row", gradients="input", output="input")
    policy = PrecisionPolicy("bf16", [rule])
    policy.to_file(tmp_path / "policy.yaml")
    assert PrecisionPolicy.from_file(tmp_path / "policy.yaml") == policy


def test_a_lazy_linear_is_one() -> None:
    lazy = nn.ModuleDict({"head": nn.LazyLinear(4)})
    assert PrecisionPolicy.from_dict({"default": "bf16", "head": "fp8"}).resolve(lazy)["head"].compute == "fp8"


def test_tied_weights_are_no_obstacle() -> None:
    tied = model()
    tied["head"] = nn.Linear(8, 4, bias=False)
    tied["head"].weight = tied["emb"].weight
    assignment = PrecisionPolicy.from_dict({"default": "bf16", "head": "fp8"}).resolve(tied)
    assert (assignment["head"].compute, assignment["emb"].compute) == ("fp8", "bf16")


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        (
            {"emb": "fp8"},
            "rule 1 (emb) covers Embedding, and fp8 is for products of nn.Linear alone; the model's Linear layers "
            "are named blocks.0.2, blocks.0.2.down, blocks.0.3, head",
        ),
        (
            {"blocks.0.1": "int8"},
            "covers MultiheadAttention, NonDynamicallyQuantizableLinear, and int8 is for products",
        ),
        ({"blocks.0.1.out_proj": "fp8"}, "whose forward never runs: MultiheadAttention uses its weights directly"),
        ({"blocks.0.0": "fp8", "blocks": "fp8"}, "covers LayerNorm, and fp8 is for products of nn.Linear alone"),
    ],
)
def test_a_rule_without_a_linear_layer_is_an_error(rules: dict[str, str], problem: str) -> None:
    with pytest.raises(PolicyError) as caught:
        PrecisionPolicy.from_dict({"default": "bf16", **rules}).resolve(model())
    assert problem in str(caught.value)


def test_a_model_without_a_linear_layer_is_told_so() -> None:
    with pytest.raises(PolicyError, match="covers GELU, and fp8 is for .*; the model has none, so leave the rule out"):
        PrecisionPolicy.from_dict({"default": "bf16", "0": "fp8"}).resolve(nn.Sequential(nn.GELU()))


def test_edits_lead_to_it_and_away_from_it() -> None:
    net = model()
    policy = PrecisionPolicy("bf16").amend({"blocks": "c=fp8,s=row"}, net)
    assert policy.resolve(net)["blocks.0.3"].eight_bits.scaling == "row"
    policy = policy.amend({"blocks": {"scaling": "tensor", "gradients": "input"}}, net)
    assert policy.resolve(net)["blocks.0.3"].eight_bits == EightBits("bf16", "tensor", "input")
    policy = policy.amend({"blocks.0.3": {"compute": "bf16", "output": "input"}}, net)
    assert {policy.resolve(net)[f"blocks.0.{n}"].compute for n in (2, 3)} == {"fp8", "bf16"}
    policy = policy.amend({"blocks": "bf16", "blocks.0.3": "bf16"}, net)
    assert {layer.compute for layer in policy.resolve(net).values()} == {"bf16"}


def test_a_move_of_options_alone_is_a_move() -> None:
    net = model()
    before = PrecisionPolicy.from_dict({"default": "bf16", "head": "fp8"}).resolve(net)
    after = PrecisionPolicy.from_dict({"default": "bf16", "head": "c=fp8,s=row"}).resolve(net)
    assert list(before.changes_to(after)) == ["head"]
    assert not before.changes_to(before)
