"""A replay computes what the run computes: its losses and the gradients that its optimizers step with, to the bit."""

from functools import partial

import pytest
import torch
from known_results import Batches, stock, trainer_of
from lightnings import pl
from monitor_models import ResNet, Watched, batches
from plugin_models import same
from torch import nn

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.evidence.instruments.sandbox import RandomState
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import formats_of


class Replaying(pl.Callback):
    """Replays each batch before the run takes it, and keeps what the run's optimizers then see."""

    def __init__(self):
        self.replayed, self.seen = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        formats = formats_of(trainer, "A test")
        replay = StepReplay(module, formats, module.device)
        with replay.opened() as stand_ins:
            found = replay.run(stand_ins, batch, batch_idx, scale=formats.scale, random=RandomState(module.device))
        scale = float(formats.scale)
        self.replayed.append({name: gradient / scale for name, gradient in found.gradients.items()})
        self.seen.append({})

    def on_before_optimizer_step(self, trainer, module, optimizer):
        mine = {id(param) for group in optimizer.param_groups for param in group["params"]}
        named = module.named_parameters()
        self.seen[-1] |= {n: p.grad.clone() for n, p in named if id(p) in mine and p.grad is not None}


class Noisy(Watched):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Dropout(0.4), ResNet(None)), weight=1.0)


class Players(Watched):
    """Both losses reach both networks; where players are toggled, nothing else keeps their gradients apart."""

    def __init__(self, toggle):
        super().__init__(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4)))
        self.automatic_optimization = False
        self.toggle = toggle

    def training_step(self, batch, batch_idx):
        for sign, optimizer in zip((1.0, -1.0), self.optimizers(), strict=True):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            else:
                optimizer.zero_grad()  # of what the other player's losses left
            self.manual_backward(sign * self.other(self.net(batch)).float().mean())
            self.manual_backward(self.other(self.net(2 * batch)).float().square().mean())
            optimizer.step()
            optimizer.zero_grad()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        # Nothing moves, so that the second player sees the weights that the replay sees.
        return [torch.optim.SGD(each.parameters(), lr=0.0) for each in (self.net, self.other)]


MODELS = {"automatic": Noisy, "by hand": partial(Players, False), "by hand, toggled": partial(Players, True)}
PLUGINS = {
    "fp16": lambda: PerLayerPrecision({"default": "fp16", "other": "c=fp32"}, loss_scaling=1024),
    "bf16": lambda: PerLayerPrecision("bf16"),
    "fp32": lambda: PerLayerPrecision("fp32"),
    "stock bf16": lambda: stock("bf16-mixed"),
    "stock fp32": lambda: stock("32-true"),
}


@pytest.mark.parametrize("make_plugin", PLUGINS.values(), ids=PLUGINS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_replay_has_the_gradients_that_the_optimizers_step_with(make, make_plugin):
    spy, model = Replaying(), make()
    trainer_of(make_plugin(), callbacks=[spy]).fit(model, Batches(batches(2)))
    trained = {name for name, _ in model.named_parameters()}
    for replayed, seen in zip(spy.replayed, spy.seen, strict=True):
        assert same(replayed, {name: seen[name] for name in replayed})
        assert set(replayed) == trained


def test_a_replay_divides_by_the_batches_of_an_accumulation():
    spy = Replaying()
    model = Watched(nn.Linear(8, 4), weight=1.0)
    trainer = trainer_of(stock("32-true"), callbacks=[spy], accumulate_grad_batches=2)
    trainer.fit(model, Batches(batches(2)))
    first, second = spy.replayed
    for name, seen in spy.seen[-1].items():
        torch.testing.assert_close(first[name] + second[name], seen)
