import os
from pathlib import Path

import pytest
from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.policy import PrecisionPolicy
from lightning_mixprec.policy.rules import Rule


def error_of(text):
    Path("policy.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PolicyError) as error:
        PrecisionPolicy.from_file("policy.yaml")
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_a_written_file_reads_well():
    PrecisionPolicy("bf16", [Rule(["**.norm", "modèle.tête"], compute="fp32", output="input")]).to_file("policy.yaml")
    assert Path("policy.yaml").read_text(encoding="utf-8") == (
        "default: bf16\nrules:\n- layers:\n  - '**.norm'\n  - modèle.tête\n  compute: fp32\n  output: input\n"
    )


def test_the_short_form_in_a_file():
    Path("policy.yaml").write_text(
        'default: fp16  # most layers\n"": bf16\nmodel.head: fp32\n"**.norm": c=fp32,o=input\n'
        "model.blocks.[0:4]: bf16\n0: fp32\nno: fp32\nre:a.*: fp32\n"
    )
    policy = PrecisionPolicy.from_file("policy.yaml")
    assert [rule.layers for rule in policy.rules] == [
        "",
        "model.head",
        "**.norm",
        "model.blocks.[0:4]",
        "0",
        "no",
        "re:a.*",
    ]


def test_anchors_that_are_meant_are_read():
    Path("policy.yaml").write_text(
        "default: bf16\nrules:\n- layers: &norms ['a', 'b']\n  compute: fp32\n- layers: *norms\n  output: input\n"
    )
    assert PrecisionPolicy.from_file("policy.yaml").rules[1].patterns == ("a", "b")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "default: bf16\n**.norm: fp32\n",
            "policy.yaml:2: a pattern that begins with '*' must be quoted: write \"**.norm\"",
        ),
        (
            "default: bf16\n*.norm: fp32\n",
            "policy.yaml:2: a pattern that begins with '*' must be quoted: write \"*.norm\"",
        ),
        ("default: bf16\nrules:\n- layers: **.norm\n  compute: fp32\n", "policy.yaml:3: a pattern that begins"),
        ("default: bf16\nrules:\n- layers: [a, *]\n  compute: fp32\n", "policy.yaml:3: a pattern that begins"),
        ("default: bf16\nrules:\n- layers: *.blocks.[0:4].x\n  compute: fp32\n", 'write "*.blocks.[0:4].x"'),
        ("default: bf16\n*norm: fp32\n", 'write "*norm"'),
        ("default: bf16\n[0:4].norm: fp32\n", "policy.yaml:2: "),
        ("default: bf16\n[a]: fp32\n", "policy.yaml:2: a key that begins with '[' or '{' must be quoted"),
        ("default: bf16\na: fp32\nb: fp32\na: fp16\n", "policy.yaml:4: key 'a' stands here a second time"),
        (
            "default: bf16\nrules:\n- layers: a\n  compute: fp32\n  compute: fp16\n",
            "policy.yaml:5: key 'compute' stands",
        ),
        (
            "default: bf16\nrules:\n- layers: a\n  cmopute: fp32\n",
            "policy.yaml:4: unknown key 'cmopute' in a rule, did you mean",
        ),
        (
            "default: bf16\nrules:\n- layers: a\n\n  compute: fp61\n",
            "policy.yaml:5: compute: unknown format 'fp61', did you",
        ),
        (
            "default: bf16\nrules:\n- layers: a\n  compute: fp32\n- layers: b\n",
            "policy.yaml:5: a rule must say at least",
        ),
        (
            "default: bf16\nrules:\n- layers:\n  - a\n  - b.[20-23]\n  compute: fp32\n",
            "policy.yaml:5: pattern 'b.[20-23]'",
        ),
        ("default: bf16\nrules:\n- layers: 're:('\n  compute: fp32\n", "policy.yaml:3: pattern 're:('"),
        (
            "default: bf16\nrules:\n- layers: [0, 1]\n  compute: fp32\n",
            "policy.yaml:3: layers has 0 (int); write a string",
        ),
        ("default: bf16\nrules: a\n", "policy.yaml:2: "),
        ("default: bf16\nrules:\n  layers: a\n", "policy.yaml:2: "),
        (
            "default: bf16\nrules: []\nalow_unmatched: true\n",
            "policy.yaml:3: unknown key 'alow_unmatched' beside rules, did",
        ),
        (
            "default: bf16\nrules: []\nallow_unmatched: 1\n",
            "policy.yaml:3: allow_unmatched is 1; it must be true or false",
        ),
        (
            "default: bf16\nrules:\n- layers: a\n  compute: fp32\n  recurse: 0\n",
            "policy.yaml:5: recurse is 0; it must be",
        ),
        ("default: 16\n", "policy.yaml:1: default is 16 (int)"),
        ("# nothing\n\nmodel.head: fp32\n", "policy.yaml:3: the policy has no default"),
        ("defualt: bf16\n", "policy.yaml:1: the policy has no default"),
        ("default: bf16\na: yes\n", "policy.yaml:2: 'a': the value is True (bool)"),
        ("default: bf16\na:\n", "policy.yaml:2: a has no value; write one or leave it out"),
        ("default: bf16\na: ~\n", "policy.yaml:2: a has no value"),
        ("default: bf16\na: 2020-13-45\n", "policy.yaml:2: cannot read '2020-13-45'"),
        ("default: bf16\na: !!python/name:os.system x\n", "policy.yaml:2: cannot read"),
        ("default: bf16\na: !x fp32\n", "policy.yaml:2: cannot read"),
        (
            "default: bf16\na: o=fp8\n",
            "policy.yaml:2: 'a': output is 'fp8', in which products of Linear layers compute",
        ),
        ("default: bf16\na: c=fp8,s=col\n", "policy.yaml:2: 'a': scaling is 'col'; scaling takes tensor or row"),
        ("default: bf16\nrules:\n\t- layers: a\n", "policy.yaml:3: indented with a tab; YAML wants blanks"),
        ("default: bf16\nb: @x\n", "policy.yaml:2: no valid YAML: found character '@' that cannot start any token"),
        ("default: 'bf16\n", "no valid YAML: found unexpected end of stream"),
        ("default: bf16\n---\ndefault: fp16\n", "policy.yaml:2: no valid YAML"),
        ("default: bf16\n<<: {a: fp32}\n", "policy.yaml:2: '<<' merges are not read"),
        ("default: bf16\nrules: &r [*r]\n", "policy.yaml"),
        ("", "policy.yaml:1: the file is empty; write at least a default"),
        ("# only a comment\n", "policy.yaml:1: the file is empty"),
        ("bf16\n", "policy.yaml:1: a policy is a mapping, got str"),
        ("- bf16\n", "policy.yaml:1: a policy is a mapping, got list"),
        (b"\xff\xfe\x00", "policy.yaml is no UTF-8 text"),
        (b"default: bf16\x00", "policy.yaml:1: no valid YAML"),
    ],
)
def test_what_a_file_refuses_names_file_and_line(text, problem):
    assert problem in error_of(text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(
        PolicyError, match=r"^the policy file nowhere\.yaml does not exist; give the path of a YAML file$"
    ):
        PrecisionPolicy.from_file("nowhere.yaml")
    with pytest.raises(PolicyError, match="^cannot read .*: Is a directory"):
        PrecisionPolicy.from_file(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_key():
    Path("policy.yaml").write_bytes(b"\xef\xbb\xbfdefault: bf16\n")
    assert PrecisionPolicy.from_file("policy.yaml") == PrecisionPolicy("bf16")


def test_errors_of_resolving_name_file_and_line():
    Path("policy.yaml").write_text("default: bf16\n\nhaed: fp32\n")
    with pytest.raises(
        PolicyError, match=r"^policy\.yaml:3: rule 1 \(haed\) matches no layer of ModuleDict; did you mean head\?"
    ):
        PrecisionPolicy.from_file("policy.yaml").resolve(nn.ModuleDict({"head": nn.Linear(2, 2)}))
    Path("policy.yaml").write_text(
        "default: bf16\nrules:\n- layers: a\n  compute: fp32\n- types: LayerNrom\n  compute: fp32\n"
    )
    with pytest.raises(PolicyError, match=r"^policy\.yaml:5: rule 2 \(types LayerNrom\) matches no layer"):
        PrecisionPolicy.from_file("policy.yaml").resolve(nn.ModuleDict({"a": nn.LayerNorm(2)}))


def test_where_a_rule_was_read_is_no_part_of_what_it_is():
    Path("policy.yaml").write_text("default: bf16\na: fp32\n")
    policy = PrecisionPolicy.from_file("policy.yaml")
    assert policy == PrecisionPolicy("bf16", [Rule("a", compute="fp32")])
    assert "policy.yaml" not in repr(policy) + repr(policy.to_dict())


def test_writing_is_all_or_nothing(monkeypatch):
    PrecisionPolicy("fp16").to_file("policy.yaml")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        PrecisionPolicy("bf16").to_file("policy.yaml")
    assert os.listdir() == ["policy.yaml"]
    assert PrecisionPolicy.from_file("policy.yaml") == PrecisionPolicy("fp16")


def test_who_reads_while_it_is_written_reads_the_whole_old_policy():
    PrecisionPolicy("fp16").to_file("policy.yaml")
    with open("policy.yaml") as reader:
        PrecisionPolicy("bf16").to_file("policy.yaml")
        assert reader.read() == "default: fp16\nrules: []\n"


def test_writing_makes_the_folder():
    PrecisionPolicy("fp16").to_file("logs/run 1/policy.yaml")
    assert PrecisionPolicy.from_file("logs/run 1/policy.yaml") == PrecisionPolicy("fp16")


def test_writing_through_a_link_keeps_the_link():
    PrecisionPolicy("fp16").to_file("real.yaml")
    os.symlink("real.yaml", "link.yaml")
    PrecisionPolicy("bf16").to_file("link.yaml")
    assert os.path.islink("link.yaml")
    assert PrecisionPolicy.from_file("real.yaml") == PrecisionPolicy("bf16")
