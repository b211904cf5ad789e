"""The monitor works on any precision plugin of Lightning: it counts what is skipped, and diagnoses the right batch."""

import math
from functools import partial

import pytest
import torch
from known_results import INF, SGD, Batches, Line, Manual, slope, stock, trainer_of
from lightnings import DoublePrecision, HalfPrecision, Precision
from monitor_models import Planted, Watched, batches, mlp, watch
from plugin_models import one_line
from torch import nn

from lightning_mixprec import MixPrecError, OverflowMonitor, PerLayerPrecision

FUSED = partial(SGD, fused=True)
FP16 = pytest.mark.parametrize("make_plugin", [lambda: PerLayerPrecision("fp16"), stock], ids=["ours", "stock"])
OPTIMIZERS = pytest.mark.parametrize("optimizer", [SGD, FUSED], ids=["plain", "fused"])

RUNS = {
    "one skip": [0.5, INF, 0.25, 0.5],
    "the first": [INF, 0.5, 0.25],
    "several in a row": [0.5, INF, INF, INF, 0.25, 0.5, 0.125, 0.25],
    "the last two": [0.5, 0.25, INF, INF],
    "none": [0.5, 0.25],
}


@FP16
@OPTIMIZERS
@pytest.mark.parametrize("values", RUNS.values(), ids=RUNS)
def test_every_skipped_step_is_counted_and_none_else(values, optimizer, make_plugin):
    seen = watch(Line(optimizer), make_plugin(), values)
    skipped = values.count(INF)
    assert seen.skipped_steps == skipped
    assert [event["batch_idx"] for event in seen.events] == [
        place for place, value in enumerate(values) if value == INF
    ]
    assert {event["verdict"] for event in seen.events} <= {"data"}
    assert seen.trainer.precision_plugin.scaler.get_scale() == 65536 / 2**skipped
    assert [event["loss_scale"] for event in seen.events] == [65536 / 2**place for place in range(skipped)]
    metrics = {key: value.item() for key, value in seen.trainer.callback_metrics.items() if key != "loss"}
    assert metrics == {
        "mixprec/skipped_steps": skipped,
        "mixprec/overflow_rate": pytest.approx(skipped / len(values)),
        # The scale of the latest step, before what follows from it.
        "mixprec/loss_scale": 65536 / 2 ** (skipped - (values[-1] == INF)),
    }
    if isinstance(seen.trainer.precision_plugin, PerLayerPrecision):
        assert seen.trainer.precision_plugin.skipped_steps == skipped


@pytest.mark.parametrize(
    ("make_plugin", "skips"),
    [
        (partial(stock, "bf16-mixed"), False),
        (partial(stock, "32-true"), False),
        (DoublePrecision, False),
        (partial(HalfPrecision, "bf16-true"), False),
        (partial(PerLayerPrecision, "bf16"), True),
        (partial(PerLayerPrecision, "fp32"), True),
        (partial(PerLayerPrecision, "bf16", skip_nonfinite=False), False),
    ],
    ids=["stock bf16", "stock fp32", "stock fp64", "stock bf16-true", "bf16", "fp32", "bf16, not guarded"],
)
def test_a_loss_that_is_not_finite_is_an_event_in_every_format(make_plugin, skips):
    seen = watch(Line(), make_plugin(), [0.5, 0.25, math.nan])
    (event,) = seen.events
    assert (event["verdict"], event["batch_idx"], event["loss_scale"]) == ("data", 2, 1.0)
    assert seen.skipped_steps == skips
    assert seen.trainer.callback_metrics["mixprec/overflow_rate"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@FP16
def test_the_culprit_is_named_although_a_fused_optimizer_finds_out_by_itself(direction, make_plugin):
    model = Watched(mlp(direction), optimizer=partial(torch.optim.SGD, lr=1e-3, fused=True))
    (event,) = watch(model, make_plugin()).events
    assert (event["verdict"], event["layer"], event["direction"]) == ("precision", "net.2.spike", direction)


@pytest.mark.parametrize("plugin", [partial(HalfPrecision, "16-true")], ids=["16-true"])
def test_a_culprit_in_fp16_weights_is_named(plugin):
    class Half(Watched):
        def training_step(self, batch, batch_idx):
            return self.net(batch).float().square().mean()

    (event,) = watch(Half(mlp("forward")), plugin()).events
    assert (event["verdict"], event["layer"], event["direction"]) == ("precision", "net.2.spike", "forward")


@pytest.mark.parametrize("bad", range(8))
def test_up_to_eight_batches_of_an_accumulation_are_looked_at(bad):
    values = [0.5] * 8
    values[bad] = INF
    seen = watch(Line(), values=values, accumulate_grad_batches=8)
    assert [event["batch_idx"] for event in seen.events] == [bad]


@FP16
@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_the_guilty_batch_of_an_accumulation_is_diagnosed(bad, make_plugin):
    values = batches(4)
    values[bad] = values[bad] * 1e6
    model = Watched(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), weight=1.0)
    seen = watch(model, make_plugin(), values, accumulate_grad_batches=2)
    accused = [event for event in seen.events if event["verdict"] == "precision"]
    assert [(event["batch_idx"], event["layer"]) for event in accused] == [(bad, "net.0")]


def two_steps(model, batch, _):
    for optimizer, layer, value in zip(model.optimizers(), (model.a, model.b), batch, strict=True):
        optimizer.zero_grad()
        model.manual_backward(slope(layer, value))
        optimizer.step()


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_data_is_to_blame_although_an_unguarded_step_has_spoiled_the_weights_by_then(precision):
    seen = watch(Manual(two_steps), stock(precision), [(0.5, 0.5), (0.5, math.nan), (0.5, 0.5)])
    assert [(event["verdict"], event["batch_idx"], event["layer"]) for event in seen.events] == [
        ("data", 1, None),
        ("model", 2, "b"),
    ]
    assert "b.weight" in seen.events[1]["detail"]


@FP16
def test_skips_of_several_optimizers_are_counted_together_as_one_failed_batch(make_plugin):
    values = [(0.5, 0.5), (INF, 0.5), (0.5, INF), (INF, INF), (0.25, 0.25)]
    seen = watch(Manual(two_steps), make_plugin(), values)
    assert [event["batch_idx"] for event in seen.events] == [1, 2, 3]
    assert seen.monitor.reasons == {"data": 3}
    if isinstance(seen.trainer.precision_plugin, PerLayerPrecision):
        assert seen.skipped_steps == seen.trainer.precision_plugin.skipped_steps


def test_a_plugin_that_is_not_known_is_refused_in_one_line():
    class Mine(Precision):
        precision = "mine"

    trainer = trainer_of(Mine(), callbacks=[OverflowMonitor()])
    with pytest.raises(MixPrecError) as caught:
        trainer.fit(Line(), Batches([0.5]))
    assert "Mine" in one_line(caught)


def test_a_nonfinite_gradient_that_the_replay_does_not_show_is_unknown():
    class Spoils(Line):
        def on_after_backward(self):
            self.layer.weight.grad.fill_(INF)

    seen = watch(Spoils(), values=[0.5, 0.25])
    assert (seen.events, seen.warned) == ([], [])
    assert (seen.monitor.reasons, seen.skipped_steps) == ({"unknown": 2}, 2)


def test_a_bf16_run_with_a_guard_names_a_broken_model():
    net = nn.Sequential(nn.Linear(8, 8), Planted(None), nn.Linear(8, 4))
    nn.init.constant_(net[2].weight, INF)
    seen = watch(Watched(net), PerLayerPrecision("bf16"))
    assert [(event["verdict"], event["layer"]) for event in seen.events] == [("model", "net.2")]


@pytest.mark.parametrize("format", ["bf16", "fp32"])
def test_an_optimizer_that_evaluates_the_loss_several_times_takes_one_step(format):
    optimizer = partial(torch.optim.LBFGS, lr=0.1, max_iter=3, line_search_fn=None)
    model = Watched(nn.Linear(8, 4), weight=1.0, optimizer=optimizer)
    values = batches(4)
    values[2] = values[2] * math.nan
    seen = watch(model, PerLayerPrecision(format), values)
    assert [(event["verdict"], event["batch_idx"]) for event in seen.events] == [("data", 2)]
    assert (seen.skipped_steps, seen.monitor.reasons) == (1, {"data": 1})
    assert seen.trainer.callback_metrics["mixprec/overflow_rate"] == 0.25
