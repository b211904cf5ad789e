"""Monitors of compiled models: they find what they find in plain ones, and nothing is compiled because of them."""

import pytest
import torch
from monitor_models import CULPRITS, Watched, batches, mlp, watch
from plugin_models import Batches, same
from selection import slow_but_for
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightning_mixprec import FidelityMonitor, OverflowMonitor, PerLayerPrecision, UnderflowMonitor, diagnose

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*(vanish in|no longer points|differs from fp32)"),
]

POLICY = {"default": "fp16", "net.blocks.0": "bf16", "**.norm": "c=fp32,o=input"}


def monitors():
    return [UnderflowMonitor(1), FidelityMonitor(2), OverflowMonitor()]


def test_a_watched_run_compiles_and_computes_what_the_unwatched_one_does(how, run):
    watched = run(POLICY, how, callbacks=monitors())
    alone = run(POLICY, how)
    assert watched.graphs == alone.graphs
    assert same(watched.numbers, alone.numbers)


@pytest.mark.parametrize("how", slow_but_for({"a submodule"}, ["the LightningModule", "a submodule", "each block"]))
def test_monitors_find_in_a_compiled_run_what_they_find_in_the_plain_one(how, run):
    seen = [monitors(), monitors()]
    for watching, way in zip(seen, (None, how), strict=True):
        run(POLICY, way, backend="aot_eager", callbacks=watching)
    for plain, compiled in zip(*seen, strict=True):
        assert compiled.state_dict() == plain.state_dict()
    assert "net.blocks.0.layer" in seen[1][0].latest
    assert "net.blocks.0.layer" in seen[1][1].latest["layers"]


class Outer(nn.Module):
    """Calls a function that was compiled by itself, as flex attention is."""

    def __init__(self, counter):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)
        self.function = torch.compile(lambda layer, x: layer(torch.tanh(x)), backend=counter)

    def forward(self, x):
        return self.function(self.second, self.first(x))


def test_a_compiled_function_inside_is_not_compiled_again(run):
    counters = [CompileCounter(), CompileCounter()]
    for counter, watching in zip(counters, ([], monitors()), strict=True):
        run({"default": "fp16", "net.second": "bf16"}, make=lambda c=counter: Outer(c), callbacks=watching)
    assert counters[0].frame_count == counters[1].frame_count > 0


COMPILING = {
    "the LightningModule": lambda module: torch.compile(module, backend="eager"),
    "in place": lambda module: module.compile(backend="eager") or module,
    "a submodule": lambda module: setattr(module, "net", torch.compile(module.net, backend="eager")) or module,
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("how", slow_but_for({"in place"}, COMPILING))
def test_an_overflow_in_compiled_code_is_traced_to_its_layer(how, direction):
    net, culprit = CULPRITS["mlp"]
    event = watch(COMPILING[how](Watched(net(direction)))).events[0]
    assert (event["layer"], event["direction"], event["verdict"]) == (culprit, direction, "precision")


def test_weights_that_are_not_finite_are_named_as_in_the_plain_model():
    module = Watched(mlp(None))
    module.net[3].weight.data.fill_(float("nan"))
    event = watch(COMPILING["a submodule"](module)).events[0]
    assert event["verdict"] == "model"
    assert event["detail"] == "weights that are not finite: net.3.weight"


@pytest.mark.parametrize("how", ["in place", "a submodule"])
def test_diagnose_says_of_a_compiled_module_what_it_says_of_the_plain_one(how):
    module = Watched(CULPRITS["mlp"][0]("forward"))
    plain = diagnose(module, batches()[0])
    assert plain["layer"] == CULPRITS["mlp"][1]
    assert diagnose(COMPILING[how](module), batches()[0]) == plain


def test_diagnose_takes_a_module_after_a_compiled_run():
    module = Watched(CULPRITS["mlp"][0]("forward"))
    watch(COMPILING["the LightningModule"](module), PerLayerPrecision("fp32"))
    assert diagnose(module, batches()[0])["layer"] == CULPRITS["mlp"][1]


def test_accumulated_batches_are_watched_without_compiling_anything(run):
    watching = monitors()
    options = {"accumulate_grad_batches": 2, "batches": Batches(6, count=6)}
    done = run(POLICY, "the LightningModule", callbacks=watching, **options)
    assert done.trainer.global_step == 3
    assert set(done.compiled_at) == {0}
    assert watching[0].latest
