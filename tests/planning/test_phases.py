"""Schedules: what can be written, what a mistake says, and when a phase is due."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from lightning_mixprec import MixPrecError, PrecisionPolicy, Rule
from lightning_mixprec.planning.phases import LowRate, Moment, Now, Plateau, read_phases
from lightning_mixprec.plugin.state import policy_version

BF16 = {"policy": "bf16"}


def phase(at, **what):
    [only] = read_phases([{"at": at, **(what or BF16)}])
    return only


# What can be written

MOMENTS = {
    0: Moment("step", 0),
    1200: Moment("step", 1200),
    "80%": Moment("share", Fraction(4, 5)),
    " 12.5 %": Moment("share", Fraction(1, 8)),
    "0%": Moment("step", 0),
}


@pytest.mark.parametrize(("at", "when"), MOMENTS.items(), ids=map(str, MOMENTS))
def test_a_number_is_of_steps_and_a_percentage_a_share_of_training(at, when):
    assert phase(at).when == when


def test_moments_that_are_mappings():
    assert phase({"step": 3}).when == Moment("step", 3)
    assert phase({"epoch": 0}).when == Moment("epoch", 0)
    assert phase({"event": "lr_below", "share": 1}).when == LowRate(1.0)
    assert phase({"event": "plateau", "monitor": "loss"}).when == Plateau("loss", "min", 3, 0.0)
    full = {"event": "plateau", "monitor": "acc", "mode": "max", "patience": 1, "min_delta": 0.5}
    assert phase(full).when == Plateau("acc", "max", 1, 0.5)


def test_every_form_of_a_policy():
    Path("policy.yaml").write_text("default: bf16\nmodel.head: fp32\n")
    short = {"default": "bf16", "model.head": "fp32"}
    policy = PrecisionPolicy("bf16", [Rule("model.head", compute="fp32")])
    for form in (short, policy, policy.to_dict(), "policy.yaml", Path("policy.yaml")):
        assert phase(0, policy=form).policy == policy
    assert phase(0, policy="fp16").policy == PrecisionPolicy("fp16")
    assert phase(0, policy="configured").policy == "configured"


def test_an_edit_is_kept_as_written():
    edit = {"model.head": "c=fp32,o=input", "**.norm": {"compute": "fp32"}}
    assert phase("10%", edit=edit).edit == edit


def test_what_was_read_is_plain_and_reads_as_the_same():
    given = [
        {"at": 0, "policy": "fp32"},
        {"at": {"epoch": 1}, "policy": "configured"},
        {"at": {"event": "plateau", "monitor": "val_loss", "patience": 2}, "edit": {"a": {"compute": "fp32"}}},
        {"at": {"event": "lr_below", "share": 0.1}, "policy": {"default": "bf16", "a.[0:2]": "c=fp32,o=input"}},
        {"at": "87.5%", "edit": {"b": "fp16"}},
    ]
    phases = read_phases(given)
    plain = [each.to_plain() for each in phases]
    assert json.loads(json.dumps(plain)) == plain
    assert read_phases(plain) == phases
    assert [each.number for each in phases] == [1, 2, 3, 4, 5]


# What a mistake says

EDIT = {"edit": {"model.head": "fp32"}}
WRONG = {
    "no mapping": ("bf16", "write a mapping"),
    "no moment": (BF16, "add at:"),
    "key": ({"when": 0, **BF16}, "unknown key 'when'"),
    "near key": ({"at": 0, "polcy": "bf16"}, "did you mean policy"),
    "neither": ({"at": 0}, "neither policy nor edit"),
    "both": ({"at": 0, **BF16, **EDIT}, "both policy and edit"),
    "negative": ({"at": -1, **BF16}, "whole number from 0"),
    "true": ({"at": True, **BF16}, "at is True (bool)"),
    "none": ({"at": None, **BF16}, "at is None"),
    "fraction": ({"at": 0.8, **BF16}, "did you mean '80%'"),
    "word": ({"at": "plateu", **BF16}, "did you mean plateau"),
    "digits": ({"at": "100", **BF16}, "a number of optimizer steps"),
    "too late": ({"at": "100%", **BF16}, "when training is over"),
    "negative share": ({"at": "-5%", **BF16}, "'80%'"),
    "two moments": ({"at": {"step": 1, "epoch": 1}, **BF16}, "names 2 moments"),
    "no moment inside": ({"at": {}, **BF16}, "names 0 moments"),
    "moment": ({"at": {"epochs": 1}, **BF16}, "did you mean epoch"),
    "epoch": ({"at": {"epoch": 1.5}, **BF16}, "at epoch is 1.5"),
    "event": ({"at": {"event": "lr_blow"}, **BF16}, "did you mean lr_below"),
    "no event": ({"at": {"event": None}, **BF16}, "the events are plateau, lr_below"),
    "no share": ({"at": {"event": "lr_below"}, **BF16}, "share is None"),
    "share": ({"at": {"event": "lr_below", "share": 10}, **BF16}, "share is 10"),
    "nan": ({"at": {"event": "lr_below", "share": math.nan}, **BF16}, "share is nan"),
    "no monitor": ({"at": {"event": "plateau"}, **BF16}, "monitor is None"),
    "mode": ({"at": {"event": "plateau", "monitor": "a", "mode": "low"}, **BF16}, "mode is 'low'"),
    "patience": ({"at": {"event": "plateau", "monitor": "a", "patience": 0}, **BF16}, "patience is 0"),
    "delta": ({"at": {"event": "plateau", "monitor": "a", "min_delta": -1}, **BF16}, "min_delta is -1"),
    "option": ({"at": {"event": "plateau", "monitr": "a"}, **BF16}, "did you mean monitor"),
    "format": ({"at": 0, "policy": "bf61"}, "did you mean 'bf16'"),
    "file": ({"at": 0, "policy": "none.yaml"}, "none.yaml does not exist"),
    "rule": ({"at": 0, "policy": {"default": "bf16", "a": "fp23"}}, "did you mean 'fp32'"),
    "no policy": ({"at": 0, "policy": None}, "policy is None"),
    "auto": ({"at": 0, "policy": "auto"}, "'configured'"),
    "edit": ({"at": 0, "edit": "fp32"}, "a mapping from pattern"),
    "empty edit": ({"at": 0, "edit": {}}, "a mapping from pattern"),
    "edit's value": ({"at": 0, "edit": {"a": "fp23"}}, "did you mean 'fp32'"),
    "edit's pattern": ({"at": 0, "edit": {"a..b": "fp32"}}, "a..b"),
    "param": ({"at": 0, "edit": {"a": "p=fp64"}}, "param cannot change"),
}


@pytest.mark.parametrize(("given", "says"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_line_that_names_the_phase(given, says):
    with pytest.raises(MixPrecError) as caught:
        read_phases([{"at": 0, "policy": "fp32"}, given])
    message = str(caught.value)
    assert message.startswith("phase 2: ")
    assert says in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("given", [None, [], (), "80%", {"at": 0, "policy": "bf16"}], ids=repr)
def test_phases_have_to_be_a_list(given):
    with pytest.raises(MixPrecError, match="list") as caught:
        read_phases(given)
    assert "\n" not in str(caught.value)


LATE_FIRST = [(100, 10), ("80%", "20%"), ({"epoch": 3}, {"epoch": 2}), ({"epoch": 3}, 0), ("80%", "0%")]


@pytest.mark.parametrize(("first", "second"), LATE_FIRST, ids=str)
def test_moments_have_to_be_listed_in_the_order_of_time(first, second):
    with pytest.raises(MixPrecError, match="phase 2: it comes at .* before phase 1 .* in the order of time"):
        read_phases([{"at": first, **BF16}, {"at": second, **EDIT}])
    read_phases([{"at": second, **EDIT}, {"at": first, **BF16}])


def test_moments_of_different_kinds_and_equal_ones_stand_in_any_order():
    given = [0, {"epoch": 0}, {"epoch": 3}, 10, 10, {"event": "lr_below", "share": 0.5}, "10%", {"epoch": 3}]
    assert len(read_phases([{"at": at, **BF16} for at in given])) == 8


# When a phase is due

START = Now(step=0, epoch=0)
DUE = {
    "first step": (0, START, True),
    "step before": (5, replace(START, step=4), False),
    "step": (5, replace(START, step=5), True),
    "step after": (5, replace(START, step=7), True),
    "share before": ("80%", replace(START, share=Fraction(79, 100)), False),
    "share": ("80%", replace(START, share=Fraction(8, 10)), True),
    "7% of 100": ("7%", replace(START, share=Fraction(7, 100)), True),
    "epoch before": ({"epoch": 3}, replace(START, epoch=2, step=99), False),
    "epoch": ({"epoch": 3}, replace(START, epoch=3), True),
    "rate at its peak": ({"event": "lr_below", "share": 1.0}, replace(START, rate=0.1, peak=0.1), False),
    "rate at the share": ({"event": "lr_below", "share": 0.5}, replace(START, rate=0.05, peak=0.1), False),
    "rate below": ({"event": "lr_below", "share": 0.5}, replace(START, rate=0.04, peak=0.1), True),
    "no rate": ({"event": "lr_below", "share": 0.5}, START, False),
}


@pytest.mark.parametrize(("at", "now", "is_due"), DUE.values(), ids=DUE)
def test_a_phase_is_due_from_its_moment_on(at, now, is_due):
    assert phase(at).is_due(now) is is_due


def test_a_plateau_is_due_after_so_many_looks():
    waiting = phase({"event": "plateau", "monitor": "a", "patience": 2})
    assert [waiting.is_due(START, looks) for looks in range(4)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("mode", "min_delta", "value", "best", "improves"),
    [
        ("min", 0.0, 1.0, None, True),
        ("min", 0.0, math.nan, None, False),
        ("min", 0.0, 0.9, 1.0, True),
        ("min", 0.0, 1.0, 1.0, False),
        ("min", 0.1, 0.95, 1.0, False),
        ("min", 0.0, math.nan, 1.0, False),
        ("max", 0.0, 1.1, 1.0, True),
        ("max", 0.2, 1.1, 1.0, False),
        ("max", 0.0, 0.9, 1.0, False),
    ],
)
def test_what_improves_a_metric(mode, min_delta, value, best, improves):
    assert Plateau("a", mode, 1, min_delta).improves(value, best) is improves


# The number of changes


def test_layers_that_move_together_are_one_change():
    def entry(step, layer, reason):
        return {"step": step, "layer": layer, "from": "fp32", "to": "bf16", "reason": reason}

    history = [entry(3, "a", "x"), entry(3, "b", "x"), entry(3, "a", "y"), entry(4, "a", "y"), entry(9, "a", "x")]
    assert [policy_version(history[:count]) for count in range(6)] == [0, 1, 1, 2, 3, 4]
