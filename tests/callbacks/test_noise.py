"""Numbers that are zero but for rounding in fp32, too: of them nothing is to be said, and nothing moves."""

import copy
import warnings
from functools import partial

import pytest
import torch
from adaptive_models import ADAM, Lessons, train
from plugin_models import Batches, Call, Task, fit, ours
from torch import nn
from torch.nn import functional as F

from lightning_mixprec import AdaptivePrecision, FidelityMonitor, PerLayerPrecision
from lightning_mixprec.evidence.comparison import Comparison, Wanted
from lightning_mixprec.evidence.run_formats import PluginFormats
from lightning_mixprec.evidence.step_window import KeptBatch


class Shift(nn.Module):
    """A bias of its own; before a normalization nothing depends on it."""

    def __init__(self, features):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x):
        return x + self.bias


class Standardized(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.shift, self.norm = nn.Linear(6, 16), Shift(16), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.norm(self.shift(self.body(x))))


class Alike(nn.Module):
    """Attention among tokens that are all the same, whatever its queries and keys are."""

    def __init__(self):
        super().__init__()
        self.embed, self.query, self.key, self.value = (nn.Linear(size, 16) for size in (6, 16, 16, 16))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        tokens = self.embed(x)[:, None].expand(-1, 5, -1)
        mixed = F.scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        return self.head(mixed.mean(1))


class Faint(nn.Module):
    """A branch whose gradient is as small as noise, and means something all the same."""

    def __init__(self):
        super().__init__()
        self.loud, self.faint = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        return self.loud(x) + self.faint(x) * 1e-9


NOISE = {"a bias before a norm": (Standardized, ["net.shift"]), "equal tokens": (Alike, ["net.query", "net.key"])}
EACH = pytest.mark.parametrize(("make", "noisy"), NOISE.values(), ids=NOISE)


def learned(make):
    torch.manual_seed(0)
    return partial(Task, make(), ADAM)


@EACH
@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_nothing_moves_for_gradients_that_are_noise_in_fp32_too(make, noisy, format):
    adaptive = AdaptivePrecision()
    train(learned(make), PerLayerPrecision(format), [adaptive], Lessons(33))
    assert adaptive.decisions == []


@EACH
@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_nobody_is_warned_of_them_and_they_have_no_cosine(make, noisy, format):
    monitor = FidelityMonitor(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="step")
        _, run = train(learned(make), PerLayerPrecision(format), [monitor], Lessons(20))
    cosines = {layer: values["grad_cosine"] for layer, values in monitor.latest["layers"].items()}
    assert [cosines[layer] for layer in noisy] == [None] * len(noisy)
    assert cosines["net.head"] > 0.99 and run.callback_metrics["mixprec/min_grad_cosine"] > 0.9


def self_agreement(task):
    """That of the first step, and the batch; the weights are the same afterwards."""
    seen = []

    def ask(run, model):
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        kept = KeptBatch(Batches(6).batches[0], 0, None)
        seen.append(Comparison(model, PluginFormats(run.precision_plugin), kept, Wanted()).self_agreement())
        assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())

    fit(task, ours("fp16"), callbacks=[Call("on_train_epoch_start", ask)])
    return seen[0].layers


@EACH
def test_what_fp32_does_not_agree_with_itself_about_is_what_fp64_has_far_less_of(make, noisy):
    torch.manual_seed(0)
    task = Task(make())
    x, y = Batches(6).batches[0]
    sizes = {}
    for dtype in (torch.float32, torch.float64):
        net = copy.deepcopy(task.net).to(dtype)
        F.mse_loss(net(x.to(dtype)), y.to(dtype)).backward()
        for name, layer in net.named_children():
            sizes[name, dtype] = sum(param.grad.double().square().sum() for param in layer.parameters()).sqrt()
    in_fp64 = [f"net.{name}" for name, dtype in sizes if sizes[name, dtype] < 1e-3 * sizes[name, torch.float32]]
    layers = self_agreement(task)
    assert in_fp64 == noisy == [name for name, layer in layers.items() if not layer.is_steady]


def test_a_gradient_as_small_as_noise_that_means_something_is_evidence():
    layers = self_agreement(Task(Faint()))
    assert layers["net.faint"].is_steady and layers["net.faint"].share < 1e-8
    monitor = FidelityMonitor(1)
    fit(Task(Faint()), ours("fp16"), callbacks=[monitor])
    assert monitor.latest["layers"]["net.faint"]["grad_cosine"] < 0.999


class Advantage(Task):
    """A policy's first loss: the mean of normalized advantages, times ratios that are 1."""

    def training_step(self, batch, batch_idx):
        scores = self.net(batch[0])[:, 0]
        wanted = batch[1][:, 0]
        wanted = (wanted - wanted.mean()) / wanted.std()
        return -((scores - scores.detach()).exp() * wanted.to(scores.dtype)).mean()


def test_the_gap_of_a_loss_that_is_zero_but_for_rounding_is_told_and_not_warned_of():
    monitor, adaptive = FidelityMonitor(1), AdaptivePrecision()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="step")
        train(partial(Advantage, Standardized(), ADAM), PerLayerPrecision("fp16"), [monitor, adaptive], Lessons(12))
    assert monitor.latest["loss_gap"] > 1
    assert adaptive.decisions == []
