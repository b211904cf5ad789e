"""A skipped step leaves no mark on BatchNorm's running statistics, whatever trains the model and when it happens."""

from functools import partial

import pytest
import torch
from known_results import INF, SGD, fails_on_stock, fit, ours, slope, stock, weights
from lightnings import pl
from torch import nn

from lightning_mixprec.optim import loss_scaling as scaling

STRAY = 1.0e4
GOOD = [torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def normed() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(2), weights())


class Normed(pl.LightningModule):
    """A loss that is infinite for batches with an outlier, whose statistics are only far off."""

    def __init__(self, optimizer=SGD):
        super().__init__()
        self.net = normed()
        self.optimizer = optimizer

    def training_step(self, batch, batch_idx):
        return slope(self.net, batch) * (INF if batch.max() >= STRAY else 1.0)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())

    @property
    def statistics(self):
        return {name: buffer.tolist() for name, buffer in self.net.named_buffers()}


OUTLIER = torch.full((4, 2), STRAY) * torch.tensor([[1.0], [1.0], [1.0], [-1.0]])


def without_outliers(model, batches, precision="16-mixed", **options):
    """The oracle: Lightning's own plugin on the batches that make real steps."""
    fit(model, stock(precision), batches, **options)
    return model


@pytest.mark.parametrize("at", [0, 1, 2, 5])
@fails_on_stock("a skipped batch stays in the running statistics")
def test_a_skipped_batch_leaves_no_mark_on_batchnorm(plugin, at):
    model = Normed()
    fit(model, plugin(), [*GOOD[:at], OUTLIER, *GOOD[at:]])
    oracle = without_outliers(Normed(), GOOD)
    assert model.statistics == oracle.statistics
    model.eval()
    assert torch.isfinite(model.net(GOOD[0])).all()


@pytest.mark.parametrize("at", [0, 2])
@fails_on_stock("a skipped batch stays in the running statistics", precision="bf16-mixed")
def test_the_guard_of_bf16_protects_batchnorm_too(plugin, at):
    model = Normed()
    fit(model, plugin(), [*GOOD[:at], OUTLIER, OUTLIER, *GOOD[at:]])
    assert model.statistics == without_outliers(Normed(), GOOD, "bf16-mixed").statistics


@pytest.mark.parametrize("outlier_is_last", [False, True])
@fails_on_stock("a skipped batch stays in the running statistics")
def test_a_skipped_step_takes_back_its_whole_accumulation_window(plugin, outlier_is_last):
    window = [GOOD[4], OUTLIER] if outlier_is_last else [OUTLIER, GOOD[4]]
    model = Normed()
    fit(model, plugin(), [*GOOD[:2], *window, *GOOD[2:4]], accumulate_grad_batches=2)
    assert model.statistics == without_outliers(Normed(), GOOD[:4], accumulate_grad_batches=2).statistics


class Adversaries(pl.LightningModule):
    """The generator's loss runs through the critic, so each BatchNorm counts forwards of both optimizers' steps."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
        self.critic = normed()

    def training_step(self, batch, batch_idx):
        critic, generator = self.optimizers()
        of_critic, of_generator = batch
        loss = slope(self.critic, of_critic) - slope(self.critic, self.generator(of_critic).detach())
        self.step(critic, loss, of_critic)
        self.step(generator, slope(self.critic, self.generator(of_generator)), of_generator)

    def step(self, optimizer, loss, batch):
        optimizer.zero_grad()
        self.manual_backward(loss * (INF if batch.max() >= STRAY else 1.0))
        optimizer.step()

    def configure_optimizers(self):
        return [SGD(self.critic.parameters(), lr=0.1), SGD(self.generator.parameters(), lr=0.1)]

    def count(self, net):
        return net[0].num_batches_tracked.item()


def of_both(index):
    return GOOD[index], GOOD[index]


@pytest.mark.parametrize(
    "bad",
    [(OUTLIER, OUTLIER), (OUTLIER, GOOD[0]), (GOOD[0], OUTLIER)],
    ids=["both skip", "the critic skips", "the generator skips"],
)
@pytest.mark.parametrize("at", [0, 3])
@fails_on_stock("the skipped steps of one optimizer poison the statistics of the other's layers, too")
def test_adversaries_keep_their_own_steps_and_no_skipped_one(plugin, at, bad):
    model = Adversaries()
    fit(model, plugin(), [*map(of_both, range(at)), bad, *map(of_both, range(at, 5))])
    assert all(buffer.abs().max() < 100 for buffer in model.buffers())
    critic_steps, generator_steps = (5 + (batch is not OUTLIER) for batch in bad)
    assert 2 * critic_steps <= model.count(model.critic) <= 2 * critic_steps + generator_steps
    assert generator_steps <= model.count(model.generator) <= generator_steps + critic_steps


class Functional(nn.Module):
    """Statistics that nothing but their values says to have changed: the kernel gives them no new version."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x):
        return nn.functional.batch_norm(x, self.mean, self.var, training=self.training)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, partial(nn.BatchNorm1d, momentum=None), Functional])
def test_every_kind_of_batchnorm_is_put_back_late_in_a_run(kind):
    model, oracle = Normed(), Normed()
    model.net[0], oracle.net[0] = kind(2), kind(2)
    fit(model, ours(), [*GOOD[:4], OUTLIER])
    assert model.statistics == without_outliers(oracle, GOOD[:4]).statistics


def test_a_learned_weight_norm_is_put_back():
    def spectral():
        model = Normed(partial(SGD, lr=0.1))
        torch.manual_seed(0)
        model.net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)), weights())
        return model

    model, oracle = spectral(), spectral()
    fit(model, ours(), [*GOOD[:3], OUTLIER, *GOOD[3:]])
    assert model.statistics == without_outliers(oracle, GOOD).statistics


def test_a_flag_that_is_not_read_puts_buffers_back_on_the_device(monkeypatch):
    monkeypatch.setattr(scaling, "_is_read", lambda *_: False)
    model = Normed(partial(SGD, fused=True))
    fit(model, ours(), [*GOOD[:2], OUTLIER, *GOOD[2:]])
    assert model.statistics == without_outliers(Normed(), GOOD).statistics
