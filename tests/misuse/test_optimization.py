"""Odd ways to optimize: each trains under a mixed policy as in Lightning's fp32, or is refused in one line."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from misuse_models import (
    Given,
    around,
    check_healthy,
    check_unchanged_by_watching,
    every_format,
    mixed,
    pairs,
    plain_task,
    seeded,
    watched,
)
from plugin_models import Call, Scheduled, Task, fit, one_line, ours, overflowing, same
from torch import nn

from lightning_mixprec import MixPrecError

LBFGS = partial(torch.optim.LBFGS, lr=0.1, max_iter=3)


def lbfgs():
    return Task(around(nn.Tanh()), LBFGS)


# LBFGS


def test_lbfgs_in_fp16_is_refused_in_one_line_before_it_begins():
    model = lbfgs()
    with pytest.raises(MixPrecError) as caught:
        watched(model, mixed("fp16"))
    assert "LBFGS" in one_line(caught)
    assert "use bf16 or fp32" in one_line(caught)
    assert model.losses == []


def test_lbfgs_in_bf16_trains():
    run = check_healthy(lbfgs, mixed("bf16"))
    assert len(run.model.losses) > run.trainer.global_step == 4


# Gradients


class Penalized(Task):
    """Differentiates twice."""

    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_()
        out = self(x)
        [grad] = torch.autograd.grad(out.sum(), x, create_graph=True)
        loss = nn.functional.mse_loss(out, batch[1]) + grad.square().mean()
        self.losses.append(loss.detach().clone())
        return loss


@every_format
def test_a_gradient_penalty(format):
    check_healthy(lambda: Penalized(around(nn.Tanh())), mixed(format))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@every_format
def test_clipping_at_infinity_clips_nothing(format, algorithm):
    clipping = {"gradient_clip_val": math.inf, "gradient_clip_algorithm": algorithm}
    run = check_healthy(plain_task, mixed(format), **clipping)
    free = seeded(plain_task)
    fit(free, ours(mixed(format)))
    assert same(dict(run.model.state_dict()), dict(free.state_dict()))


class Steep(Task):
    """Its head's gradients are finite, and their norm is not."""

    def on_before_optimizer_step(self, optimizer):
        self.net[2].weight.grad.fill_(1e30)


@every_format
def test_gradients_whose_norm_is_infinite_are_clipped_to_nothing_as_in_fp32(format):
    run = watched(seeded(lambda: Steep(around(nn.Tanh()))), mixed(format), gradient_clip_val=1.0)
    wide = seeded(lambda: Steep(around(nn.Tanh())))
    fit(wide, gradient_clip_val=1.0)
    assert run.plugin.skipped_steps == 0
    assert same(dict(run.model.state_dict()), dict(wide.state_dict()))


@every_format
def test_a_step_with_infinite_gradients_is_skipped_before_clipping_makes_nan_of_them(format):
    run = watched(seeded(plain_task), mixed(format), callbacks=overflowing(), gradient_clip_val=1.0)
    assert run.plugin.skipped_steps == 1
    assert run.trainer.global_step == 3
    assert all(torch.isfinite(param).all() for param in run.model.parameters())


# Averages of the weights


AVERAGES = {
    "EMA": lambda: [EMAWeightAveraging(decay=0.5)],
    "average": lambda: [WeightAveraging()],
    "SWA": lambda: [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)],
}


@pytest.mark.parametrize("kind", AVERAGES)
@every_format
def test_averages_of_the_weights(kind, format):
    check_healthy(plain_task, mixed(format), callbacks=AVERAGES[kind], max_epochs=3)


@every_format
def test_an_average_takes_in_what_was_stored_after_each_step_that_was_one(format):
    weights = Call("on_train_batch_end", lambda run, model: model.net[0].weight.detach().clone())
    callbacks = [*overflowing(), weights, EMAWeightAveraging(decay=0.75)]
    run = watched(seeded(plain_task), mixed(format), callbacks=callbacks)
    first, skipped, *others = weights.results
    assert torch.equal(first, skipped)
    average = first
    for weight in others:
        average = 0.75 * average + 0.25 * weight
    assert torch.allclose(run.model.net[0].weight, average, atol=1e-6)


# When to step


@every_format
def test_a_schedule_of_accumulation(format):
    def callbacks():
        return [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})]

    run = check_healthy(plain_task, mixed(format), callbacks=callbacks, max_epochs=3)
    assert run.trainer.global_step == 4 + 2 + 1


@every_format
def test_a_schedule_of_accumulation_with_a_skipped_window(format):
    spoil = Call("on_after_backward", lambda run, model: model.net[0].weight.grad.fill_(math.inf), at=4)
    callbacks = [GradientAccumulationScheduler({0: 1, 1: 2}), spoil]
    run = watched(seeded(lambda: Scheduled(around(nn.Tanh()))), mixed(format), callbacks=callbacks, max_epochs=2)
    assert run.plugin.skipped_steps == 1
    assert run.trainer.global_step == 4 + 2 - 1
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == 0.05 * 0.5**5


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@every_format
def test_steps_without_a_loss(format):
    class NowAndThen(Task):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    run = check_unchanged_by_watching(lambda: NowAndThen(around(nn.Tanh())), mixed(format))
    assert len(run.model.losses) == 2


@every_format
def test_a_loss_that_needs_no_gradient_is_lightnings_matter(format):
    class Detached(Task):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach()

    with pytest.raises(RuntimeError, match="does not require grad"):
        watched(Detached(around(nn.Tanh())), mixed(format), Given(pairs()))
