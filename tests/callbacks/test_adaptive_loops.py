"""AdaptivePrecision in every kind of loop: when it may move, what it leaves behind, and whom it works with."""

import contextlib
import gc
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from adaptive_models import ADAM, Lessons, Loud, adapt, encoded, late, loud, send_outcomes, silent, solved, train
from plugin_models import Call, Task, same, trainer
from selection import slow_but_for
from torch import nn

from lightning_mixprec import FidelityMonitor, OverflowMonitor, PerLayerPrecision, UnderflowMonitor
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision
from lightning_mixprec.callbacks.scheduler import PrecisionScheduler

CULPRIT = ("net.down", "fp16", "bf16")
ENCODING = ("net.encode", "fp16", "fp32")


class Validated(Task):
    def validation_step(self, batch, batch_idx):
        self.log("gap", nn.functional.mse_loss(self(batch[0]), batch[1]))


def watching(formats, layer):
    """Notes after each batch what a layer computes in."""
    return Call("on_train_batch_end", lambda run, model: formats.append(run.precision_plugin.assignment[layer].compute))


# Kinds of loops


@pytest.mark.parametrize("window", [2, 3])
def test_under_accumulation_layers_move_between_windows_alone(window):
    before = []
    look = Call("on_before_backward", lambda run, model: before.append(run.precision_plugin.assignment["net.down"]))
    run = adapt(callbacks=[look], batches=Lessons(24), accumulate_grad_batches=window)
    assert run.moves == [CULPRIT]
    [first] = [number for number in range(1, 24) if before[number] != before[number - 1]]
    assert first % window == 0
    assert run.is_finite


def test_a_checkpoint_within_a_window_moves_nothing_before_the_window_ends(monkeypatch):
    """Where outcomes come late, saving waits for that of the step before."""
    send_outcomes(monkeypatch)
    before = []
    look = Call("on_before_backward", lambda run, model: before.append(run.precision_plugin.assignment["net.down"]))
    saves = [Call("on_train_batch_end", lambda run, model: run.save_checkpoint("run.ckpt"), at=at) for at in (4, 7)]
    make = partial(Task, Loud(), partial(ADAM, fused=True))
    run = adapt(make, callbacks=[look, *saves], batches=Lessons(24), accumulate_grad_batches=3)
    assert run.moves == [CULPRIT]
    [first] = [number for number in range(1, 24) if before[number] != before[number - 1]]
    assert first % 3 == 0


class Adversarial(Task):
    """A discriminator that overflows and a generator, each with an optimizer, that step in turn."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)))
        self.automatic_optimization = False
        self.critic = Loud()

    def training_step(self, batch, batch_idx):
        for optimizer, sign in zip(self.optimizers(), (1.0, -1.0), strict=True):
            self.toggle_optimizer(optimizer)
            made = self.critic(self.net(batch[0])).float().mean()
            loss = sign * (made - self.critic(batch[0]).float().mean()) + 0.01 * made.square()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.losses.append(loss.detach().clone())

    def configure_optimizers(self):
        return [ADAM(self.net.parameters()), ADAM(self.critic.parameters())]


def test_by_hand_with_two_optimizers_the_culprit_moves():
    run = adapt(Adversarial, batches=Lessons(16))
    assert run.moves == [("critic.down", "fp16", "bf16")]
    assert run.is_finite
    assert bool(torch.stack(run.module.losses[4:]).isfinite().all())


def test_validation_inside_the_epoch_sees_the_formats_that_training_has():
    formats = []
    look = Call("on_validation_start", lambda run, model: formats.append(run.precision_plugin.assignment["net.down"]))
    run = trainer(PerLayerPrecision("fp16"), callbacks=[AdaptivePrecision(), look], val_check_interval=1)
    torch.manual_seed(0)
    run.fit(Validated(Loud(), ADAM), Lessons(6), Lessons(2))
    assert [layer.compute for layer in formats] == ["fp16"] + ["bf16"] * 5
    assert torch.isfinite(run.callback_metrics["gap"])


class Iterating(Task):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter. step flavor")
@pytest.mark.filterwarnings("ignore:Found .dataloader_iter. argument")
def test_where_nobody_sees_the_batches_it_says_so_once_and_moves_nothing():
    with pytest.warns(UserWarning, match="AdaptivePrecision needs batches") as caught:
        run = adapt(partial(Iterating, Loud(), ADAM), plugin=PerLayerPrecision("fp16", loss_scaling=1024))
    assert len([each for each in caught if "needs batches" in str(each.message)]) == 1
    assert run.adaptive.decisions == []
    assert len(run.module.losses) == 40


@pytest.mark.parametrize("options", [{"fast_dev_run": 8}, {"barebones": True}], ids=["fast_dev_run", "barebones"])
@pytest.mark.filterwarnings("ignore:.*barebones")
def test_quiet_runs_move_and_leave_no_file_and_no_line(options, capsys):
    run = trainer(PerLayerPrecision("fp16"), callbacks=[adaptive := AdaptivePrecision()], **_allowed(options))
    torch.manual_seed(0)
    run.fit(loud(), Lessons(8))
    assert [tuple(decision["moves"][0]) for decision in adaptive.decisions] == [CULPRIT]
    assert [*Path().rglob("*.yaml"), *Path().rglob("*.jsonl")] == []
    assert "AdaptivePrecision" not in capsys.readouterr().out


def _allowed(options):
    """A bare Trainer takes no options that say that it is to be bare."""
    refused = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps"]
    return options | (dict.fromkeys(refused) if "barebones" in options else {})


def test_lbfgs_in_bf16_is_left_alone():
    def make():
        return Task(nn.Linear(6, 2), partial(torch.optim.LBFGS, lr=0.1, max_iter=4))

    adaptive = AdaptivePrecision(every_n_steps=1)
    alone, _ = train(make, PerLayerPrecision("bf16"), batches=Lessons(6))
    run = adapt(make, adaptive, "bf16", batches=Lessons(6))
    assert adaptive.decisions == []
    assert same(run.module.state_dict(), alone.state_dict())


# What stays


def test_two_fits_with_one_callback_are_two_runs():
    adaptive = AdaptivePrecision()
    save = partial(Call, "on_train_batch_end", lambda run, model: run.save_checkpoint("run.ckpt"))
    first = adapt(silent, adaptive, callbacks=[save(at=5)], batches=encoded(10))
    assert first.moves == [ENCODING]
    fresh = adapt(loud, callbacks=[save(at=3)], batches=Lessons(10))
    second = adapt(loud, adaptive, callbacks=[save(at=3)], batches=Lessons(10))
    assert second.plugin.history == fresh.plugin.history
    assert second.plugin.policy == fresh.plugin.policy
    assert same(second.module.state_dict(), fresh.module.state_dict())
    assert second.adaptive.decisions == fresh.adaptive.decisions


def test_a_fit_with_another_model_starts_without_the_copy_of_the_last_ones_weights():
    adaptive = AdaptivePrecision()
    save = Call("on_train_batch_end", lambda run, model: run.save_checkpoint("run.ckpt"), at=3)
    first = adapt(partial(Task, nn.Linear(6, 2)), adaptive, callbacks=[save], batches=Lessons(6))
    second = adapt(partial(Task, nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))), adaptive, batches=Lessons(6))
    assert (first.moves, second.moves) == ([], [])
    assert len(second.module.losses) == 6


class Streamed(Lessons):
    """Batches that nobody but the run holds; remembers them weakly."""

    def __init__(self, count):
        super().__init__(count)
        self.seen = []

    def __iter__(self):
        for x, y in self.batches:
            batch = [x.clone(), y.clone()]
            self.seen.append(weakref.ref(batch[0]))
            yield batch
            del batch

    @property
    def alive(self):
        gc.collect()
        return [number for number, ref in enumerate(self.seen) if ref() is not None]


def fail(run, model):
    raise RuntimeError("planted")


@pytest.mark.parametrize("fails", [False, True], ids=["after the run", "after an exception"])
def test_it_keeps_no_batch(fails):
    alive = []
    for watching in ([], [AdaptivePrecision()]):
        batches, planted = Streamed(8), [Call("on_before_backward", fail, at=6)] * fails
        plugin = PerLayerPrecision("fp16", loss_scaling=1024)
        run = trainer(plugin, callbacks=[*watching, *planted], accumulate_grad_batches=4)
        torch.manual_seed(0)
        with pytest.raises(RuntimeError, match="planted") if fails else contextlib.nullcontext():
            run.fit(loud(), batches)
        assert len(batches.seen) >= 7
        alive.append(batches.alive)
    assert alive[0] == alive[1]
    assert len(alive[0]) <= 1


# Together with others


def test_beside_the_monitors_it_decides_what_it_decides_alone():
    alone = adapt(silent, batches=encoded(12))
    monitors = [OverflowMonitor(), UnderflowMonitor(2), FidelityMonitor(2)]
    beside = adapt(silent, callbacks=monitors, batches=encoded(12))
    assert beside.adaptive.decisions == alone.adaptive.decisions
    assert same(beside.module.state_dict(), alone.module.state_dict())
    assert beside.trainer.callback_metrics["mixprec/loss_gap"] < 0.05


def scheduled(policy, make=silent, batches=encoded):
    scheduler = PrecisionScheduler([{"at": 10, "policy": policy}])
    return adapt(make, callbacks=[scheduler], batches=batches(20))


def test_a_phase_sets_the_base_and_wider_promotions_stay():
    run = scheduled({"default": "bf16", "net.head": "fp32"})
    assert run.formats == {"": "bf16", "net": "bf16", "net.encode": "fp32", "net.body": "bf16", "net.head": "fp32"}
    assert [entry["reason"].partition(":")[0] for entry in run.plugin.history if entry["step"] < 10] == ["adaptive"]
    assert {entry["reason"] for entry in run.plugin.history if entry["step"] == 10} == {"schedule: step 10"}
    assert "net.encode" not in {entry["layer"] for entry in run.plugin.history if entry["step"] == 10}


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_a_phase_that_is_as_wide_ends_the_promotion(policy):
    run = scheduled(policy, loud, Lessons)
    assert run.moves == [CULPRIT]
    assert run.formats == dict.fromkeys(run.formats, policy)
    assert run.plugin.policy.to_dict() == {"default": policy, "rules": []}


def test_a_policy_that_somebody_else_sets_is_a_new_base():
    edit = Call("on_train_batch_start", lambda run, model: run.precision_plugin.edit_policy({"net.head": "bf16"}), at=8)
    run = adapt(silent, callbacks=[edit], batches=encoded(20))
    assert run.moves == [ENCODING]
    assert (run.formats["net.encode"], run.formats["net.head"]) == ("fp32", "bf16")


# Compiled


def test_a_move_compiles_a_bounded_number_of_graphs_and_the_run_goes_on():
    count = []

    def backend(graph, inputs):
        count.append(1)
        return graph.forward

    def make():
        module = loud()
        module.net = torch.compile(module.net, backend=backend)
        return module

    torch._dynamo.reset()
    train(make, PerLayerPrecision("fp16", loss_scaling=1024), batches=Lessons(3))
    alone, count[:] = len(count), []
    torch._dynamo.reset()
    run = adapt(make, batches=Lessons(12))
    torch._dynamo.reset()
    assert [move[1:] for move in run.moves] == [("fp16", "bf16")]
    assert run.moves[0][0].endswith("down")
    assert run.is_finite
    assert 1 <= alone < len(count) <= 4 * alone


# Damage


def test_steps_that_were_wrong_are_undone_with_the_move():
    run = adapt(solved, batches=encoded(16))
    [decision] = run.adaptive.decisions
    assert decision["restores"] is True
    begun = decision["step"]
    rest = encoded(16)
    rest.batches = rest.batches[begun:]
    fresh, _ = train(solved, PerLayerPrecision(run.plugin.policy), batches=rest)
    assert same(run.module.losses[begun:], fresh.losses)
    assert same(run.module.state_dict(), fresh.state_dict())


def spoil(name):
    def write(run, model):
        with torch.no_grad():
            dict([*model.named_parameters(), *model.named_buffers()])[name].fill_(float("nan"))

    return write


def normed():
    return Task(nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)), ADAM)


@pytest.mark.parametrize("policy", slow_but_for({"fp16"}, ["fp16", "bf16", "fp32"]))
@pytest.mark.parametrize("name", ["net.0.weight", "net.1.weight", "net.3.bias", "net.1.running_var"])
def test_weights_and_statistics_that_something_spoiled_are_restored_and_the_run_goes_on(name, policy):
    damage = Call("on_train_batch_end", spoil(name), at=15)
    run = adapt(normed, AdaptivePrecision(every_n_steps=5), policy, [damage], Lessons(40))
    assert run.is_finite
    assert {decision["kind"] for decision in run.adaptive.decisions} == {"restore"}
    assert run.moves == run.plugin.history == []
    reference, _ = train(normed, None, batches=Lessons(40))
    assert late(run.module.losses) < 1.5 * late(reference.losses)
