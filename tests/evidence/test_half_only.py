"""Kernels that take 16 bits alone: the rest of a step is compared with fp32 all the same, and the layer is named."""

import json
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from diary import Diary
from plugin_models import Batches, Task, fit, ours, same, stock
from torch import Tensor, nn

from lightning_mixprec import FidelityMonitor, OverflowMonitor, UnderflowMonitor, diagnose
from lightning_mixprec.errors import TraceLeftError
from lightning_mixprec.evidence.instruments.sandbox import Sandbox

ASKED = Diary()
"""The dtypes that the kernel was asked for."""


@pytest.fixture(autouse=True)
def nobody_has_asked():
    ASKED.clear()


def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention for 16 bits alone, as flash-attn's is."""
    ASKED.append(query.dtype)
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("only fp16 and bf16 are supported")
    return plain(query, key, value)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2)).softmax(-1) @ value


class Kernel(nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return kernel(*args)


class Attention(nn.Module):
    """Attention whose kernel it calls itself, or has in a module that is given query, key and value."""

    def __init__(self, compute=kernel) -> None:
        super().__init__()
        self.norm, self.inputs, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.compute = compute() if isinstance(compute, type) else compute

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.compute(*self.inputs(self.norm(x)).chunk(3, -1)))


def attending(compute=kernel, *others: nn.Module) -> Task:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Flatten(), nn.Linear(30, 2))
    return Task(nn.Sequential(nn.Linear(6, 6), Attention(compute), Attention(compute), *others, head))


def rows():
    return [json.loads(line) for line in Path("mixprec.jsonl").read_text().splitlines()]


def watched(model, plugin, **options):
    """A run under monitors, and what it warned of."""
    callbacks = [UnderflowMonitor(1), FidelityMonitor(1, layers_per_sample=100), OverflowMonitor()]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(model, plugin, Batches(5, 6, count=3), callbacks=callbacks, **options)
    return callbacks[1], [str(each.message) for each in told if "compute in fp32" in str(each.message)]


PLUGINS = {f"{who.__name__} {format}": (who, format) for who in (ours, stock) for format in ("bf16", "fp16")}
EACH = pytest.mark.parametrize("plugin", [partial(who, format) for who, format in PLUGINS.values()], ids=PLUGINS)


@EACH
def test_the_rest_is_compared_and_the_layers_are_named_once(plugin):
    fidelity, told = watched(model := attending(), plugin())
    assert [row["problem"] for row in rows() if "problem" in row] == []
    assert [row["not_in_fp32"] for row in rows() if "loss_gap" in row] == [["net.1", "net.2"]] * 3
    assert len(told) == 1
    assert "layer 'net.1' (also 1 more: 'net.2')" in told[0]
    assert "only fp16 and bf16 are supported" in told[0]
    assert ASKED.count(torch.float32) == 1 + 3  # in the first step, and in the first calls of the layers around it
    layers = fidelity.latest["layers"]
    assert layers.keys() & {"net.1", "net.2"} == set()  # of weights of their own they have none
    assert all(40 < layers[name]["sqnr_db"] < 90 for name in ("net.0", "net.1.inputs", "net.1.out", "net.3.1"))
    assert min(layers[name]["grad_cosine"] for name in ("net.0", "net.1.norm", "net.2.out", "net.3.1")) > 0.999
    alone = attending()
    fit(alone, plugin(), Batches(5, 6, count=3))
    assert same(alone.state_dict(), model.state_dict())


@EACH
def test_what_is_given_to_a_kernel_in_a_module_of_its_own_is_in_16_bits_too(plugin):
    _, told = watched(attending(Kernel), plugin())
    assert [row["problem"] for row in rows() if "problem" in row] == []
    everyone = ["net.1.compute", "net.2.compute", "net.1", "net.2"]
    assert [row["not_in_fp32"] for row in rows() if "loss_gap" in row] == [everyone] * 3
    assert len(told) == 2


@pytest.mark.parametrize("plugin", [ours, stock])
def test_gradients_that_are_too_small_for_fp16_reach_the_layers_before_it(plugin):
    class Faint(Task):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 1e-7

    found = []
    for compute in (kernel, plain):
        model = attending(compute)
        faint = Faint(model.net)
        fidelity, _ = watched(faint, plugin("fp16"))
        found.append(fidelity.latest["layers"]["net.0"]["grad_cosine"])
    assert found[0] == pytest.approx(found[1], abs=0.02)
    assert found[0] > 0.95


def test_a_layer_that_fails_in_its_own_format_too_is_no_such_layer():
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if "log" in vars(model):  # in a replay
                ASKED.append(x.dtype)
                raise ValueError(f"never again, after {len(ASKED)}")
            return x

    model = Task(nn.Sequential(nn.Linear(6, 6), nn.Sequential(Never()), nn.Linear(6, 2)))
    plugin = ours("bf16")
    with pytest.warns(UserWarning, match="ValueError: never again, after 1"):
        run = fit(model, plugin, Batches(6, count=1), callbacks=[UnderflowMonitor(1)])
    assert run.global_step == 1
    assert plugin.not_in_fp32 == {}
    assert 1 < len(ASKED) < 5


@pytest.mark.parametrize("at", [1, 2])
def test_what_cannot_be_put_back_is_an_error_at_once_and_looked_for_in_no_layer(at, monkeypatch):
    opened, close = [], Sandbox.close

    def leaves_a_trace(sandbox, random, error):
        opened.append(close(sandbox, random, error))
        return TraceLeftError("left a trace") if len(opened) == at else opened[-1]

    monkeypatch.setattr(Sandbox, "close", leaves_a_trace)
    with pytest.raises(TraceLeftError, match="left a trace"):
        fit(attending(), ours("bf16"), Batches(5, 6, count=1), callbacks=[UnderflowMonitor(1)])
    assert len(opened) == at


class Loud(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        nn.init.constant_(self.up.weight, 1e5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x))


@pytest.mark.filterwarnings("ignore:.*cannot compute in fp32:UserWarning")
def test_an_overflow_elsewhere_is_named():
    found = diagnose(attending(kernel, Loud()), (torch.ones(2, 5, 6), torch.zeros(2, 2)), "fp16")
    assert (found["verdict"], found["layer"], found["fits"]) == ("precision", "net.3.up", "bf16")


@pytest.mark.parametrize("plugin", [ours, stock])
def test_a_layer_that_cannot_be_helped_is_not_tried_again_at_each_sample(plugin, monkeypatch):
    """It fails in fp32, also with its own operations in 16 bits: one replay in fp32 tells from then on."""
    runs = []

    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if "log" in vars(task):
                runs.append(task.trainer.global_step)
                raise RuntimeError("not in a replay")
            return x

    task = Task(nn.Sequential(nn.Linear(6, 6), Never(), nn.Flatten(), nn.Linear(30, 2)))
    with pytest.warns(UserWarning, match="could not sample step 0"):
        fit(task, plugin("bf16"), Batches(5, 6, count=4), callbacks=[UnderflowMonitor(1)])
    assert [runs.count(step) for step in range(4)] == [3, 1, 1, 1]
