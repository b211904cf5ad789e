import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from policy_models import Box
from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.policy import PrecisionPolicy
from lightning_mixprec.policy.rules import Rule


def example():
    blocks = nn.ModuleList(Box(norm=nn.LayerNorm(2), fc=nn.Linear(2, 2)) for _ in range(3))
    return Box(model=Box(blocks=blocks, head=nn.Linear(2, 2)))


def error_of(policy, edits):
    with pytest.raises(PolicyError) as error:
        policy.amend(edits, example())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_new_rules_go_in_front_in_their_order():
    policy = PrecisionPolicy("bf16", [Rule(types="LayerNorm", compute="fp32")])
    amended = policy.amend({"model.head": "fp32", "model.blocks.0.norm": "c=fp16,o=input"}, example())
    assert amended.rules == (
        Rule("model.head", compute="fp32"),
        Rule("model.blocks.0.norm", compute="fp16", output="input"),
        *policy.rules,
    )
    assert policy.rules == (Rule(types="LayerNorm", compute="fp32"),)


def test_a_rule_with_the_same_pattern_lends_what_the_edit_does_not_say():
    rules = [Rule(types="LayerNorm", compute="fp32"), Rule(["model"], param="fp64", compute="fp16", output="input")]
    amended = PrecisionPolicy("bf16", rules).amend({"model": {"compute": "fp32"}}, example())
    assert amended.rules == (Rule(["model"], param="fp64", compute="fp32", output="input"), rules[0])


def test_rules_with_nothing_left_to_decide_are_dropped():
    policy = PrecisionPolicy("bf16", [Rule("model.head", compute="fp32"), Rule("model.blocks.0", compute="fp16")])
    amended = policy.amend({"**.head": "fp16"}, example())
    assert amended.rules == (Rule("**.head", compute="fp16"), Rule("model.blocks.0", compute="fp16"))
    amended.resolve(example())


def test_rules_that_match_nothing_here_are_kept_where_they_are_allowed():
    policy = PrecisionPolicy("bf16", [Rule("elsewhere", compute="fp32")], allow_unmatched=True)
    assert policy.amend({"model.head": "fp32"}, example()).rules[1] == policy.rules[0]


def test_an_edit_leaves_weights_as_they_are_stored():
    policy = PrecisionPolicy("bf16", [Rule("model", param="fp64", compute="fp32")])
    before, after = policy.resolve(example()), policy.amend({"**.norm": "bf16"}, example()).resolve(example())
    assert {name: layer.param for name, layer in after.items()} == {name: layer.param for name, layer in before.items()}
    assert after["model.blocks.1.norm"].formats == ("fp64", "bf16", None)


def test_an_edit_across_layers_stored_by_different_rules_is_refused():
    policy = PrecisionPolicy("bf16", [Rule("model.head", param="fp64", compute="fp32")])
    message = error_of(policy, {"**": "fp16"})
    assert message.startswith("edit '**' is for layers whose param differs by rule (fp64 and unsaid)")


@pytest.mark.parametrize(
    ("edits", "problem"),
    [
        ({"model.hed": "fp32"}, "edit 'model.hed' matches no layer; did you mean model.head?"),
        ({"model.head": "p=fp64,c=fp32"}, "edit 'model.head': param cannot change during a run"),
        ({"model.head": {"param": "fp64"}}, "edit 'model.head': param cannot change during a run"),
        ({"model.head": {"recurse": False}}, "edit 'model.head': an edit must say at least one of compute and output"),
        ({"model.head": {"cmopute": "fp32"}}, "unknown key 'cmopute', did you mean compute?"),
        ({"model.head": {"compute": None}}, "compute is None"),
        ({"model.head": {}}, "must say at least one"),
        ({"model.head": "e4m3"}, "edit 'model.head': compute is 'e4m3', which is not computed in yet"),
        ({"model.head": None}, "edit 'model.head': the value is None"),
        ({"model.blocks.[10,11]": "fp32"}, "write the slice model.blocks.[10:12]"),
        ({3: "fp32"}, "edit 3: layers is 3 (int)"),
        ({"**.head": "fp32", "model.head": "fp16"}, "rule 2 (model.head) decides nothing"),
        ("fp32", "edits are 'fp32'; write a mapping"),
    ],
)
def test_edits_that_are_refused(edits, problem):
    assert problem in error_of(PrecisionPolicy("bf16"), edits)


patterns = st.sampled_from(
    ["**", "model", "model.head", "**.norm", "model.blocks.[0:2]", "model.blocks.*.fc", "model.blocks"]
)
formats = st.sampled_from(["fp32", "bf16", "fp16", "c=fp32,o=input"])


@given(st.dictionaries(patterns, formats, max_size=3), st.lists(st.tuples(patterns, formats), max_size=4))
def test_any_run_of_edits_resolves_strictly_and_takes_effect(rules, edits):
    model = example()
    try:
        policy = PrecisionPolicy.from_dict({"default": "bf16"} | rules)
        policy.resolve(model)
    except PolicyError:
        assume(False)
    for pattern, value in edits:
        try:
            amended = policy.amend({pattern: value}, model)
        except PolicyError as error:
            assert "decides nothing" in str(error) and "nearer" not in str(error)
            continue
        policy = amended
        assignment = policy.resolve(model)
        wanted = "fp32" if "=" in value else value
        matched = PrecisionPolicy("fp64", [Rule(pattern, compute="fp32")]).resolve(model)
        own = [name for name in matched if matched[name].compute == "fp32" and assignment[name].rule == policy.rules[0]]
        assert own
        assert {assignment[name].compute for name in own} == {wanted}
        assert PrecisionPolicy.from_dict(policy.to_dict()) == policy


def computed(policy, model):
    return {name: layer.compute for name, layer in policy.resolve(model).items()}


NON_RECURSIVE_EDITS = st.sampled_from(["", "model", "model.head", "model.blocks.0", "model.blocks.0.norm", "**.norm"])


@given(st.dictionaries(patterns, formats, max_size=3), NON_RECURSIVE_EDITS, st.sampled_from(["fp64", "fp16"]))
def test_an_edit_that_does_not_recurse_moves_what_it_matches_and_nothing_else(rules, pattern, format):
    model = example()
    try:
        policy = PrecisionPolicy.from_dict({"default": "bf16"} | rules)
        before = computed(policy, model)
    except PolicyError:
        assume(False)
    matched = PrecisionPolicy("bf16", [Rule(pattern, compute="fp32", recurse=False)]).resolve(model)
    moved = {name for name, layer in matched.items() if layer.compute == "fp32"}
    amended = policy.amend({pattern: {"compute": format, "recurse": False}}, model)
    assert computed(amended, model) == {name: format if name in moved else old for name, old in before.items()}
    assert PrecisionPolicy.from_dict(amended.to_dict()) == amended


def test_a_recursive_rule_with_the_same_pattern_still_decides_for_the_children():
    old = Rule("model", compute="fp16", output="input")
    amended = PrecisionPolicy("bf16", [old]).amend({"model": {"compute": "fp32", "recurse": False}}, example())
    assert amended.rules == (Rule("model", compute="fp32", output="input", recurse=False), old)
    again = amended.amend({"model": {"compute": "fp64", "recurse": False}}, example())
    assert again.rules == (Rule("model", compute="fp64", output="input", recurse=False), old)


def test_of_two_rules_of_a_pattern_the_one_that_gives_way_lends():
    below = Rule("model", compute="fp16", output="input")
    rules = [below, Rule("model", param="fp64", compute="fp32", output="fp32", recurse=False)]
    amended = PrecisionPolicy("bf16", rules).amend({"model": {"compute": "bf16", "recurse": False}}, example())
    assert amended.rules == (Rule("model", param="fp64", compute="bf16", output="fp32", recurse=False), below)


def test_an_edit_that_does_not_say_which_is_for_both_rules_of_a_pattern():
    rules = [Rule("model", compute="fp32", recurse=False), Rule("model", compute="fp16", output="fp32")]
    amended = PrecisionPolicy("bf16", rules).amend({"model": "fp64"}, example())
    assert amended.rules == (Rule("model", compute="fp64", output="fp32"),)


def test_an_edit_that_recurses_takes_the_place_of_a_rule_that_does_not():
    policy = PrecisionPolicy("bf16", [Rule("model", compute="fp32", recurse=False)])
    assert policy.amend({"model": "fp16"}, example()).rules == (Rule("model", compute="fp16", recurse=False),)
    amended = policy.amend({"model": {"compute": "fp16", "recurse": True}}, example())
    assert amended.rules == (Rule("model", compute="fp16"),)


def test_a_rule_of_the_same_pattern_with_no_children_left_is_dropped():
    policy = PrecisionPolicy("bf16", [Rule("model.head", compute="fp16")])
    amended = policy.amend({"model.head": {"compute": "fp32", "recurse": False}}, example())
    assert amended.rules == (Rule("model.head", compute="fp32", recurse=False),)


def test_weights_stay_as_stored_where_only_own_operations_move():
    rules = [Rule("model", param="fp64", compute="fp32"), Rule("model.head", param="fp64", compute="fp32")]
    edits = {"model": {"compute": "bf16", "recurse": False}, "model.head": {"compute": "bf16", "recurse": False}}
    amended = PrecisionPolicy("bf16", rules).amend(edits, example())
    assert amended.rules == (
        Rule("model", compute="bf16", recurse=False),
        Rule("model.head", param="fp64", compute="bf16", recurse=False),
        rules[0],
    )
    assert {layer.param for name, layer in amended.resolve(example()).items() if name.count(".") > 2} == {"fp64"}


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        ({"recurse": False}, "edit 'model.blocks': an edit must say at least one of compute and output"),
        ({"compute": "fp32", "recurse": "no"}, "edit 'model.blocks': recurse is 'no'; it must be true or false"),
        ({"compute": "fp32", "recurse": 0}, "recurse is 0; it must be true or false"),
        ({"compute": "fp32", "recurs": False}, "unknown key 'recurs', did you mean recurse?"),
        ({"compute": "fp32", "recurse": False}, "(model.blocks, recurse=False) does nothing: model.blocks has no"),
        ({"compute": "fp32", "depth": 1}, "unknown key 'depth'; an edit takes compute, output and recurse"),
    ],
)
def test_edits_about_recursion_that_are_refused(edit, problem):
    policy = PrecisionPolicy("bf16", [Rule("model.blocks", compute="fp16")])
    assert problem in error_of(policy, {"model.blocks": edit})
