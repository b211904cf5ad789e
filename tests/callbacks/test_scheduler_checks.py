"""What PrecisionScheduler tells of its phases, and what it refuses before the first step."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from lightnings import pl
from monitor_models import Memory
from plugin_models import (
    Batches,
    Call,
    Evaluable,
    Scheduled,
    fit,
    one_line,
    snapshot,
    task,
    trainer,
)

from lightning_mixprec import PerLayerPrecision, PrecisionPolicy
from lightning_mixprec.callbacks.scheduler import PrecisionScheduler

MIXED = {"default": "bf16", "net.4": "fp32"}


class Unsized:
    def __iter__(self):
        return iter(Batches(6))


def edit(edits):
    return lambda run, model: run.precision_plugin.edit_policy(edits)


def came(phases, policy="fp32", **options):
    """For each phase that came: its number and the steps before it."""
    scheduler = PrecisionScheduler(phases)
    fit(task(), PerLayerPrecision(policy), callbacks=[scheduler], **options)
    return [(each["phase"], each["step"]) for each in scheduler.came]


# What is told

TOLD = [{"at": 1, "policy": MIXED}, {"at": {"epoch": 1}, "edit": {"net.0": "fp32"}}]


def test_each_change_is_one_line_and_a_summary_follows(capsys):
    fit(task(), PerLayerPrecision("fp32"), max_epochs=2, callbacks=[PrecisionScheduler(TOLD)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("PrecisionScheduler")]
    assert lines == [
        "PrecisionScheduler: step 1, epoch 0: default fp32 -> bf16; net.4 (c=fp32) added (step 1)",
        "PrecisionScheduler: step 4, epoch 1: net.0 (c=fp32) added (epoch 1)",
        "PrecisionScheduler: 2 of 2 phases came",
    ]


def test_the_summary_says_what_did_not_come(capsys):
    phases = [{"at": 1, "policy": "bf16"}, {"at": {"event": "lr_below", "share": 0.01}, "policy": "fp32"}]
    fit(task(Scheduled), PerLayerPrecision("fp32"), callbacks=[PrecisionScheduler(phases)])
    out = capsys.readouterr().out
    assert "1 of 2 phases came" in out
    assert "2: learning rate below 0.01 of its peak  did not come" in out


@pytest.mark.parametrize("quiet", [{"fast_dev_run": 2}, {"barebones": True, "enable_checkpointing": None}], ids=str)
def test_a_trial_is_quiet(quiet, capsys):
    scheduler = PrecisionScheduler([{"at": 1, "policy": "bf16"}])
    fit(task(), PerLayerPrecision("fp32"), callbacks=[scheduler], **{"logger": None, **quiet})
    assert "PrecisionScheduler" not in capsys.readouterr().out
    assert len(scheduler.came) == 1


def test_a_trial_of_a_few_batches_does_not_warn_of_what_it_never_reaches():
    fit(
        task(), PerLayerPrecision("fp32"), callbacks=[PrecisionScheduler([{"at": 9, "policy": "bf16"}])], fast_dev_run=1
    )


def test_the_history_gives_the_reason():
    plugin = PerLayerPrecision("fp32")
    fit(task(), plugin, callbacks=[PrecisionScheduler([{"at": "50%", "policy": "bf16"}])])
    assert plugin.history == [
        {"step": 2, "layer": "", "from": "fp32", "to": "bf16", "reason": "schedule: 50% of training"}
    ]


def test_the_version_of_the_policy_is_logged():
    logger, scheduler = Memory(), PrecisionScheduler(TOLD)
    options = {"logger": logger, "log_every_n_steps": 1, "max_epochs": 2}
    run = fit(task(), PerLayerPrecision("fp32"), callbacks=[scheduler], **options)
    versions = [row["mixprec/policy_version"] for _, row in logger.rows if "mixprec/policy_version" in row]
    assert versions == [0, 1, 1, 1, 2, 2, 2, 2]
    assert run.callback_metrics["mixprec/policy_version"] == 2


def test_the_journal_has_a_row_for_each_phase():
    fit(task(), PerLayerPrecision("fp32"), max_epochs=2, callbacks=[PrecisionScheduler(TOLD)])
    first, second = (json.loads(line) for line in Path("mixprec.jsonl").read_text().splitlines())
    assert (first["monitor"], first["step"], first["epoch"], first["batch_idx"]) == ("schedule", 1, 0, 1)
    assert second.pop("run_id") == first["run_id"]
    assert second == {
        "monitor": "schedule",
        "step": 4,
        "epoch": 1,
        "batch_idx": 0,
        "phase": 2,
        "at": "epoch 1",
        "change": "net.0 (c=fp32) added",
    }


def test_a_change_by_another_hand_counts_too():
    plugin = PerLayerPrecision("fp32")
    move = Call("on_train_batch_end", edit({"net.0": "bf16"}), at=0)
    run = fit(task(), plugin, callbacks=[PrecisionScheduler([{"at": 3, "policy": "bf16"}]), move])
    assert run.callback_metrics["mixprec/policy_version"] == 2


def test_there_is_nothing_to_plot():
    with pytest.raises(ValueError, match="draws nothing"):
        PrecisionScheduler(TOLD).plot()


# What is refused before the first step

REFUSED = {
    "edit": ([{"at": 0, "policy": "bf16"}, {"at": 3, "edit": {"net.9": "fp32"}}], "phase 2: edit 'net.9' matches no"),
    "policy": ([{"at": 3, "policy": {"default": "bf16", "net.9": "fp32"}}], "phase 1: "),
    "param": ([{"at": 3, "policy": {"default": "bf16", "net.0": "p=fp64,c=fp64"}}], "phase 1: .*param"),
}


@pytest.mark.parametrize(("phases", "says"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_the_model_is_refused_before_the_first_step(phases, says):
    model = task()
    with pytest.raises(ValueError, match=says) as caught:
        fit(model, PerLayerPrecision("fp32"), callbacks=[PrecisionScheduler(phases)])
    one_line(caught)
    assert model.losses == []


def test_an_optimizer_that_fp16_does_not_allow_is_refused_before_the_first_step():
    model = task()
    model.make_optimizer = partial(torch.optim.LBFGS, lr=0.1, max_iter=2)
    with pytest.raises(ValueError, match="phase 2: LBFGS") as caught:
        phases = [{"at": 1, "policy": "bf16"}, {"at": 2, "edit": {"net.0": "fp16"}}]
        fit(model, PerLayerPrecision("fp32"), callbacks=[PrecisionScheduler(phases)])
    one_line(caught)
    assert model.losses == []


def test_an_edit_after_an_event_has_to_fit_the_policy_before_the_event_too():
    stored = {"default": "fp32", "net.0": "p=fp64,c=fp64"}
    both_stored = {"net.[0:5]": "bf16"}  # cannot be edited as one while a rule stores one of them otherwise

    def phases(first):
        return [{"at": first, "policy": "fp32"}, {"at": 3, "edit": both_stored}]

    assert came(phases(1), policy=stored) == [(1, 1), (2, 3)]
    with pytest.raises(ValueError, match="phase 2: .*param differs") as caught:
        came(phases({"event": "plateau", "monitor": "loss"}), policy=stored)
    one_line(caught)


@pytest.mark.parametrize("plugin", [None, "stock"])
def test_another_plugin_is_refused(plugin):
    plugins = pl.plugins.MixedPrecision("bf16-mixed", "cpu") if plugin else None
    with pytest.raises(ValueError, match=r"use Trainer\(plugins=PerLayerPrecision") as caught:
        fit(task(), plugins, callbacks=[PrecisionScheduler(TOLD)])
    one_line(caught)


def test_a_share_of_endless_training_is_refused():
    model = task()
    with pytest.raises(ValueError, match="phase 2: it comes at 80% of training, but .* no end") as caught:
        phases = [{"at": 0, "policy": "bf16"}, {"at": "80%", "policy": "fp32"}]
        fit(model, PerLayerPrecision("fp32"), callbacks=[PrecisionScheduler(phases)], max_epochs=-1)
    one_line(caught)
    assert model.losses == []


def test_a_share_of_data_without_a_length_is_refused_unless_it_is_whole_epochs():
    model = task()
    with pytest.raises(ValueError, match="phase 1: it comes at 80% of training, but .* no length") as caught:
        scheduler = PrecisionScheduler([{"at": "80%", "policy": "bf16"}])
        fit(model, PerLayerPrecision("fp32"), Unsized(), callbacks=[scheduler], max_epochs=3)
    one_line(caught)
    assert model.losses == []


@pytest.mark.parametrize(
    ("at", "options"),
    [
        ({"step": 8}, {"max_epochs": 2}),
        ({"step": 3}, {"max_steps": 3, "max_epochs": -1}),
        ({"step": 4}, {"max_epochs": 2, "accumulate_grad_batches": 2}),
        ({"epoch": 2}, {"max_epochs": 2}),
    ],
    ids=str,
)
def test_a_phase_that_never_comes_is_one_warning(at, options):
    with pytest.warns(UserWarning, match="phase 1 never comes") as caught:
        found = came([{"at": at, "policy": "bf16"}], **options)
    assert [str(each.message).startswith("phase 1") for each in caught].count(True) == 1
    assert found == []


def test_a_model_is_left_as_it_was_and_can_be_evaluated():
    model, scheduler = task(Evaluable), PrecisionScheduler([{"at": 1, "policy": "bf16"}])
    run, before = trainer(PerLayerPrecision("fp32"), callbacks=[scheduler]), snapshot(model)
    run.fit(model, Batches(6), Batches(6, count=1))
    assert snapshot(model) == before
    run.validate(model, Batches(6, count=1), verbose=False)
    assert run.precision_plugin.policy == PrecisionPolicy("bf16")
    assert len(scheduler.came) == 1
