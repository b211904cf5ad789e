"""Weights stored in 16 bits: a step in fp32 is that of the same model in fp32, under our plugin and stock ones."""

import copy

import pytest
import torch
from plugin_models import Batches, Call, Task, fit, ours, same, stock
from torch import Tensor, nn

from lightning_mixprec import FidelityMonitor, UnderflowMonitor
from lightning_mixprec.evidence.comparison import Comparison, Wanted
from lightning_mixprec.evidence.run_formats import formats_of
from lightning_mixprec.evidence.step_window import KeptBatch

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Adapted(nn.Module):
    """A frozen layer in 16 bits, with an adapter in fp32."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Encoding(nn.Module):
    """A frozen layer in 16 bits that is given what code of its user's casts to its weights' dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.frozen, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.frozen(x.to(self.dtype))
        return self.head(hidden.float())


def adapted(dtype):
    net = nn.Sequential(Adapted(6, 8), nn.Tanh(), Adapted(8, 2))
    for layer in (net[0].base, net[2].base):
        layer.to(dtype)
    return net


def encoding(dtype):
    net = Encoding(dtype)
    net.frozen.to(dtype)
    return net


def stored(dtype):
    """A layer whose trained weights are stored in 16 bits beside others in fp32."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    net[2].to(dtype)
    return net


def task_of(net, dtype):
    torch.manual_seed(0)
    return Task(net(dtype))


def by_hand(model, batch):
    """Loss and gradients of the same model in fp32."""
    twin = copy.deepcopy(model).float()
    for module in twin.modules():
        if isinstance(module, Encoding):  # what is rounded by its own code stays rounded
            module.frozen.register_forward_pre_hook(lambda frozen, args: args[0].float())
    loss = nn.functional.mse_loss(twin.net(batch[0]), batch[1])
    loss.backward()
    return loss, {name: param.grad for name, param in twin.named_parameters() if param.grad is not None}


NETS = pytest.mark.parametrize("net", [adapted, encoding, stored], ids=lambda net: net.__name__)
PLUGINS = pytest.mark.parametrize("plugin", [ours, stock], ids=lambda plugin: plugin.__name__)


@NETS
@PLUGINS
@pytest.mark.parametrize("format", HALF)
@pytest.mark.filterwarnings("ignore:.*(stored in|updates)")
def test_the_step_in_fp32_is_that_of_the_same_model_in_fp32(format, plugin, net):
    if net is stored and plugin is stock and format == "fp16":
        pytest.skip("stock scalers unscale no gradients in fp16")
    model, batch = task_of(net, HALF[format]), Batches(6, count=1).batches[0]
    expected, gradients = by_hand(model, batch)

    def compare(run, module):
        comparison = Comparison(module, formats_of(run, "A test"), KeptBatch(batch, 0, None), Wanted())
        comparison.run_reference()
        return comparison.reference

    call = Call("on_train_batch_start", compare)
    fit(model, plugin(format), Batches(6, count=1), callbacks=[call])
    [found] = call.results
    assert found.losses[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert found.gradients[name].dtype == torch.float32
        assert torch.allclose(found.gradients[name], gradient, rtol=1e-5, atol=1e-8)


@NETS
@PLUGINS
@pytest.mark.filterwarnings("ignore:.*(stored in|updates|as they were)")
def test_every_sample_succeeds_and_training_is_the_same(plugin, net):
    models, fidelity = [], FidelityMonitor(1, layers_per_sample=100)
    for callbacks in ([], [fidelity, UnderflowMonitor(1)]):
        models.append(task_of(net, torch.bfloat16))
        fit(models[-1], plugin("bf16"), Batches(6, count=3), callbacks=callbacks)
    assert same(*(model.state_dict() for model in models))
    assert fidelity.latest["loss_gap"] < 0.02
    assert all(values["sqnr_db"] > 30 for values in fidelity.latest["layers"].values())
