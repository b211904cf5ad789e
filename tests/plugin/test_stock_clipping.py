"""Clipping sees the gradients that the loss has, not the scaled ones, whoever clips, when and with which optimizer."""

from functools import partial

import pytest
import torch
from known_results import INF, SGD, Line, Manual, fails_on_stock, fit, ours, slope
from lightnings import Precision, pl


def clipped(model, batch, _, **clipping):
    optimizer, _ = model.optimizers()
    optimizer.zero_grad()
    model.manual_backward(slope(model.a, batch))
    model.clip_gradients(optimizer, **clipping)
    optimizer.step()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@fails_on_stock("self.clip_gradients clips gradients that are still scaled")
def test_clipping_by_hand_clips_what_an_fp32_run_clips(plugin, algorithm):
    body = partial(clipped, gradient_clip_val=0.125, gradient_clip_algorithm=algorithm)
    model, oracle = Manual(body), Manual(body)
    fit(model, plugin(), [0.5, INF, 0.0625])
    fit(oracle, Precision(), [0.5, 0.0625])
    assert torch.equal(model.a.weight, oracle.a.weight)


def clipped_halfway(model, batch, _):
    optimizer, _ = model.optimizers()
    optimizer.zero_grad()
    model.manual_backward(slope(model.a, batch[0]))
    model.clip_gradients(optimizer, gradient_clip_val=0.125, gradient_clip_algorithm="value")
    model.manual_backward(slope(model.a, batch[1]))
    optimizer.step()


@fails_on_stock("clipping sees scaled gradients, and later ones are added to what it left")
def test_gradients_may_be_added_to_clipped_ones(plugin):
    model, plugin = Manual(clipped_halfway), plugin()
    fit(model, plugin, [(0.5, 0.5), (0.5, INF), (INF, 0.5), (0.0625, 0.25)])
    assert model.travelled[0] == 0.625 + 0.3125
    assert plugin.skipped_steps == 2


@pytest.mark.parametrize("policy", ["bf16", "fp32"])
def test_the_guard_looks_at_gradients_that_are_added_to_clipped_ones(policy):
    model = Manual(clipped_halfway)
    fit(model, ours(policy), [(0.5, 0.5), (0.5, INF)])
    assert model.travelled[0] == 0.625


def clipped_and_dropped(model, batch, _):
    optimizer, _ = model.optimizers()
    for part in batch:
        optimizer.zero_grad()
        model.manual_backward(slope(model.a, part))
        model.clip_gradients(optimizer, gradient_clip_val=0.125, gradient_clip_algorithm="value")
    optimizer.step()


@pytest.mark.parametrize("policy", ["fp16", "bf16"])
def test_gradients_that_were_clipped_and_dropped_are_forgotten(policy):
    model, plugin = Manual(clipped_and_dropped), ours(policy)
    fit(model, plugin, [(0.5, 0.5), (INF, 0.0625)])
    assert model.travelled[0] == 0.1875
    assert plugin.skipped_steps == 0


def adversaries_clipped_first(model, batch, _):
    a, b = model.optimizers()
    a.zero_grad()
    b.zero_grad()
    model.manual_backward(slope(model.a, batch[0]))
    model.clip_gradients(a, gradient_clip_val=0.25, gradient_clip_algorithm="norm")
    model.manual_backward(slope(model.a, batch[1]) + slope(model.b, batch[1]))
    model.clip_gradients(b, gradient_clip_val=0.25, gradient_clip_algorithm="norm")
    a.step()
    b.step()


@fails_on_stock("clipping sees scaled gradients, and later ones are added to what it left")
def test_optimizers_that_are_clipped_before_they_step_train_as_in_fp32(plugin):
    model, oracle = Manual(adversaries_clipped_first), Manual(adversaries_clipped_first)
    fit(model, plugin(), [(0.5, 0.25), (0.125, 0.5)])
    fit(oracle, Precision(), [(0.5, 0.25), (0.125, 0.5)])
    assert torch.equal(model.a.weight, oracle.a.weight)
    assert torch.equal(model.b.weight, oracle.b.weight)


class GradientSpy(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(next(pl_module.parameters()).grad.flatten()[0].item())


@pytest.mark.parametrize("fused", [pytest.param(False, id="plain"), pytest.param(True, id="fused")])
def test_hooks_before_the_step_see_unscaled_gradients(fused):
    spy = GradientSpy()
    fit(Line(partial(SGD, fused=fused)), ours(), [0.5, 0.25], callbacks=[spy])
    assert spy.seen == [0.5, 0.25]


@fails_on_stock("fused optimizers unscale inside their step, after the hooks")
def test_hooks_before_a_fused_step_see_unscaled_gradients(plugin):
    spy = GradientSpy()
    fit(Line(partial(SGD, fused=True)), plugin(), [0.5, 0.25], callbacks=[spy])
    assert spy.seen == [0.5, 0.25]


class LossSpy(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_backward(self, trainer, pl_module, loss):
        self.seen.append(loss.item())


@fails_on_stock("hooks before backward are handed the scaled loss")
def test_hooks_before_backward_see_the_loss_as_the_user_computed_it(plugin):
    spy = LossSpy()
    model = Line()
    torch.nn.init.ones_(model.layer.weight)
    fit(model, plugin(), [0.5], callbacks=[spy])
    assert spy.seen == [1.0]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@fails_on_stock("fused optimizers cannot be clipped", raises=RuntimeError)
def test_fused_optimizers_are_clipped_as_in_an_fp32_run(plugin, algorithm, kind):
    optimizer = partial(kind, lr=0.5, fused=True)
    clipping = {"gradient_clip_val": 0.125, "gradient_clip_algorithm": algorithm}
    model, oracle = Line(optimizer), Line(optimizer)
    fit(model, plugin(), [0.5, INF, 0.0625], **clipping)
    fit(oracle, Precision(), [0.5, 0.0625], **clipping)
    assert torch.equal(model.layer.weight, oracle.layer.weight)
