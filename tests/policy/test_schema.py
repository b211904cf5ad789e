"""The JSON schema for editors: what it accepts, the reader accepts, and what it refuses, the reader refuses."""

import json
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml

from lightning_mixprec import MixPrecError, PrecisionPolicy

SCHEMA = json.loads((files("lightning_mixprec") / "policy" / "written" / "policy.schema.json").read_text())
CONFIGS = Path(__file__).parents[2] / "examples" / "configs"

GOOD = [
    {"default": "bf16"},
    {"default": "fp16", "allow_unmatched": True},
    {"default": "bf16", "model.head": "fp32", "**.norm": "c=fp32,o=input"},
    {"default": "bf16", "blocks": "c=fp8, s=row, g=input"},
    {"default": "bf16", "model.head": "p=fp32 , c=fp16"},
    {"default": "bf16", "rules": []},
    {"default": "bf16", "rules": [{"layers": "", "compute": "fp32", "recurse": False}]},
    {"default": "bf16", "rules": [{"types": ["Linear", "Conv2d"], "compute": "int8", "gradients": "none"}]},
    {"default": "fp32", "rules": [{"layers": ["a", "b"], "param": "bf16"}], "allow_unmatched": False},
]
BAD = [
    {},
    [],
    {"default": "bf17"},
    {"default": "fp8"},
    {"default": "bf16", "model.head": "fp33"},
    {"default": "bf16", "model.head": "x=fp32"},
    {"default": "bf16", "model.head": 32},
    {"default": "bf16", "model.head": "p=int8"},
    {"default": "bf16", "rules": {"layers": "head", "compute": "fp32"}},
    {"default": "bf16", "rules": [{"layers": "head"}]},
    {"default": "bf16", "rules": [{"compute": "fp32"}]},
    {"default": "bf16", "rules": [{"layers": "head", "comput": "fp32"}]},
    {"default": "bf16", "rules": [{"layers": "head", "compute": "input"}]},
    {"default": "bf16", "rules": [{"layers": "head", "compute": "fp32", "recurse": "no"}]},
    {"default": "bf16", "rules": [{"layers": "head", "compute": "fp32"}], "more": "fp32"},
    {"default": "bf16", "allow_unmatched": True, "head": "fp32"},
]


def accepts(policy):
    try:
        jsonschema.validate(policy, SCHEMA)
    except jsonschema.ValidationError:
        return False
    return True


def reads(policy):
    try:
        PrecisionPolicy.from_dict(policy)
    except MixPrecError:
        return False
    return True


def test_it_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("policy", GOOD, ids=str)
def test_good_policies_are_accepted_by_both(policy):
    assert accepts(policy) and reads(policy)


@pytest.mark.parametrize("policy", BAD, ids=str)
def test_bad_ones_are_refused_by_both(policy):
    assert not accepts(policy) and not reads(policy)


def test_the_policies_of_the_examples_are_accepted():
    found = []
    for path in CONFIGS.glob("*.yaml"):
        plugins = (yaml.safe_load(path.read_text()).get("trainer") or {}).get("plugins")
        policy = plugins.get("init_args", {}).get("policy") if isinstance(plugins, dict) else None
        found += [policy] if isinstance(policy, dict) else []
    assert len(found) > 10
    assert [policy for policy in found if not accepts(policy)] == []
