import pytest
from policy_models import Box
from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.policy import PrecisionPolicy
from lightning_mixprec.policy.rules import Rule


def example():
    block = {"norm": nn.LayerNorm(2), "attn": nn.MultiheadAttention(2, 1), "fc": nn.Linear(2, 2)}
    blocks = nn.ModuleList(Box(**block) for _ in range(2))
    return Box(
        model=Box(blocks=blocks, head=nn.Linear(2, 2), weights=nn.ParameterList([nn.Parameter(block["fc"].weight)]))
    )


def error_of(*rules, model=None, **options):
    with pytest.raises(PolicyError) as error:
        PrecisionPolicy("bf16", rules, **options).resolve(model or example())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("layers", "near"),
    [
        ("model.hed", "did you mean model.head?"),
        ("head", "did you mean model.head?"),
        ("model.Head", "did you mean model.head?"),
        ("blocks.*.norm", "did you mean model.blocks.0.norm, model.blocks.1.norm?"),
        ("model.blokcs.*.norm", "did you mean model.blocks.*.norm?"),
        ("model.blocks.[0:2].nrom", "did you mean model.blocks.[0:2].norm?"),
        ("model.blocks.7.norm", "did you mean model.blocks.1.norm, model.blocks.0.norm"),
        ("model.head.weight", "did you mean model.head?"),
        ("module.model.head", "did you mean model.head"),
        (r"re:model.hed", "did you mean model.head"),
        ("xyz", "the layers at the top are model"),
    ],
)
def test_a_rule_that_matches_nothing_names_near_misses(layers, near):
    message = error_of(Rule("model", compute="fp16"), Rule(layers, compute="fp32"))
    assert message.startswith(f"rule 2 ({layers}) matches no layer of Box; ")
    assert near in message


@pytest.mark.parametrize(
    ("layers", "last"),
    [("Linear", "Linear"), ("*Norm*", "*Norm*"), ("**.LayerNorm", "LayerNorm"), ("torch.nn.Linear", "Linear")],
)
def test_a_type_given_as_a_layer_says_where_types_go(layers, last):
    message = error_of(Rule(layers, compute="fp32"))
    assert f"{last} is a type of layers, not a name; in a rule of the full form write types: '{last}'" in message
    PrecisionPolicy("bf16", [Rule(types=last, compute="fp32", recurse=False)]).resolve(
        Box(fc=nn.Linear(2, 2), n=nn.LayerNorm(2))
    )


@pytest.mark.parametrize(
    ("types", "near"),
    [
        ("LayerNrom", "did you mean LayerNorm?"),
        ("layernorm", "did you mean LayerNorm?"),
        ("torch.nn.*LINEAR", "did you mean Linear?"),
        ("nn.LayerNorm", "did you mean LayerNorm?"),
        ("torch.nn.LayerNrm", "did you mean LayerNorm?"),
        ("Xyzzy", "its types are Box, LayerNorm, Linear, ModuleList, MultiheadAttention"),
    ],
)
def test_a_type_that_matches_nothing_names_near_misses(types, near):
    message = error_of(Rule(types=types, compute="fp32"))
    assert f"it has none of type {types}; " in message
    assert near in message


def test_layers_and_types_that_match_but_not_the_same_layer():
    message = error_of(Rule("model.head", types="LayerNorm", compute="fp32"))
    assert "model.head has another type; one layer must match both" in message


def test_a_list_errs_only_if_all_its_entries_match_nothing():
    PrecisionPolicy("bf16", [Rule(["model.hed", "model.head"], compute="fp32")]).resolve(example())
    PrecisionPolicy("bf16", [Rule(types=["LayerNrom", "Linear"], compute="fp32")]).resolve(example())
    assert "matches no layer" in error_of(Rule(["model.hed", "x"], compute="fp32"))
    assert "matches no layer" in error_of(Rule(types=["LayerNrom", "x"], compute="fp32"))


def test_allow_unmatched_accepts_rules_that_match_nothing_and_nothing_else():
    policy = PrecisionPolicy("bf16", [Rule("model.hed", compute="fp32")], allow_unmatched=True)
    assert "matched nothing" in str(policy.resolve(example()))
    rules = [Rule("model.head", compute="fp32"), Rule("**.head", compute="fp16")]
    assert "decides nothing" in error_of(*rules, allow_unmatched=True)


def test_a_rule_that_decides_nothing_and_disagrees_names_the_winner_and_the_way_out():
    assert error_of(Rule("model.head", compute="fp32"), Rule("**.head", compute="fp16")) == (
        "rule 2 (**.head) decides nothing: model.head is fp32/fp32/- by rule 1 (model.head); move it before that, or "
        "remove it"
    )
    assert "decides nothing" in error_of(Rule("model.head", compute="fp32"), Rule("**.head", output="input"))


def test_a_rule_that_decides_nothing_and_agrees_is_accepted():
    rules = [Rule("model.head", compute="fp32", output="input"), Rule("**.head", compute="fp32")]
    PrecisionPolicy("bf16", rules).resolve(example())


def test_a_rule_whose_layers_all_have_nearer_rules():
    message = error_of(Rule("model.blocks", compute="fp32"), Rule("model.blocks.*", compute="fp16"))
    assert "rule 1 (model.blocks) decides nothing: model.blocks.0 is fp32/fp16/- by rule 2 (model.blocks.*)" in message
    assert "so remove it" in message


def test_a_rule_for_a_container_without_forward_that_does_not_recurse():
    message = error_of(Rule("model.blocks", compute="fp32", recurse=False))
    assert "rule 1 (model.blocks, recurse=False) does nothing: model.blocks has no forward" in message
    assert "write recurse=True" in message
    PrecisionPolicy("bf16", [Rule("model.blocks", compute="fp32")]).resolve(example())


def test_a_rule_for_a_list_of_parameters_can_only_say_param():
    assert "does nothing" in error_of(Rule("model.weights", compute="fp32"))
    PrecisionPolicy("bf16", [Rule("model.weights", param="fp64")]).resolve(example())


def test_a_rule_that_says_only_param_for_a_layer_without_weights():
    assert "does nothing" in error_of(Rule("act", param="fp64"), model=Box(act=nn.ReLU(), fc=nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "rule",
    [
        Rule("model.blocks.0.attn.out_proj", compute="fp32"),
        Rule("**.out_proj", compute="fp32"),
        Rule("**.attn.*", compute="fp32"),
        Rule(types="NonDynamicallyQuantizableLinear", compute="fp32"),
        Rule(["model.head", "model.blocks.0.attn.out_proj"], compute="fp32"),
        Rule("**.attn.out_proj", types="Linear", param="fp64"),
    ],
)
def test_a_rule_meant_for_out_proj_whose_forward_never_runs(rule):
    message = error_of(rule)
    assert "is for model.blocks.0.attn.out_proj, whose forward never runs" in message
    assert message.endswith("write the rule for model.blocks.0.attn")


@pytest.mark.parametrize("rule", [Rule(types="Linear", compute="fp32"), Rule("**", types="*Linear", compute="fp32")])
def test_a_broad_rule_may_match_out_proj_which_goes_with_its_attention(rule):
    assignment = PrecisionPolicy("bf16", [rule]).resolve(example())
    assert assignment["model.blocks.0.attn.out_proj"].compute == "bf16"
    assert assignment["model.blocks.0.fc"].compute == "fp32"


def test_a_rule_for_out_proj_that_asks_for_what_the_attention_gets_is_accepted():
    policy = PrecisionPolicy("bf16", [Rule(["**.attn", "**.attn.out_proj"], compute="fp32")])
    assert policy.resolve(example())["model.blocks.1.attn.out_proj"].compute == "fp32"


def test_other_children_of_an_attention_subclass_are_ordinary_layers():
    class Rotary(nn.MultiheadAttention):
        def __init__(self):
            super().__init__(2, 1)
            self.rotate = nn.Linear(2, 2)

    policy = PrecisionPolicy("bf16", [Rule("attn.rotate", compute="fp32")])
    assert policy.resolve(Box(attn=Rotary()))["attn.rotate"].compute == "fp32"


def test_an_output_for_the_root_alone_is_refused_because_nobody_takes_it():
    model = nn.Sequential(nn.Linear(2, 2))
    policy = PrecisionPolicy("bf16", [Rule("", output="fp32", recurse=False)])
    with pytest.raises(PolicyError, match="does nothing"):
        policy.resolve(model)
    PrecisionPolicy("bf16", [Rule("", output="fp32")]).resolve(model)
