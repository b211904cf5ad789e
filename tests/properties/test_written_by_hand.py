"""Whatever a user may write: a policy, a scaling or a rule comes out valid, or one line says what is wrong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.optim.loss_scaling_options import LossScaling
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy
from lightning_mixprec.policy.rules import Rule

VALID = (
    "# a policy\ndefault: bf16\nrules:\n- layers: &norms ['**.norm', \"model.[0:4]\"]\n  compute: fp32\n"
    "  output: input\n- types: [LayerNorm, '*Norm*']\n  param: fp64\n  recurse: false\nallow_unmatched: true\n",
    "default: fp16\nmodel.head: fp32\n'**.norm': c=fp32,o=input\n're:a.*': p=fp64\n",
    "{default: bf16, rules: [{layers: a, compute: fp16}]}\n",
)
PIECES = [
    *"*&!:-[]{}'\"|>?%@`#~\t\n\x00\x85\u2028\ufeff\ud7ff",
    *("<<", "  ", "---", "...", "!!python/object:os.system ", "&a *a", "0x1F", "1e400", ".nan", "yes", "2020-13-45"),
    *("fp32", "fp8", "re:(", "re:", "[0:4]", "[20-23]", "**", "layers", "rules: ", "default: "),
]


@st.composite
def mutated(draw):
    text = draw(st.sampled_from(VALID))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(text))), draw(st.integers(0, 8))
        text = text[:at] + draw(st.sampled_from(["", *PIECES])) + text[at + length * draw(st.integers(0, 1)) :]
    return text


def is_refused_in_one_line(call, *arguments):
    """Whether it is; anything but an error of ours fails the test."""
    try:
        call(*arguments)
    except MixPrecError as error:
        assert 10 < len(str(error)) < 2000
        assert len(str(error).splitlines()) == 1
        return True
    return False


@given(mutated() | st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
@settings(max_examples=300)
def test_a_file_is_a_policy_or_one_line(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if not is_refused_in_one_line(PrecisionPolicy.from_file, path):
        policy = PrecisionPolicy.from_file(path)
        assert PrecisionPolicy.from_dict(policy.to_dict()) == policy
        policy.to_file(path)
        assert PrecisionPolicy.from_file(path) == policy


@given(st.binary(max_size=30))
def test_bytes_are_a_policy_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    is_refused_in_one_line(PrecisionPolicy.from_file, path)


WORDS = st.sampled_from(["default", "rules", "layers", "types", "compute", "output", "param", "recurse", "fp32", "a"])
ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
ANYTHING = st.recursive(
    ODD | WORDS | st.just(object()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS | ODD, inner, max_size=4)
        | st.tuples(inner, inner)
        | st.frozensets(ODD, max_size=2)
    ),
    max_leaves=6,
)
OPTIONS = ["init_scale", "growth_factor", "backoff_factor", "growth_interval", "min_scale", "hysteresis", "at_min"]


@given(ANYTHING | st.fixed_dictionaries({"default": WORDS}, optional={"rules": ANYTHING, "allow_unmatched": ANYTHING}))
@settings(max_examples=150)
def test_a_value_is_a_policy_or_one_line(value):
    if not is_refused_in_one_line(as_policy, value):
        assert as_policy(as_policy(value).to_dict()) == as_policy(value)
    is_refused_in_one_line(PrecisionPolicy.from_dict, value)


@given(st.dictionaries(st.sampled_from(["layers", "types", "param", "compute", "output", "recurse"]), ANYTHING | WORDS))
@settings(max_examples=120)
def test_arguments_are_a_rule_or_one_line(arguments):
    if not is_refused_in_one_line(lambda: Rule(**arguments)):
        assert Rule(**Rule(**arguments).to_dict()) == Rule(**arguments)


@given(ANYTHING | st.dictionaries(st.sampled_from(OPTIONS), st.integers(-1, 70000) | st.floats() | ANYTHING))
@settings(max_examples=120)
def test_a_value_is_a_loss_scaling_or_one_line(value):
    if not is_refused_in_one_line(LossScaling.from_value, value):
        options = LossScaling.from_value(value)
        assert 0 < options.min_scale <= options.init_scale <= options.max_scale
    is_refused_in_one_line(lambda: PerLayerPrecision("fp16", loss_scaling=value))


@pytest.mark.parametrize("name", ["skip_nonfinite", "eval_policy", "on_policy_change"])
@given(value=ANYTHING)
@settings(max_examples=30)
def test_an_argument_of_the_plugin_is_taken_or_one_line(name, value):
    is_refused_in_one_line(lambda: PerLayerPrecision("bf16", **{name: value}))
