import builtins
import io
import re
import sys

import pytest
import torch
from policy_models import Box
from selection import slow
from torch import nn

from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy
from lightning_mixprec.policy.rules import Rule


def block(width=2):
    return Box(norm=nn.LayerNorm(width), fc=nn.Linear(width, width), act=nn.ReLU())


def rows(text):
    """The table's cells, by layer; a blank in a cell is a single one."""
    lines = [re.split(r" {2,}", line) for line in text.splitlines() if not line.startswith(("rule ", "... and "))]
    return {cells[0]: dict(zip(lines[0][1:], cells[1:], strict=True)) for cells in lines[1:]}


def counted(text):
    return sum(int(row["parameters"].replace(",", "")) for row in rows(text).values() if row["parameters"][0].isdigit())


def test_every_column_of_a_small_model():
    model = Box(model=Box(embed=nn.Embedding(500, 4), head=nn.Linear(4, 500, bias=False), norm=nn.LayerNorm(4)))
    model.model.head.weight = model.model.embed.weight
    model.model.lazy, model.model.again = nn.LazyLinear(3), model.model.norm
    policy = PrecisionPolicy(
        "bf16",
        [
            Rule("model.embed", param="fp64"),
            Rule(types="*Norm", compute="fp32", output="input"),
            Rule("**.norm", compute="fp32"),
        ],
    )
    assert str(policy.resolve(model)).splitlines() == [
        "layer        type          parameters  param/compute/output  rule",
        '""           Box                    -  fp64/bf16/-           default',
        "model        Box                    -  fp64/bf16/-           default",
        "model.embed  Embedding          2,000  fp64/bf16/-           model.embed",
        "model.head   Linear              tied  fp64/bf16/-           default",
        "model.norm   LayerNorm              8  fp32/fp32/input       types *Norm",
        "model.lazy   LazyLinear          lazy  fp32/bf16/-           default",
        "model.again  = model.norm           -  fp32/fp32/input       types *Norm",
        "rule 1: model.embed -> p=fp64: matched 1, decided 1",
        "rule 2: types *Norm -> c=fp32,o=input: matched 1, decided 1",
        "rule 3: **.norm -> c=fp32: matched 1, decided 0, lost 1 to rule 2",
    ]


def test_what_is_in_a_shared_layer_is_shown_once():
    model = Box(first=block())
    model.second = model.first
    names = list(rows(str(as_policy({"default": "bf16", "first.act": "fp32"}).resolve(model))))
    assert names == ['""', "first", "first.norm", "first.fc", "first.act", "second"]


def test_attention_modules_that_decide_for_their_parts_are_named():
    model = Box(attn=nn.MultiheadAttention(4, 2), fc=nn.Linear(2, 2))
    text = str(PrecisionPolicy("bf16", [Rule(types="Linear", compute="fp32")]).resolve(model))
    assert "matched 2, decided 1, lost 1 to attention modules" in text


def test_repeated_blocks_become_one_line_with_what_is_in_them():
    model = Box(blocks=nn.ModuleList(block() for _ in range(12)), head=nn.Linear(2, 2))
    policy = PrecisionPolicy("bf16", [Rule("blocks.[-2:]", compute="fp16"), Rule("**.norm", compute="fp32")])
    text = str(policy.resolve(model))
    table = rows(text)
    assert table["blocks.[0:10]"] == {
        "type": "Box x 10",
        "parameters": "-",
        "param/compute/output": "fp32/bf16/-",
        "rule": "default",
    }
    assert table["blocks.[0:10].norm"]["param/compute/output"] == "fp32/fp32/-"
    assert table["blocks.[0:10].fc"]["parameters"] == "60"
    assert table["blocks.[10:12].fc"]["param/compute/output"] == "fp32/fp16/-"
    assert "blocks.3" not in table
    assert counted(text) == sum(parameter.numel() for parameter in model.parameters())


def test_blocks_numbered_within_their_names_become_one_line_too():
    model = Box(layers=nn.Sequential())
    for number in range(12):
        model.layers.add_module(f"layer_{number}", Box(conv1=block(), conv2=nn.Linear(2, 2), conv3=nn.Linear(2, 2)))
    policy = PrecisionPolicy("bf16", [Rule("layers.layer_1*.conv2", compute="fp32"), Rule("**.norm", compute="fp32")])
    table = rows(text := str(policy.resolve(model)))
    assert [name for name in table if re.fullmatch(r"layers\.[^.]+(\.\.\d+})?", name)] == [
        "layers.layer_0",
        "layers.layer_1",
        "layers.layer_{2..9}",
        "layers.layer_{10..11}",
    ]
    assert table["layers.layer_{2..9}"]["type"] == "Box x 8"
    assert table["layers.layer_{2..9}.conv2"] == {
        "type": "Linear x 8",
        "parameters": "48",
        "param/compute/output": "fp32/bf16/-",
        "rule": "default",
    }
    assert table["layers.layer_{10..11}.conv3"]["type"] == "Linear x 2"
    assert counted(text) == sum(parameter.numel() for parameter in model.parameters())


def test_blocks_that_differ_anywhere_are_not_merged():
    blocks = nn.ModuleList(block() for _ in range(12))
    blocks[5].fc = nn.Linear(2, 2, bias=False)
    blocks[8].act = nn.Tanh()
    table = rows(str(as_policy({"default": "bf16", "**.norm": "fp32"}).resolve(Box(blocks=blocks))))
    assert [name for name in table if re.fullmatch(r"blocks\.[^.]+", name)] == [
        "blocks.[0:5]",
        "blocks.5",
        "blocks.[6:8]",
        "blocks.8",
        "blocks.[9:12]",
    ]


def test_every_second_block_becomes_a_slice_with_a_step():
    blocks = nn.ModuleList(Box(**{f"part_{letter}": block() for letter in "abcd"}) for _ in range(30))
    policy = PrecisionPolicy("bf16", [Rule("blocks.[::2]", compute="fp32"), Rule("**.norm", compute="fp32")])
    table = rows(str(policy.resolve(Box(blocks=blocks))))
    assert "blocks.[0:29:2]" in table
    assert "blocks.[1:30:2].part_a.norm" in table
    assert table["blocks.[1:30:2].part_a"]["type"] == "Box x 15 (45 layers)"


@pytest.fixture(scope="module")
def big_model():
    with torch.device("meta"):
        return Box(model=Box(blocks=nn.ModuleList(block() for _ in range(2500)), head=nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "rules",
    [
        slow([]),
        slow([Rule(types="LayerNorm", compute="fp32")]),
        [Rule("model.blocks.[::2]", compute="fp32")],
        slow([Rule("re:.*[02357].*(norm|act)", compute="fp32"), Rule("re:.*[149].*fc", compute="fp16")]),
        [Rule(f"model.blocks.{number * number}", compute="fp32" if number % 3 else "fp16") for number in range(50)],
    ],
)
def test_a_big_model_fits_a_screen_or_two(rules, big_model):
    text = str(PrecisionPolicy("bf16", rules).resolve(big_model))
    assert len(text.splitlines()) <= 60
    assert counted(text) == sum(parameter.numel() for parameter in big_model.parameters())


def test_a_big_irregular_model_fits_too():
    model = Box(model=nn.Sequential(*(block(width) if width % 3 else nn.Linear(width, 1) for width in range(1, 400))))
    policy = PrecisionPolicy("bf16", [Rule("re:.*[1357]", compute="fp32"), Rule(types="LayerNorm", compute="fp16")])
    text = str(policy.resolve(model))
    assert len(text.splitlines()) <= 60
    assert counted(text) == sum(parameter.numel() for parameter in model.parameters())
    assert rows(text)["model.* (300 more)"]["param/compute/output"].endswith("fp32/fp16/- x 250")


def test_a_uniform_model_is_one_line_however_small():
    text = str(as_policy("bf16").resolve(Box(first=nn.Linear(2, 2), second=nn.Sequential(nn.Linear(2, 1)))))
    assert text.splitlines()[1:] == ['""     Box (4 layers)           9  fp32/bf16/-           default']


def test_a_uniform_big_model_folds_into_few_lines():
    model = Box(**{f"stage{number}": nn.Sequential(block(number), block(number + 1)) for number in range(2, 40)})
    text = str(as_policy("bf16").resolve(model))
    assert len(text.splitlines()) == 2
    assert "(343 layers)" in text


def test_many_rules_are_cut_short():
    rules = [Rule(f"blocks.{number}", compute="fp32") for number in range(30)]
    text = str(PrecisionPolicy("bf16", rules).resolve(Box(blocks=nn.ModuleList(block() for _ in range(30)))))
    assert text.splitlines()[-1] == "... and 20 more rules"


def test_long_rules_are_shortened():
    rule = Rule([f"layer_with_a_long_name_{number}" for number in range(9)], compute="fp32")
    model = Box(**{f"layer_with_a_long_name_{number}": nn.Linear(2, 2) for number in range(9)})
    assert all(len(line) < 140 for line in str(PrecisionPolicy("bf16", [rule]).resolve(model)).splitlines())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_show_prints_a_plain_table_into_a_file():
    assignment = as_policy("bf16").resolve(block())
    file = io.StringIO()
    assignment.table.show(title="policy 'auto': bf16", file=file)
    assert file.getvalue() == f"policy 'auto': bf16\n{assignment}\n"


def test_show_prints_to_the_present_stdout(capsys):
    as_policy("bf16").resolve(block()).table.show()
    assert capsys.readouterr().out.startswith("layer  type")


def test_show_draws_with_rich_on_a_terminal():
    rich = pytest.importorskip("rich")
    assert rich
    file = Terminal()
    policy = PrecisionPolicy("bf16", [Rule("[0:1]", compute="fp32"), Rule("**", types="ReLU", compute="fp32")])
    policy.resolve(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).table.show(file=file)
    assert "─" in file.getvalue()
    assert "[0:1]" in file.getvalue(), "a slice is no markup"
    assert "rule 1: [0:1] -> c=fp32: matched 1, decided 1" in file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_drawn_table_keeps_a_layer_to_a_line_with_its_formats_whole(width):
    pytest.importorskip("rich")
    model = Box(layer1=nn.Sequential(*(Box(conv1=nn.Conv2d(8, 8, 3), batch_norm1=nn.BatchNorm2d(8)) for _ in range(2))))
    assignment = PrecisionPolicy("bf16", [Rule(types="*Norm*", compute="fp32", output="input")]).resolve(model)
    text = re.sub(r"\x1b\[[0-9;]*m", "", assignment.table.render(rich=True, width=width))
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for name, layer in assignment.items():
        [line] = [line for line in lines if line.startswith(f"{name or chr(34) * 2} ")]
        assert f" {layer} " in line


def test_on_a_very_narrow_terminal_the_table_is_plain():
    assignment = as_policy("bf16").resolve(block())
    assert assignment.table.render(rich=True, width=60) == str(assignment)


def test_show_is_plain_on_a_terminal_without_rich(monkeypatch):
    real = builtins.__import__

    def without_rich(name, *args, **kwargs):
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_rich)
    assignment = as_policy("bf16").resolve(block())
    file = Terminal()
    assignment.table.show(file=file)
    assert file.getvalue() == f"{assignment}\n"
    assert assignment.table.render(rich=True) == str(assignment)


def test_names_that_the_terminal_cannot_print_do_not_stop_the_run():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    as_policy({"default": "bf16", "tête": "fp32"}).resolve(Box(tête=nn.Linear(2, 2))).table.show(file=file)
    file.flush()
    assert rb"t\xeate" in raw.getvalue()


def test_a_repr_is_short():
    assert repr(as_policy("bf16").resolve(block())) == "<Assignment of 4 layers, computing in bf16>"
