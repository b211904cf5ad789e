"""A layer that cannot be run again costs that layer: the other layers, the other monitors and training go on."""

import json
from pathlib import Path

import pytest
import torch
from lightnings import pl
from plugin_models import Batches, Task, fit, ours, same, stock
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_mixprec import FidelityMonitor, UnderflowMonitor


def rows():
    return [json.loads(line) for line in Path("mixprec.jsonl").read_text().splitlines()]


def model_around(middle: type[nn.Module]) -> Task:
    torch.manual_seed(0)
    return Task(nn.Sequential(nn.Linear(6, 8), middle(), nn.Linear(8, 2)))


def watched(make, plugin, **options):
    """A run with monitors, which trains as the one without, to the last bit."""
    alone, together = make(), make()
    fit(alone, plugin(), Batches(6, count=3), **options)
    underflow, fidelity = UnderflowMonitor(1), FidelityMonitor(1, layers_per_sample=100)
    fit(together, plugin(), Batches(6, count=3), callbacks=[underflow, fidelity], **options)
    assert same(alone.state_dict(), together.state_dict())
    return underflow, fidelity


PLUGINS = pytest.mark.parametrize("plugin", [lambda: ours("bf16"), lambda: stock("bf16")], ids=["ours", "stock"])


class Hinted(nn.Module):
    """A layer that takes something from a list where the layer around it has put it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.hints = nn.Linear(8, 8), []

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.hints.pop()


class Hinting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hinted = Hinted()

    def forward(self, x: Tensor) -> Tensor:
        self.hinted.hints.append(2.0)
        return self.hinted(x)


@PLUGINS
def test_one_whose_second_run_raises_is_named_with_the_reason_and_the_others_are_compared(plugin, capsys):
    underflow, fidelity = watched(lambda: model_around(Hinting), plugin)
    assert [row for row in rows() if "problem" in row] == []
    told = [row["not_compared"] for row in rows() if "loss_gap" in row]
    assert [list(each) for each in told] == [["net.1.hinted"]] * 3
    assert told[0]["net.1.hinted"] == "IndexError: pop from empty list"
    known = {layer for layer, values in fidelity.latest["layers"].items() if values["sqnr_db"] is not None}
    assert known == {"net", "net.0", "net.1", "net.1.hinted.inner", "net.2"}
    assert {"net.0", "net.1.hinted", "net.1.hinted.inner", "net.2"} <= underflow.latest.keys()
    assert "could not be compared: 'net.1.hinted'" in capsys.readouterr().out


class Forces(nn.Module):
    """A layer that takes a gradient in its forward, as force fields do."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        at = x.detach().float().requires_grad_()
        force = torch.autograd.grad(self.energy(at).sum(), at, create_graph=True)[0]
        return x + force


@PLUGINS
def test_one_that_takes_a_gradient_in_its_forward_is_compared(plugin):
    underflow, fidelity = watched(lambda: model_around(Forces), plugin)
    assert [row for row in rows() if "problem" in row or "not_compared" in row] == []
    assert 30 < fidelity.latest["layers"]["net.1"]["sqnr_db"] < 80
    assert {"net.0", "net.1.energy.2"} <= underflow.latest.keys()


class PerSample(pl.LightningModule):
    """Gradients of each sample by vmap, clipped and summed by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
            return functional_call(self.net, weights, (sample[None],)).float().square().mean()

        weights = {name: param.detach() for name, param in self.net.named_parameters()}
        each = vmap(grad(loss), in_dims=(None, 0))(weights, batch[0])
        for name, param in self.net.named_parameters():
            param.grad = each[name].float().clamp(-1, 1).mean(0)
        self.optimizers().step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@PLUGINS
def test_per_sample_gradients_are_sampled_and_the_calls_inside_vmap_are_left_out(plugin):
    underflow, fidelity = watched(PerSample, plugin)
    assert [row for row in rows() if "problem" in row] == []
    told = [row["not_compared"] for row in rows() if "loss_gap" in row]
    assert set(told[0]) == {"net", "net.0", "net.1", "net.2"}
    assert fidelity.latest["layers"]["net.0"]["grad_cosine"] > 0.99
    assert {"net.0", "net.2"} <= underflow.latest.keys()
    assert underflow.latest["net.0"]["flow_underflow_rate"] is not None
