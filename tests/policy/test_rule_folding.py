"""Folded policies give every layer what was chosen, and are as short as a person would write them."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.rule_folding import LayerOutline, folded_policy, outline_of, stand_in_of

FORMATS = ("fp32", "bf16", "fp16")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(4), nn.MultiheadAttention(4, 2), nn.Sequential(*self.layers())

    def layers(self):
        return nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)

    def forward(self, x):
        return self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self, blocks=4):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(4, 4), nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(x)


def given_to(model, choose):
    """A format for each layer with operations of its own."""
    return {each.name: choose(each.name, each.classes[0]) for each in outline_of(model) if each.has_forward}


def check(model, formats):
    policy = folded_policy(model, formats)
    resolved = policy.resolve(model)
    assert {name: resolved[name].compute for name in formats} == formats
    return policy.to_dict()


def test_one_format_needs_no_rule():
    model = Net()
    assert check(model, given_to(model, lambda name, kind: "fp16")) == {"default": "fp16", "rules": []}


def test_a_type_is_said_as_a_type():
    model = Net()
    formats = given_to(model, lambda name, kind: "fp32" if kind == "LayerNorm" else "bf16")
    assert check(model, formats) == {"default": "bf16", "rules": [{"types": "LayerNorm", "compute": "fp32"}]}


def test_a_type_with_an_exception_is_a_type_and_a_name():
    model = Net()
    formats = given_to(model, lambda name, kind: "fp32" if kind == "LayerNorm" and name != "norm" else "bf16")
    written = check(model, formats)
    assert written["default"] == "bf16"
    assert written["rules"] in (
        [{"layers": "norm", "compute": "bf16"}, {"types": "LayerNorm", "compute": "fp32"}],
        [{"layers": "blocks.*.norm", "compute": "fp32"}],
    )


def test_blocks_in_a_row_are_a_slice_and_what_is_alike_in_all_a_glob():
    model = Net(6)
    formats = given_to(model, lambda name, kind: "fp32" if name.startswith(("blocks.0", "blocks.1")) else "bf16")
    assert check(model, formats)["rules"] == [{"layers": "blocks.[0:2]", "compute": "fp32"}]
    formats = given_to(model, lambda name, kind: "fp32" if name.endswith("mlp.2") else "bf16")
    assert check(model, formats)["rules"] == [{"layers": "blocks.*.mlp.2", "compute": "fp32"}]


def test_a_subtree_is_one_rule_and_own_operations_do_not_take_it_along():
    model = Net()
    formats = given_to(model, lambda name, kind: "fp32" if name.startswith("blocks.2") else "bf16")
    assert check(model, formats)["rules"] == [{"layers": "blocks.2", "compute": "fp32"}]
    formats = given_to(model, lambda name, kind: "fp32" if name == "" else "bf16")
    assert check(model, formats)["rules"] == [{"layers": "", "compute": "fp32", "recurse": False}]


def test_products_in_8_bits_are_for_linears():
    model = Net()
    formats = given_to(model, lambda name, kind: "fp8" if kind == "Linear" and name != "head" else "bf16")
    assert check(model, formats)["default"] == "bf16"


def test_shared_layers_are_one():
    model = Net()
    model.again = nn.Sequential(model.head, nn.Linear(4, 4))
    formats = given_to(model, lambda name, kind: "fp32" if name.startswith("again") and name != "again.0" else "bf16")
    check(model, formats)
    with pytest.raises(PolicyError, match=r"'head' and 'again.0' are one, but get bf16 and fp32; choose one"):
        folded_policy(model, {"head": "bf16", "again.0": "fp32"})


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), share=st.sampled_from([0.05, 0.3, 1.0]), blocks=st.integers(1, 5))
def test_whatever_is_chosen_is_given(seed, share, blocks):
    model, draw = Net(blocks), random.Random(seed)
    formats = given_to(model, lambda name, kind: draw.choice(FORMATS) if draw.random() < share else "bf16")
    check(model, formats)


def test_a_stand_in_resolves_as_the_model_does():
    model = Net()
    model.again = model.blocks[0]
    outline = outline_of(model)
    stand_in = stand_in_of([LayerOutline(**vars(each)) for each in outline])
    draw = random.Random(7)
    for _ in range(10):
        formats = given_to(model, lambda name, kind: draw.choice(FORMATS[:2]))
        formats = {each.name: formats[each.first_name] for each in outline if each.has_forward}
        policy = folded_policy(stand_in, formats)
        one, other = policy.resolve(model), policy.resolve(stand_in)
        assert [{name: found[name].compute for name in formats} for found in (one, other)] == [formats, formats]
