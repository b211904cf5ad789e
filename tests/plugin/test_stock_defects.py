"""Defects of Lightning's own mixed precision in scaling and stepping, each shown on it and absent from ours."""

import math
from functools import partial

import pytest
import torch
from known_results import INF, SGD, Line, Manual, fails_on_stock, fit, holds_on_both, ours, slope, stock, weights
from lightnings import Precision, pl
from torch import nn

from lightning_mixprec.errors import MixPrecError, SupportError

PATIENT = {"at_min": "warn", "max_consecutive_skips": 1000}


@pytest.mark.filterwarnings("ignore:.*the loss scale is at its minimum")
@fails_on_stock("endless overflow drives the scale to 0, and the next finite step writes NaN")
def test_endless_overflow_neither_collapses_the_scale_nor_reaches_the_weights(plugin):
    model, plugin = Line(), plugin(loss_scaling=PATIENT)
    fit(model, plugin, [INF] * 200 + [0.5])
    assert plugin.scaler.get_scale() > 0
    assert model.travelled == 0.5


def zero_grads(*optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()


def both_backwards_then_both_steps(model, batch, _):
    optimizers = model.optimizers()
    zero_grads(*optimizers)
    model.manual_backward(slope(model.a, batch[0]))
    model.manual_backward(slope(model.b, batch[1]))
    for optimizer in optimizers:
        optimizer.step()


@fails_on_stock("the scale changes after the first optimizer's step, before the second's gradients are unscaled")
def test_a_scale_change_between_two_steps_leaves_the_second_optimizers_gradients_right(plugin):
    model = Manual(both_backwards_then_both_steps)
    fit(model, plugin(), [(INF, 0.25), (0.5, 0.25), (INF, 0.25), (INF, 0.25), (0.5, 0.25)])
    assert model.travelled == [1.0, 1.25]


@fails_on_stock("each optimizer's step changes the scale, so a batch with two overflows halves it twice")
def test_a_batch_is_one_piece_of_evidence_about_the_scale_however_many_optimizers_step(plugin):
    plugin = plugin()
    fit(Manual(both_backwards_then_both_steps), plugin, [(INF, INF), (0.5, 0.5)])
    assert plugin.scaler.get_scale() == 32768.0


def three_critic_steps(model, batch, _):
    critic, generator = model.optimizers()
    for part in batch[0]:
        zero_grads(critic)
        model.manual_backward(slope(model.a, part))
        critic.step()
    zero_grads(generator)
    model.manual_backward(slope(model.b, batch[1]))
    generator.step()


@holds_on_both()
def test_an_optimizer_may_step_several_times_in_a_training_step(plugin):
    model = Manual(three_critic_steps)
    fit(model, plugin(), [((0.5, INF, 0.25), 0.5), ((0.5, 0.5, 0.5), 0.5)])
    assert model.travelled == [2.25, 1.0]


def one_backward_two_steps(model, batch, _):
    first, second = model.optimizers()
    zero_grads(first)
    model.manual_backward(slope(model.a, batch))
    first.step()
    second.step()


@fails_on_stock("the second optimizer divides gradients by the scale that the first has divided already")
def test_two_optimizers_that_share_parameters_unscale_them_once(plugin):
    model = Manual(one_backward_two_steps, lambda model: [SGD(model.a.parameters()), SGD(model.a.parameters(), lr=0.5)])
    fit(model, plugin(), [0.5, INF, 0.5])
    assert model.travelled[0] == 1.5


@pytest.fixture
def _uninitialised_memory_is_nan():
    """Torch fills fresh memory with NaN, so that reading it shows on every run."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_uninitialised_memory_is_nan")
@fails_on_stock("fused SGD keeps an uninitialised momentum when its first step is skipped")
def test_fused_momentum_is_sound_after_a_skipped_first_step(plugin):
    optimizer = partial(SGD, momentum=0.5, fused=True)
    model, oracle = Line(optimizer), Line(optimizer)
    fit(model, plugin(), [INF, 0.5, 0.25])
    fit(oracle, Precision(), [0.5, 0.25])
    assert torch.equal(model.layer.weight, oracle.layer.weight)


def b_steps_every_batch_and_a_every_second(model, batch, index):
    a, b = model.optimizers()
    model.manual_backward(slope(model.a, batch[0]))
    model.manual_backward(slope(model.b, batch[1]))
    b.step()
    zero_grads(b)
    if index % 2:
        a.step()
        zero_grads(a)


@fails_on_stock("gradients that wait for their step keep the old scale when the scale changes")
def test_accumulated_gradients_follow_a_scale_that_another_optimizer_changes(plugin):
    model = Manual(b_steps_every_batch_and_a_every_second)
    fit(model, plugin(), [(0.5, INF), (0.25, 0.5), (0.5, 0.5), (0.25, 0.5)])
    assert model.travelled == [1.5, 1.5]


def only_a_has_gradients(model, batch, _):
    optimizers = model.optimizers()
    zero_grads(*optimizers)
    model.manual_backward(slope(model.a, batch))
    for optimizer in optimizers:
        optimizer.step()


@fails_on_stock("an optimizer whose parameters have no gradients fails an assertion ('No inf checks')")
def test_an_optimizer_without_gradients_steps_without_moving(plugin):
    model = Manual(only_a_has_gradients)
    fit(model, plugin(), [0.5, 0.25])
    assert model.travelled == [0.75, 0.0]


class NoneAtLast(Line):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@fails_on_stock("training_step returning None on the last micro-batch drops the accumulated gradients")
def test_none_on_the_last_micro_batch_keeps_the_accumulated_gradients(plugin):
    model, oracle = NoneAtLast(), NoneAtLast()
    fit(model, plugin(), [0.5, 0.25, 0.125, 0.25], accumulate_grad_batches=2)
    fit(oracle, stock("32-true"), [0.5, 0.25, 0.125, 0.25], accumulate_grad_batches=2)
    assert model.travelled == oracle.travelled == 0.3125


class Words(pl.LightningModule):
    """Sparse gradients with an index that occurs several times."""

    def __init__(self, kind):
        super().__init__()
        self.table = nn.Embedding(4, 2, sparse=True)
        nn.init.zeros_(self.table.weight)
        self.kind = kind

    def training_step(self, batch, batch_idx):
        words, factor = batch
        return (self.table(words) * factor).mean()

    def configure_optimizers(self):
        return self.kind(list(self.parameters()), lr=0.5)


@holds_on_both()
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.SparseAdam])
def test_sparse_gradients_are_unscaled_and_their_overflow_skipped(plugin, kind):
    batches = [
        (torch.tensor(words), torch.tensor(factor))
        for words, factor in (([0, 1, 1, 3], 1.0), ([2, 2, 2, 1], INF), ([3, 3, 0, 0], 1.0))
    ]
    model, oracle = Words(kind), Words(kind)
    fit(model, plugin(), batches)
    fit(oracle, Precision(), batches[::2])
    assert torch.equal(model.table.weight, oracle.table.weight)


@pytest.mark.filterwarnings("ignore:.*store their weights in 16 bits")
@fails_on_stock("parameters stored in fp16 end the run ('Attempting to unscale FP16 gradients')", raises=ValueError)
def test_parameters_stored_in_fp16_train(plugin):
    model = Line()
    model.layer.half()
    fit(model, plugin(), [0.5, INF, 0.25])
    assert model.travelled == 0.75
    assert model.layer.weight.dtype == torch.float16


INVALID = [
    {"init_scale": -1.0},
    {"init_scale": 0.0},
    {"init_scale": math.nan},
    {"growth_interval": 0},
]


def stock_with(**scaling):
    return torch.amp.GradScaler("cpu", **scaling)


@pytest.mark.parametrize("scaling", INVALID, ids=str)
@pytest.mark.parametrize(
    "construct",
    [
        pytest.param(stock_with, id="stock", marks=pytest.mark.xfail(strict=True, reason="GradScaler takes them")),
        pytest.param(lambda **scaling: ours(loss_scaling=scaling), id="ours"),
    ],
)
def test_invalid_options_are_refused(construct, scaling):
    with pytest.raises((MixPrecError, AssertionError)):
        construct(**scaling)


@fails_on_stock("one non-finite gradient destroys the weights", precision="bf16-mixed")
def test_bf16_is_guarded_against_non_finite_gradients(plugin):
    model, plugin = Line(), plugin()
    fit(model, plugin, [0.5, INF, math.nan, 0.25])
    assert model.travelled == 0.75
    assert plugin.skipped_steps == 2


@pytest.mark.parametrize("policy", ["bf16", "fp32"])
def test_the_guard_can_be_switched_off(policy):
    model = Line()
    fit(model, ours(policy, skip_nonfinite=False), [0.5, INF, 0.25])
    assert math.isnan(model.travelled) or math.isinf(model.travelled)


def parabola(layer, batch):
    return (layer(batch).float() - 1).square().mean()


def two_steps_on_one_batch(model, batch, _):
    optimizer, _ = model.optimizers()
    for _ in range(2):
        zero_grads(optimizer)
        model.manual_backward(parabola(model.a, batch))
        optimizer.step()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_second_forward_in_a_training_step_sees_the_weights_that_the_first_step_wrote(precision):
    model, oracle = Manual(two_steps_on_one_batch), Manual(two_steps_on_one_batch)
    fit(model, ours({"bf16-mixed": "bf16", "16-mixed": "fp16"}[precision]), [0.3, 0.2])
    fit(oracle, stock(precision), [0.3, 0.2])
    assert torch.equal(model.a.weight, oracle.a.weight)


class Peeking(Line):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.layer(batch)
        return super().training_step(batch, batch_idx)


@holds_on_both()
def test_a_forward_without_gradients_does_not_take_them_from_the_next(plugin):
    model = Peeking()
    fit(model, plugin(), [0.5, 0.25])
    assert model.travelled == 0.75


class Quadratic(Line):
    def training_step(self, batch, batch_idx):
        self.began = True
        return parabola(self.layer, batch)


LBFGS = partial(torch.optim.LBFGS, lr=0.5, max_iter=3)


def test_lbfgs_is_refused_under_loss_scaling_before_training_begins():
    model = Quadratic(LBFGS)
    with pytest.raises(SupportError, match=r"LBFGS .* use bf16 or fp32"):
        fit(model, ours(), [0.5])
    assert not hasattr(model, "began")


@pytest.mark.parametrize(("policy", "precision"), [("bf16", "bf16-mixed"), ("fp32", "32-true")])
def test_lbfgs_trains_as_with_lightnings_own_plugin(policy, precision):
    model, oracle = Quadratic(LBFGS), Quadratic(LBFGS)
    fit(model, ours(policy), [0.5, 0.25])
    fit(oracle, stock(precision), [0.5, 0.25])
    assert model.travelled != 0
    assert torch.equal(model.layer.weight, oracle.layer.weight)


class Mixed(Line):
    def __init__(self):
        super().__init__()
        self.wide = weights().double()

    def training_step(self, batch, batch_idx):
        return slope(self.layer, batch) + slope(self.wide, batch.double())


def test_layers_stored_in_several_formats_are_stepped_by_one_optimizer():
    model = Mixed()
    fit(model, ours({"default": "fp16", "wide": "fp64"}), [0.5, INF, 0.25])
    assert model.travelled == 0.75
    assert model.wide.weight.flatten().tolist() == [-0.75, -0.75]
