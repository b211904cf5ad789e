"""Validation that overflows although training is sound: told with its layer, moved, and a matter of precision alone."""

import pytest
import torch
from adaptive_models import ADAM, adapt, stock, train
from plugin_models import Batches, Task, same
from torch import nn

from lightning_mixprec import OverflowMonitor, PerLayerPrecision
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision
from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.evidence.evaluation import EvaluationWatch
from lightning_mixprec.evidence.step_window import KeptBatch

NAN = float("nan")
pytestmark = pytest.mark.filterwarnings(r"ignore:step \d, batch 1. in validation", "ignore:Metric ")


class Summed(nn.Module):
    """A mean by way of a sum, which fp16 does not hold for many rows."""

    def forward(self, h):
        return (h.T @ torch.ones(len(h), 1)).T / len(h)


class Whole(Task):
    """Trains on crops, validates on what is 500 times as large; may log a metric that is NaN in every format."""

    def __init__(self, metric=0.0, returns=False):
        net = nn.Sequential(nn.Linear(6, 8), Summed(), nn.Linear(8, 2))
        torch.manual_seed(5)
        super().__init__(net, ADAM)
        self.metric, self.returns = metric, returns

    def forward(self, x):
        return self.net[2](self.net[1](self.net[0](x) * 100) / 100).expand(4, 2)

    def validation_step(self, batch, batch_idx):
        x = batch[0].repeat(500, 1) + 3.0 if batch_idx else batch[0]
        loss = nn.functional.mse_loss(self(x).float(), batch[1])
        self.log("metric", torch.tensor(self.metric))
        if not self.returns:
            self.log("val_loss", loss)
        return {"loss": loss, "number": 3} if self.returns else None

    def val_dataloader(self):
        return Batches(6, count=2, seed=9)


def ours():
    return PerLayerPrecision("fp16", {"init_scale": 128.0})


def validated(make, plugin, callbacks=(), **options):
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, "batches": Batches(6), **options}
    return train(make, plugin, callbacks, **options)


@pytest.mark.parametrize("returns", [False, True], ids=["logged", "returned"])
@pytest.mark.parametrize("make_plugin", [stock, ours], ids=["stock", "ours"])
def test_the_layer_that_overflows_in_validation_alone_is_named(make_plugin, returns):
    monitor = OverflowMonitor()
    with pytest.warns(
        UserWarning, match=r"step \d, batch 1: in validation, the forward of layer 'net.1' \(mm\) overflow"
    ):
        validated(lambda: Whole(returns=returns), make_plugin(), [monitor], max_epochs=1)
    (event,) = [event for event in monitor.events if event["verdict"] != "scale"]
    assert (event["verdict"], event["layer"], event["stage"], event["fits"]) == (
        "precision",
        "net.1",
        "validation",
        "bf16",
    )


def test_it_is_moved_and_the_next_validation_is_that_of_fp32():
    run = adapt(
        Whole, plugin=ours(), batches=Batches(6), max_epochs=2, num_sanity_val_steps=0, callbacks=[OverflowMonitor()]
    )
    assert run.moves == [("net.1", "fp16", "bf16")]
    _, reference = validated(Whole, None)
    expected = reference.callback_metrics["val_loss"].item()
    assert run.trainer.callback_metrics["val_loss"].item() == pytest.approx(expected, rel=0.05)


def test_a_metric_that_is_nan_in_fp32_too_accuses_nobody_and_hides_nothing():
    monitor = OverflowMonitor()
    validated(lambda: Whole(metric=NAN), ours(), [monitor], max_epochs=1)
    assert monitor.events == []
    monitor = OverflowMonitor()
    validated(lambda: Whole(metric=NAN), ours(), [monitor], max_epochs=2)
    assert [event["layer"] for event in monitor.events] == ["net.1"]


@pytest.mark.parametrize("make_plugin", [stock, ours], ids=["stock", "ours"])
@pytest.mark.parametrize("metric", [0.0, NAN])
def test_training_and_validation_with_the_monitor_are_the_same_to_the_last_bit(make_plugin, metric):
    runs = [validated(lambda: Whole(metric), make_plugin(), watching) for watching in ([], [OverflowMonitor()])]
    (bare, alone), (watched, beside) = runs
    assert same(bare.state_dict(), watched.state_dict())
    assert same(bare.losses, watched.losses)
    first, second = (
        {key: value for key, value in run.callback_metrics.items() if not key.startswith("mixprec")}
        for run in (alone, beside)
    )
    assert first.keys() == second.keys()
    assert all(str(first[key]) == str(second[key]) for key in first)


def test_where_validation_has_a_policy_of_its_own_its_layer_is_named_and_nothing_moves():
    monitor, adaptive = OverflowMonitor(), AdaptivePrecision()
    plugin = PerLayerPrecision("bf16", eval_policy="fp16")
    validated(Whole, plugin, [monitor, adaptive], max_epochs=1)
    assert [(event["layer"], event["format"]) for event in monitor.events] == [("net.1", "fp16")]
    assert (adaptive.decisions, plugin.history) == ([], [])


def test_the_sanity_check_before_training_is_not_looked_at():
    monitor = OverflowMonitor()
    validated(Whole, ours(), [monitor], max_epochs=1, num_sanity_val_steps=2, check_val_every_n_epoch=2)
    assert monitor.events == []


def test_while_the_device_is_at_work_four_batches_are_kept_and_the_first_bad_one_is_found(monkeypatch):
    monkeypatch.setattr(Transfer, "is_ready", False)
    watch = EvaluationWatch()
    for place in range(9):
        kept = KeptBatch(None, place, None)
        watch.add(kept, 0, {"loss": torch.tensor(NAN if place in (2, 7) else 1.0), "other": torch.ones(2)})
        assert len(watch._waiting) <= 4
    seen = watch.finish()
    assert seen.kept.batch_idx == 2
    watch.acquit(seen)
    watch.add(kept, 0, {"loss": torch.tensor(NAN), "other": torch.ones(2)})
    assert watch.finish() is None
