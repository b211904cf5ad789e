"""After a run, however it ended, the model is as it was, and what the plugin learned can still be read."""

import copy
import json
import pickle
from functools import partial

import pytest
import torch
from plugin_models import Batches, Call, Evaluable, Task, TwoOptimizers, fit, ours, probes, snapshot, stock, trainer
from selection import slow
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from lightning_mixprec import MixPrecError, PerLayerPrecision, PrecisionPolicy
from lightning_mixprec.engine.backends import Backends

POLICIES = {
    "uniform": "fp16",
    "mixed": {"default": "bf16", "body.0": "fp32", "body.[3:]": "c=fp16,o=input"},
    "norms": {"default": "fp16", "rules": [{"types": "*Norm*", "compute": "fp32", "output": "input"}]},
    "stored wide": {"default": "bf16", "body.0": "p=fp64,c=fp64", "attention": "p=fp64,c=fp32", "rnn": "p=fp64,c=fp64"},
}
with_every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


class Zoo(nn.Module):
    """Modules that are easily left changed: buffers, an RNN, attention, shared weights, hooks, an own forward."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.body[3].weight
        self.own = nn.Identity()
        self.own.forward = doubled
        self.head = nn.Linear(8, 2)
        self.head.register_forward_hook(scaled)

    def forward(self, x):
        x = self.tied(self.body(x))[:, None, :]
        x = self.encoder(self.attention(x, x, x)[0])
        return self.head(self.own(self.rnn(x)[0][:, 0]))


def doubled(x):
    return 2 * x


def scaled(module, args, output):
    return output * 0.5


class Scheduled(Evaluable):
    """Has a schedule per step, for which the plugin puts a gate on the module while it trains."""

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=0.01, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1), "interval": "step"}}


def net_policy(policy):
    """The same policy for the net inside a task."""
    if isinstance(policy, str) or "rules" in policy:
        return policy
    return {key if key == "default" else f"net.{key}": value for key, value in policy.items()}


def new_plugin(policy):
    return ours(net_policy(policy), emulate="auto", eval_policy={"default": "fp32", "net.head": "bf16"})


def as_it_was(model):
    """A function that checks that a model is what it is now."""
    before, buffers, keys = snapshot(model), [name for name, _ in model.named_buffers()], list(model.state_dict())

    def check():
        assert snapshot(model) == before
        assert [name for name, _ in model.named_buffers()] == buffers
        assert list(model.state_dict()) == keys
        assert all(param.dtype == torch.float32 for param in model.parameters())
        assert not torch.is_autocast_enabled("cpu")

    return check


@with_every_policy
@pytest.mark.parametrize("task", [Scheduled, TwoOptimizers])
def test_after_fit(policy, task):
    model = task(Zoo(), partial(SGD, lr=0.01, momentum=0.9))
    check = as_it_was(model)
    changed = Call("on_train_batch_end", lambda run, model: snapshot(model.net), at=1)
    before = snapshot(model.net)
    run = trainer(new_plugin(policy), callbacks=[changed], max_epochs=2)
    run.fit(model, Batches(6), Batches(6) if task is Scheduled else None)
    is_untouched = policy == "fp16" and Backends("cpu").region("fp16").mode is None
    assert (changed.results[0] == before) == is_untouched
    check()
    assert all(torch.isfinite(param).all() for param in model.parameters())


@with_every_policy
@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_after_evaluation(policy, entry):
    model = Scheduled(Zoo())
    check = as_it_was(model)
    getattr(trainer(new_plugin(policy)), entry)(model, Batches(6))
    check()


class Raises(Scheduled):
    """Raises in one of its hooks, at the second call."""

    where = "training_step"
    error: BaseException = RuntimeError("planted")
    calls = 0

    def _maybe(self, where):
        self.calls += where == self.where
        if self.calls == 2 and where == self.where:
            raise self.error

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self._maybe("training_step")
        return loss

    def forward(self, x):
        out = super().forward(x)
        self._maybe("forward")
        return out

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self._maybe("validation_step")

    def on_before_backward(self, loss):
        self._maybe("on_before_backward")

    def on_before_optimizer_step(self, optimizer):
        self._maybe("on_before_optimizer_step")

    def on_train_batch_end(self, *args):
        self._maybe("on_train_batch_end")


WHERE = [
    "training_step",
    "forward",
    "validation_step",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
]


class Interrupt(BaseException):
    """Neither an Exception nor something that Lightning turns into an exit of the process."""


@with_every_policy
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("error", [RuntimeError("planted"), slow(Interrupt("planted"))], ids=["error", "interrupt"])
def test_after_an_exception(policy, where, error):
    model = Raises(Zoo())
    model.where, model.error = where, error
    check = as_it_was(model)
    plugin = new_plugin(policy)
    with pytest.raises(type(error), match="planted"):
        trainer(plugin).fit(model, Batches(6), Batches(6))
    check()
    assert plugin.assignment["net.head"].compute == plugin.policy.default
    again = Scheduled(Zoo())
    trainer(plugin).fit(again, Batches(6), Batches(6))
    assert len(again.losses) == 4


@pytest.mark.parametrize("policy", [POLICIES["mixed"]])
def test_after_ctrl_c(policy):
    model = Raises(Zoo())
    model.error = KeyboardInterrupt()
    check = as_it_was(model)
    with pytest.raises(SystemExit):
        trainer(new_plugin(policy)).fit(model, Batches(6), Batches(6))
    check()


def test_after_a_layer_raised_in_the_middle_of_a_region():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("planted")

    model = Task(nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 2), Failing())))
    check = as_it_was(model)
    with pytest.raises(RuntimeError, match="planted"):
        fit(model, ours({"default": "bf16", "net.1": "fp16", "net.1.1": "fp32"}))
    check()


@pytest.mark.parametrize(
    "policy", [{"default": "bf16", "net.heda": "fp32"}, {"default": "bf16", "net.attention.out_proj": "fp32"}]
)
def test_after_a_policy_that_does_not_fit_the_model(policy):
    model = Scheduled(Zoo())
    check = as_it_was(model)
    with pytest.raises(MixPrecError):
        fit_both(model, PerLayerPrecision(policy))
    check()


def fit_both(model, plugin):
    trainer(plugin).fit(model, Batches(6), Batches(6))


def test_after_an_eval_policy_that_does_not_fit_the_model():
    model = Scheduled(Zoo())
    check = as_it_was(model)
    with pytest.raises(MixPrecError):
        fit_both(
            model, PerLayerPrecision(net_policy(POLICIES["mixed"]), eval_policy={"default": "bf16", "heda": "fp32"})
        )
    check()


def test_after_an_optimizer_that_is_refused():
    model = Task(probes(), torch.optim.LBFGS)
    check = as_it_was(model)
    with pytest.raises(MixPrecError, match="LBFGS"):
        fit(model, PerLayerPrecision({"default": "fp16", "net.1": "fp32"}))
    check()


def test_a_users_own_instance_attributes_survive():
    model = Scheduled(Zoo())
    model.lr_scheduler_step = own_scheduler_step
    check = as_it_was(model)
    fit_both(model, new_plugin(POLICIES["mixed"]))
    assert model.lr_scheduler_step is own_scheduler_step
    assert own_scheduler_step.calls == 4
    check()


def own_scheduler_step(scheduler, metric):
    own_scheduler_step.calls += 1
    scheduler.step()


own_scheduler_step.calls = 0


def test_the_trained_model_can_be_copied_pickled_saved_and_used_without_the_package(tmp_path):
    model = Scheduled(Zoo())
    fit_both(model, new_plugin(POLICIES["mixed"]))
    model.eval()
    x = Batches(6).batches[0][0]
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert b"lightning_mixprec" not in pickle.dumps(model)
    fresh = Scheduled(Zoo()).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)


def test_the_model_trains_on_with_lightnings_own_plugin():
    model = Scheduled(Zoo())
    fit_both(model, new_plugin(POLICIES["mixed"]))
    fit_both(model, stock("bf16"))
    assert len(model.losses) == 8


def test_what_the_plugin_learned_can_be_read_after_teardown():
    plugin = ours({"default": "fp16", "net.1": "fp32"})
    overflow = Call("on_train_batch_start", lambda run, model: model.net[0].weight.data.mul_(1e6), at=2)
    restore = Call("on_train_batch_end", lambda run, model: model.net[0].weight.data.div_(1e6), at=2)
    move = Call("on_train_batch_end", lambda run, model: run.precision_plugin.edit_policy({"net.2": "bf16"}), at=1)
    model = Task(probes())
    run = fit(model, plugin, callbacks=[overflow, restore, move])
    assert plugin.skipped_steps == 1
    assert run.global_step == 3
    assert plugin.scaler.get_scale() == 512
    assert plugin.scaler.state_dict()["scale"] == 512
    assert not plugin.step_was_skipped(run.optimizers[0])
    assert plugin.policy == PrecisionPolicy.from_dict({"default": "fp16", "net.2": "bf16", "net.1": "fp32"})
    assert [plugin.assignment[f"net.{i}"].compute for i in range(3)] == ["fp16", "fp32", "bf16"]
    assert "net.2" in str(plugin.assignment)
    assert [entry["layer"] for entry in plugin.history] == ["net.2"]
    json.dumps([plugin.history, plugin.state_dict()])


def test_the_plugin_keeps_no_model_alive():
    import gc
    import weakref

    plugin = new_plugin(POLICIES["mixed"])
    model = Scheduled(Zoo())
    run = trainer(plugin)
    run.fit(model, Batches(6), Batches(6))
    alive = weakref.ref(model.net)
    del model, run
    gc.collect()
    assert alive() is None
    assert plugin.assignment is not None
