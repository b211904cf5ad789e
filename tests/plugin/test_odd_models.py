"""Models that are not plain fp32 train as under Lightning's own plugins: parts of TorchScript, weights in fp64."""

from contextlib import nullcontext

import pytest
import torch
from plugin_models import Batches, Call, Task, fit, mlp, ours, same, stock
from torch import nn

from lightning_mixprec.errors import PolicyError

scripts = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")


def trained(plugin, make_net, loader=None):
    torch.manual_seed(0)
    model = Task(make_net())
    fit(model, plugin, loader)
    return {"losses": model.losses, "weights": dict(model.state_dict())}


def traced(net):
    return torch.jit.trace(net, torch.randn(4, 8))


# torch goes on computing a scripted Linear in the first 16-bit format that one is called in, and fails in the other.
@scripts
@pytest.mark.parametrize(
    ("make", "format"),
    [(torch.jit.script, "fp32"), (torch.jit.script, "bf16"), (traced, "fp32"), (traced, "bf16"), (traced, "fp16")],
)
def test_a_part_of_torchscript(make, format):
    def net():
        return nn.Sequential(nn.Linear(6, 8), make(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 2))

    assert same(trained(ours(format), net), trained(stock(format), net))


@scripts
@pytest.mark.parametrize("policy", ["bf16", {"default": "bf16", "net.0": "fp32"}])
def test_a_model_is_scripted_after_the_run_and_told_so_within_it(policy):
    model, x = Task(mlp()), torch.randn(2, 6)
    script = Call("on_train_batch_end", lambda trainer, model: torch.jit.script(model.net))
    with nullcontext() if policy == "bf16" else pytest.raises(PolicyError, match="script it after the run"):
        fit(model, ours(policy), callbacks=[script])
    model.eval()
    assert torch.equal(torch.jit.script(model.net)(x), model.net(x))


class Precise(nn.Module):
    """A part in fp64 that takes what comes, and hands on fp32 or not."""

    def __init__(self, narrows=True):
        super().__init__()
        self.linear, self.narrows = nn.Linear(8, 8).double(), narrows

    def forward(self, x):
        y = torch.tanh(self.linear(x.double()))
        return y.float() if self.narrows else y


class Scaled(nn.Module):
    """A Linear in fp32 whose result a buffer in fp64 scales."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((8,), 1 / 3, dtype=torch.float64))

    def forward(self, x):
        return (self.linear(x) * self.scale).float()


def normed():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 2)).double()


IN_FP64 = {
    "all": (lambda: mlp().double(), torch.float64),
    "all, with statistics": (normed, torch.float64),
    "a part": (lambda: nn.Sequential(nn.Linear(6, 8), Precise(), nn.Linear(8, 2)), torch.float32),
    "the first part": (lambda: nn.Sequential(nn.Linear(6, 8).double(), Precise(), nn.Linear(8, 2)), torch.float64),
    "the last parts": (lambda: nn.Sequential(nn.Linear(6, 8), Precise(False), nn.Linear(8, 2).double()), torch.float32),
    "a buffer": (lambda: nn.Sequential(nn.Linear(6, 8), Scaled(), nn.Linear(8, 2)), torch.float32),
}


def batches(dtype):
    loader = Batches(6)
    loader.batches = [(x.to(dtype), y) for x, y in loader]
    return loader


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", IN_FP64)
def test_what_is_in_fp64_stays(kind, format):
    net, dtype = IN_FP64[kind]
    assert same(trained(ours(format), net, batches(dtype)), trained(stock(format), net, batches(dtype)))


@pytest.mark.parametrize("policy", ["bf16", "fp16", "fp32"])
def test_the_assignment_says_what_layers_in_fp64_compute_in(policy):
    plugin = ours(policy)
    fit(Task(nn.Sequential(nn.Linear(6, 8), Precise(), nn.Linear(8, 2))), plugin)
    formats = {name: layer.compute for name, layer in plugin.assignment.items()}
    assert formats == dict.fromkeys(formats, policy) | {"net.1": "fp64", "net.1.linear": "fp64"}
    plugin = ours(policy)
    fit(Task(mlp().double()), plugin, batches(torch.float64))
    assert plugin.assignment.compute_formats == {"fp64"}


@pytest.mark.parametrize("rule", ["net.0", "net.2", "net.4", "net"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_rule_has_layers_in_fp64_compute_narrower(compute, rule):
    model, plugin = Task(mlp().double()), ours({"default": "bf16", rule: compute})
    fit(model, plugin, batches(torch.float64))
    assert plugin.assignment[rule].compute == compute
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("rule", ["net.0", "net.2"])
def test_a_part_in_fp64_trains_beside_layers_with_rules(rule):
    def net():
        return nn.Sequential(nn.Linear(6, 8), Precise(False), nn.Linear(8, 2).double(), nn.Identity())

    model = Task(net())
    fit(model, ours({"default": "bf16", rule: "fp32"}))
    assert all(torch.isfinite(loss) for loss in model.losses)
