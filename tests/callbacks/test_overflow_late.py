"""On an accelerator the outcome of a step is looked at when the next step's work is on its way, never waited for.

The CPU stands in for the accelerator by sending its outcomes, too, and by not reading the flag that its fused
optimizers obey; tests marked ``gpu`` do the same on CUDA.
"""

from functools import partial

import pytest
import torch
from known_results import INF, SGD, Batches, Line, Manual, Saving, slope, stock, trainer_of
from lightnings import ModelCheckpoint, pl
from monitor_models import CULPRITS, Watched, batches, mlp, watch
from torch import nn

from lightning_mixprec import OverflowMonitor, PerLayerPrecision
from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.evidence import step_window as evidence_module
from lightning_mixprec.evidence.step_window import StepWindow
from lightning_mixprec.optim import loss_scaling as scaling

FUSED = partial(SGD, fused=True)
FP16 = pytest.mark.parametrize("make_plugin", [lambda: PerLayerPrecision("fp16"), stock], ids=["ours", "stock"])
RUNS = {
    "one skip": [0.5, INF, 0.25, 0.5],
    "the first": [INF, 0.5, 0.25],
    "several in a row": [0.5, INF, INF, INF, 0.25, 0.5, 0.125, 0.25],
    "the last two": [0.5, 0.25, INF, INF],
}


@pytest.fixture
def late(monkeypatch):
    monkeypatch.setattr(scaling, "_is_read", lambda optimizer, _: not scaling.obeys_found_inf(optimizer))
    monkeypatch.setattr(StepWindow, "is_late", True)


def told(seen):
    """What a monitor knows at the end of a run."""
    return seen.events, seen.skipped_steps, seen.monitor.reasons, seen.trainer.callback_metrics


class Validated(Line):
    """Validation is in another format, and its module in another mode."""

    def training_step(self, batch, batch_idx):
        assert self.training
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        return slope(self.layer, batch)


def test_a_step_before_a_validation_is_replayed_as_it_was(late, tmp_path):
    plugin = PerLayerPrecision("fp16", eval_policy="fp32")
    monitor, saving = OverflowMonitor(), ModelCheckpoint(tmp_path)
    trainer = trainer_of(plugin, callbacks=[monitor, saving], enable_checkpointing=True, val_check_interval=1)
    trainer.fit(Validated(), Batches([2.0, 2.0]), Batches([0.5]))
    assert monitor.reasons == {"scale": 2}


def steps_before_each_skip(values, make_plugin):
    """Lightning's own plugin counts a skipped step as a step."""
    places = [place for place, value in enumerate(values) if value == INF]
    return places if make_plugin is stock else [place - values[:place].count(INF) for place in places]


@FP16
@pytest.mark.parametrize("optimizer", [SGD, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("values", RUNS.values(), ids=RUNS)
def test_a_late_outcome_tells_what_an_early_one_tells(values, optimizer, make_plugin, monkeypatch):
    early = told(watch(Line(optimizer), make_plugin(), values))
    monkeypatch.setattr(scaling, "_is_read", lambda optimizer, _: not scaling.obeys_found_inf(optimizer))
    monkeypatch.setattr(StepWindow, "is_late", True)
    assert told(watch(Line(optimizer), make_plugin(), values)) == early
    assert early[1] == values.count(INF)
    assert [event["step"] for event in early[0]] == steps_before_each_skip(values, make_plugin)


@pytest.mark.usefixtures("late")
@FP16
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_a_culprit_is_named_one_step_late(name, direction, make_plugin):
    net, culprit = CULPRITS[name]
    model = Watched(net(direction), optimizer=partial(torch.optim.SGD, lr=1e-3, fused=True))
    seen = watch(model, make_plugin(), batches(2))
    assert [(event["batch_idx"], event["layer"], event["direction"]) for event in seen.events] == [
        (0, culprit, direction),
        (1, culprit, direction),
    ]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_the_guilty_batch_of_an_accumulation_is_diagnosed_late(bad):
    values = batches(6)
    values[bad] = values[bad] * 1e6
    model = Watched(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), weight=1.0)
    seen = watch(model, None, values, accumulate_grad_batches=2)
    accused = [event for event in seen.events if event["verdict"] == "precision"]
    assert [(event["batch_idx"], event["layer"]) for event in accused] == [(bad, "net.0")]


def several_steps(model, batch, _):
    for optimizer, layer, parts in zip(model.optimizers(), (model.a, model.b), batch, strict=True):
        for part in parts:
            optimizer.zero_grad()
            model.manual_backward(slope(layer, part))
            optimizer.step()


@pytest.mark.usefixtures("late")
def test_several_optimizers_that_step_several_times_are_counted_step_by_step():
    model = Manual(several_steps, lambda model: [FUSED(model.a.parameters()), FUSED(model.b.parameters())])
    plugin = PerLayerPrecision("fp16")
    seen = watch(model, plugin, [((0.5, INF), (INF, 0.25)), ((INF, 0.5), (0.5, INF)), ((0.25, 0.25), (INF, INF))])
    assert (seen.skipped_steps, plugin.skipped_steps) == (6, 6)
    assert [event["batch_idx"] for event in seen.events] == [0, 1, 2]
    assert seen.trainer.callback_metrics["mixprec/overflow_rate"] == 0.5


@pytest.mark.usefixtures("late")
def test_the_host_asks_about_a_step_when_the_device_has_its_next_work(monkeypatch):
    diary = []

    class Noted(Transfer):
        def get(self):
            diary.append("wait")
            return super().get()

    monkeypatch.setattr(evidence_module, "Transfer", Noted)

    class Diarist(Line):
        def on_after_backward(self):
            diary.append("backward")

        def on_before_optimizer_step(self, optimizer):
            diary.append("step")

    watch(Diarist(FUSED), None, [0.5, INF, 0.25])
    assert diary == ["backward", "step", "backward", "wait", "step", "backward", "wait", "step", "wait"]


@pytest.mark.usefixtures("late")
def test_a_checkpoint_takes_in_what_is_on_its_way(tmp_path):
    seen = watch(Line(FUSED), None, [0.5, INF], callbacks=[Saving(tmp_path / "late.ckpt", batch=1)])
    state = torch.load(tmp_path / "late.ckpt", weights_only=True)["callbacks"]["OverflowMonitor"]
    assert (state["skipped_steps"], state["reasons"]) == (1, {"data": 1})
    assert seen.skipped_steps == 1


class OnTheDevice(Watched):
    """Logs nothing: logging reads values."""

    def training_step(self, batch, batch_idx):
        return self.net(batch).float().square().mean()


class NoWaiting(pl.Callback):
    """Turns every host synchronisation into an error, from the third batch on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if batch_idx > 1 else "default")

    def on_train_batch_end(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["fp16", "bf16", "fp32"])
def test_on_cuda_an_ordinary_step_waits_for_nothing(policy):
    model = OnTheDevice(mlp(None), optimizer=partial(torch.optim.SGD, lr=1e-3, fused=True))
    # Callbacks run in their order: what the monitor does at the end of a batch is inside, too.
    options = {"accelerator": "cuda", "callbacks": [NoWaiting()]}
    plugin = PerLayerPrecision(policy, loss_scaling=1024 if policy == "fp16" else "auto")
    try:
        seen = watch(model, plugin, batches(6), monitor=OverflowMonitor(), **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (seen.events, seen.skipped_steps) == ([], 0)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", CULPRITS)
@pytest.mark.parametrize("fused", [False, True])
def test_on_cuda_a_culprit_is_named(name, direction, fused):
    net, culprit = CULPRITS[name]
    model = Watched(net(direction), optimizer=partial(torch.optim.SGD, lr=1e-3, fused=fused))
    seen = watch(model, None, batches(2), accelerator="cuda")
    assert [(event["batch_idx"], event["layer"], event["direction"]) for event in seen.events] == [
        (0, culprit, direction),
        (1, culprit, direction),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("make_plugin", [lambda: PerLayerPrecision("fp16"), partial(stock, device="cuda")])
@pytest.mark.parametrize("optimizer", [SGD, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("values", RUNS.values(), ids=RUNS)
def test_on_cuda_every_skipped_step_is_counted(values, optimizer, make_plugin):
    seen = watch(Line(optimizer), make_plugin(), values, accelerator="cuda")
    assert seen.skipped_steps == values.count(INF)
    assert [event["batch_idx"] for event in seen.events] == [
        place for place, value in enumerate(values) if value == INF
    ]
