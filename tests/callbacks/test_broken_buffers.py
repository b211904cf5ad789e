"""A step that leaves buffers not finite although its loss and gradients are: told with its layer, put back, moved."""

import pytest
import torch
from adaptive_models import ADAM, Lessons, adapt, late, stock, train
from plugin_models import Task, same
from torch import nn

from lightning_mixprec import OverflowMonitor, PerLayerPrecision
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision
from lightning_mixprec.evidence.buffers import BufferWatch

pytestmark = pytest.mark.filterwarnings(r"ignore:step \d+, batch \d+. in buffers alone")


class Averaged(nn.Module):
    """Moving averages of sums that fp16 does not hold; what it hands on is made of those of the steps before."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain
        self.register_buffer("total", torch.ones(6))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        shift = 1e-9 * self.total.mean()
        if self.training:
            with torch.no_grad():
                self.total.mul_(0.9).add_((x.T @ torch.full((len(x), 1), self.gain)).flatten(), alpha=0.1)
                self.steps += 1
        return x + shift


def averaged(gain=1e5):
    torch.manual_seed(2)
    return Task(nn.Sequential(nn.Linear(6, 6), Averaged(gain), nn.BatchNorm1d(6), nn.Linear(6, 2)), ADAM)


def ours():
    return PerLayerPrecision("fp16", {"init_scale": 128.0})


@pytest.mark.parametrize("make_plugin", [stock, ours], ids=["stock", "ours"])
def test_the_layer_is_named_at_the_first_step_and_nobody_says_that_it_is_the_model(make_plugin):
    monitor = OverflowMonitor()
    train(averaged, make_plugin(), [monitor], batches=Lessons(4))
    told = [event for event in monitor.events if event["verdict"] != "scale"]
    assert [(event["verdict"], event["layer"], event["batch_idx"]) for event in told[:1]] == [("precision", "net.1", 0)]
    assert told[0]["message"].startswith("in buffers alone ('net.1.total'), the forward of layer 'net.1' (")
    assert {event["verdict"] for event in told} == {"precision"}


@pytest.mark.parametrize("is_late", [False, True], ids=["at once", "a batch later"])
def test_buffers_are_put_back_the_layer_moves_and_the_run_ends_as_in_fp32(is_late, monkeypatch):
    if is_late:
        monkeypatch.setattr(BufferWatch, "_is_late", True)
    module, _ = train(averaged, None, batches=Lessons(20))
    run = adapt(averaged, plugin=ours(), callbacks=[OverflowMonitor()], batches=Lessons(20))
    assert run.moves == [("net.1", "fp16", "bf16")]
    assert [decision["kind"] for decision in run.adaptive.decisions] == ["promote"]
    assert run.is_finite
    assert late(run.module.losses) < 1.2 * late(module.losses) + 1e-3
    assert run.module.net[1].total.float().norm() == pytest.approx(module.net[1].total.norm().item(), rel=0.3)


def test_advice_puts_nothing_back():
    adaptive = AdaptivePrecision("advise")
    bare, _ = train(averaged, ours(), batches=Lessons(6))
    run = adapt(averaged, adaptive, ours(), batches=Lessons(6))
    assert same(nan_as_a_number(bare.state_dict()), nan_as_a_number(run.module.state_dict()))
    assert not run.is_finite


@pytest.mark.parametrize("gain", [1e5, 1e-2], ids=["broken", "healthy"])
@pytest.mark.parametrize("make_plugin", [stock, ours], ids=["stock", "ours"])
def test_the_run_with_the_monitor_is_the_same_to_the_last_bit(make_plugin, gain):
    runs = [
        train(lambda: averaged(gain), make_plugin(), watching, batches=Lessons(6))[0]
        for watching in ([], [OverflowMonitor()])
    ]
    assert same(*(nan_as_a_number(run.state_dict()) for run in runs))
    assert same(*(nan_as_a_number(dict(enumerate(run.losses))) for run in runs))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_statistics_of_a_part_of_torchscript_are_watched_and_kept():
    def scripted():
        part = torch.jit.script(nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()))
        return Task(nn.Sequential(nn.Linear(6, 6), part, nn.Linear(6, 2)), ADAM)

    bare, watched = (
        train(scripted, PerLayerPrecision("bf16"), watching, batches=Lessons(4))[0]
        for watching in ([], [OverflowMonitor(), AdaptivePrecision()])
    )
    assert same(dict(bare.state_dict()), dict(watched.state_dict()))


def nan_as_a_number(state):
    return {
        key: value.nan_to_num(1.5, 2.5, 3.5) if value.is_floating_point() else value for key, value in state.items()
    }


class Extremes(nn.Module):
    """Forgets its minimum in each step until the next one, as a metric does that is reset."""

    def __init__(self):
        super().__init__()
        self.register_buffer("least", torch.zeros(()))

    def forward(self, x):
        self.least.fill_(float("inf"))
        return x


def test_a_buffer_that_fp32_leaves_infinite_too_accuses_nobody_and_is_looked_into_once():
    monitor, adaptive = OverflowMonitor(), AdaptivePrecision()
    train(
        lambda: Task(nn.Sequential(nn.Linear(6, 2), Extremes()), ADAM), ours(), [monitor, adaptive], batches=Lessons(5)
    )
    assert (monitor.events, adaptive.decisions) == ([], [])
