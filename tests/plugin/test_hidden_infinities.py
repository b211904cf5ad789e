"""A hook that makes infinite gradients finite is told of once: its steps are taken, and the loss scale never falls."""

import warnings

import pytest
import torch
from lightnings import MixedPrecision
from plugin_models import Batches, Task, fit, probes
from torch.optim import SGD

from lightning_mixprec import OverflowMonitor, PerLayerPrecision


def finite(grad):
    return torch.nan_to_num(grad, nan=0.0, posinf=1e5, neginf=-1e5)


class Hiding(Task):
    """Its gradients overflow at the loss scale of 65536; a hook of some kind hides that, or none."""

    def __init__(self, kind, size=3e6):
        super().__init__(probes(), lambda params: SGD(params, lr=1e-6))
        self.kind, self.size = kind, size
        self.automatic_optimization = kind != "training_step"
        for param in self.parameters():
            if kind == "of the parameter":
                param.register_hook(finite)
            elif kind == "after accumulation":
                param.register_post_accumulate_grad_hook(self._hide)

    def training_step(self, batch, batch_idx):
        loss = self.size * super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            for param in self.parameters():
                self._hide(param)
            self.optimizers().step()
        return loss

    def on_after_backward(self):
        for param in self.parameters():
            if self.kind == "in place":
                self._hide(param)
            elif self.kind == "another tensor":
                param.grad = finite(param.grad)

    @staticmethod
    def _hide(param):
        param.grad.copy_(finite(param.grad))


KINDS = ["in place", "another tensor", "training_step", "of the parameter", "after accumulation"]


def told(model, plugin, callbacks=(), count=4):
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=".*is not finite after backward")
        fit(model, plugin, Batches(6, count=count), callbacks=list(callbacks))
    return [str(each.message) for each in caught]


def stock():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_plugin_tells_it_once(kind):
    plugin = PerLayerPrecision("fp16")
    (message,) = told(Hiding(kind), plugin)
    assert message.startswith("The gradient of 'net.0.weight' and of 5 more parameters is not finite")
    assert "No step is skipped for it, and the loss scale never falls for it" in message
    assert plugin.skipped_steps == 0 and plugin.scaler.get_scale() == 65536


@pytest.mark.parametrize("kind", KINDS)
def test_the_monitor_tells_it_once_of_a_run_under_lightnings_own_plugin(kind):
    assert len(told(Hiding(kind), stock(), [OverflowMonitor()])) == 1


def test_it_is_told_once_with_plugin_and_monitor():
    assert len(told(Hiding("in place"), PerLayerPrecision("fp16"), [OverflowMonitor()])) == 1


class Steep(Hiding):
    """The gradient of one bias is NaN."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (0 * self.net[2].bias).sqrt().sum()


def test_the_parameter_that_is_hidden_is_named():
    model = Steep("of the parameter", size=1.0)
    (message,) = told(model, PerLayerPrecision("bf16"))
    assert message.startswith("The gradient of 'net.2.bias' is not finite after backward")
    assert "loss scale" not in message


@pytest.mark.parametrize("plugin", [lambda: PerLayerPrecision("fp16"), stock])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_gradients_that_are_finite_are_not_told_of(plugin, kind):
    assert told(Hiding(kind, size=1e-3), plugin(), [OverflowMonitor()]) == []


@pytest.mark.parametrize("plugin", [lambda: PerLayerPrecision("fp16"), stock])
def test_steps_that_are_skipped_are_not_told_of(plugin):
    assert told(Hiding(None), plugin(), [OverflowMonitor()], count=2) == []


def test_where_nothing_is_guarded_nothing_is_told():
    model = Hiding("of the parameter")
    assert told(model, PerLayerPrecision("bf16", skip_nonfinite=False)) == []


class Rivals(Task):
    """The loss of one network overflows in the other's gradients, too, which are thrown away."""

    def __init__(self):
        super().__init__(probes())
        self.automatic_optimization = False

    def configure_optimizers(self):
        return SGD(self.net[0].parameters(), lr=1e-6), SGD(self.net[2].parameters(), lr=1e-6)

    def training_step(self, batch, batch_idx):
        for optimizer, size in zip(self.optimizers(), (3e6, 1e-3), strict=True):
            self.zero_grad()
            self.manual_backward(size * super().training_step(batch, batch_idx))
            optimizer.step()


def test_gradients_that_are_thrown_away_are_not_told_of():
    assert told(Rivals(), PerLayerPrecision("fp16"), count=1) == []


@pytest.mark.parametrize("kind", ["of the parameter", "after accumulation"])
def test_hooks_of_parameters_stay_as_they_were(kind):
    model = Hiding(kind)
    before = [list((p._backward_hooks or p._post_accumulate_grad_hooks).items()) for p in model.parameters()]
    told(model, PerLayerPrecision("fp16"))
    assert before == [list((p._backward_hooks or p._post_accumulate_grad_hooks).items()) for p in model.parameters()]
