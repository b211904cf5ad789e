"""An optimizer that evaluates the loss itself, several times per step, is guarded as far as it lets itself be."""

from functools import partial

import pytest
import torch
from known_results import INF, Line, Manual, fit, ours, slope, stock
from torch import nn

LBFGS = partial(torch.optim.LBFGS, lr=0.5, max_iter=3)


class Parabola(Line):
    def training_step(self, batch, batch_idx):
        return parabola(self.layer, batch)


def parabola(layer, batch):
    return (layer(batch).float() - 1).pow(2).mean()


@pytest.mark.parametrize("policy", ["bf16", "fp32"])
@pytest.mark.parametrize("values", [[INF, 0.5, 0.25], [0.5, INF, 0.25], [0.5, 0.25, INF], [0.5, float("nan"), 0.25]])
def test_a_batch_with_non_finite_gradients_is_skipped(policy, values):
    model, oracle, plugin = Parabola(LBFGS), Parabola(LBFGS), ours(policy)
    trainer = fit(model, plugin, values)
    fit(oracle, stock({"bf16": "bf16-mixed", "fp32": "32-true"}[policy]), [0.5, 0.25])
    assert oracle.travelled != 0
    assert torch.equal(model.layer.weight, oracle.layer.weight)
    assert (plugin.skipped_steps, trainer.global_step) == (1, 2)


def test_the_guard_can_be_switched_off():
    model = Parabola(LBFGS)
    fit(model, ours("bf16", skip_nonfinite=False), [0.5, INF])
    assert not torch.isfinite(model.layer.weight).all()


def two_steps(model, batch, _):
    first, second = model.optimizers()

    def closure():
        first.zero_grad()
        loss = parabola(model.a, batch[0])
        model.manual_backward(loss)
        return loss

    first.step(closure)
    second.zero_grad()
    model.manual_backward(slope(model.b, batch[1]))
    second.step()


class Normed(nn.Sequential):
    """A layer after BatchNorm, which sees the batch's noise."""

    def __init__(self):
        super().__init__(nn.BatchNorm1d(2), nn.Linear(2, 1, bias=False))
        nn.init.ones_(self[1].weight)


class ByHand(Manual):
    def __init__(self):
        super().__init__(two_steps)
        self.a = Normed()

    def configure_optimizers(self):
        return [LBFGS(self.a.parameters()), torch.optim.SGD(self.b.parameters(), lr=1.0)]


def test_by_hand_every_evaluation_sees_the_weights_and_another_optimizers_skip_takes_nothing_back():
    noise = [torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    model, oracle = ByHand(), ByHand()
    fit(model, ours("bf16"), [(batch, 0.5 if index < 3 else INF) for index, batch in enumerate(noise)])
    fit(oracle, stock("bf16-mixed"), [(batch, 0.5) for batch in noise])
    assert oracle.a[0].num_batches_tracked >= len(noise)
    assert torch.equal(model.a[1].weight, oracle.a[1].weight)
    for name, value in oracle.a.state_dict().items():
        assert torch.equal(model.a.state_dict()[name], value), name


class Sharpness(torch.optim.SGD):
    """Steps by the gradients at a point uphill of the weights, as SAM does: it cannot do without its closure."""

    def step(self, closure=None):
        assert closure is not None
        with torch.enable_grad():
            loss = closure()
        params = [param for group in self.param_groups for param in group["params"]]
        here = [param.detach().clone() for param in params]
        with torch.no_grad():
            torch._foreach_add_(params, [param.grad for param in params], alpha=0.1)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            torch._foreach_copy_(params, here)
        super().step()
        return loss


@pytest.mark.parametrize(("policy", "precision"), [("fp32", "32-true"), ("bf16", "bf16-mixed")])
def test_an_optimizer_that_wants_its_closure_gets_it_as_from_lightnings_own_plugin(policy, precision):
    models = []
    for plugin in (ours(policy), stock(precision)):
        torch.manual_seed(0)
        model = Parabola(lambda params: Sharpness(params, lr=0.05))
        fit(model, plugin, [1.0, 2.0, 3.0])
        models.append(model)
    assert all(torch.equal(one, other) for one, other in zip(*(model.parameters() for model in models), strict=True))


def test_a_skipped_step_of_such_an_optimizer_moves_nothing():
    model = Parabola(lambda params: Sharpness(params, lr=0.05))
    before = [param.detach().clone() for param in model.parameters()]
    plugin = ours("bf16")
    fit(model, plugin, [INF])
    assert plugin.skipped_steps == 1
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
