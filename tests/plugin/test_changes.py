"""Changing the policy of a running model: when it is allowed, what it does, and what the history says."""

import json
from functools import partial

import pytest
import torch
from plugin_models import Batches, Call, Evaluable, Task, TwoOptimizers, fit, mlp, probes, same, snapshot, trainer
from torch import nn
from torch.optim import SGD

from lightning_mixprec import MixPrecError, PerLayerPrecision, PrecisionPolicy

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def edit(edits, **kwargs):
    return lambda run, model: run.precision_plugin.edit_policy(edits, **kwargs)


def replace(policy, **kwargs):
    return lambda run, model: run.precision_plugin.set_policy(policy, **kwargs)


def computed(model):
    """For each probe, the sequence of formats it computed in."""
    return [[seen[1] for seen in probe.seen] for probe in model.net]


# Hook, the batch from which on the edit holds if it is made at the hook's second call (of 6 batches in 3 epochs of 2)
BETWEEN_STEPS = {
    "on_train_batch_start": 1,
    "on_train_batch_end": 2,
    "on_validation_end": 4,
    "on_validation_start": 4,
    "on_train_epoch_start": 2,
    "on_train_epoch_end": 4,
    "on_before_optimizer_step": 2,
    "on_after_backward": 2,
}


@pytest.mark.parametrize(("hook", "since"), BETWEEN_STEPS.items(), ids=BETWEEN_STEPS)
def test_between_steps_a_layer_can_move(hook, since):
    model = Evaluable(probes())
    for probe in model.net:
        probe.register_forward_hook(lambda module, args, out: None if model.training else module.seen.pop() and None)
    plugin = PerLayerPrecision("bf16")
    run = trainer(plugin, max_epochs=3, callbacks=[Call(hook, edit({"net.1": "fp32"}, reason="trial"), at=1)])
    run.fit(model, Batches(6, count=2), Batches(6, count=1))
    assert computed(model) == [[BF16] * 6, [BF16] * since + [FP32] * (6 - since), [BF16] * 6]
    [entry] = plugin.history
    steps = since - 1 if hook in ("on_before_optimizer_step", "on_after_backward") else since
    assert entry == {"step": steps, "layer": "net.1", "from": "bf16", "to": "fp32", "reason": "trial"}
    assert json.loads(json.dumps(plugin.history)) == plugin.history
    assert plugin.assignment["net.1"].compute == "fp32"
    assert plugin.policy == PrecisionPolicy.from_dict({"default": "bf16", "net.1": "fp32"})


def test_a_change_is_that_of_a_run_that_had_it_from_the_start():
    def run(plugin, **options):
        torch.manual_seed(3)
        model = Task(mlp(), partial(SGD, lr=0.05, momentum=0.9))
        torch.manual_seed(4)
        fit(model, plugin, **options)
        return [model.losses, [*model.state_dict().values()]]

    policy = {"default": "bf16", "net.4": "fp32", "net.6": "c=fp32,o=input"}
    expected = run(PerLayerPrecision(policy))
    moved = PerLayerPrecision("bf16")
    assert same(run(moved, callbacks=[Call("on_train_start", replace(policy))]), expected)
    assert moved.policy == PrecisionPolicy.from_dict(policy)
    back_and_forth = PerLayerPrecision(policy)
    there = Call("on_train_start", replace("bf16"))
    back = Call("on_train_batch_start", replace(policy), at=0)
    assert same(run(back_and_forth, callbacks=[there, back]), expected)


def test_the_history_has_one_entry_per_change_and_all_that_is_said():
    model = Task(nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)), nn.Linear(8, 2)))
    plugin = PerLayerPrecision("bf16")
    moves = [
        Call("on_train_batch_start", edit({"net.0": "fp32"}, reason="first"), at=1),
        Call("on_train_batch_start", edit({"net.0.2": "c=fp32,o=input"}), at=2),
        Call("on_train_batch_end", replace("bf16", reason="back"), at=2),
        Call("on_train_batch_end", replace("bf16", reason="nothing changes"), at=3),
    ]
    fit(model, plugin, callbacks=moves)
    first, second, *back = plugin.history
    assert first == {"step": 1, "layer": "net.0", "from": "bf16", "to": "fp32", "reason": "first"}
    assert (second["step"], second["layer"], second["reason"]) == (2, "net.0.2", "edit_policy")
    assert (second["from"], second["to"], second["output"]) == ("fp32", "fp32", "input")
    assert {entry["layer"] for entry in back} == {"net.0", "net.0.2"}
    assert {(entry["step"], entry["reason"]) for entry in back} == {(3, "back")}
    assert all(isinstance(value, (int, str)) for entry in plugin.history for value in entry.values())
    assert json.loads(json.dumps(plugin.history)) == plugin.history


def test_how_products_in_8_bits_are_scaled_is_in_the_history():
    plugin = PerLayerPrecision({"default": "bf16", "net.4": "fp8"}, emulate=True)
    by_row = {"compute": "fp8", "scaling": "row", "gradients": "none"}
    moves = [
        Call("on_train_batch_start", edit({"net.4": by_row}, reason="rows"), at=1),
        Call("on_train_batch_start", edit({"net.4": "bf16"}, reason="back"), at=2),
    ]
    fit(Task(mlp()), plugin, callbacks=moves)
    same = {"layer": "net.4", "from": "fp8"}
    assert plugin.history == [
        {**same, "step": 1, "to": "fp8", "reason": "rows", "scaling": "row", "gradients": "none"},
        {**same, "step": 2, "to": "bf16", "reason": "back"},
    ]


def test_own_operations_and_a_layer_inside_that_change_alike_are_two_entries():
    alone = {"compute": "fp32", "recurse": False}
    plugin = PerLayerPrecision("bf16")
    moves = [
        Call("on_train_batch_start", edit({"": alone, "net.4": "fp32", "net": alone}), at=1),
        Call("on_train_batch_start", replace("bf16"), at=2),
    ]
    fit(Task(mlp()), plugin, callbacks=moves)
    there, back = plugin.history[:3], plugin.history[3:]
    assert [entry["layer"] for entry in there] == [entry["layer"] for entry in back] == ["", "net", "net.4"]


def test_a_change_of_the_whole_model_is_one_entry():
    plugin = PerLayerPrecision("bf16")
    fit(Task(mlp()), plugin, callbacks=[Call("on_train_batch_end", replace("fp32", reason="all"), at=1)])
    assert plugin.history == [{"step": 2, "layer": "", "from": "bf16", "to": "fp32", "reason": "all"}]


# In the middle of a step


class Meddling(Task):
    """Edits the policy from one of its own methods."""

    where = "training_step"

    def _edit(self, where):
        if where == self.where:
            self.trainer.precision_plugin.edit_policy({"net.0": "fp32"})

    def training_step(self, batch, batch_idx):
        self._edit("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self._edit("validation_step")

    def forward(self, x):
        out = super().forward(x)
        self._edit("forward")
        return out

    def on_before_zero_grad(self, optimizer):
        self._edit("on_before_zero_grad")

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        self._edit("optimizer_zero_grad")
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_before_backward(self, loss):
        self._edit("on_before_backward")

    def backward(self, loss, *args, **kwargs):
        self._edit("backward")
        super().backward(loss, *args, **kwargs)


class MeddlingByHand(Meddling):
    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self._edit("after manual_backward")
        optimizer.step()
        self._edit("after step")


MID_STEP = ["training_step", "forward", "on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "backward"]
MID_STEP_BY_HAND = ["training_step", "forward", "on_before_backward", "backward", "after manual_backward", "after step"]


@pytest.mark.parametrize(
    ("task", "where"),
    [(Meddling, where) for where in [*MID_STEP, "validation_step"]]
    + [(MeddlingByHand, where) for where in MID_STEP_BY_HAND],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_in_the_middle_of_a_step_a_change_is_refused_in_one_line(task, where):
    model = task(mlp())
    model.where = where
    plugin = PerLayerPrecision("bf16")
    with pytest.raises(MixPrecError, match="between steps") as caught:
        trainer(plugin).fit(model, Batches(6), Batches(6, count=1))
    assert "\n" not in str(caught.value)
    assert plugin.history == []
    assert plugin.policy == PrecisionPolicy("bf16")


@pytest.mark.parametrize("hook", ["on_before_zero_grad", "on_before_backward"])
def test_a_callback_is_refused_in_the_middle_of_a_step_too(hook):
    with pytest.raises(MixPrecError, match="between steps"):
        fit(Task(mlp()), PerLayerPrecision("bf16"), callbacks=[Call(hook, edit({"net.0": "fp32"}), at=1)])


def test_after_a_refused_change_that_was_caught_the_run_goes_on():
    class Persistent(Task):
        def training_step(self, batch, batch_idx):
            with pytest.raises(MixPrecError):
                self.trainer.precision_plugin.edit_policy({"net.0": "fp32"})
            return super().training_step(batch, batch_idx)

    model = Persistent(probes())
    plugin = PerLayerPrecision("bf16")
    fit(model, plugin, callbacks=[Call("on_train_batch_end", edit({"net.0": "fp32"}), at=1)])
    assert computed(model)[0] == [BF16, BF16, FP32, FP32]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_after_a_step_without_a_loss_a_change_is_allowed():
    class NoLoss(Task):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    model = NoLoss(probes())
    fit(model, PerLayerPrecision("bf16"), callbacks=[Call("on_train_batch_end", edit({"net.0": "fp32"}), at=1)])
    assert computed(model)[0] == [BF16, BF16, FP32, FP32]


def test_manual_optimization_can_change_between_batches():
    model = TwoOptimizers(probes())
    fit(model, PerLayerPrecision("bf16"), callbacks=[Call("on_train_batch_end", edit({"net.0": "fp32"}), at=1)])
    assert computed(model)[0] == [BF16] * 4 + [FP32] * 4


# What is refused


@pytest.mark.parametrize(
    ("change", "to", "says"),
    [
        (edit, {"net.1": "p=fp64,c=fp64"}, "param"),
        (edit, {"net.1": {"param": "fp64"}}, "param"),
        (replace, {"default": "bf16", "net.1": "p=fp64,c=fp64"}, "param can only be chosen before training"),
        (edit, {"net.11": "fp32"}, "net.1"),
        (edit, {"ent.1": "fp32"}, "net.1"),
        (edit, {"net.1": "fp23"}, "fp32"),
        (edit, "fp32", "mapping"),
        (replace, "bf61", "bf16"),
        (replace, "auto", "auto"),
        (replace, "none.yaml", "none.yaml does not exist"),
        (replace, {"default": "bf16", "head": "fp32"}, "head"),
        (replace, None, "None"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_change_that_cannot_be_is_one_line_and_leaves_everything_as_it_was(change, to, says):
    model = Task(probes())
    plugin = PerLayerPrecision({"default": "bf16", "net.2": "fp32"})
    policy = plugin.policy

    def try_it(run, model):
        during = snapshot(model)
        with pytest.raises(MixPrecError) as caught:
            change(to)(run, model)
        assert snapshot(model) == during
        return str(caught.value)

    callback = Call("on_train_batch_end", try_it, at=1)
    fit(model, plugin, callbacks=[callback])
    [message] = callback.results
    assert "\n" not in message
    assert says in message
    assert plugin.history == []
    assert plugin.policy == policy
    assert computed(model) == [[BF16] * 4, [BF16] * 4, [FP32] * 4]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [lambda p: p.edit_policy({"net.0": "fp32"}), lambda p: p.set_policy("fp32")])
def test_a_policy_of_no_running_model_cannot_be_changed(when, change):
    plugin = PerLayerPrecision("bf16")
    if when == "after":
        fit(Task(mlp()), plugin)
    with pytest.raises(MixPrecError, match="none is running") as caught:
        change(plugin)
    assert "\n" not in str(caught.value)


# Loss scaling follows


def test_an_fp16_layer_that_comes_turns_loss_scaling_on_and_one_that_goes_off():
    scales = Call("on_train_batch_end", lambda run, model: run.scaler.get_scale())
    plugin = PerLayerPrecision("bf16")
    comes = Call("on_train_batch_start", edit({"net.4": "fp16"}), at=1)
    goes = Call("on_train_batch_start", edit({"net.4": "bf16"}), at=3)
    model = Task(mlp())
    fit(model, plugin, callbacks=[comes, goes, scales])
    assert scales.results[0] == scales.results[3] == 1
    assert min(scales.results[1:3]) > 1
    assert [entry["to"] for entry in plugin.history] == ["fp16", "bf16"]
    assert plugin.skipped_steps == 0
    assert all(torch.isfinite(param).all() for param in model.parameters())


def test_gradients_that_wait_for_their_step_follow_the_scale():
    """The scale comes between the two batches of an accumulation; powers of two change no bit of an fp32 gradient."""

    def run(*callbacks):
        torch.manual_seed(3)
        model = Task(nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 2)))
        fit(model, PerLayerPrecision("fp32"), accumulate_grad_batches=2, callbacks=[*callbacks])
        return [*model.state_dict().values()]

    # Identity computes nothing, so that only the scaling changes.
    on = Call("on_train_batch_end", edit({"net.1": "c=fp16,o=fp32"}), at=0)
    off = Call("on_train_batch_end", edit({"net.1": "c=fp32"}), at=2)
    assert same(run(on, off), run())


@pytest.mark.parametrize(("loss_scaling", "scale"), [(False, 1), (128, 128)])
def test_scaling_that_was_configured_stays(loss_scaling, scale):
    plugin = PerLayerPrecision("bf16", loss_scaling=loss_scaling)
    scales = Call("on_train_batch_end", lambda run, model: run.scaler.get_scale())
    fit(Task(mlp()), plugin, callbacks=[Call("on_train_batch_start", edit({"net.4": "fp16"}), at=1), scales])
    assert scales.results == [scale] * 4


def test_an_optimizer_that_scaling_does_not_allow_refuses_an_fp16_layer():
    lbfgs = partial(torch.optim.LBFGS, lr=0.1, max_iter=2)
    plugin = PerLayerPrecision("bf16")
    with pytest.raises(MixPrecError, match="LBFGS"):
        fit(Task(mlp(), lbfgs), plugin, callbacks=[Call("on_train_batch_end", edit({"net.4": "fp16"}), at=1)])
    assert plugin.history == []


# What was learned can be used again


def test_the_policy_in_force_round_trips_through_a_file():
    plugin = PerLayerPrecision({"default": "bf16", "net.0": "fp32", "net.[4:]": "fp32"})
    moves = [
        Call("on_train_batch_end", edit({"net.0": "bf16", "net.2": "c=fp32,o=input"}), at=0),
        Call("on_train_batch_end", edit({"net.6": "fp16"}), at=1),
    ]
    fit(Task(mlp()), plugin, callbacks=moves)
    plugin.policy.to_file("learned.yaml")
    again = PerLayerPrecision("learned.yaml")
    assert again.policy == plugin.policy
    fit(Task(mlp()), again)
    assert {name: layer.formats for name, layer in again.assignment.items()} == {
        name: layer.formats for name, layer in plugin.assignment.items()
    }
    assert again.assignment["net.6"].compute == "fp16"
    assert again.assignment["net.0"].compute == "bf16"


def test_during_evaluation_a_change_is_one_of_the_training_policy():
    plugin = PerLayerPrecision("bf16", eval_policy="fp32")
    model = Evaluable(probes())
    run = trainer(plugin, callbacks=[Call("on_validation_batch_end", edit({"net.0": "fp16"}), at=0)], max_epochs=2)
    run.fit(model, Batches(6, count=1), Batches(6, count=2))
    assert computed(model) == [
        [BF16, FP32, FP32, FP16, FP32, FP32],
        [BF16, FP32, FP32, BF16, FP32, FP32],
        [BF16, FP32, FP32, BF16, FP32, FP32],
    ]
    assert [(entry["step"], entry["layer"]) for entry in plugin.history] == [(1, "net.0")]


def test_a_layer_can_move_to_fp64_and_back():
    model = Task(probes())
    before = snapshot(model)
    moves = [
        Call("on_train_batch_end", edit({"net.1": "fp64"}), at=0),
        Call("on_train_batch_end", edit({"net.1": "bf16"}), at=2),
    ]
    fit(model, PerLayerPrecision("bf16"), callbacks=moves)
    assert computed(model)[1] == [BF16, FP64, FP64, BF16]
    assert snapshot(model) == before


def test_moves_add_no_weight_and_lose_none():
    model = Task(mlp())
    keys = list(model.state_dict())
    during = Call("on_train_batch_end", lambda run, model: list(model.state_dict()))
    fit(
        model,
        PerLayerPrecision("bf16"),
        callbacks=[Call("on_train_batch_start", edit({"net.4": "fp32"}), at=1), during],
    )
    assert during.results == [keys] * 4
    assert model.net[4].weight.dtype == FP32


# Evidence


def test_the_evidence_of_a_change_is_in_each_of_its_entries():
    evidence = {"loss_gap": 0.5, "layers": {"net.0": {"grad_cosine": 0.1}}, "steps": [3, None, True]}
    moves = [
        Call("on_train_batch_end", edit({"net.0": "fp32", "net.2": "fp32"}, reason="drift", evidence=evidence), at=0),
        Call("on_train_batch_end", replace("bf16", evidence={"cause": "back"}), at=1),
        Call("on_train_batch_end", edit({"net.1": "fp32"}), at=2),
    ]
    plugin = PerLayerPrecision("bf16")
    model = Task(probes())
    run = fit(model, plugin, callbacks=moves)
    by_evidence = [(entry["layer"], entry.get("evidence")) for entry in plugin.history]
    assert by_evidence[:2] == [("net.0", evidence), ("net.2", evidence)]
    assert by_evidence[2:] == [("net.0", {"cause": "back"}), ("net.2", {"cause": "back"}), ("net.1", None)]
    assert "evidence" not in plugin.history[-1]
    evidence["layers"].clear()
    plugin.history[0]["evidence"]["steps"].clear()
    assert plugin.history[1]["evidence"]["layers"] and plugin.history[1]["evidence"]["steps"]
    run.save_checkpoint("run.ckpt")
    saved = torch.load("run.ckpt", weights_only=True)["PerLayerPrecision"]["history"]
    assert saved == plugin.history


@pytest.mark.parametrize("value", [torch.ones(()), BF16, {1, 2}, {3: "x"}, [object]], ids=str)
def test_evidence_that_a_checkpoint_could_not_keep_is_refused_in_one_line(value):
    plugin = PerLayerPrecision("bf16")
    with pytest.raises(MixPrecError, match="evidence.*plain") as caught:
        fit(
            Task(probes()),
            plugin,
            callbacks=[Call("on_train_batch_end", edit({"net.0": "fp32"}, evidence={"why": value}))],
        )
    assert "\n" not in str(caught.value)
    assert plugin.history == []


# The loss scale


def move_scale(scale):
    return lambda run, model: run.precision_plugin.set_loss_scale(scale)


def test_the_loss_scale_moves_between_steps_and_is_searched_for_from_there():
    scaling = {"init_scale": 1024.0, "growth_interval": 3, "max_scale": 4096.0}
    plugin = PerLayerPrecision("fp16", loss_scaling=scaling)
    scales = Call("on_train_batch_end", lambda run, model: run.scaler.get_scale())
    moves = [Call("on_train_batch_end", move_scale(scale), at=at) for at, scale in [(1, 64), (4, 1e9)]]
    fit(Task(mlp()), plugin, Batches(6, count=6), callbacks=[*moves, scales])
    assert scales.results == [1024, 64, 64, 64, 4096, 4096]
    assert plugin.history == []


def test_gradients_that_wait_for_their_step_follow_a_move_of_the_scale():
    def run(*callbacks):
        torch.manual_seed(3)
        model = Task(nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 2)))
        plugin = PerLayerPrecision("fp32", loss_scaling={"init_scale": 1024.0})
        fit(model, plugin, accumulate_grad_batches=2, callbacks=[*callbacks])
        return [*model.state_dict().values()]

    move = Call("on_train_batch_end", move_scale(16), at=0)
    assert same(run(move), run())
    assert move.calls == 4


@pytest.mark.parametrize(
    ("arguments", "scale", "says"),
    [
        ({"policy": "bf16"}, 8, "nothing is scaled"),
        ({"policy": "fp16", "loss_scaling": 128}, 8, "is static"),
        ({"policy": "fp16"}, 0, "positive finite number"),
    ],
)
def test_a_move_of_the_scale_that_cannot_be_is_one_line(arguments, scale, says):
    plugin = PerLayerPrecision(**arguments)
    with pytest.raises(MixPrecError, match=says) as caught:
        fit(Task(mlp()), plugin, callbacks=[Call("on_train_start", move_scale(scale))])
    assert "\n" not in str(caught.value)


def test_the_loss_scale_cannot_be_moved_in_the_middle_of_a_step_or_without_a_run():
    plugin = PerLayerPrecision("fp16")
    with pytest.raises(MixPrecError, match="loss scale.*none is running"):
        plugin.set_loss_scale(8)
    move = Call("on_before_backward", move_scale(8))
    with pytest.raises(MixPrecError, match="loss scale.*between steps"):
        fit(Task(mlp()), plugin, callbacks=[move])
