"""Layers may be called anything that has no dot in it: every file that is written can be read, and names them right."""

import json

import pytest
import torch
from misuse_models import around, seeded, watched, watchers
from plugin_models import Call, Task, fit, ours, resume, save
from selection import slow_but_for
from torch import nn

from lightning_mixprec import OverflowMonitor, PerLayerPrecision, PrecisionPolicy, PrecisionScheduler, Rule, diagnose
from lightning_mixprec.policy.patterns import literal

NAMES = [
    "new\nline",
    "tab\tand blank ",
    "next\x85line",
    "\x1b[31mred",
    "\x00",
    "\ud800",
    "\ufeff",
    'quo"ted',
    "it's",
    "[bold]x[/bold]",
    "$x_{1}",
    "%s{0}",
    "/etc/passwd",
    "back\\slash\\n",
    "re:x",
    "**",
    "[0:4]",
    "null",
    ": # - !",
    "p=fp32",
    "default",
    "ünï 😀",
    "_orig_mod",
    "a" * 300,
]


def named(name, inner=nn.Tanh):
    """A layer of that name between two others."""
    net = nn.Sequential()
    for key, layer in (("in", nn.Linear(6, 8)), (name, nn.Linear(8, 8)), ("act", inner()), ("out", nn.Linear(8, 2))):
        net.add_module(key, layer)
    return Task(net)


def layers_in(rows):
    return {row["layer"] for row in rows if row.get("layer") is not None}


@pytest.mark.parametrize("name", slow_but_for(NAMES[::4], NAMES), ids=ascii)
def test_a_run_writes_files_that_can_be_read_whatever_its_layers_are_called(name, capsys):
    layer = f"net.{name}"
    move = Call("on_train_batch_end", lambda run, model: run.precision_plugin.edit_policy({literal(layer): "fp32"}), 1)
    run = watched(seeded(lambda: named(name)), "fp16", callbacks=[move, save()])
    assert run.problems == []
    assert {"net.in", layer, "net.out"} <= layers_in(run.rows)
    lines = (capsys.readouterr().out).split("\n")
    assert all(line.isprintable() for line in lines)

    learned = PrecisionPolicy.from_file("watched/learned_policy.yaml")
    assert learned == run.plugin.policy
    fresh = seeded(lambda: named(name))
    plugin = PerLayerPrecision("watched/learned_policy.yaml")
    fit(fresh, plugin)
    assert [each for each, formats in plugin.assignment.items() if formats.compute == "fp32"] == [layer]

    again = ours("fp16")
    resume(again, model=named(name), callbacks=watchers())
    assert [entry["layer"] for entry in again.history] == [layer]
    assert again.policy == learned


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_policy_written_by_hand_for_a_layer_of_any_name(name):
    layer, model = f"net.{name}", named(name)
    for policy in (
        PrecisionPolicy("bf16", [Rule(literal(layer), compute="fp32")]),
        PrecisionPolicy.from_dict({"default": "bf16", literal(layer): "fp32"}),
    ):
        policy.to_file("policy.yaml")
        read = PrecisionPolicy.from_file("policy.yaml")
        assert read == policy
        assert [each for each, formats in read.resolve(model).items() if formats.compute == "fp32"] == [layer]


@pytest.mark.parametrize("name", ["new\nline", '[b]"$x_"', "/etc/passwd", "\ud800"], ids=ascii)
def test_a_phase_that_edits_a_layer_of_any_name_is_written_down(name):
    layer = f"net.{name}"
    phases = [{"at": 0, "policy": "bf16"}, {"at": 2, "edit": {literal(layer): "fp32"}}]
    run = watched(seeded(lambda: named(name)), "bf16", callbacks=[PrecisionScheduler(phases)])
    [row] = [row for row in run.rows if row["monitor"] == "schedule" and row["phase"] == 2]
    assert literal(layer) in row["change"]
    assert run.plugin.assignment[layer].compute == "fp32"


class Spiking(nn.Module):
    """Beyond fp16 inside, and back."""

    def forward(self, x):
        return x * 2.0**20 * 2.0**-20


@pytest.mark.parametrize("name", ["new\nline", '[b]"$x_"', "/etc/passwd", "\ud800"], ids=ascii)
def test_an_overflow_in_a_layer_of_any_name_is_written_down_and_can_be_replayed(name, tmp_path):
    net = around(nn.Identity())
    del net[1]
    odd = nn.Sequential()
    for key, layer in (("in", net[0]), (name, Spiking()), ("out", net[1])):
        odd.add_module(key, layer)
    monitor = OverflowMonitor(save_batch=True)
    with pytest.warns(UserWarning, match=r"^step 0, batch 0: .*\n?.*diagnose"):
        fit(Task(odd), ours("fp16"), callbacks=[monitor], max_steps=1, limit_train_batches=1)
    [event] = [json.loads(line) for line in (tmp_path / "mixprec.jsonl").read_text(encoding="utf-8").splitlines()]
    assert event["layer"] == monitor.events[0]["layer"] == f"net.{name}"
    [saved] = tmp_path.glob("overflow-step0-*.pt")
    assert torch.load(saved, weights_only=True)["event"]["layer"] == f"net.{name}"
    assert diagnose(Task(odd), saved)["layer"] == f"net.{name}"
