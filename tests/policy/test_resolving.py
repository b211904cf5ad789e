import copy
import fnmatch
import gc
import pickle
import re
import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_models import Box
from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.module_names import walk
from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy
from lightning_mixprec.policy.resolving import resolve
from lightning_mixprec.policy.rules import Rule


class Block(Box):
    def __init__(self):
        super().__init__(norm=nn.LayerNorm(2), attn=nn.Linear(2, 2), mlp=nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


class Encoder(Box):
    def __init__(self, blocks=3):
        super().__init__(blocks=nn.ModuleList(Block() for _ in range(blocks)), norm=nn.LayerNorm(2))


def example():
    return Box(model=Box(encoder=Encoder(), head=nn.Linear(2, 2)))


def computes(policy, model):
    return {name: layer.compute for name, layer in policy.resolve(model).items()}


def names_in(policy, model, format):
    return [name for name, compute in computes(policy, model).items() if compute == format]


def test_the_default_holds_everywhere_under_no_rule():
    assignment = as_policy("bf16").resolve(example())
    assert {(layer.param, layer.compute, layer.output, layer.rule) for layer in assignment.values()} == {
        ("fp32", "bf16", None, None)
    }
    assert list(assignment) == [node.name for node in walk(example())]
    assert assignment.compute_formats == {"bf16"}


def test_a_rule_covers_the_subtree_and_recurse_false_only_the_layers_own_operations():
    deep = PrecisionPolicy("bf16", [Rule("model.encoder.blocks.0", compute="fp32")])
    assert names_in(deep, example(), "fp32") == [
        "model.encoder.blocks.0",
        "model.encoder.blocks.0.norm",
        "model.encoder.blocks.0.attn",
        "model.encoder.blocks.0.mlp",
        "model.encoder.blocks.0.mlp.0",
        "model.encoder.blocks.0.mlp.1",
    ]
    shallow = PrecisionPolicy("bf16", [Rule("model.encoder.blocks.0", compute="fp32", recurse=False)])
    assert names_in(shallow, example(), "fp32") == ["model.encoder.blocks.0"]


def test_a_rule_without_recurse_leaves_the_subtree_to_the_next_rule_for_the_same_layer():
    policy = PrecisionPolicy("bf16", [Rule("model", compute="fp32", recurse=False), Rule("model", compute="fp16")])
    found = computes(policy, example())
    assert (found["model"], found["model.head"], found[""]) == ("fp32", "fp16", "bf16")


def test_encoder_in_bf16_its_norms_in_fp32_works_in_either_order():
    rules = [Rule("model.encoder", compute="bf16"), Rule(types="LayerNorm", compute="fp32")]
    one, other = (computes(PrecisionPolicy("fp16", ordered), example()) for ordered in (rules, rules[::-1]))
    assert one == other
    assert one["model.encoder.blocks.1.norm"] == "fp32"
    assert one["model.encoder.blocks.1.attn"] == "bf16"
    assert one["model.head"] == "fp16"


def test_among_rules_for_the_same_layer_the_first_decides_alone():
    first, second = Rule("model.head", compute="fp32"), Rule("**.head", types="Linear", compute="fp32", output="input")
    policy = PrecisionPolicy("bf16", [first, Rule("model.encoder.norm", compute="fp32"), second], allow_unmatched=True)
    with pytest.raises(PolicyError, match="decides nothing"):
        policy.resolve(example())
    layer = PrecisionPolicy("bf16", [second]).resolve(example())["model.head"]
    assert (layer.param, layer.compute, layer.output, layer.rule) == ("fp32", "fp32", "input", second)


def test_what_the_deciding_rule_does_not_say_is_not_taken_from_another_rule():
    policy = PrecisionPolicy("bf16", [Rule("model", compute="fp16"), Rule("model.head", output="input")])
    assert policy.resolve(example())["model.head"].formats == ("fp32", "bf16", "input")


def test_the_examples_of_the_design():
    model = Box(model=Box(encoder=Encoder(12), blocks=nn.ModuleList(Block() for _ in range(6)), head=nn.Linear(2, 2)))
    short = PrecisionPolicy.from_dict({"default": "fp16", "model.head": "fp32"})
    assert names_in(short, model, "fp32") == ["model.head"]
    globbed = PrecisionPolicy("bf16", [Rule("model.encoder.*.*.attn", compute="fp32")])
    assert len(names_in(globbed, model, "fp32")) == 12
    norms = PrecisionPolicy("bf16", [Rule("model.**.norm", compute="fp32", output="input")])
    assert len(names_in(norms, model, "fp32")) == 12 + 1 + 6
    sliced = PrecisionPolicy("bf16", [Rule("model.blocks.[0:4]", compute="fp32", recurse=False)])
    assert names_in(sliced, model, "fp32") == [f"model.blocks.{number}" for number in range(4)]
    last = PrecisionPolicy("bf16", [Rule("model.encoder.blocks.[-4:]", compute="fp32", recurse=False)])
    assert names_in(last, model, "fp32") == [f"model.encoder.blocks.{number}" for number in range(8, 12)]
    types = PrecisionPolicy("bf16", [Rule(types=["torch.nn.LayerNorm", "*Conv*"], compute="fp32")])
    assert len(names_in(types, model, "fp32")) == 12 + 1 + 6
    both = PrecisionPolicy("bf16", [Rule("model.**", types="LayerNorm", compute="fp32")])
    assert computes(both, model) == computes(types, model)


def test_fc1_does_not_match_fc10():
    model = Box(fc1=nn.Linear(2, 2), fc10=nn.Linear(2, 2))
    assert names_in(PrecisionPolicy("bf16", [Rule("fc1", compute="fp32")]), model, "fp32") == ["fc1"]


def test_param_is_as_stored_where_no_rule_says_it():
    model = Box(
        low=nn.Linear(2, 2).bfloat16(),
        high=nn.Sequential(nn.ReLU(), nn.Linear(2, 2).double()),
        mixed=Box(act=nn.ReLU(), norm=nn.LayerNorm(2).double()),
        none=nn.ReLU(),
    )
    model.complex = nn.Linear(2, 2)
    model.complex.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    model.complex.bias = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    policy = PrecisionPolicy("bf16", [Rule("mixed.norm", param="fp32"), Rule("none", compute="fp32")])
    found = {name: layer.param for name, layer in policy.resolve(model).items()}
    assert found == {
        "": "bf16",
        "low": "bf16",
        "high": "fp64",
        "high.0": "fp64",
        "high.1": "fp64",
        "mixed": "fp32",
        "mixed.act": "fp32",
        "mixed.norm": "fp32",
        "none": "bf16",
        "complex": "fp64",
    }
    assert as_policy("bf16").resolve(nn.ReLU())[""].param == "fp32"


def test_a_weight_tied_to_one_with_a_rule_is_stored_as_that_rule_says():
    model = Box(embed=nn.Embedding(3, 2), head=nn.Linear(2, 3, bias=False))
    model.head.weight = model.embed.weight
    assignment = PrecisionPolicy("bf16", [Rule("embed", param="fp64")]).resolve(model)
    assert assignment["head"].param == assignment["embed"].param == "fp64"
    assert [assignment[name].is_stored_by_rule for name in ("head", "embed")] == [False, True]
    assert assignment[""].param == "fp64"


def test_a_tied_weight_under_two_params_is_refused():
    model = Box(embed=nn.Embedding(3, 2), head=nn.Linear(2, 3, bias=False))
    model.head.weight = model.embed.weight
    policy = PrecisionPolicy("bf16", [Rule("embed", param="fp64"), Rule("head", param="fp32")])
    with pytest.raises(
        PolicyError, match="layers 'embed' and 'head' share a weight, but rules store it as fp64 and as fp32"
    ):
        policy.resolve(model)
    agreed = PrecisionPolicy("bf16", [Rule("embed", param="fp64", compute="fp32"), Rule("head", param="fp64")])
    assert agreed.resolve(model)["head"].formats == ("fp64", "bf16", None)


def shared_model():
    shared = Block()
    return Box(a=Box(inner=shared), b=Box(inner=shared), c=nn.Linear(2, 2))


def test_a_rule_for_any_name_of_a_shared_layer_holds_for_all_its_names():
    assignment = PrecisionPolicy("bf16", [Rule("b.inner", compute="fp32")]).resolve(shared_model())
    assert assignment["a.inner"] is assignment["b.inner"]
    assert assignment["a.inner.mlp.0"].compute == assignment["b.inner.mlp.0"].compute == "fp32"
    assert assignment["a"].compute == assignment["b"].compute == "bf16"


def test_a_shared_layer_goes_with_the_parent_that_has_a_rule():
    assignment = PrecisionPolicy("bf16", [Rule("b", compute="fp32")]).resolve(shared_model())
    assert assignment["a.inner"].compute == assignment["b.inner.norm"].compute == "fp32"


def test_a_shared_layer_goes_with_its_nearest_parent():
    shared = nn.Linear(2, 2)
    model = Box(far=Box(x=Box(y=Box(shared=shared))), near=Box(shared=shared))
    for rules in ([Rule("far", compute="fp16"), Rule("near", compute="fp32")],):
        for ordered in (rules, rules[::-1]):
            assert computes(PrecisionPolicy("bf16", ordered), model)["far.x.y.shared"] == "fp32"


def test_a_shared_layer_between_two_rules_is_refused_and_a_rule_for_itself_helps():
    rules = [Rule("a", compute="fp32"), Rule("b", compute="fp16")]
    with pytest.raises(PolicyError) as error:
        PrecisionPolicy("bf16", rules).resolve(shared_model())
    assert str(error.value) == (
        "layer 'a.inner' is also 'b.inner', and rule 'a' makes it fp32/fp32/- while rule 'b' makes it fp32/fp16/-; "
        "write a rule for a.inner itself"
    )
    policy = PrecisionPolicy("bf16", [*rules, Rule("a.inner", compute="bf16")])
    assert computes(policy, shared_model())["b.inner.attn"] == "bf16"


def test_a_shared_layer_between_two_rules_that_agree_is_accepted():
    policy = PrecisionPolicy("bf16", [Rule("a", compute="fp32"), Rule("b", compute="fp32", param="fp32")])
    assert computes(policy, shared_model())["b.inner.attn"] == "fp32"


def test_a_layer_that_contains_itself():
    model = Box(a=Box(b=nn.Linear(2, 2)))
    model.a.back = model.a
    assert names_in(PrecisionPolicy("bf16", [Rule("a", compute="fp32")]), model, "fp32") == ["a", "a.b"]


def test_an_attention_module_is_one_unit():
    model = Box(attn=nn.MultiheadAttention(4, 2), fc=nn.Linear(2, 2))
    assert computes(PrecisionPolicy("bf16", [Rule(types="Linear", compute="fp32")]), model) == {
        "": "bf16",
        "attn": "bf16",
        "attn.out_proj": "bf16",
        "fc": "fp32",
    }
    shallow = PrecisionPolicy("bf16", [Rule("attn", compute="fp32", recurse=False)])
    assert computes(shallow, model)["attn.out_proj"] == "fp32"


def test_parametrizations_are_ordinary_layers():
    model = Box(fc=nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    policy = PrecisionPolicy("bf16", [Rule("**.parametrizations.**", types="_WeightNorm", compute="fp32")])
    assert names_in(policy, model, "fp32") == ["fc.parametrizations.weight.0"]
    assert names_in(PrecisionPolicy("bf16", [Rule(types="Linear", compute="fp32")]), model, "fp32")[0] == "fc"


def test_lazy_layers():
    model = Box(lazy=nn.LazyLinear(3), norm=nn.LazyBatchNorm1d())
    assignment = PrecisionPolicy("bf16", [Rule(types="Linear", compute="fp32")]).resolve(model)
    assert assignment["lazy"].formats == ("fp32", "fp32", None)
    assert assignment.facts["lazy"].parameters is None
    assert "lazy" in str(assignment)
    assert type(model.lazy) is nn.LazyLinear


def wrappers():
    def data_parallel(module):
        return type("DistributedDataParallel", (Box,), {})(module=module)

    def checkpointed(module):
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        return checkpoint_wrapper(module)

    return {
        "compiled": torch.compile,
        "checkpointed": checkpointed,
        "data parallel": data_parallel,
        "averaged": torch.optim.swa_utils.AveragedModel,
        "compiled and data parallel": lambda module: data_parallel(torch.compile(module)),
    }


@pytest.mark.parametrize("wrapper", wrappers())
def test_wrappers_leave_the_names_as_they_are_written(wrapper):
    policy = PrecisionPolicy(
        "bf16", [Rule("model.encoder.blocks.[-1:]", compute="fp32"), Rule("model.head", compute="fp16")]
    )
    plain = policy.resolve(example())
    wrap = wrappers()[wrapper]
    model = example()
    model.model.encoder.blocks[2] = wrap(model.model.encoder.blocks[2])
    model.model = wrap(model.model)
    assert policy.resolve(wrap(model)) == plain


def test_a_real_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        assert list(as_policy({"default": "bf16", "0": "fp32"}).resolve(wrapped)) == ["", "0", "1"]
    finally:
        torch.distributed.destroy_process_group()


def test_an_assignment_keeps_no_hold_on_the_model():
    model = example()
    alive = weakref.ref(model)
    assignment = as_policy("bf16").resolve(model)
    del model
    gc.collect()
    assert alive() is None
    for other in (pickle.loads(pickle.dumps(assignment)), copy.deepcopy(assignment)):
        assert other == assignment
        assert str(other) == str(assignment)
        assert other.tallies == assignment.tallies


def test_resolving_leaves_the_model_alone():
    model = example()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    PrecisionPolicy("bf16", [Rule("model.head", param="fp64", compute="fp32")]).resolve(model)
    assert all(vars(module) == before[name] for name, module in model.named_modules())


def test_changes_between_assignments():
    model = shared_model()
    one = as_policy("bf16").resolve(model)
    other = PrecisionPolicy("bf16", [Rule("b.inner.norm", compute="fp32")]).resolve(model)
    assert {name: (old.compute, new.compute) for name, (old, new) in one.changes_to(other).items()} == {
        "a.inner.norm": ("bf16", "fp32")
    }
    assert one.changes_to(one) == {}
    assert one != other
    assert other.compute_formats == {"bf16", "fp32"}
    assert one.compute_formats == {"bf16"}


def test_tallies_count_what_each_rule_matched_decided_and_lost():
    model = Box(attn=nn.MultiheadAttention(4, 2), enc=Encoder(2))
    policy = PrecisionPolicy(
        "bf16",
        [Rule("enc.blocks.0.attn", compute="fp16"), Rule(types="Linear", compute="fp32"), Rule("enc", compute="fp16")],
    )
    tallies = policy.resolve(model).tallies
    assert [(tally.matched, tally.decided, dict(tally.lost)) for tally in tallies] == [
        (1, 1, {}),
        (5, 3, {0: 1, None: 1}),
        (1, 15 - 4, {}),
    ]


def big_model():
    with torch.device("meta"):
        return Box(model=Encoder(1667), head=nn.Linear(2, 2))


def hundred_rules():
    rules = []
    for number in range(17):
        rules += [
            Rule(f"model.blocks.{number}.attn", compute="fp32"),
            Rule(f"model.blocks.*{number + 100}.mlp.[01]", compute="fp16"),
            Rule(f"**.{number + 50}.norm", compute="fp32", output="input"),
            Rule(f"model.blocks.[{number * 20 + 200}:{number * 20 + 220}]", compute="fp16"),
            Rule(rf"re:model\.blocks\.1{number + 10}\d\.attn", compute="fp32"),
            Rule(f"model.blocks.1{number + 10}?.mlp.*", types="ReLU", compute="fp32"),
        ]
    return rules[:100]


def test_ten_thousand_layers_against_a_hundred_rules():
    model, rules = big_model(), hundred_rules()
    assert len(list(model.modules())) > 10_000
    start = time.process_time()
    PrecisionPolicy("bf16", rules).resolve(model)
    # Measured at 0.2 s of this process; the bound allows for slow machines.
    assert time.process_time() - start < 5


# An independent model of matching and deciding: slow, recursive, by name alone.


def reference_match(pattern, segments, siblings):
    if not pattern:
        return not segments
    if pattern[0] == "**":
        rest = pattern[1:]
        return any(reference_match(rest, segments[cut:], siblings[cut:]) for cut in range(len(segments) + 1))
    if not segments:
        return False
    if slice_ := re.fullmatch(r"\[(-?\d*):(-?\d*):?(-?\d*)\]", pattern[0]):
        bounds = [int(text) if text else None for text in slice_.groups()]
        numbered = sorted((name for name in siblings[0] if name.isdecimal()), key=int)
        matches = segments[0] in numbered[slice(*bounds)]
    else:
        matches = fnmatch.fnmatchcase(segments[0], pattern[0])
    return matches and reference_match(pattern[1:], segments[1:], siblings[1:])


def reference_matches(rule, name, module, model):
    def by_name(pattern):
        if pattern.startswith("re:"):
            return re.fullmatch(pattern[3:], name) is not None
        segments = name.split(".") if name else []
        above = [".".join(segments[:depth]) for depth in range(len(segments))]
        siblings = [list(model.get_submodule(parent)._modules) for parent in above]
        return reference_match(pattern.split(".") if pattern else [], segments, siblings)

    named = rule.layers is None or any(map(by_name, rule.patterns))
    typed = rule.types is None or any(
        fnmatch.fnmatchcase(cls.__name__, pattern)
        for pattern in rule.type_patterns
        for cls in type(module).__mro__
        if cls not in (nn.Module, object)
    )
    return named and typed


def reference_deciders(policy, model):
    """For each module the rules, by position, that may decide: several if parents at one distance disagree."""
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    matching = {
        module: [
            number
            for number, rule in enumerate(policy.rules)
            if any(reference_matches(rule, name, module, model) for name in names[module])
        ]
        for module in names
    }
    deciders = {}
    for module in names:
        found = set(matching[module][:1])
        above = {module}
        while not found and above:
            above = {parent for parent in names if any(child in above for child in parent.children())}
            recursive = [[number for number in matching[parent] if policy.rules[number].recurse] for parent in above]
            found = {numbers[0] for numbers in recursive if numbers}
        deciders[module] = found
    return names, deciders


@st.composite
def models(draw):
    pool = []

    def grow(depth):
        kind = draw(st.sampled_from(["leaf", "leaf", "box", "list", "shared"])) if depth else "leaf"
        if kind == "shared" and pool:
            return draw(st.sampled_from(pool))
        if kind == "box":
            names = draw(st.lists(st.sampled_from(["a", "b", "ab", "norm"]), unique=True, max_size=3))
            module = Box(**{name: grow(depth - 1) for name in names})
        elif kind == "list":
            module = nn.Sequential(*(grow(depth - 1) for _ in range(draw(st.integers(0, 3)))))
        else:
            module = draw(st.sampled_from([nn.ReLU, nn.Identity, nn.Tanh]))()
        pool.append(module)
        return module

    return Box(**{name: grow(3) for name in ("a", "b", "c")})


rules_for_models = st.builds(
    Rule,
    layers=st.one_of(
        st.none(),
        st.lists(
            st.sampled_from(["", "a", "b", "*", "**", "a*", "?", "[ab]", "[0:2]", "[-1:]", "norm", "1", "c"]),
            min_size=1,
            max_size=3,
        ).map(lambda parts: ".".join(part for part in parts if part)),
        st.sampled_from([r"re:.*norm", r"re:a\..*", r"re:(b|c)\.\d"]),
    ),
    types=st.sampled_from(["*", "ReLU", ["Tanh", "Identity"], "Seq*", "Box"]),
    compute=st.sampled_from(["fp64", "fp32", "bf16", "fp16"]),
    recurse=st.booleans(),
)


@settings(max_examples=300)
@given(models(), st.lists(rules_for_models, max_size=5))
def test_deciding_agrees_with_the_reference(model, rules):
    policy = PrecisionPolicy("bf16", rules)
    names, deciders = reference_deciders(policy, model)
    conflicts = [
        module for module, found in deciders.items() if len({policy.rules[number].compute for number in found}) > 1
    ]
    if conflicts:
        with pytest.raises(PolicyError, match="is also"):
            resolve(policy.default, policy.rules, model)
        return
    resolution = resolve(policy.default, policy.rules, model)
    by_name = dict(zip(resolution.inventory.tree.names, resolution.inventory.layer_at, strict=True))
    assert set(by_name) == {name for aliases in names.values() for name in aliases}
    for module, aliases in names.items():
        expected = min(deciders[module], default=None)
        assert {resolution.decided_by[by_name[name]] for name in aliases} == {expected}
