"""A search for the loss scale is diagnosed once, then followed with one look a step; what contradicts is diagnosed."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from adaptive_models import ADAM, Lessons, adapt
from known_results import INF
from lightnings import CSVLogger, MixedPrecision
from monitor_models import STARVED, Planted, Watched, batches, mlp, watch
from plugin_models import Task
from torch import nn

from lightning_mixprec import AdaptivePrecision, OverflowMonitor, PerLayerPrecision
from lightning_mixprec.evidence.failures import ScaleSearch
from lightning_mixprec.evidence.replay import StepReplay

SIZE = 2.0**4
"""A loss weight at which a scale of 65536 has to be halved several times."""


def summed(direction=None):
    """Its gradients are as large as those of a loss that is a sum; a layer overflows in forward or in backward."""
    net = nn.Sequential(mlp(None), Planted(direction))
    model = Watched(net, weight=1.0)
    step = model.training_step
    model.training_step = lambda batch, batch_idx: SIZE * step(batch, batch_idx)
    return model


@pytest.fixture
def replays(monkeypatch):
    """How often steps were replayed, by batch."""
    counted, run = Counter(), StepReplay.run_on_own

    def counting(self, stand_ins, batch, batch_idx, **options):
        counted[batch_idx] += 1
        return run(self, stand_ins, batch, batch_idx, **options)

    monkeypatch.setattr(StepReplay, "run_on_own", counting)
    return counted


@pytest.fixture
def whole(monkeypatch):
    """Has each step of a search diagnosed, as it was before one look was enough."""

    def diagnose_all():
        monkeypatch.setattr(ScaleSearch, "_followed", lambda *args: None)

    return diagnose_all


def stock():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("plugin", [lambda: PerLayerPrecision("fp16"), stock], ids=["ours", "stock"])
def test_a_step_of_a_search_that_goes_on_is_replayed_once(replays, plugin):
    seen = watch(summed(), plugin(), [batches()[0]] * 12)
    assert seen.skipped_steps >= 4
    assert replays[0] >= 3, "diagnosed"
    assert [replays[batch] for batch in range(1, 12)] == [1] * (seen.skipped_steps - 1) + [0] * (
        12 - seen.skipped_steps
    )
    assert seen.monitor.reasons == {"scale": seen.skipped_steps}


def told(folder):
    rows = [json.loads(line) for line in Path(folder, "mixprec.jsonl").read_text().splitlines()]
    assert len({row.pop("run_id") for row in rows}) <= 1
    return [row for row in rows if row["monitor"] in ("overflow", "adaptive")]


@pytest.mark.parametrize("plugin", [lambda: PerLayerPrecision("fp16"), stock], ids=["ours", "stock"])
def test_what_is_told_is_what_a_diagnosis_of_each_step_tells(replays, whole, plugin, tmp_path):
    def run(name):
        replays.clear()
        seen = watch(summed(), plugin(), [batches()[0]] * 12, logger=CSVLogger(tmp_path, name=name))
        return seen, sum(replays.values()), told(tmp_path / name / "version_0")

    one_look, few, rows = run("one look")
    whole()
    each, many, rows_of_each = run("each")
    assert (few, many) == (3 + 6, 7 * 3)
    assert one_look.events == each.events and rows == rows_of_each
    assert one_look.monitor.state_dict() == each.monitor.state_dict()


def test_of_different_batches_each_is_finite_at_the_scale_that_is_told(whole):
    values = [batch * gain for batch, gain in zip(batches(12, size=8), (1, 0.8, 1.2, 0.9) * 3, strict=True)]
    events = watch(summed(), values=values).events
    whole()
    of_each = watch(summed(), values=values).events
    assert len(events) > 3
    assert [(event["step"], event["batch_idx"], event["verdict"], event["loss_scale"]) for event in events] == [
        (event["step"], event["batch_idx"], event["verdict"], event["loss_scale"]) for event in of_each
    ]
    for event in events:
        plugin = PerLayerPrecision("fp16", loss_scaling=event["smaller_scale"])
        assert watch(summed(), plugin, [values[event["batch_idx"]]]).skipped_steps == 0


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_layer_that_overflows_in_the_middle_of_a_search_is_found(direction):
    model = summed(direction)
    model.net[1].direction, planted = None, model.net[1]

    step = model.training_step

    def planting(batch, batch_idx):
        planted.direction, model.weight = (direction, STARVED) if batch_idx == 1 else (None, 1.0)
        return step(batch, batch_idx)

    model.training_step = planting
    seen = watch(model, values=[batches()[0]] * 4)
    verdicts = [(event["verdict"], event["layer"]) for event in seen.events]
    assert verdicts[:3] == [("scale", None), ("precision", "net.1.spike"), ("scale", None)]


def test_a_batch_whose_gradients_are_larger_still_is_diagnosed(replays):
    values = [batches()[0], batches()[0] * 2.0**5, batches()[0]]
    seen = watch(summed(), values=values)
    assert replays[1] > 1 and replays[2] == 1
    assert [event["verdict"] for event in seen.events] == ["scale"] * 3
    assert seen.events[1]["smaller_scale"] < seen.events[0]["smaller_scale"]


def test_data_that_is_not_finite_ends_a_search(replays):
    values = [batches()[0], torch.full((4, 8), INF), batches()[0]]
    seen = watch(summed(), values=values)
    assert [event["verdict"] for event in seen.events] == ["scale", "data", "scale"]
    assert replays[2] > 1


def test_a_step_that_goes_well_ends_a_search(replays):
    plugin = PerLayerPrecision("fp16", loss_scaling={"growth_interval": 1})
    seen = watch(summed(), plugin, [batches()[0]] * 14)
    failed = [event["batch_idx"] for event in seen.events]
    again = next(batch for before, batch in zip(failed, failed[1:], strict=False) if batch > before + 1)
    assert replays[again] > 1


class Sum(Task):
    def training_step(self, batch, batch_idx):
        return 2.0**10 * super().training_step(batch, batch_idx)


def test_a_controller_decides_the_same_with_one_look(replays, whole, tmp_path):
    def run(name):
        replays.clear()
        logger = CSVLogger(tmp_path, name=name)
        lessons = Lessons(40)
        lessons.batches = [lessons.batches[0]] * 40
        run = adapt(lambda: Sum(nn.Linear(6, 2), ADAM), AdaptivePrecision(), batches=lessons, logger=logger)
        return run, sum(replays.values()), told(logger.log_dir)

    one_look, few, rows = run("one look")
    whole()
    each, many, rows_of_each = run("each")
    assert [row["verdict"] for row in rows if "verdict" in row] == ["scale"] * 2 and rows == rows_of_each
    assert (few, many) == (2 + 2 + 3 + 1, 2 + 2 + 3 + 3), "two samples, and two failed steps that are looked into"
    assert one_look.moves == each.moves == []
    assert one_look.adaptive.state_dict() == each.adaptive.state_dict()


def test_batches_that_are_accumulated_are_diagnosed_whole(replays):
    seen = watch(summed(), values=[batches()[0]] * 6, accumulate_grad_batches=2)
    assert [event["verdict"] for event in seen.events] == ["scale"] * 3
    assert min(replays[1], replays[3], replays[5]) > 1


def test_on_half_of_the_batch_it_is_said(monkeypatch):
    monitor = OverflowMonitor()
    run = StepReplay.run_on_own

    def short(self, stand_ins, batch, batch_idx, **options):
        if batch_idx == 1 and len(batch) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, stand_ins, batch, batch_idx, **options)

    monkeypatch.setattr(StepReplay, "run_on_own", short)
    seen = watch(summed(), values=[batches()[0]] * 2, monitor=monitor)
    assert [event["detail"] for event in seen.events] == ["", "on half of the batch, as memory ran out"]
