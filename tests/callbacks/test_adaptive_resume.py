"""A run under AdaptivePrecision that is interrupted at any step goes on, and decides, as one that was not."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from adaptive_models import Encoding, Lessons, Loud, adapt, encoded, loud, send_outcomes, silent, solved
from lightnings import ModelCheckpoint
from plugin_models import Call, Task, one_line, same, trainer
from selection import slow_but_for
from torch import nn

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision
from lightning_mixprec.planning import controller

COUNT = 16
pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def passing():
    """Phases in the thousands in the first batches and in the last ones; next to nothing between."""
    lessons = Lessons(COUNT)
    inputs = [x * (1.0 if number < 4 or number >= 11 else 1e-3) for number, (x, _) in enumerate(lessons.batches)]
    lessons.batches = [(x, Encoding()(x)[:, :2]) for x in inputs]
    return lessons


def restless():
    return AdaptivePrecision(every_n_steps=1, dwell_steps=2)


def dropping():
    """Overflows, and draws random numbers."""
    return Task(nn.Sequential(nn.Dropout(0.3), Loud()), partial(torch.optim.Adam, lr=1e-2))


# Name: the model, its batches, the callback, the Trainer's options, and the kinds of what is decided.
RUNS = {
    "range, with random numbers": (dropping, lambda: Lessons(8), AdaptivePrecision, {}, ["promote"]),
    "precision, undoing": (solved, lambda: encoded(8), AdaptivePrecision, {}, ["promote"]),
    "to and fro": (silent, passing, restless, {}, ["promote", "demote", "promote"]),
    "accumulating": (silent, lambda: encoded(12), AdaptivePrecision, {"accumulate_grad_batches": 3}, ["promote"]),
    "advice": (loud, lambda: Lessons(5), partial(AdaptivePrecision, "advise"), {}, ["promote"]),
}


def go(name, path=None, save=None):
    make, batches, callback, options, _ = RUNS[name]
    callbacks = [] if save is None else [save]
    return adapt(make, callback(), PerLayerPrecision("fp16"), callbacks, batches(), ckpt_path=path, **options)


def everything(run):
    return {
        "decisions": run.adaptive.decisions,
        "history": run.plugin.history,
        "policy": run.plugin.policy.to_dict(),
        "scale": run.plugin.scaler.state_dict(),
        "skipped": run.plugin.skipped_steps,
        "weights": run.module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.trainer.optimizers],
        "state": run.adaptive.state_dict()["values"],
    }


def saving():
    """Writes a checkpoint after each batch, named by the batch, with the random numbers that it ends with."""

    def save(trainer, model):
        name = trainer.fit_loop.epoch_loop.batch_idx
        trainer.save_checkpoint(f"{name}.ckpt")
        torch.save(torch.get_rng_state(), f"{name}.rng")

    return Call("on_train_batch_end", save)


@pytest.mark.parametrize("name", slow_but_for({"range, with random numbers", "advice"}, RUNS))
def test_interrupted_at_any_step_it_decides_the_same_and_ends_with_the_same_bits(name):
    whole = everything(go(name))
    saved = everything(go(name, save=saving()))
    assert [key for key in whole if not same(whole[key], saved[key])] == []
    assert [decision["kind"] for decision in whole["decisions"]] == RUNS[name][-1]
    wrong, window = {}, RUNS[name][3].get("accumulate_grad_batches", 1)
    # Lightning saves no gradients that wait for their step, so windows are not interrupted.
    for batch in range(window - 1, len(RUNS[name][1]()) - 1, window):
        restore = Call("on_train_start", lambda run, model, at=batch: torch.set_rng_state(torch.load(f"{at}.rng")))
        resumed = everything(go(name, path=f"{batch}.ckpt", save=restore))
        different = [key for key in whole if not same(whole[key], resumed[key])]
        if different:
            wrong[batch] = different
    assert wrong == {}


LATE = pytest.mark.parametrize(("make", "batches"), [(loud, Lessons), (solved, encoded)], ids=["range", "precision"])


def fused(make):
    module = make()
    module.make_optimizer = partial(module.make_optimizer, fused=True)
    return module


@LATE
def test_so_does_one_whose_outcomes_come_late_and_that_saves_as_often(make, batches, monkeypatch):
    send_outcomes(monkeypatch)
    whole = everything(adapt(partial(fused, make), callbacks=[saving()], batches=batches(8)))
    assert [decision["kind"] for decision in whole["decisions"]] == ["promote"]
    for batch in range(7):
        run = adapt(partial(fused, make), callbacks=[saving()], batches=batches(8), ckpt_path=f"{batch}.ckpt")
        assert [key for key in whole if not same(whole[key], everything(run)[key])] == [], batch


@LATE
def test_saving_a_checkpoint_changes_no_decision_where_outcomes_come_late(make, batches, monkeypatch):
    send_outcomes(monkeypatch)
    whole = everything(adapt(partial(fused, make), batches=batches(8)))
    saved = everything(adapt(partial(fused, make), callbacks=[saving()], batches=batches(8)))
    assert [key for key in whole if not same(whole[key], saved[key])] == []


def test_checkpoints_of_lightning_are_plain_and_go_on_as_well():
    checkpoint = ModelCheckpoint(dirpath="saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = adapt(silent, callbacks=[checkpoint], batches=encoded(COUNT), enable_checkpointing=True)
    paths = sorted(Path("saved").glob("*.ckpt"))
    assert len(paths) == COUNT
    for path in paths:
        state = torch.load(path, weights_only=True)["callbacks"]["AdaptivePrecision"]
        assert state["version"] == 1
    options = {"callbacks": [checkpoint], "enable_checkpointing": True}
    resumed = adapt(silent, batches=encoded(COUNT), ckpt_path="saved/step=2.ckpt", **options)
    assert resumed.adaptive.decisions == whole.adaptive.decisions
    assert resumed.plugin.history == whole.plugin.history


def test_a_checkpoint_that_is_saved_after_the_fit_goes_on_as_well():
    options = {"batches": encoded(4), "adaptive": AdaptivePrecision(every_n_steps=1, dwell_steps=4)}
    first = adapt(silent, **options)
    first.trainer.save_checkpoint("run.ckpt")
    state = torch.load("run.ckpt", weights_only=True)["callbacks"]["AdaptivePrecision"]["steered"]["controller"]
    assert list(state["promoted"]) == ["net.encode"]
    assert state["batches"] == 4


def interrupted(make=silent, batches=encoded, at=8):
    save = Call("on_train_batch_end", lambda run, model: run.save_checkpoint("run.ckpt"), at=at)
    return adapt(make, callbacks=[save], batches=batches(COUNT))


def test_another_configured_policy_is_the_new_base_if_that_is_accepted():
    interrupted()
    other = PerLayerPrecision({"default": "fp16", "net.head": "fp32"}, on_policy_change="accept")
    run = adapt(silent, plugin=other, batches=encoded(COUNT), ckpt_path="run.ckpt")
    assert run.formats["net.head"] == "fp32"
    assert run.formats["net.encode"] == "fp32"
    assert [decision["moves"] for decision in run.adaptive.decisions] == [[["net.encode", "fp16", "fp32"]]] * 2


def test_another_configured_policy_is_refused_else():
    interrupted()
    with pytest.raises(ValueError, match="on_policy_change") as caught:
        adapt(silent, plugin={"default": "fp16", "net.head": "fp32"}, batches=encoded(COUNT), ckpt_path="run.ckpt")
    one_line(caught)


def test_a_checkpoint_of_a_run_without_the_callback_is_adapted_from_there():
    save = Call("on_train_batch_end", lambda run, model: run.save_checkpoint("run.ckpt"), at=5)
    adapt(silent, AdaptivePrecision(pin="**"), callbacks=[save], batches=encoded(COUNT))
    content = torch.load("run.ckpt", weights_only=True)
    del content["callbacks"]["AdaptivePrecision"]
    torch.save(content, "without.ckpt")
    run = adapt(silent, batches=encoded(COUNT), ckpt_path="without.ckpt")
    assert run.moves == [("net.encode", "fp16", "fp32")]
    assert run.adaptive.decisions[0]["step"] == 8


def test_a_checkpoint_can_be_validated_without_a_trace():
    interrupted()

    class Validated(Task):
        def validation_step(self, batch, batch_idx):
            self.log("gap", nn.functional.mse_loss(self(batch[0]), batch[1]))

    adaptive, plugin = AdaptivePrecision(), PerLayerPrecision("fp16")
    run = trainer(plugin, callbacks=[adaptive])
    module = Validated(silent().net)
    run.validate(module, encoded(2), ckpt_path="run.ckpt", verbose=False)
    assert len(adaptive.decisions) == 1
    assert plugin.assignment["net.encode"].compute == "fp32"


def test_a_state_of_another_version_is_refused():
    adaptive = AdaptivePrecision()
    with pytest.raises(ValueError, match="version 2") as caught:
        adaptive.load_state_dict({**adaptive.state_dict(), "version": 2})
    one_line(caught)


def test_the_state_before_training_is_plain():
    state = AdaptivePrecision().state_dict()
    assert json.loads(json.dumps({**state, "values": {}})) == {**state, "values": {}}


def spoiled(path=None, save=None):
    """A run whose weights something spoils after the batch with the number 8."""

    def spoil(run, model):
        if run.fit_loop.epoch_loop.batch_idx == 8:
            nn.init.constant_(model.net.head.weight, float("nan"))

    callbacks = [Call("on_train_batch_end", spoil), *([save] if save else [])]
    adaptive = AdaptivePrecision(every_n_steps=3)
    return adapt(silent, adaptive, "fp32", callbacks, batches=encoded(14), ckpt_path=path)


def test_what_is_restored_after_a_resume_is_what_the_uninterrupted_run_restores():
    whole = everything(spoiled(save=saving()))
    assert [decision["kind"] for decision in whole["decisions"]] == ["restore"]
    for batch in (1, 4, 6, 7, 8, 10):
        resumed = everything(spoiled(f"{batch}.ckpt"))
        assert [key for key in whole if not same(whole[key], resumed[key])] == [], batch


def test_a_settled_run_whose_checkpoints_hold_no_copy_decides_the_same(monkeypatch):
    monkeypatch.setattr(controller, "_FIRST_SAMPLES", (0, 2))
    whole = everything(spoiled(save=saving()))
    for batch in (6, 7, 10):
        state = torch.load(f"{batch}.ckpt", weights_only=True)["callbacks"]["AdaptivePrecision"]
        assert (state["steered"]["copy"] is None) is (batch < 8)
        resumed = spoiled(f"{batch}.ckpt")
        assert (resumed.adaptive.decisions, resumed.plugin.history) == (whole["decisions"], whole["history"])
        assert resumed.is_finite
