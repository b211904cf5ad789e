"""What a checkpoint keeps of the plugin, and that it goes together with checkpoints of Lightning."""

import dataclasses
import json

import pytest
import torch
from lightnings import MixedPrecision
from plugin_models import (
    MOMENTUM,
    Call,
    Task,
    fit,
    mlp,
    moved,
    ours,
    overflowing,
    resume,
    same,
    save,
    stock,
    task,
)

from lightning_mixprec import MixPrecError, PerLayerPrecision, PrecisionPolicy
from lightning_mixprec.plugin.state import PluginState

MIXED = {"default": "fp16", "net.6": "fp32"}
POLICY = PrecisionPolicy.from_dict(MIXED)


def saved_state(path="run.ckpt"):
    return torch.load(path, weights_only=True)["PerLayerPrecision"]


def is_plain(value):
    if isinstance(value, dict):
        return type(value) is dict and all(type(key) is str and is_plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return type(value) in (int, float, str, bool, type(None))


# What is kept


def test_the_state_is_plain_and_says_its_version():
    plugin = ours({"default": "fp16", "rules": [{"types": ["LayerNorm"], "compute": "fp32", "output": "input"}]})
    move = Call("on_train_batch_end", lambda run, model: run.precision_plugin.edit_policy({"net.4": "bf16"}), at=0)
    fit(task(), plugin, callbacks=[*overflowing(), move, save()])
    state = saved_state()
    assert is_plain(state)
    assert json.loads(json.dumps(state)) == state
    assert state["version"] == 1
    assert state["scaler"]["scale"] == 512
    assert state["steps"]["skipped_steps"] == 1
    assert len(state["history"]) == 1
    assert PrecisionPolicy.from_dict(state["policy"]) == plugin.policy
    assert PrecisionPolicy.from_dict(state["configured"]) != plugin.policy


def test_every_field_off_its_default_survives_a_round_trip():
    state = PluginState(
        configured=MIXED,
        policy=POLICY.to_dict(),
        history=[{"step": 3, "layer": "net.4", "from": "fp16", "to": "bf16", "reason": "trial"}],
        scaler={"scale": 512.0, "growth_tracker": 7, "overflows": 2},
        steps={"skipped_steps": 5, "in_a_row": [1, 2], "owed_holds": 1},
        version=0,
    )
    blank = PluginState("auto", {}, [], {}, {})
    for field in dataclasses.fields(PluginState):
        assert getattr(state, field.name) != getattr(blank, field.name)
    assert PluginState.from_dict(json.loads(json.dumps(state.to_dict())), whole=state.to_dict()) == state


def test_every_counter_of_the_run_survives_a_resume():
    """A resumed run holds what the saved one held: compared through the states, off every default."""
    plugin = PerLayerPrecision(MIXED, loss_scaling={"init_scale": 1024.0, "hysteresis": 3, "growth_interval": 50})
    spoil = Call("on_after_backward", lambda run, model: model.net[0].weight.grad.fill_(float("inf")))
    spoil.at = 3
    move = Call("on_train_batch_end", lambda run, model: run.precision_plugin.edit_policy({"net.4": "bf16"}), at=1)
    fit(task(), plugin, callbacks=[spoil, move, save()])
    before = saved_state()
    assert before["scaler"] == {"scale": 1024.0, "growth_tracker": 0, "overflows": 1}
    assert before["steps"]["in_a_row"] == [1]

    again = PerLayerPrecision(MIXED, loss_scaling={"init_scale": 1024.0, "hysteresis": 3, "growth_interval": 50})
    at_start = Call("on_train_start", lambda run, model: run.precision_plugin.state_dict())
    resume(again, callbacks=[at_start])
    assert at_start.results == [before]


# Checkpoints that are not whole, or not ours


def tamper(change, path="run.ckpt"):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["PerLayerPrecision"])
    torch.save(checkpoint, path)


@pytest.mark.parametrize("version", [2, 99, "2", None, 1.5])
def test_a_state_of_another_version_is_refused_in_one_line(version):
    fit(task(), ours(MIXED), callbacks=[save()])
    tamper(lambda state: state.update(version=version))
    with pytest.raises(MixPrecError, match="version") as caught:
        resume(ours(MIXED))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(PluginState)])
def test_a_truncated_state_is_refused_in_one_line(field):
    fit(task(), ours(MIXED), callbacks=[save()])
    tamper(lambda state: state.pop(field))
    with pytest.raises(MixPrecError, match=field) as caught:
        resume(ours(MIXED))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "field"),
    [("scaler", "growth_tracker"), ("steps", "skipped_steps"), ("steps", "in_a_row"), ("policy", "default")],
)
def test_a_state_with_a_truncated_part_is_refused_in_one_line(part, field):
    moved(ours(MIXED))
    tamper(lambda state: state[part].pop(field))
    with pytest.raises(MixPrecError, match=field) as caught:
        resume(ours(MIXED))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", MIXED], ids=str)
@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
def test_stock_checkpoints_never_raise_and_give_their_loss_scale(format, policy):
    fit(task(), stock(format), callbacks=[save()])
    plugin = PerLayerPrecision(policy, loss_scaling="auto")
    scales = Call("on_train_start", lambda run, model: run.scaler.get_scale())
    _, run = resume(plugin, callbacks=[scales])
    scaled = policy in ("fp16", MIXED)
    assert scales.results == [1024 if scaled and format == "fp16" else 65536 if scaled else 1]
    assert run.global_step >= 7
    assert plugin.history == []


def test_the_growth_of_a_stock_scale_goes_on():
    def theirs():
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=6)
        return MixedPrecision("16-mixed", "cpu", scaler)

    whole = theirs()
    fit(task(), whole, max_epochs=2)
    fit(task(), theirs(), callbacks=[save()])
    plugin = PerLayerPrecision("fp16", loss_scaling={"init_scale": 65536.0, "growth_interval": 6})
    resume(plugin)
    assert plugin.scaler.get_scale() == whole.scaler.get_scale() == 512


def test_a_stock_run_goes_on_bit_for_bit_under_the_plugin():
    for format in ("fp32", "bf16", "fp16"):
        whole = task()
        fit(whole, stock(format), max_epochs=2)
        fit(task(), stock(format), callbacks=[save()])
        model, _ = resume(ours(format))
        assert same(model.losses, whole.losses[4:])
        assert same([*model.state_dict().values()], [*whole.state_dict().values()])


def test_the_scale_of_an_old_checkpoint_is_taken_over():
    fit(task(), stock("fp16"), callbacks=[save()])
    checkpoint = torch.load("run.ckpt", weights_only=True)
    checkpoint["native_amp_scaling_state"] = checkpoint.pop("MixedPrecision")
    torch.save(checkpoint, "run.ckpt")
    scales = Call("on_train_start", lambda run, model: run.scaler.get_scale())
    resume(PerLayerPrecision("fp16"), callbacks=[scales])
    assert scales.results == [1024]


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
def test_lightning_goes_on_from_a_checkpoint_of_the_plugin(format):
    whole = task()
    fit(whole, stock(format), max_epochs=2)
    fit(task(), ours(format), callbacks=[save()])
    model, _ = resume(stock(format))
    assert same(model.losses, whole.losses[4:])
    assert same([*model.state_dict().values()], [*whole.state_dict().values()])


class Loadable(Task):
    def __init__(self, width=8):
        super().__init__(mlp(), MOMENTUM)
        self.save_hyperparameters()


def test_a_checkpoint_loads_without_the_plugin():
    model = Loadable()
    fit(model, ours(MIXED), callbacks=[save()])
    loaded = Loadable.load_from_checkpoint("run.ckpt", weights_only=True)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_state_can_only_be_loaded_into_a_running_plugin():
    plugin = ours(MIXED)
    fit(task(), plugin, callbacks=[save()])
    with pytest.raises(MixPrecError) as caught:
        plugin.load_state_dict(saved_state())
    assert "\n" not in str(caught.value)


def test_saving_before_any_run_and_after_one():
    plugin = PerLayerPrecision("auto")
    assert is_plain(plugin.state_dict())
    fit(task(), plugin)
    assert is_plain(plugin.state_dict())


def test_the_trainer_saves_after_fit_and_the_run_goes_on():
    plugin = ours(MIXED)
    run = fit(task(), plugin)
    run.save_checkpoint("run.ckpt")
    again = ours(MIXED)
    resume(again)
    assert again.history == []
