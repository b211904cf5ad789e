"""An ordinary step pays nothing per layer: the same calls of the package's functions, however many layers there are."""

import functools

import pytest
import torch
from counting import CallsOfSteps, more_in
from plugin_models import Batches, Task, trainer
from torch import nn

from lightning_mixprec import FidelityMonitor, OverflowMonitor, PerLayerPrecision, PrecisionReport, UnderflowMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.*vanish in")


def chain(layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))


def calls(layers, policy="bf16", callbacks=(), begin=10, end=12, **arguments):
    counted = CallsOfSteps(begin, end)  # after the first eight steps, which are looked at
    model = Task(chain(layers), functools.partial(torch.optim.SGD, lr=1e-3))
    plugin = PerLayerPrecision(policy, emulate=False, **arguments)
    trainer(plugin, callbacks=[counted, *callbacks]).fit(model, Batches(6, count=end + 1, targets=6))
    return counted


@pytest.mark.parametrize(
    ("policy", "arguments"),
    [("bf16", {}), ("bf16", {"skip_nonfinite": False}), ("fp32", {}), ("bf16", {"loss_scaling": 8.0})],
    ids=["guarded", "unguarded", "fp32", "scaled"],
)
def test_a_uniform_step_calls_nothing_per_layer(policy, arguments):
    few, many = calls(3, policy, **arguments), calls(30, policy, **arguments)
    assert more_in(few.calls, many.calls) == {}
    assert many.per_step < 150


def test_an_emulated_step_pays_for_its_products_alone():
    def run(layers):
        counted = CallsOfSteps(10, 12)
        plugin = PerLayerPrecision("bf16", emulate=True)
        trainer(plugin, callbacks=[counted]).fit(Task(chain(layers)), Batches(6, count=13, targets=6))
        return counted.calls

    few, many = run(3), run(30)
    layers = {name for name in more_in(few, many) if many[name] - few[name] >= 27 * 2}
    assert not [name for name in layers if name.split(":")[0] in ("apply.py", "__init__.py", "formats_in_force.py")]


def test_monitors_that_are_not_due_call_nothing_per_layer():
    def run(layers):
        monitors = [OverflowMonitor(), UnderflowMonitor(1000), FidelityMonitor(1000), PrecisionReport(1000)]
        return calls(layers, callbacks=monitors)

    few, many = run(3), run(30)
    assert more_in(few.calls, many.calls) == {}
    assert many.per_step < 450
