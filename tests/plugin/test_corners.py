"""Corners in which two features of Lightning or of the plugin meet."""

from functools import partial

import pytest
import torch
from lightnings import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, Tuner, WeightAveraging, pl
from plugin_models import Batches, Call, Evaluable, Task, TwoOptimizers, fit, mlp, ours, probes, same, snapshot, trainer
from torch import nn
from torch.optim import SGD

from lightning_mixprec import PerLayerPrecision

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
STORED_WIDE = {"default": "fp32", "net.1": "p=fp64,c=fp64"}


# fp64 and evaluation


class Noting(Evaluable):
    """Notes the format of every batch it gets."""

    def __init__(self, net):
        super().__init__(net)
        self.came = {"training": [], "validation": []}

    def training_step(self, batch, batch_idx):
        self.came["training"].append(batch[0].dtype)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.came["validation"].append(batch[0].dtype)
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("policy", "eval_policy", "training", "validation"),
    [("bf16", "fp64", FP32, FP64), ("fp64", "fp32", FP64, FP32), ("fp64", None, FP64, FP64)],
)
def test_batches_are_wide_exactly_in_the_stage_whose_policy_is_fp64(policy, eval_policy, training, validation):
    model = Noting(mlp())
    run = trainer(PerLayerPrecision(policy, eval_policy=eval_policy), val_check_interval=2, num_sanity_val_steps=1)
    run.fit(model, Batches(6), Batches(6, count=2))
    assert model.came == {"training": [training] * 4, "validation": [validation] * 5}


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize(
    "policies", [("bf16", "fp64"), ("fp64", "bf16"), ("fp32", {"default": "fp32", "net.1": "fp64"})]
)
def test_buffers_that_evaluation_converts_can_be_trained_on(policies, inference_mode):
    """Evaluation runs in inference mode, whose tensors training cannot use."""
    policy, eval_policy = policies
    model = Evaluable(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), partial(SGD, lr=0.05))
    before = snapshot(model)
    run = trainer(
        PerLayerPrecision(policy, eval_policy=eval_policy),
        inference_mode=inference_mode,
        val_check_interval=2,
        num_sanity_val_steps=1,
        max_epochs=2,
    )
    run.fit(model, Batches(6), Batches(6, count=1))
    assert model.net[1].num_batches_tracked == 8
    assert torch.isfinite(model.net[1].running_var).all()
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    assert snapshot(model) == before


def test_statistics_do_not_depend_on_the_eval_policy():
    def run(eval_policy):
        torch.manual_seed(3)
        model = Evaluable(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), partial(SGD, lr=0.05))
        plugin = PerLayerPrecision("bf16", eval_policy=eval_policy)
        trainer(plugin, val_check_interval=2, num_sanity_val_steps=1).fit(model, Batches(6), Batches(6, count=1))
        return [*model.state_dict().values()]

    assert same(run("fp64"), run(None))


# Weights stored in fp64


@pytest.mark.parametrize(
    "callback",
    [lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), WeightAveraging, EMAWeightAveraging],
    ids=["swa", "average", "ema"],
)
def test_weights_stored_in_fp64_can_be_averaged(callback):
    model = Evaluable(probes(), partial(SGD, lr=0.05))
    before = snapshot(model)
    run = trainer(PerLayerPrecision(STORED_WIDE), callbacks=[callback()], max_epochs=3)
    run.fit(model, Batches(6), Batches(6, count=1))
    assert set(model.net[1].seen) == {(FP64, FP64, FP64)}
    assert all(torch.isfinite(param).all() for param in model.parameters())
    assert snapshot(model) == before


def test_a_checkpoint_of_averaged_weights_loses_no_bit_of_them():
    def new():
        torch.manual_seed(3)
        return Task(probes(), partial(SGD, lr=0.1, momentum=0.9))

    def final():
        return Call("on_train_end", lambda run, model: {k: v.clone() for k, v in model.state_dict().items()})

    save = Call("on_train_epoch_end", lambda run, model: run.save_checkpoint("run.ckpt"), at=0)
    whole, resumed = final(), final()
    fit(new(), PerLayerPrecision(STORED_WIDE), callbacks=[EMAWeightAveraging(), save, whole], max_epochs=2)
    run = trainer(PerLayerPrecision(STORED_WIDE), callbacks=[EMAWeightAveraging(), resumed], max_epochs=2)
    run.fit(new(), Batches(6), ckpt_path="run.ckpt")
    assert same(resumed.results, whole.results)


def test_gradients_of_weights_stored_in_fp64_are_clipped_with_the_others():
    before = probes()
    model = Task(before, partial(SGD, lr=1.0))
    start = [param.detach().clone() for param in model.parameters()]
    fit(model, PerLayerPrecision(STORED_WIDE), gradient_clip_val=1e-3, max_steps=1)
    moved = [(param - old).flatten() for param, old in zip(model.parameters(), start, strict=True)]
    assert torch.cat(moved).norm().item() == pytest.approx(1e-3, rel=1e-2)


# Loss scaling that begins in the middle of an optimizer step


@pytest.mark.parametrize("hook", ["on_after_backward", "on_before_optimizer_step", "on_train_batch_end"])
@pytest.mark.parametrize("task", [Task, TwoOptimizers])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_loss_scaling_can_begin_at_any_point_between_two_forward_passes(hook, task, clip):
    """The layer that moves to fp16 computes nothing, and powers of two change no bit."""
    if task is TwoOptimizers and (clip or hook != "on_train_batch_end"):
        pytest.skip("in manual optimization all of this is inside a step, where nothing may change")

    def run(*callbacks):
        torch.manual_seed(3)
        model = task(nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 2)), partial(SGD, lr=0.1, momentum=0.9))
        plugin = PerLayerPrecision("fp32")
        fit(model, plugin, callbacks=[*callbacks], gradient_clip_val=clip)
        assert plugin.skipped_steps == 0
        return [*model.state_dict().values()], plugin.scaler.get_scale()

    def edit(value):
        return lambda trainer, model: trainer.precision_plugin.edit_policy({"net.1": value})

    on, off = Call(hook, edit("c=fp16,o=fp32"), at=1), Call(hook, edit("c=fp32,o=fp32"), at=2)
    expected, _ = run()
    assert same(run(on), (expected, 65536.0))
    assert same(run(on, off), (expected, 1.0))


# Manual optimization runs backward inside the step


class ByHand(Task):
    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Squared(nn.Module):
    """A matmul by hand; under autocast its backward would be computed in 16 bits."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return MatmulByHand.apply(x, self.weight)


class MatmulByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.T @ grad


@pytest.mark.parametrize(
    "policy", [{"default": "bf16", "net.0": "fp32"}, {"default": "bf16", "net.0": "c=fp32,o=fp32"}]
)
def test_manual_and_automatic_optimization_have_the_same_gradients(policy):
    def run(task):
        torch.manual_seed(3)
        model = task(nn.Sequential(Squared(), nn.Linear(6, 2)))
        fit(model, ours(policy))
        return [*model.state_dict().values()]

    assert same(run(ByHand), run(Task))


# Other parts of Lightning


class Configured(Task):
    """Makes its layers in ``configure_model``."""

    def __init__(self):
        super().__init__(nn.Identity())

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            self.net = probes()


def test_layers_made_in_configure_model_get_their_formats():
    model = Configured()
    fit(model, ours({"default": "bf16", "net.1": "fp16"}))
    assert [probe.computed for probe in model.net] == [{BF16}, {FP16}, {BF16}]


def test_lightnings_tuner_finds_a_learning_rate_and_leaves_no_trace():
    class Tuned(Task):
        def __init__(self):
            super().__init__(mlp())
            self.lr = 0.05

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=self.lr)

    model = Tuned()
    plugin = ours({"default": "bf16", "net.4": "fp16"})
    run = trainer(plugin, max_epochs=2)
    before = [param.detach().clone() for param in model.parameters()]
    kept = snapshot(model.net)
    found = Tuner(run).lr_find(model, Batches(6, count=12), num_training=10, update_attr=False)
    assert len(found.results["loss"]) == 10
    assert same([param.detach() for param in model.parameters()], before)
    assert snapshot(model.net) == kept
    assert plugin.history == []
    run.fit(model, Batches(6))
    assert len(model.losses) >= 18


def test_checkpoints_of_the_callback_carry_the_state():
    plugin = ours({"default": "bf16", "net.4": "fp16"})
    fit(
        Task(mlp()),
        plugin,
        callbacks=[ModelCheckpoint(dirpath=".", filename="{step}", every_n_train_steps=2, save_top_k=-1)],
        enable_checkpointing=True,
    )
    state = torch.load("step=4.ckpt", weights_only=True)["PerLayerPrecision"]
    assert state["scaler"]["growth_tracker"] == 4
    assert state == plugin.state_dict()


class GradientPenalty(Task):
    """Differentiates twice."""

    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_()
        out = self(x)
        [grad] = torch.autograd.grad(out.sum(), x, create_graph=True)
        return nn.functional.mse_loss(out, batch[1]) + grad.pow(2).mean()


@pytest.mark.parametrize("policy", ["bf16", {"default": "bf16", "net.0": "fp16", "net.2": "fp32"}])
def test_a_gradient_penalty_trains(policy):
    model = GradientPenalty(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)))
    start = [param.detach().clone() for param in model.parameters()]
    plugin = ours(policy)
    fit(model, plugin)
    assert plugin.skipped_steps == 0
    assert not any(torch.equal(param, old) for param, old in zip(model.parameters(), start, strict=True))


def test_plugins_take_turns_on_one_model():
    model = Task(probes())
    turns = [
        ("bf16", [BF16, BF16, BF16]),
        ({"default": "fp16", "net.1": "fp32"}, [FP16, FP32, FP16]),
        ("fp32", [FP32, FP32, FP32]),
    ]
    for policy, formats in turns:
        for probe in model.net:
            probe.seen.clear()
        fit(model, ours(policy))
        assert [probe.computed for probe in model.net] == [{format} for format in formats]


def test_a_strategy_can_bring_the_plugin():
    plugin = ours({"default": "bf16", "net.1": "fp32"})
    strategy = pl.strategies.SingleDeviceStrategy(device=torch.device("cpu"), precision_plugin=plugin)
    model = Task(probes())
    fit(model, None, strategy=strategy)
    assert [probe.computed for probe in model.net] == [{BF16}, {FP32}, {BF16}]
