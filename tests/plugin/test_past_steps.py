"""Steps that an optimizer takes without the plugin are told once, and only where they are."""

import warnings

import pytest
import torch
from lightnings import pl
from odd_steps import PAST_THE_PLUGIN, THROUGH_THE_PLUGIN, Odd, adam, odd, plain
from plugin_models import Batches, Call, Task, fit, mlp, ours
from torch.optim import SGD
from torch.optim import optimizer as torch_optimizer

from lightning_mixprec import PerLayerPrecision


def warned(model, plugin, count=4, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=".*past the precision plugin")
        fit(model, plugin, Batches(6, count=count), **options)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("format", ["fp16", "bf16"])
@pytest.mark.parametrize("name", PAST_THE_PLUGIN)
def test_it_is_told_once(name, format):
    (told,) = warned(odd(name), ours(format))
    assert "steps past the precision plugin" in told and "self.optimizers() returns" in told
    assert ("multiplied by the loss scale" in told) == (format == "fp16")


@pytest.mark.parametrize("format", ["fp16", "bf16"])
@pytest.mark.parametrize("name", THROUGH_THE_PLUGIN)
def test_nothing_is_told_of(name, format):
    assert warned(odd(name), ours(format)) == []


class ByHand(SGD):
    @torch.no_grad()
    def move(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(1e-6 * p.grad)
        self.zero_grad()


def by_hand(module, batch):
    module.manual_backward(module.loss(batch))
    module.optimizers().move()


@pytest.mark.parametrize("batches", [7, 8, 12])
def test_a_method_that_calls_no_step_is_told_at_the_eighth_batch(batches):
    model = Odd(by_hand, lambda module: ByHand(module.parameters(), lr=0.1))
    assert len(warned(model, ours("fp16"), batches)) == (batches >= 8)


def test_weights_that_are_bounded_by_hand_are_no_step():
    def bounded(module, batch):
        plain(module, batch)
        for param in module.parameters():
            torch.clamp_(param.detach(), -1, 1)

    assert warned(Odd(bounded, adam), ours("bf16"), 12) == []


def test_an_optimizer_of_the_steps_own_is_no_step_of_the_run():
    def latent(module, batch):
        found = torch.zeros_like(batch[0], requires_grad=True)
        own = SGD([found], lr=0.1)
        module.loss((found, batch[1])).backward()
        own.step()
        module.zero_grad()
        plain(module, (found.detach(), batch[1]))

    assert warned(Odd(latent, adam), ours("bf16")) == []


def test_where_nothing_is_guarded_nothing_is_told():
    assert warned(odd("the Trainer's"), PerLayerPrecision("bf16", skip_nonfinite=False)) == []


def test_automatic_optimization_that_steps_the_wrapped_optimizer_is_told():
    class Overriding(Task):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer_closure()
            optimizer.optimizer.step()

    assert len(warned(Overriding(mlp()), ours("bf16"))) == 1


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_no_hook_is_left(ends):
    class End(pl.Callback):
        def on_train_batch_end(self, *_):
            if ends == "badly":
                raise RuntimeError("planted")

    hooks, during = torch_optimizer._global_optimizer_pre_hooks, Call("on_train_batch_start", lambda *_: len(hooks))
    before = dict(hooks)
    with pytest.raises(RuntimeError, match="planted") if ends == "badly" else warnings.catch_warnings():
        fit(Task(mlp()), ours("bf16"), callbacks=[during, End()])
    assert during.results[0] == len(before) + 1 and dict(hooks) == before
