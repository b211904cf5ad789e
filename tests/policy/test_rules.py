import copy
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import lightning_mixprec.policy.rules as rule_module
from lightning_mixprec.errors import MixPrecError, PolicyError
from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy, describe_difference
from lightning_mixprec.policy.rules import FieldError, Rule, parse_short_form

segments = st.one_of(
    st.sampled_from(
        ["*", "**", "[0:4]", "[-4:]", "norm", "fc?", "blocks", "[ab]x", "'q'", '"q"', "#1", "no", "~", "1.5"]
    ),
    st.text(st.characters(exclude_categories=["Zs", "Zl", "Zp", "Cs", "Cc"], exclude_characters="[].*"), min_size=1),
)
patterns = st.one_of(st.just(""), st.lists(segments, min_size=1, max_size=4).map(".".join), st.just(r"re:a b\.(c|d)"))
type_patterns = st.sampled_from(["LayerNorm", "torch.nn.Linear", "*Norm*"])
formats = st.sampled_from(["fp64", "fp32", "bf16", "fp16"])


def one_or_more(strategy):
    return st.one_of(strategy, st.lists(strategy, min_size=1, max_size=3))


@st.composite
def rules(draw):
    return Rule(
        layers=draw(one_or_more(patterns)),
        types=draw(st.one_of(st.none(), one_or_more(type_patterns))),
        param=draw(st.sampled_from([None, "fp32", "fp64"])),
        compute=draw(formats),
        output=draw(st.one_of(st.none(), st.just("input"), formats)),
        recurse=draw(st.booleans()),
    )


policies = st.builds(PrecisionPolicy, formats, st.lists(rules(), max_size=4), st.booleans())


def error_of(call, *args, **kwargs):
    with pytest.raises(PolicyError) as error:
        call(*args, **kwargs)
    assert isinstance(error.value, MixPrecError)
    assert "\n" not in str(error.value)
    return str(error.value)


@given(policies)
def test_to_dict_and_back_is_the_same_policy(policy):
    assert PrecisionPolicy.from_dict(policy.to_dict()) == policy
    assert PrecisionPolicy.from_dict(policy.to_dict()).to_dict() == policy.to_dict()
    assert hash(PrecisionPolicy.from_dict(policy.to_dict())) == hash(policy)


@given(policies)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_to_file_and_back_is_the_same_policy(policy):
    policy.to_file("policy.yaml")
    assert PrecisionPolicy.from_file("policy.yaml") == policy
    assert PrecisionPolicy.from_dict(yaml.safe_load(Path("policy.yaml").read_text(encoding="utf-8"))) == policy


@given(policies)
def test_pickle_and_deepcopy_give_the_same_policy(policy):
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy


@given(policies)
def test_to_dict_is_of_plain_types(policy):
    def is_plain(value):
        if type(value) is dict:
            return all(type(key) is str and is_plain(entry) for key, entry in value.items())
        return all(map(is_plain, value)) if type(value) is list else type(value) in (str, bool)

    assert is_plain(policy.to_dict())


def test_from_dict_and_back_is_the_same_mapping():
    mapping = {
        "default": "bf16",
        "rules": [
            {"layers": "model.head", "compute": "fp32"},
            {"layers": ["a.*", "b"], "types": ["LayerNorm"], "compute": "fp32", "output": "input", "recurse": False},
            {"types": "*Norm*", "param": "fp64"},
        ],
    }
    assert PrecisionPolicy.from_dict(mapping).to_dict() == mapping
    mapping["allow_unmatched"] = True
    assert PrecisionPolicy.from_dict(mapping).to_dict() == mapping


def test_the_short_form_is_the_full_form_in_short():
    short = {"default": "fp16", "model.head": "fp32", "**.norm": "c=fp32,o=input", "": "p=fp64, c=bf16"}
    assert PrecisionPolicy.from_dict(short) == PrecisionPolicy(
        "fp16",
        [
            Rule("model.head", compute="fp32"),
            Rule("**.norm", compute="fp32", output="input"),
            Rule("", param="fp64", compute="bf16"),
        ],
    )


def test_the_keys_of_the_full_form_may_be_layers_of_the_short_form():
    policy = PrecisionPolicy.from_dict({"default": "bf16", "rules": "fp32", "allow_unmatched": "fp16"})
    assert [rule.layers for rule in policy.rules] == ["rules", "allow_unmatched"]


def test_rules_may_be_mappings_and_are_not_changed_by_changing_the_list():
    given_rules = [{"layers": ["a"], "compute": "fp32"}]
    policy = PrecisionPolicy("bf16", given_rules)
    given_rules[0]["layers"].append("b")
    given_rules.clear()
    assert policy == PrecisionPolicy("bf16", [Rule(["a"], compute="fp32")])
    with pytest.raises(AttributeError):
        policy.default = "fp16"
    with pytest.raises(AttributeError):
        policy.rules[0].compute = "fp16"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "a rule selects no layers; give layers, types or both"),
        ({"compute": "fp32"}, "a rule selects no layers"),
        ({"layers": "a"}, "must say at least one of param, compute and output"),
        ({"layers": [], "compute": "fp32"}, "layers is an empty list"),
        ({"types": (), "compute": "fp32"}, "types is an empty list"),
        ({"layers": 3, "compute": "fp32"}, "layers is 3 (int); write a string or a list of strings"),
        ({"layers": {"a"}, "compute": "fp32"}, "write a string or a list of strings"),
        ({"layers": ["a", None], "compute": "fp32"}, "layers has None (NoneType); write a string"),
        ({"types": torch.nn.LayerNorm, "compute": "fp32"}, "write a string or a list of strings"),
        ({"types": [torch.nn.LayerNorm], "compute": "fp32"}, "types has LayerNorm (type); write a string"),
        ({"layers": "a", "compute": "fp61"}, "compute: unknown format 'fp61', did you mean"),
        (
            {"layers": "a", "compute": "bfloat16"},
            "unknown format 'bfloat16', did you mean 'bf16'? compute takes fp64, fp32",
        ),
        (
            {"layers": "a", "compute": 16},
            "compute is 16 (int), did you mean 'fp16'? compute takes fp64, fp32, bf16, fp16",
        ),
        ({"layers": "a", "compute": torch.bfloat16}, "compute is torch.bfloat16 (dtype), did you mean 'bf16'? compute"),
        (
            {"layers": "a", "compute": torch.float16},
            "compute is torch.float16 (dtype), did you mean 'fp16'? compute takes",
        ),
        (
            {"layers": "a", "output": "fp8"},
            "output is 'fp8', in which products of Linear layers compute and nothing else; output takes fp64, fp32, "
            "bf16, fp16, input, and a rule may say compute: fp8",
        ),
        ({"layers": "a", "output": "int8"}, "output is 'int8', in which products of Linear layers compute"),
        ({"layers": "a", "param": "int8"}, "param is 'int8', but weights are not stored in 8 bits"),
        ({"layers": "a", "compute": "fp8", "scaling": "block"}, "scaling is 'block'; scaling takes tensor or row"),
        ({"layers": "a", "compute": "fp8", "gradients": 1}, "gradients is 1; gradients takes all or input or none"),
        ({"layers": "a", "compute": "bf16", "scaling": "row"}, "but the rule says compute: bf16; leave scaling out"),
        (
            {"layers": "a", "scaling": "row"},
            "scaling is said of compute: fp8 and int8, but the rule does not say compute",
        ),
        ({"layers": "a", "compute": "int8", "scaling": "tensor"}, "int8 is scaled by row; leave scaling out"),
        ({"layers": "a", "compute": "e4m3"}, "not computed in yet"),
        ({"layers": "a", "output": "e5m2"}, "output is 'e5m2', which is not computed in yet"),
        ({"layers": "a", "output": "inptu"}, "unknown format 'inptu', did you mean input? output takes"),
        ({"layers": "a", "compute": "input"}, "which only output can be"),
        ({"layers": "a", "param": "e4m3"}, "weights are not stored in 8 bits; param takes fp64, fp32, bf16, fp16"),
        ({"layers": "a", "compute": "fp32", "recurse": "no"}, "recurse is 'no'; it must be true or false"),
        ({"layers": "a.[20-23]", "compute": "fp32"}, "write the slice a.[20:24]"),
        ({"layers": ["a", "re:("], "compute": "fp32"}, "missing ), unterminated subpattern"),
        ({"types": "Layer Norm", "compute": "fp32"}, "has a blank"),
    ],
)
def test_what_a_rule_refuses(arguments, problem):
    assert problem in error_of(Rule, **arguments)


@pytest.mark.parametrize(
    ("mapping", "problem"),
    [
        ([], "a policy is a mapping, got list"),
        ({}, "the policy has no default"),
        ({"defalt": "bf16", "a": "fp32"}, "did you mean default instead of 'defalt'?"),
        (
            {"default": "fp8"},
            "default is 'fp8', in which products of Linear layers compute and nothing else; default takes fp64, fp32, "
            "bf16, fp16, and a rule may say compute: fp8",
        ),
        ({"default": "bf16", "a": "s=row"}, "'a': scaling is said of compute: fp8 and int8, but the rule does not say"),
        ({"default": "bf16", "a": "c=fp8,g=some"}, "'a': gradients is 'some'; gradients takes all or input or none"),
        ({"default": None}, "default is None (NoneType)"),
        ({"default": "bf16", 0: "fp32"}, 'key 0 is no string; write it in quotes: "0"'),
        ({"default": "bf16", "rules": [], "a": "fp32"}, "unknown key 'a' beside rules; a pattern goes into the list"),
        ({"default": "bf16", "rules": [], "allow_unmatch": True}, "did you mean allow_unmatched?"),
        ({"default": "bf16", "rules": {"layers": "a"}}, "rules is a dict; write a list of rules, each beginning with"),
        ({"default": "bf16", "rules": ["a"]}, "rule 1: a rule is 'a'; write a mapping"),
        ({"default": "bf16", "rule": [{"layers": "a", "compute": "fp32"}]}, "did you mean rules?"),
        (
            {"default": "bf16", "a": "fp32", "allow_unmatched": True},
            "allow_unmatched goes beside rules, not beside patterns; the full form is",
        ),
        ({"default": 16}, "default is 16 (int), did you mean 'fp16'? default takes fp64, fp32, bf16, fp16"),
        ({"default": False}, "default is False (bool); default takes fp64, fp32, bf16, fp16"),
        (
            {"default": "bf16", "rules": [], "allow_unmatched": "yes"},
            "allow_unmatched is 'yes'; it must be true or false",
        ),
        ({"default": "bf16", "rules": [{"layer": "a"}]}, "rule 1: unknown key 'layer' in a rule, did you mean layers?"),
        ({"default": "bf16", "rules": [{"layers": "a", "origin": "x"}]}, "unknown key 'origin'"),
        (
            {"default": "bf16", "rules": [{"layers": "a", "compute": "fp32"}, {"layers": "b"}]},
            "rule 2: a rule must say",
        ),
        ({"default": "bf16", "a": {"compute": "fp32"}}, "'a': the value is"),
        ({"default": "bf16", "a": None}, "'a': the value is None (NoneType); write a compute format such as fp32"),
        ({"default": "bf16", "a": "c=fp32;o=input"}, "unknown format 'fp32;o=input'"),
        ({"default": "bf16", "a": "c=fp32,o"}, "cannot read 'o' in 'c=fp32,o'; write p=, c= or o="),
        ({"default": "bf16", "a": "compute=fp32"}, "cannot read 'compute=fp32'"),
        ({"default": "bf16", "a": "c=fp32,c=fp16"}, "says c= twice"),
        ({"default": "bf16", "a": "c=,o=input"}, "cannot read 'c='"),
        ({"default": "bf16", "a": ""}, "unknown format ''"),
        ({"default": "bf16", "a": "p=fp8"}, "param is 'fp8', but weights are not stored in 8 bits"),
        ({"default": "bf16", "blocks.[10,11]": "fp32"}, "write the slice blocks.[10:12]"),
    ],
)
def test_what_a_mapping_refuses(mapping, problem):
    assert problem in error_of(PrecisionPolicy.from_dict, mapping)


def test_what_a_policy_refuses():
    assert "rules is 'a'" in error_of(PrecisionPolicy, "bf16", "a")
    assert "default takes" in error_of(PrecisionPolicy, "float8")
    assert "allow_unmatched is 1" in error_of(PrecisionPolicy, "bf16", allow_unmatched=1)


@given(st.dictionaries(st.sampled_from("pco"), st.sampled_from(["fp64", "fp32"]), min_size=1))
def test_short_values_say_what_they_say(said):
    names = {"p": "param", "c": "compute", "o": "output"}
    text = ",".join(f"{key}={format}" for key, format in said.items())
    assert parse_short_form(text) == {names[key]: format for key, format in said.items()}


@given(st.text(max_size=12))
def test_any_other_value_is_one_line(text):
    assume(text not in ("fp64", "fp32", "bf16", "fp16"))
    try:
        parse_short_form(text)
    except PolicyError as error:
        assert len(str(error).splitlines()) == 1


def test_as_policy_takes_all_that_a_policy_may_be_given_as(tmp_path):
    policy = PrecisionPolicy("fp16", [Rule("model.head", compute="fp32")])
    policy.to_file(tmp_path / "p.yaml")
    assert as_policy("fp16") == PrecisionPolicy("fp16")
    assert as_policy(policy) is policy
    assert as_policy({"default": "fp16", "model.head": "fp32"}) == policy
    assert as_policy(tmp_path / "p.yaml") == as_policy(str(tmp_path / "p.yaml")) == as_policy("p.yaml") == policy


def test_as_policy_takes_a_file_without_suffix(tmp_path):
    PrecisionPolicy("fp16").to_file("mine")
    assert as_policy("mine") == PrecisionPolicy("fp16")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("fp61", "did you mean"),
        ("fp61", "no file is called so"),
        ("float16", "policy: unknown format 'float16', did you mean 'fp16'? policy takes"),
        ("fp8", "policy is 'fp8', in which products of Linear layers compute and nothing else; policy takes fp64"),
        ("policy.yaml", "the policy file policy.yaml does not exist"),
        ("conf/policy", "the policy file conf/policy does not exist"),
        (16, "policy is 16 (int); give a format name, a path to a YAML file, a mapping or a PrecisionPolicy"),
        (None, "policy is None"),
        ("", "unknown format ''"),
        ("a\0b", "unknown format"),
    ],
)
def test_what_as_policy_refuses(value, problem):
    assert problem in error_of(as_policy, value)


def test_lightning_cli_parses_a_policy_from_yaml(tmp_path):
    from jsonargparse import ArgumentParser

    def train(policy: PrecisionPolicy):
        return policy

    (tmp_path / "config.yaml").write_text(
        "policy:\n  default: bf16\n  rules:\n  - layers: model.head\n    compute: fp32\n"
        "  - types: ['*Norm*', LayerNorm]\n    output: input\n    recurse: false\n"
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(train)
    config = parser.parse_args(["--config", "config.yaml"])
    build = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    assert build(config).policy == PrecisionPolicy(
        "bf16",
        [Rule("model.head", compute="fp32"), Rule(types=["*Norm*", "LayerNorm"], output="input", recurse=False)],
    )
    assert "origin" not in parser.dump(config)


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ({"default": "fp16"}, {"default": "fp16"}, "no difference"),
        ({"default": "fp16"}, {"default": "bf16"}, "default fp16 -> bf16"),
        ({"default": "fp16"}, {"default": "fp16", "a": "fp32"}, "a (c=fp32) added"),
        ({"default": "fp16", "a": "fp32"}, {"default": "fp16"}, "a (c=fp32) removed"),
        ({"default": "fp16", "a": "fp32"}, {"default": "fp16", "a": "c=fp32,o=input"}, "a c=fp32 -> c=fp32,o=input"),
        ({"default": "fp16", "a": "fp32", "b": "fp32"}, {"default": "fp16", "b": "fp32", "a": "fp32"}, "another order"),
        (
            {"default": "fp16"},
            {"default": "fp16", "rules": [], "allow_unmatched": True},
            "allow_unmatched false -> true",
        ),
    ],
)
def test_describe_difference(one, other, difference):
    assert difference in describe_difference(as_policy(one), as_policy(other))


def test_field_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(FieldError("no", "rules", 1)))
    assert (str(error), error.path) == ("no", ("rules", 1))


def test_rule_labels_are_readable():
    assert Rule("", compute="fp32").label == '""'
    assert (
        Rule(["a", "b.*"], types="LayerNorm", compute="fp32", recurse=False).label
        == "a | b.*, types LayerNorm, recurse=False"
    )
    assert Rule("a", param="fp64", compute="fp32", output="input").value == "p=fp64,c=fp32,o=input"


def test_every_field_is_checked_by_name():
    keys = {"layers", "types", "param", "compute", "output", "recurse", "scaling", "gradients"}
    assert set(rule_module.RULE_KEYS) == keys
