"""Models that are not plain fp32 modules train as under Lightning's own plugins: parts of TorchScript."""

from contextlib import nullcontext

import pytest
import torch
from plugin_models import Call, Task, fit, mlp, ours, same, stock
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
