"""Every way in which Lightning runs a model works with a mixed policy, and gives what it should."""

from functools import partial

import pytest
import torch
from lightnings import EMAWeightAveraging, ModelSummary, StochasticWeightAveraging, WeightAveraging, pl, summarize
from plugin_models import (
    Batches,
    Call,
    Evaluable,
    Scheduled,
    Task,
    TwoOptimizers,
    fit,
    mlp,
    ours,
    probes,
    same,
    snapshot,
    stock,
    trainer,
)
from torch import nn
from torch.optim import SGD

from lightning_mixprec import MixPrecError, PerLayerPrecision

MIXED = {"default": "bf16", "net.0": "fp16", "net.6": "c=fp32,o=fp32"}
MIXED_PROBES = {"default": "bf16", "net.0": "fp16", "net.2": "fp32"}
COMPUTED = [{torch.float16}, {torch.bfloat16}, {torch.float32}]


def trained(task=Task, plugin=None, **options):
    torch.manual_seed(3)
    model = task(mlp(), partial(SGD, lr=0.05, momentum=0.9))
    torch.manual_seed(4)
    fit(model, plugin or ours(MIXED), **options)
    return model


def losses_and_weights(model):
    return [model.losses, [*model.state_dict().values()]]


# Fits that follow each other


def test_repeated_fits_are_as_fits_with_fresh_plugins():
    def two_fits(plugins):
        torch.manual_seed(3)
        model = Task(mlp(), partial(SGD, lr=0.05, momentum=0.9))
        for plugin in plugins:
            fit(model, plugin)
        return losses_and_weights(model)

    expected = two_fits([ours(MIXED), ours(MIXED)])
    assert same(two_fits([ours(MIXED)] * 2), expected)


def test_one_trainer_fits_twice_and_evaluates_in_between():
    model = Evaluable(probes())
    plugin = ours(MIXED_PROBES)
    run = trainer(plugin)
    before = snapshot(model)
    run.fit(model, Batches(6), Batches(6))
    run.validate(model, Batches(6), verbose=False)
    run.fit_loop.max_epochs = 2
    run.fit(model, Batches(6), Batches(6))
    run.predict(model, Batches(6))
    assert len(model.losses) == 8
    assert [probe.computed for probe in model.net] == COMPUTED
    assert snapshot(model) == before


def test_one_plugin_serves_models_that_follow_each_other():
    plugin = ours(MIXED_PROBES)
    first, second = Task(probes()), Task(probes())
    fit(first, plugin)
    fit(second, plugin)
    fit(first, plugin)
    for model in (first, second):
        assert [probe.computed for probe in model.net] == COMPUTED
    assert plugin.history == []


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_evaluation_without_fit(entry):
    model = Evaluable(probes())
    before = snapshot(model)
    getattr(trainer(ours(MIXED_PROBES)), entry)(model, Batches(6))
    assert [probe.computed for probe in model.net] == COMPUTED
    assert snapshot(model) == before


# Options of the Trainer


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 3}, 3),
        ({"overfit_batches": 1, "max_epochs": 3}, 3),
        ({"max_steps": 2}, 2),
        ({"accumulate_grad_batches": 2}, 2),
        ({"accumulate_grad_batches": 3}, 2),
        ({"limit_train_batches": 0.5}, 2),
        ({"gradient_clip_val": 0.1}, 4),
        ({"detect_anomaly": True}, 4),
        ({"deterministic": True}, 4),
        ({"inference_mode": False}, 4),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_options_of_the_trainer(options, steps):
    model = Evaluable(probes())
    run = trainer(ours(MIXED_PROBES), **options)
    run.fit(model, Batches(6), Batches(6, count=1))
    assert run.global_step == steps
    assert [probe.computed for probe in model.net] == COMPUTED


def test_clipping_by_norm_bounds_the_unscaled_gradient():
    norms = Call(
        "on_before_zero_grad",
        lambda run, model: [p.grad.norm() for p in model.parameters() if p.grad is not None],
    )
    model = Task(mlp(), partial(SGD, lr=0.05))
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, ours(MIXED), gradient_clip_val=1e-3, max_steps=1, callbacks=[norms])
    moved = torch.stack([(p - old).norm() for p, old in zip(model.parameters(), before, strict=True)]).norm() / 0.05
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


class ClosureAndClipping(Task):
    """Manual optimization with a closure, ``toggle_optimizer`` and clipping by hand."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            loss = super(ClosureAndClipping, self).training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")

        with optimizer.toggle_model():
            optimizer.step(closure=closure)


class Accumulating(Task):
    """Manual optimization that steps on every second batch."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


@pytest.mark.parametrize("task", [TwoOptimizers, ClosureAndClipping, Accumulating])
def test_manual_optimization_is_as_with_fp32_up_to_rounding(task):
    low, full = trained(task, max_epochs=3), trained(task, PerLayerPrecision("fp32"), max_epochs=3)
    start = trained(task, PerLayerPrecision("fp32"), limit_train_batches=0)
    for mine, reference, old in zip(low.parameters(), full.parameters(), start.parameters(), strict=True):
        assert not torch.equal(reference, old)
        cosine = nn.functional.cosine_similarity((mine - old).flatten(), (reference - old).flatten(), dim=0)
        assert cosine > 0.98


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16"])
def test_a_schedule_of_every_step_is_as_stock(policy):
    assert same(
        losses_and_weights(trained(Scheduled, ours(policy), max_epochs=2)),
        losses_and_weights(trained(Scheduled, stock(policy) or pl.plugins.Precision(), max_epochs=2)),
    )


class OwnSchedulerStep(Scheduled):
    """Overrides ``lr_scheduler_step``, as users of other schedulers do."""

    def lr_scheduler_step(self, scheduler, metric):
        self.stepped = getattr(self, "stepped", 0) + 1
        scheduler.step()


def test_a_users_own_scheduler_step_is_called_once_per_step():
    model = trained(OwnSchedulerStep, max_epochs=2)
    assert model.stepped == 8
    assert "lr_scheduler_step" not in vars(model)


class NowAndThen(Task):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx % 2 == 0 else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_training_step_that_returns_none_moves_nothing():
    weights = Call("on_train_batch_end", lambda run, model: model.net[0].weight.detach().clone())
    trained(NowAndThen, callbacks=[weights])
    first, after_none, third, after_none_again = weights.results
    assert torch.equal(first, after_none)
    assert not torch.equal(after_none, third)
    assert torch.equal(third, after_none_again)


# Callbacks of Lightning


@pytest.mark.parametrize(
    "callback",
    [lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), WeightAveraging, EMAWeightAveraging],
    ids=["swa", "average", "ema"],
)
def test_averaging_under_a_mixed_policy(callback):
    model = Evaluable(probes(), partial(SGD, lr=0.05))
    before = snapshot(model)
    run = trainer(ours(MIXED_PROBES), callbacks=[callback()], max_epochs=3)
    run.fit(model, Batches(6), Batches(6, count=1))
    assert [probe.computed for probe in model.net] == COMPUTED
    assert all(torch.isfinite(param).all() for param in model.parameters())
    assert snapshot(model) == before


def test_averaged_weights_are_the_average_of_the_stored_ones():
    seen = Call("on_train_batch_end", lambda run, model: model.net[0].weight.detach().clone())
    model = Task(mlp(), partial(SGD, lr=0.05))
    fit(model, ours(MIXED), callbacks=[seen, EMAWeightAveraging(decay=0.75)])
    average = seen.results[0]
    for weight in seen.results[1:]:
        average = 0.75 * average + 0.25 * weight
    assert torch.allclose(model.net[0].weight, average, atol=1e-6)


# Lightning knows no number of bytes for any mixed precision, its own included.
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
def test_a_model_summary_with_an_example_input():
    model = Task(probes())
    model.example_input_array = torch.randn(2, 6)
    sizes = Call("on_train_start", lambda run, model: summarize(model, max_depth=2).out_sizes)
    fit(model, ours(MIXED_PROBES), callbacks=[ModelSummary(max_depth=2), sizes], max_steps=1)
    assert sizes.results == [[[2, 2], [2, 8], [2, 8], [2, 2]]]
    assert [probe.computed for probe in model.net] == COMPUTED


# torch.compile


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("policy", ["bf16", MIXED], ids=["uniform", "mixed"])
def test_a_compiled_lightning_module(policy):
    def run(compiles):
        torch.manual_seed(3)
        model = Quiet(mlp_without_dropout())
        plain = model
        if compiles:
            model = torch.compile(model, backend="eager")
        fit(model, ours(policy))
        return [*plain.state_dict().values()]

    assert same(run(True), run(False))


# Dynamo looks at .grad of what it traces, whatever the precision.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("policy", ["bf16", MIXED], ids=["uniform", "mixed"])
@pytest.mark.parametrize("part", ["net", "net.4"])
def test_a_compiled_submodule(policy, part):
    def run(compiles):
        torch.manual_seed(3)
        model = Task(mlp_without_dropout())
        if compiles and part == "net":
            model.net = torch.compile(model.net, backend="eager", fullgraph=True)
        elif compiles:
            model.net[4] = torch.compile(model.net[4], backend="eager", fullgraph=True)
        before = snapshot(model)
        plugin = ours(policy)
        fit(model, plugin)
        assert plugin.assignment["net.4"].compute == "bf16"
        assert _forwards(snapshot(model)) == _forwards(before)
        return [model.losses, [*model.state_dict().values()]]

    assert same(run(True), run(False))


def _forwards(taken):
    return {name: entries.get("forward") for name, entries in taken.items()}


class Quiet(Task):
    """Keeps no losses: a list that grows makes Dynamo recompile each step."""

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])


def mlp_without_dropout():
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Identity(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    )


# Errors inside a step reach the user as they are


def test_an_error_of_the_user_is_not_replaced():
    class Failing(Task):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        fit(Failing(mlp()), ours(MIXED))


def test_an_optimizer_that_evaluates_the_loss_itself_is_refused_only_under_scaling():
    lbfgs = partial(torch.optim.LBFGS, lr=0.1, max_iter=2)
    fit(Task(mlp(), lbfgs), PerLayerPrecision("bf16"))
    with pytest.raises(MixPrecError, match="LBFGS"):
        fit(Task(mlp(), lbfgs), ours(MIXED))
