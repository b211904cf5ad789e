"""Precision is told apart from broken data, a broken model and the search for a loss scale; a healthy run is let be."""

import dataclasses
import json
import math
import re
from collections import UserDict

import pytest
import torch
from known_results import INF, stock
from lightnings import CSVLogger, MixedPrecision
from monitor_models import CULPRITS, FACTOR, Gain, Planted, Watched, batches, mlp, watch
from plugin_models import Batches, Task, fit
from selection import slow
from torch import nn

from lightning_mixprec import LossScaling, OverflowMonitor, PerLayerPrecision

NAN = math.nan
FORMATS = pytest.mark.parametrize("format", ["fp16", "bf16", "fp32"])


def accused(event):
    return event["verdict"], event["layer"], event["direction"]


class Nested(Watched):
    """Takes the first tensor that it finds in its batch, and a mask if there is one."""

    def __init__(self, take, net=None):
        super().__init__(net or mlp(None))
        self.take = take

    def training_step(self, batch, batch_idx):
        return super().training_step(self.take(batch), batch_idx)


class Graph:
    def __init__(self, x):
        self.nodes, self.whole = {"x": x}, self


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


def spoiled(value):
    batch = batches()[0]
    batch[1, 3] = value
    return batch


DATA = {
    "tensor": (lambda bad: bad, lambda batch: batch, "1 of 32 values in batch"),
    "tuple": (lambda bad: (batches()[0], bad), lambda batch: batch[1], "1 of 32 values in batch[1]"),
    "nested dict": (
        lambda bad: {"id": torch.arange(4), "views": [{"x": bad}]},
        lambda batch: batch["views"][0]["x"],
        "1 of 32 values in batch['views'][0]['x']",
    ),
    "dataclass": (lambda bad: [Pair(bad, torch.zeros(1))], lambda batch: batch[0].x, "1 of 32 values in batch[0].x"),
    "own class": (lambda bad: Graph(bad), lambda batch: batch.nodes["x"], "1 of 32 values in batch.nodes['x']"),
    "UserDict": (lambda bad: UserDict(x=bad), lambda batch: batch["x"], "1 of 32 values in batch['x']"),
}


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize(("make", "take", "detail"), DATA.values(), ids=DATA)
def test_a_batch_that_is_not_finite_is_the_datas_fault(make, take, detail, value):
    seen = watch(Nested(take), values=[make(spoiled(value))])
    (event,) = seen.events
    assert accused(event) == ("data", None, None)
    assert event["detail"] == detail
    assert seen.warned == [
        f"step 0, batch 0: the batch itself is not finite ({detail}); clean the data: no format helps."
    ]


@FORMATS
def test_the_verdict_data_is_the_same_in_every_format(format):
    seen = watch(Watched(mlp(None)), PerLayerPrecision(format), [spoiled(NAN)])
    assert [accused(event) for event in seen.events] == [("data", None, None)]
    assert seen.skipped_steps == 1


def test_nan_in_a_batch_that_the_model_does_not_look_at_is_not_accused():
    take = DATA["tuple"][1]
    seen = watch(Nested(take, mlp("forward")), values=[(spoiled(NAN), batches()[0])])
    assert accused(seen.events[0]) == ("precision", "net.2.spike", "forward")
    seen = watch(Nested(take, Broken(lambda x: (x - x) / (x - x))), values=[(spoiled(NAN), batches()[0])])
    assert accused(seen.events[0]) == ("model", "net", "forward")


class Masked(Watched):
    """Adds a mask that came with the batch."""

    def __init__(self, gain=1.0):
        super().__init__(nn.Sequential(nn.Linear(8, 8), Gain(gain), Gain(1 / gain)))

    def training_step(self, batch, batch_idx):
        x, mask = batch
        return (self.net(x) + mask).softmax(-1).float().square().mean()


def mask(all_of_a_row):
    mask = torch.zeros(4, 8)
    mask[0, 0 if all_of_a_row else slice(4, None)] = -INF
    mask[1] = -INF if all_of_a_row else 0.0
    return mask


def test_a_mask_of_minus_infinity_in_the_batch_is_not_broken_data():
    assert watch(Masked(), values=[(batches()[0], mask(False))]).events == []
    (event,) = watch(Masked(FACTOR), values=[(batches()[0], mask(False))]).events
    assert accused(event) == ("precision", "net.1", "forward")
    (event,) = watch(Masked(), values=[(batches()[0], mask(True))]).events
    assert accused(event) == ("data", None, None)
    assert event["detail"] == "9 of 32 values in batch[1]"


class Broken(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class RootOfZero(torch.autograd.Function):
    """Finite in forward, infinite in backward: the derivative of a square root at zero."""

    @staticmethod
    def forward(ctx, x):
        return x * 0

    @staticmethod
    def backward(ctx, grad):
        return grad / torch.zeros_like(grad)


BROKEN = {
    "0 / 0": (lambda x: (x - x) / (x - x), "forward", "div"),
    "x / 0": (lambda x: (1 + x * x) / (x - x), "forward", "div"),
    "log of a negative": (lambda x: torch.log(-1 - x.float() * x.float()), "forward", "log"),
    "root of a negative": (lambda x: torch.sqrt(-1 - x * x), "forward", "sqrt"),
    "root of zero": (lambda x: torch.sqrt((x - x).float()), "backward", "div"),
    "norm of zero in backward": (RootOfZero.apply, "backward", "div"),
}


@FORMATS
@pytest.mark.parametrize(("function", "direction", "op"), BROKEN.values(), ids=BROKEN)
def test_a_model_that_fp32_does_not_save_is_named_and_not_blamed_on_precision(function, direction, op, format):
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), Broken(function)), nn.Linear(8, 4))
    seen = watch(Watched(net, weight=1.0), PerLayerPrecision(format))
    (event,) = seen.events
    assert accused(event) == ("model", "net.1.1", direction)
    assert event["op"] == op
    assert f"the {direction} of layer 'net.1.1' ({op}) is not finite in fp32 either" in seen.warned[0]


@FORMATS
def test_weights_that_are_nan_are_named(format):
    model = Watched(mlp(None))
    with torch.no_grad():
        model.net[3].weight[0, 0] = NAN
    (event,) = watch(model, PerLayerPrecision(format)).events
    assert accused(event) == ("model", "net.3", "forward")
    assert event["detail"] == "weights that are not finite: net.3.weight"
    assert "(weights that are not finite: net.3.weight)" in event["message"]


def test_a_frozen_weight_that_was_never_finite_is_no_lost_weight():
    net = nn.Sequential(mlp(None), Gain(INF))
    net.unused = nn.Parameter(torch.tensor([NAN]), requires_grad=False)
    seen = watch(Watched(net), values=batches(2))
    assert [event["detail"] for event in seen.events] == ["", ""]


@pytest.mark.parametrize("make_plugin", [lambda: PerLayerPrecision("fp16"), slow(stock)], ids=["ours", "stock"])
@pytest.mark.parametrize("name", CULPRITS)
def test_a_healthy_run_is_never_accused(name, make_plugin):
    net, _ = CULPRITS[name]
    seen = watch(Watched(net(None), weight=1.0), make_plugin(), batches(8, size=8))
    assert {event["verdict"] for event in seen.events} == {"scale"}
    assert seen.warned == []
    assert seen.monitor.reasons == {"scale": seen.skipped_steps}
    assert [event["loss_scale"] for event in seen.events] == [65536 / 2**step for step in range(seen.skipped_steps)]
    # Lightning's own plugin counts a skipped step.
    counts = isinstance(seen.trainer.precision_plugin, MixedPrecision)
    assert [event["step"] for event in seen.events] == [index if counts else 0 for index in range(seen.skipped_steps)]


@pytest.mark.parametrize("format", ["bf16", "fp32"])
@pytest.mark.parametrize("name", CULPRITS)
def test_a_healthy_run_in_a_wide_format_has_no_events(name, format):
    assert watch(Watched(CULPRITS[name][0](None)), PerLayerPrecision(format), batches(2)).events == []


def test_a_layer_whose_gradients_are_noise_does_not_make_the_search_for_a_scale_an_accusation():
    class Useless(Watched):
        def training_step(self, batch, batch_idx):
            return self.net(batch).float().square().mean() + 2.0**-60 * self.other(batch).float().sum()

    seen = watch(Useless(mlp(None)), values=[batches()[0] * 30])
    assert [event["verdict"] for event in seen.events] == ["scale"]


def test_large_gradients_of_a_layer_in_fp32_do_not_make_the_search_for_a_scale_an_accusation():
    # Between the calm and the spike gradients reach 2**40 in fp32, and nothing of that reaches fp16.
    net = nn.Sequential(nn.Linear(8, 8), Gain(2.0**-40), Gain(2.0**40), nn.Linear(8, 4))
    plugin = PerLayerPrecision({"default": "fp16", "net.1": "c=fp32", "net.2": "c=fp32"})
    seen = watch(Watched(net), plugin, [batches()[0] * 30])
    assert [event["verdict"] for event in seen.events] == ["scale"]


def test_large_gradients_that_autocast_keeps_in_fp32_do_not_make_the_search_for_a_scale_an_accusation():
    class Roundabout(Watched):
        def training_step(self, batch, batch_idx):
            return (self.net(batch).float() * 2.0**-40 * 2.0**40).square().mean()

    seen = watch(Roundabout(nn.Linear(8, 4)), values=[batches()[0] * 30])
    assert [event["verdict"] for event in seen.events] == ["scale"]


@pytest.mark.parametrize("scale", [1.0, 2.0**-3])
def test_a_search_that_has_come_down_to_one_goes_on(scale):
    net = nn.Sequential(nn.Linear(8, 8), Gain(2.0**-10), Gain(2.0**-10), Gain(2.0**22))
    plugin = PerLayerPrecision("fp16", loss_scaling=LossScaling(init_scale=scale))
    seen = watch(Watched(net, weight=1.0), plugin, [batches()[0] * 8])
    assert [(event["verdict"], event["loss_scale"]) for event in seen.events] == [("scale", scale)]


def test_without_loss_scaling_a_backward_overflow_is_the_layers():
    net = nn.Sequential(nn.Linear(8, 8), Gain(2.0**-10), Gain(2.0**-10), Gain(2.0**22))
    plugin = PerLayerPrecision("fp16", loss_scaling=False)
    (event,) = watch(Watched(net, weight=1.0), plugin, [batches()[0] * 8]).events
    assert accused(event) == ("precision", "net.3", "backward")


def test_what_overflows_at_a_large_scale_alone_does_not_hide_what_overflows_at_any():
    # At 65536 the gain of 2**10 is the first that overflows in backward; at 1 only the spike's is left.
    net = nn.Sequential(nn.Linear(8, 8), Planted("backward"), Gain(2.0**-10), Gain(2.0**10), nn.Linear(8, 4))
    (event,) = watch(Watched(net)).events
    assert accused(event) == ("precision", "net.1.spike", "backward")
    assert event["loss_scale"] == 65536
    assert event["value"] > 65504 * 1024


def rows_of(folder):
    return [json.loads(line) for line in (folder / "mixprec.jsonl").read_text().splitlines()]


def test_the_message_is_a_short_line_and_the_trace_is_in_the_file(tmp_path):
    logger = CSVLogger(tmp_path)
    seen = watch(Watched(mlp("forward")), logger=logger)
    (message,) = seen.warned
    assert message.startswith("step 0, batch 0: the forward of layer 'net.2.spike' (mul) overflows in fp16, where fp32")
    assert message.endswith("; bf16 holds it: compute 'net.2.spike', and where it goes, in bf16.")
    assert len(message) < 180
    (row,) = rows_of(tmp_path / "lightning_logs" / "version_0")
    (event,) = seen.events
    frames, run_id = row.pop("frames"), row.pop("run_id")
    assert re.fullmatch("[0-9a-f]{8}", run_id)
    assert row == {"monitor": "overflow", **event}
    (culprit,) = [frame for frame in frames if frame["layer"] == "net.2.spike" and frame["infs"]]
    before = frames[frames.index(culprit) - 1]
    assert (culprit["op"], culprit["format"]) == ("mul", "fp16")
    assert 0 < before["amin"] < before["amax"] < 65504
    assert before["amax"] * FACTOR == pytest.approx(event["value"], rel=1e-2)
    assert not any(frame["infs"] or frame["nans"] for frame in frames[: frames.index(culprit)])


def test_a_fixed_loss_scale_that_is_too_large_is_said_to_be_fixed():
    with pytest.warns(UserWarning, match="lower the loss scale, which is fixed"):
        found = diagnosed_at_fixed_scale(2.0**24)
    assert {event["verdict"] for event in found} == {"scale"}
    assert all("search" not in event["message"] for event in found)


def diagnosed_at_fixed_scale(scale):
    monitor = OverflowMonitor(max_diagnoses=1)
    plugin = PerLayerPrecision("fp16", loss_scaling=scale)
    torch.manual_seed(0)
    fit(Task(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))), plugin, Batches(6, count=2), callbacks=[monitor])
    return monitor.events
