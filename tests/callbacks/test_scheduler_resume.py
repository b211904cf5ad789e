"""A run under PrecisionScheduler that is interrupted goes on as one that was not."""

import json

import pytest
import torch
from known_results import Saving
from plugin_models import Batches, Call, Scheduled, one_line, same, save, task, trainer
from selection import slow_but_for

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.callbacks.scheduler import PrecisionScheduler

COUNT, EPOCHS = 4, 6


class Judged(Scheduled):
    """The learning rate halves with every step; validation gets worse from the third time on."""

    def validation_step(self, batch, batch_idx):
        self.log("metric", abs(2.0 - self.current_epoch), batch_size=4)


PHASES = [
    {"at": 1, "edit": {"net.0": "bf16"}},
    {"at": {"event": "plateau", "monitor": "metric", "patience": 2}, "policy": {"default": "bf16", "net.6": "fp32"}},
    {"at": {"event": "lr_below", "share": 0.001}, "edit": {"net.4": "bf16"}},
    {"at": {"epoch": 3}, "edit": {"net.2": "bf16"}},
    {"at": "90%", "policy": "configured"},
]


def go(phases=PHASES, path=None, epochs=EPOCHS, callbacks=(), **options):
    """Trains up to an epoch; the checkpoint of a run that ends early counts as written by the whole run."""
    model, plugin, scheduler = task(Judged), PerLayerPrecision("fp32"), PrecisionScheduler(phases)
    run = trainer(plugin, callbacks=[scheduler, *callbacks], max_epochs=EPOCHS, **options)
    stop = Call("on_train_epoch_end", lambda run, model: setattr(run, "should_stop", True), at=epochs - 1)
    run.callbacks.append(stop)
    run.fit(model, Batches(6, count=COUNT), Batches(6, count=1), ckpt_path=path)
    return model, plugin, scheduler


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupted; its folder is named, a test's own one is not yet entered here."""
    return go(default_root_dir=tmp_path_factory.mktemp("whole"))


def test_the_uninterrupted_run_has_every_kind_of_moment(whole):
    _, plugin, scheduler = whole
    assert [(each["phase"], each["step"]) for each in scheduler.came] == [(1, 1), (3, 10), (4, 12), (2, 20), (5, 22)]
    assert {entry["step"] for entry in plugin.history} == {1, 10, 12, 20, 22}


@pytest.mark.parametrize("epochs", range(1, EPOCHS))
def test_a_run_that_is_resumed_makes_the_same_changes_at_the_same_steps(epochs, whole):
    expected, plugin, scheduler = whole
    go(epochs=epochs, callbacks=[save()])
    model, resumed_plugin, resumed = go(path="run.ckpt")
    assert resumed.came == scheduler.came
    assert resumed_plugin.history == plugin.history
    assert resumed.state_dict() == scheduler.state_dict()
    assert same([*model.state_dict().values()], [*expected.state_dict().values()])
    assert same(model.losses, expected.losses[epochs * COUNT :])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("batch", slow_but_for({0, 2}, [0, 1, 2, 3]))
@pytest.mark.parametrize(("at", "step"), [(1, 1), (2, 2), ("4%", 1), ("25%", 3), ({"epoch": 1}, 2)], ids=str)
def test_within_an_accumulation_too(at, step, batch):
    """Three batches and then one, the last of an epoch, make a step; of 24 batches 4 % are one and 25 % are six."""
    phases, options = [{"at": at, "policy": "bf16"}], {"accumulate_grad_batches": 3}
    go(phases, epochs=2, callbacks=[Saving("run.ckpt", batch)], **options)
    came = torch.load("run.ckpt", weights_only=True)["callbacks"]["PrecisionScheduler"]["came"]
    _, _, scheduler = go(phases, path="run.ckpt", **options)
    assert [each["step"] for each in scheduler.came] == [step]
    assert came in ([], scheduler.came)


def test_the_state_is_plain():
    go(epochs=2, callbacks=[save()])
    state = torch.load("run.ckpt", weights_only=True)["callbacks"]["PrecisionScheduler"]
    assert json.loads(json.dumps(state)) == state
    assert state["version"] == 1


def test_a_state_of_another_version_is_refused():
    scheduler = PrecisionScheduler(PHASES)
    with pytest.raises(ValueError, match="version 2") as caught:
        scheduler.load_state_dict({**scheduler.state_dict(), "version": 2})
    one_line(caught)


# Other phases than those of the checkpoint


def test_phases_that_have_not_come_may_change():
    go(epochs=2, callbacks=[save()])
    phases = [PHASES[0], {"at": {"epoch": 4}, "policy": "bf16"}]
    _, _, scheduler = go(phases, path="run.ckpt")
    assert [(each["phase"], each["step"]) for each in scheduler.came] == [(1, 1), (2, 16)]


@pytest.mark.parametrize("change", ["policy", "moment", "gone"])
def test_phases_that_have_come_may_not(change):
    go(epochs=3, callbacks=[save()])  # phases 1 and 3 have come
    phases = {
        "policy": [PHASES[0], PHASES[1], {**PHASES[2], "edit": {"net.4": "fp16"}}],
        "moment": [PHASES[0], PHASES[1], {**PHASES[2], "at": {"epoch": 1}}],
        "gone": [PHASES[0], PHASES[1]],
    }[change]
    with pytest.raises(
        ValueError, match="phase 3 is not the checkpoint's, .*list phases 1 to 3 as they were"
    ) as caught:
        go(phases, path="run.ckpt")
    one_line(caught)


def test_a_checkpoint_of_other_phases_can_be_validated():
    go(epochs=3, callbacks=[save()])
    run = trainer(PerLayerPrecision("fp32"), callbacks=[PrecisionScheduler([{"at": 5, "policy": "bf16"}])])
    run.validate(task(Judged), Batches(6, count=1), ckpt_path="run.ckpt", verbose=False)


def test_a_schedule_that_joins_a_run_catches_up_in_order():
    run = trainer(PerLayerPrecision("fp32"), callbacks=[save()], max_epochs=2)
    run.fit(task(Judged), Batches(6, count=COUNT), Batches(6, count=1))
    phases = [{"at": 1, "policy": "bf16"}, {"at": 3, "edit": {"net.0": "fp32"}}, {"at": 9, "policy": "fp32"}]
    _, plugin, scheduler = go(phases, path="run.ckpt")
    assert [(each["phase"], each["step"]) for each in scheduler.came] == [(1, 8), (2, 8), (3, 9)]
    assert {entry["step"] for entry in plugin.history} == {8, 9}
