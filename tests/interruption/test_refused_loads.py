"""A checkpoint that cannot be gone on from: one clear line, and the plugin is as it was before."""

import contextlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from interruption.runs import trained, watchers
from plugin_models import Call, fit, moved, one_line, ours, resume, same, save, snapshot, task

from lightning_mixprec import MixPrecError, PerLayerPrecision

MIXED = {"default": "fp16", "net.6": "fp32"}
NAME = "PerLayerPrecision"


OF_TORCH = (RuntimeError, OSError, EOFError, pickle.UnpicklingError)
"""What torch raises for files that are no checkpoints."""


def tampered(change):
    content = torch.load("run.ckpt", weights_only=True)
    content[NAME] = change(content[NAME])
    torch.save(content, "bad.ckpt")


def with_part(part, **entries):
    return lambda state: {**state, part: {**state[part], **entries}}


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def instead(**entries):
    return lambda state: {**state, **entries}


UNREADABLE = {
    "of a later release": (instead(version=2), "version 2, this release of lightning_mixprec reads up to 1; upgrade"),
    "version of another type": (instead(version=True), "version True"),
    "truncated": (without("steps"), "lacks steps; it was not written whole"),
    "part truncated": (instead(scaler=None), "lacks scaler.scale, scaler.growth_tracker, scaler.overflows"),
    "scale damaged": (with_part("scaler", scale="much"), "damaged in scaler.scale"),
    "counters damaged": (with_part("steps", in_a_row=None, schedules=[["a"]]), r"damaged in steps.in_a_row, steps.sch"),
    "history damaged": (instead(history=[{"step": 1}]), "damaged in history"),
    "policy damaged": (instead(policy={"rules": []}), "checkpoint's policy cannot be read: .*default"),
    "policy of another model": (instead(policy={"default": "fp16", "nat.0": "fp32"}), "nat.0.*did you mean net.0"),
    "another policy": (instead(configured={"default": "bf16", "rules": []}), "another policy than the one configured"),
    "nothing": (lambda state: None, "version None"),
    "no mapping": (lambda state: [1], "version None"),
}


def seen(plugin):
    """What others read of a plugin, and what it would save of its scale."""
    return [
        plugin.policy,
        plugin._configured,
        json.dumps(plugin.history),
        plugin.scaler.state_dict(),
        plugin.skipped_steps,
        {name: layer.compute for name, layer in plugin.assignment.items()},
    ]


def used():
    """A plugin with a run behind it, in which a layer moved and the loss scale fell."""
    plugin = ours(MIXED)
    spoil = Call("on_after_backward", lambda run, model: model.net[0].weight.grad.fill_(float("inf")), at=2)
    move = Call("on_train_batch_end", lambda run, model: plugin.edit_policy({"net.0": "fp32"}), at=1)
    fit(task(), plugin, callbacks=[spoil, move])
    return plugin


@contextlib.contextmanager
def nothing_is_taken_over(plugin, model):
    before, stored = seen(plugin), snapshot(model)
    with pytest.raises((MixPrecError, *OF_TORCH)) as caught:
        yield caught
    assert seen(plugin) == before
    assert snapshot(model) == stored


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_state_that_cannot_be_taken_over_is_refused_in_one_line_and_nothing_of_it_is(name):
    moved(ours(MIXED))
    change, says = UNREADABLE[name]
    tampered(change)
    plugin, model = used(), task()
    with nothing_is_taken_over(plugin, model) as caught:
        resume(plugin, "bad.ckpt", model)
    assert isinstance(caught.value, MixPrecError)
    with pytest.raises(MixPrecError, match=says):
        raise caught.value
    one_line(caught)


def test_after_a_refused_load_the_plugin_resumes_a_good_checkpoint_as_a_new_one_does():
    moved(ours(MIXED))
    tampered(UNREADABLE["scale damaged"][0])
    plugin, fresh = used(), ours(MIXED)
    with pytest.raises(MixPrecError):
        resume(plugin, "bad.ckpt")
    model, expected = resume(plugin)[0], resume(fresh)[0]
    assert same(model.losses, expected.losses)
    assert seen(plugin) == seen(fresh)


@pytest.mark.parametrize("name", ["half", "empty", "none", "not ours"])
def test_a_file_that_is_no_whole_checkpoint_is_refused_before_anything_of_it_is_loaded(name):
    moved(ours(MIXED))
    content = Path("run.ckpt").read_bytes()
    if name != "none":
        Path("bad.ckpt").write_bytes({"half": content[: len(content) // 2], "empty": b"", "not ours": b"x" * 99}[name])
    plugin, model = used(), task()
    with nothing_is_taken_over(plugin, model):
        resume(plugin, "bad.ckpt", model)
    assert same(dict(model.state_dict()), dict(task().state_dict()))


def test_weights_are_those_of_the_checkpoint_after_the_plugin_refused_it():
    """Lightning loads them before it asks the precision plugin; it does so with its own plugins, too."""
    first = task()
    fit(first, ours(MIXED), callbacks=[save()])
    model = task()
    with pytest.raises(MixPrecError):
        resume(PerLayerPrecision("bf16"), model=model)
    assert same(dict(model.state_dict()), dict(first.state_dict()))


# Callbacks


@pytest.mark.parametrize("callback", watchers(), ids=lambda each: type(each).__name__)
def test_a_truncated_state_of_a_callback_is_refused_whole(callback):
    before, name = callback.state_dict(), type(callback).__name__
    for key in before.keys() - {"version"}:
        changed = {each: [*value, 1] if isinstance(value, list) else value for each, value in before.items()}
        del changed[key]
        with pytest.raises(MixPrecError, match=f"{name} state lacks {key}; it was not written whole") as caught:
            callback.load_state_dict(changed)
        one_line(caught)
        assert repr(callback.state_dict()) == repr(before)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("damage", [lambda kept: kept.pop("controller"), lambda kept: kept["copy"]["params"].pop()])
def test_a_damaged_part_of_the_controllers_state_is_refused_in_one_line(tmp_path, damage):
    trained(tmp_path / "first", max_epochs=2)
    content = torch.load(tmp_path / "first/saved/epoch=1.ckpt", weights_only=True)
    damage(content["callbacks"]["AdaptivePrecision"]["steered"])
    torch.save(content, "bad.ckpt")
    with pytest.raises(MixPrecError, match="AdaptivePrecision state") as caught:
        trained(tmp_path / "second", "bad.ckpt")
    one_line(caught)
