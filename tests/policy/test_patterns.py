import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.matching import ClassIndex, NameTree, class_names
from lightning_mixprec.policy.module_names import walk
from lightning_mixprec.policy.patterns import check_type_pattern, literal, parse
from lightning_mixprec.policy.policy import PrecisionPolicy
from lightning_mixprec.policy.rules import Rule

NAMES = [
    "",
    "model",
    "model.norm",
    "model.fc1",
    "model.fc10",
    "model.Fc1",
    "model.blocks",
    *(name for number in range(12) for name in (f"model.blocks.{number}", f"model.blocks.{number}.norm")),
    "model.odd",
    "model.odd.10",
    "model.odd.3",
    "model.odd.x",
    "head",
]


def found(pattern, names=NAMES):
    tree = NameTree(names)
    return [names[place] for place in sorted(tree.find(parse(pattern)))]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", [""]),
        ("**", NAMES),
        ("model", ["model"]),
        ("model.fc1", ["model.fc1"]),
        ("model.fc?", ["model.fc1"]),
        ("model.fc*", ["model.fc1", "model.fc10"]),
        ("model.[fF]c1", ["model.fc1", "model.Fc1"]),
        ("model.[!f]c1", ["model.Fc1"]),
        ("*", ["model", "head"]),
        ("*.norm", ["model.norm"]),
        ("**.fc1", ["model.fc1"]),
        ("model.**.fc1", ["model.fc1"]),
        ("model.odd.**", ["model.odd", "model.odd.10", "model.odd.3", "model.odd.x"]),
        ("model.**.**.odd", ["model.odd"]),
        ("model.blocks.[0:2]", ["model.blocks.0", "model.blocks.1"]),
        ("model.blocks.[-2:]", ["model.blocks.10", "model.blocks.11"]),
        ("model.blocks.[::5].norm", ["model.blocks.0.norm", "model.blocks.5.norm", "model.blocks.10.norm"]),
        ("model.blocks.[1:2:1]", ["model.blocks.1"]),
        ("model.blocks.[11::-11]", ["model.blocks.0", "model.blocks.11"]),
        ("model.blocks.[7:3]", []),
        ("model.blocks.[0-3]", ["model.blocks.0", "model.blocks.1", "model.blocks.2", "model.blocks.3"]),
        ("model.odd.[0:1]", ["model.odd.3"]),
        ("model.odd.[1:]", ["model.odd.10"]),
        ("**.[:1]", ["model.blocks.0", "model.odd.3"]),
        (r"re:model\.fc\d", ["model.fc1"]),
        (r"re:.*\.(fc10|x)", ["model.fc10", "model.odd.x"]),
        ("re:head|", ["", "head"]),
        ("MODEL", []),
        ("fc1", []),
    ],
)
def test_what_a_pattern_matches(pattern, names):
    assert found(pattern) == names


def test_double_star_stands_for_zero_segments_too():
    assert "model.norm" in found("model.**.norm")
    assert "model.blocks.7.norm" in found("model.**.norm")
    assert found("**.model") == ["model"]


@given(
    st.lists(st.text("ab1[]!*?-", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.lists(st.sampled_from(["a", "b", "ab", "1", "a1", "b-"]), min_size=1, max_size=3), max_size=8),
)
def test_globs_are_those_of_fnmatch_segment_by_segment(pattern, names):
    try:
        checked = parse(".".join(pattern))
    except PolicyError:
        return
    closed = sorted({tuple(name[:end]) for name in names for end in range(len(name) + 1)})
    tree = NameTree([".".join(name) for name in closed])
    expected = {
        place
        for place, name in enumerate(closed)
        if len(name) == len(pattern) and all(map(fnmatch.fnmatchcase, name, pattern))
    }
    assert tree.find(checked) == expected


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("model.blocks.[20-23]", "write the slice model.blocks.[20:24]"),
        ("model.blocks.[0-11].norm", "write the slice model.blocks.[0:12].norm"),
        ("blocks.[8-11]", "write the slice blocks.[8:12]"),
        ("model.blocks.[9-12].norm", "write the slice model.blocks.[9:13].norm"),
        ("layer[8-11]", "list the layers instead: layer8, layer9, layer10, layer11"),
        ("blocks.[10,11]", "write the slice blocks.[10:12]"),
        ("blocks.[3,7]", "list the layers: blocks.3, blocks.7"),
        ("blocks.[-1]", "write the slice blocks.[-1:]"),
        ("blocks.[-4]", "write the slice blocks.[-4:-3]"),
        ("blocks.[12]", "write blocks.12, or a slice"),
        ("blocks.[!0]", "write a slice of the blocks that are meant"),
        ("layer[10-12]", "list the layers instead: layer10, layer11, layer12"),
    ],
)
def test_a_character_class_that_would_match_the_wrong_blocks_shows_what_to_write(pattern, advice):
    with pytest.raises(PolicyError) as error:
        parse(pattern)
    assert "would match the wrong blocks" in str(error.value)
    assert advice in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "pattern", ["layer[12]", "blocks.[012]", "layer[1-4].conv", "[ab]*", "blocks.[0-9]", "x[a-f0-9]", "a[]]", "a[*]"]
)
def test_character_classes_that_are_right_are_accepted(pattern):
    assert parse(pattern).text == pattern


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("blocks.[3:7", "opens '[' and does not close it"),
        ("blocks.3]", "closes ']' without opening it"),
        ("blocks.[]", "opens '[' and does not close it"),
        ("blocks.[4-2]", "runs backwards"),
        ("blocks.[11-8]", "would match the wrong blocks; write the slice blocks.[8:12]"),
        ("blocks.[::0]", "the step of slice [::0] is 0"),
        ("blocks.[0:1:2:3]", "no slice"),
        ("blocks[0:4]", "no slice"),
        ("blocks.[1:2]x", "no slice"),
        ("a..b", "empty segment"),
        (".a", "empty segment"),
        ("a.", "empty segment"),
        ("foo**", "'**' stands alone between dots"),
        ("a.***", "'**' stands alone between dots"),
        ("model head", "write ? where a layer's name has one"),
        ("a\t", "has a blank"),
        ("re:", "no regular expression after the colon"),
        ("re:model.(head", "missing ), unterminated subpattern at position 6"),
        ("re:a{99999999999}", "no regular expression"),
    ],
)
def test_malformed_patterns(pattern, problem):
    with pytest.raises(PolicyError) as error:
        parse(pattern)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


class Outer:
    class LayerNorm:
        pass


def test_class_names_are_the_public_ones_too():
    assert {"Linear", "torch.nn.Linear", "torch.nn.modules.linear.Linear"} <= class_names(nn.Linear)
    assert class_names(Outer.LayerNorm) == {"LayerNorm", f"{__name__}.Outer.LayerNorm"}


def test_what_a_type_pattern_matches():
    class MyNorm(nn.LayerNorm):
        pass

    index = ClassIndex([nn.LayerNorm, MyNorm, nn.BatchNorm1d, nn.Linear, nn.LazyLinear, nn.LocalResponseNorm])
    assert index.matching("LayerNorm") == {nn.LayerNorm, MyNorm}
    assert index.matching("torch.nn.LayerNorm") == {nn.LayerNorm, MyNorm}
    assert index.matching("torch.nn.modules.normalization.LayerNorm") == {nn.LayerNorm, MyNorm}
    assert index.matching("torch.*.LayerNorm") == {nn.LayerNorm, MyNorm}
    assert index.matching("*Norm*") == {nn.LayerNorm, MyNorm, nn.BatchNorm1d, nn.LocalResponseNorm}
    assert index.matching("MyNorm") == {MyNorm}
    assert index.matching("Linear") == {nn.Linear, nn.LazyLinear}
    assert index.matching("linear") == set()
    assert index.matching("nn.Linear") == set()
    assert index.matching("*normalization*") == set(), "a pattern without a dot is about the class's own name"
    assert index.matching("M*") == {MyNorm}, "a glob is not about the base that all layers have"
    assert len(index.matching("Module")) == len(index.matching("*")) == 6


@pytest.mark.parametrize("text", ["", "a..b", "Layer Norm", "[Layer"])
def test_malformed_type_patterns(text):
    with pytest.raises(PolicyError, match="write"):
        check_type_pattern(text)


odd_keys = st.one_of(
    st.sampled_from(["re:", "re:a", "**", "*", "[0:2]", "[0]", "a b", "a\n", "default", "0", "1", "norm", "\\"]),
    st.text("abré:*?[]!-\\ \t\n(|)^$", min_size=1, max_size=4),
)


@given(st.dictionaries(odd_keys, st.lists(odd_keys, max_size=3), min_size=1, max_size=4))
def test_a_literal_matches_the_layer_of_that_name_alone(keys):
    layers = {key: nn.ModuleDict({below: nn.Identity() for below in belows}) for key, belows in keys.items()}
    model = nn.ModuleDict(layers)
    names = [node.name for node in walk(model)]
    for name in names:
        assert found(literal(name), names) == [name]
        if isinstance(model.get_submodule(name), nn.Identity):
            resolved = PrecisionPolicy("bf16", [Rule(literal(name), compute="fp32")]).resolve(model)
            assert [layer for layer, given in resolved.items() if given.compute == "fp32"] == [name]


@pytest.mark.parametrize("name", ["", "model", "model.blocks.10.norm", "model._orig", "é", "a:b", "a(b)"])
def test_a_literal_is_the_name_where_that_says_it(name):
    assert literal(name) == name
