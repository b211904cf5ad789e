"""Runs under PrecisionScheduler, against the same runs whose policy is set by hand before the batch it is for."""

import json
from functools import partial
from pathlib import Path

import known_results
import pytest
import torch
from capabilities import auto_format
from plugin_models import (
    Batches,
    Call,
    Evaluable,
    Scheduled,
    Task,
    TwoOptimizers,
    fit,
    overflowing,
    probes,
    same,
    task,
    trainer,
)
from torch.optim.lr_scheduler import LambdaLR

from lightning_mixprec import FidelityMonitor, OverflowMonitor, PerLayerPrecision
from lightning_mixprec.callbacks.scheduler import PrecisionScheduler
from lightning_mixprec.optim import loss_scaling as scaling

MIXED = {"default": "bf16", "net.4": "fp32"}


def replace(policy):
    return lambda run, model: run.precision_plugin.set_policy(policy)


def edit(edits):
    return lambda run, model: run.precision_plugin.edit_policy(edits)


def by_hand(moves, policy="fp32", kind=Task, count=4, callbacks=(), **options):
    """A run whose policy changes before given batches, counted from the start; losses and weights."""
    calls = [Call("on_train_batch_start", change, at=batch) for batch, change in moves.items()]
    model = task(kind)
    fit(model, PerLayerPrecision(policy), Batches(6, count=count), callbacks=[*calls, *callbacks], **options)
    return [model.losses, [*model.state_dict().values()]]


def scheduled(phases, policy="fp32", kind=Task, count=4, callbacks=(), **options):
    """The same under a schedule; and for each phase that came: its number and the steps before it."""
    model, plugin, scheduler = task(kind), PerLayerPrecision(policy), PrecisionScheduler(phases)
    fit(model, plugin, Batches(6, count=count), callbacks=[scheduler, *callbacks], **options)
    came = [(each["phase"], each["step"]) for each in scheduler.came]
    assert {entry["step"] for entry in plugin.history} <= {step for _, step in came}
    return [model.losses, [*model.state_dict().values()]], came


# Moments

MOMENTS = {
    "start": (0, 0),
    "step": (5, 5),
    "step in words": ({"step": 7}, 7),
    "share": ("50%", 6),
    "share between steps": ("51%", 7),
    "last step": ({"step": 11}, 11),
    "epoch": ({"epoch": 2}, 8),
    "first epoch": ({"epoch": 0}, 0),
}


@pytest.mark.parametrize(("at", "batch"), MOMENTS.values(), ids=MOMENTS)
def test_a_phase_holds_from_its_first_step_on(at, batch):
    result, came = scheduled([{"at": at, "policy": MIXED}], max_epochs=3)
    assert came == [(1, batch)]
    assert same(result, by_hand({batch: replace(MIXED)}, max_epochs=3))
    assert not same(result, by_hand({}, max_epochs=3))


def test_a_phase_at_the_start_is_a_policy_that_was_configured():
    result, _ = scheduled([{"at": 0, "policy": MIXED}])
    assert same(result, by_hand({}, policy=MIXED))


def test_phases_follow_each_other_and_edits_build_on_what_is_there():
    phases = [
        {"at": 2, "policy": "bf16"},
        {"at": {"epoch": 1}, "edit": {"net.0": "fp32"}},
        {"at": 6, "edit": {"net.4": "c=fp32,o=input"}},
        {"at": 6, "edit": {"net.6": "fp32"}},
        {"at": "75%", "policy": "configured"},
    ]
    result, came = scheduled(phases, max_epochs=3)
    last = {"net.4": "c=fp32,o=input", "net.6": "fp32"}
    moves = {2: replace("bf16"), 4: edit({"net.0": "fp32"}), 6: edit(last), 9: replace("fp32")}
    assert same(result, by_hand(moves, max_epochs=3))
    assert came == [(1, 2), (2, 4), (3, 6), (4, 6), (5, 9)]


def test_at_the_same_moment_the_later_one_wins():
    phases = [{"at": 2, "policy": "bf16"}, {"at": {"step": 2}, "policy": "fp32"}, {"at": "50%", "policy": MIXED}]
    result, came = scheduled(phases)
    assert same(result, by_hand({2: replace(MIXED)}))
    assert [phase for phase, _ in came] == [1, 2, 3]


def test_shares_are_of_whichever_limit_is_nearer():
    assert scheduled([{"at": "50%", "policy": "bf16"}], max_epochs=3, max_steps=6)[1] == [(1, 3)]
    assert scheduled([{"at": "50%", "policy": "bf16"}], max_epochs=-1, max_steps=10)[1] == [(1, 5)]
    assert scheduled([{"at": "50%", "policy": "bf16"}], max_epochs=2, limit_train_batches=2)[1] == [(1, 2)]


class Unsized:
    def __iter__(self):
        return iter(Batches(6))


def test_without_a_length_a_share_may_be_of_steps_or_whole_epochs():
    for options, step in [({"max_steps": 6}, 3), ({"max_epochs": 4}, 8)]:
        scheduler = PrecisionScheduler([{"at": "50%", "policy": "bf16"}])
        fit(task(), PerLayerPrecision("fp32"), Unsized(), callbacks=[scheduler], **{"max_epochs": -1, **options})
        assert [each["step"] for each in scheduler.came] == [step]


def test_a_skipped_step_is_no_step():
    """The second of eight batches overflows, so four steps are taken after five batches; a share goes by batches."""
    phases = [{"at": 4, "edit": {"net.0": "bf16"}}, {"at": "75%", "edit": {"net.4": "bf16"}}]
    result, came = scheduled(phases, count=8, callbacks=overflowing())
    assert came == [(1, 4), (2, 5)]
    moves = {5: edit({"net.0": "bf16"}), 6: edit({"net.4": "bf16"})}
    assert same(result, by_hand(moves, count=8, callbacks=overflowing()))


@pytest.mark.parametrize("is_late", [False, True])
def test_a_skip_that_is_known_late_is_no_step_either(is_late, monkeypatch):
    if is_late:  # fused optimizers obey the flag on the device, as on CUDA
        monkeypatch.setattr(scaling, "_is_read", lambda optimizer, _: not scaling.obeys_found_inf(optimizer))
    scheduler = PrecisionScheduler([{"at": 2, "policy": "bf16"}])
    model = known_results.Line(partial(torch.optim.SGD, lr=1.0, fused=True))
    known_results.fit(model, PerLayerPrecision("fp16"), [0.5, known_results.INF, 0.25, 0.5, 0.5], callbacks=[scheduler])
    [row] = [json.loads(line) for line in Path("mixprec.jsonl").read_text().splitlines()]
    assert (row["step"], row["batch_idx"]) == (2, 3)
    assert model.travelled == 1.75


# The learning rate


class Warmed(Task):
    """A warm-up over four steps, and then down."""

    SHARES = (0.1, 0.2, 0.5, 1.0, 1.0, 0.6, 0.3, 0.05)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = LambdaLR(optimizer, lambda step: self.SHARES[min(step, 7)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize(("share", "batch"), [(1.0, 5), (0.5, 6), (0.3, 7), (0.1, 7)])
def test_a_learning_rate_is_low_after_its_peak_and_not_during_the_warm_up(share, batch):
    phases = [{"at": {"event": "lr_below", "share": share}, "policy": "bf16"}]
    result, came = scheduled(phases, kind=Warmed, count=8)
    assert came == [(1, batch)]
    assert same(result, by_hand({batch: replace("bf16")}, kind=Warmed, count=8))


def test_a_group_that_is_frozen_does_not_make_the_rate_low():
    class Groups(Scheduled):
        def configure_optimizers(self):
            (config := super().configure_optimizers())["optimizer"].param_groups[0]["lr"] = 0.0
            config["optimizer"].add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1})
            return config["optimizer"]

    with pytest.warns(UserWarning, match="phase 1 waits for the learning rate to fall"):
        _, came = scheduled([{"at": {"event": "lr_below", "share": 0.5}, "policy": "bf16"}], kind=Groups)
    assert came == []


# Between the batches of an accumulation nothing changes


class Validated(Scheduled):
    """The learning rate halves with every step; a metric that never improves."""

    def validation_step(self, batch, batch_idx):
        self.log("metric", 1.0, batch_size=4)


@pytest.mark.parametrize(
    ("at", "batch"),
    [
        (1, 3),
        ("20%", 3),  # two of ten batches
        ({"event": "plateau", "monitor": "metric", "patience": 1}, 3),  # known after two batches
        ({"event": "lr_below", "share": 0.5}, 6),
        ({"step": 4}, 10),  # the tenth batch has a step of its own
        ({"epoch": 1}, 10),
    ],
    ids=str,
)
def test_a_phase_waits_for_the_first_batch_of_an_accumulation(at, batch):
    def run(*callbacks):
        model, validation = task(Validated), Batches(6, count=1)
        options = {"accumulate_grad_batches": 3, "val_check_interval": 1, "max_epochs": 2}
        each = trainer(PerLayerPrecision("fp32"), callbacks=[*callbacks], **options)
        if "20%" in str(at):
            each.fit_loop.max_epochs = 1
        each.fit(model, Batches(6, count=10), validation)
        return [model.losses, [*model.state_dict().values()]]

    result = run(PrecisionScheduler([{"at": at, "policy": "bf16"}]))
    assert same(result, run(Call("on_train_batch_start", replace("bf16"), at=batch)))


class Accumulating(Task):
    """Manual optimization that steps after every third batch."""

    def __init__(self, *args):
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


@pytest.mark.parametrize(("at", "batch"), [(0, 0), (1, 3), (2, 6), ("50%", 6), ("20%", 3)])
def test_in_manual_optimization_a_phase_waits_for_a_step(at, batch):
    result, came = scheduled([{"at": at, "policy": "bf16"}], kind=Accumulating, count=9)
    assert same(result, by_hand({batch: replace("bf16")}, kind=Accumulating, count=9))
    assert came == [(1, batch // 3)]


@pytest.mark.parametrize(("at", "batch"), [(4, 2), ("50%", 4), ({"epoch": 1}, 4)])
def test_with_two_optimizers_a_share_is_still_one_of_training(at, batch):
    result, came = scheduled([{"at": at, "policy": "bf16"}], kind=TwoOptimizers, max_epochs=2)
    assert same(result, by_hand({batch: replace("bf16")}, kind=TwoOptimizers, max_epochs=2))
    assert came == [(1, 2 * batch)]


# With what else a run has


def test_evaluation_keeps_its_own_policy():
    def run(*callbacks):
        model = task(Evaluable)
        plugin = PerLayerPrecision("fp32", eval_policy="bf16")
        each = trainer(plugin, callbacks=[*callbacks], max_epochs=2, val_check_interval=1)
        each.fit(model, Batches(6), Batches(6, count=1))
        return [model.losses, model.eval_losses]

    phases = [{"at": 3, "policy": MIXED}, {"at": 5, "policy": "fp32"}]
    hand = [Call("on_train_batch_start", replace(policy), at=at) for at, policy in [(3, MIXED), (5, "fp32")]]
    assert same(run(PrecisionScheduler(phases)), run(*hand))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_follows():
    torch.compiler.reset()
    phases = [{"at": 1, "edit": {"net.0": "bf16"}}, {"at": 3, "policy": "configured"}]
    scheduler, model = PrecisionScheduler(phases), task()
    fit(torch.compile(model, backend="eager"), PerLayerPrecision("fp32"), callbacks=[scheduler])
    expected = by_hand({1: edit({"net.0": "bf16"}), 3: replace("fp32")})
    assert same([*model.state_dict().values()], expected[1])
    assert len(scheduler.came) == 2
    torch.compiler.reset()


def test_what_auto_chose_is_what_was_configured():
    auto = auto_format()
    other = "bf16" if auto == "fp32" else "fp32"
    phases = [{"at": 1, "policy": other}, {"at": 3, "policy": "configured"}]
    _, came = scheduled(phases, policy="auto")
    assert came == [(1, 1), (2, 3)]
    plugin = PerLayerPrecision("auto")
    fit(task(), plugin, callbacks=[PrecisionScheduler(phases)])
    assert [(entry["from"], entry["to"]) for entry in plugin.history] == [(auto, other), (other, auto)]


def test_monitors_look_at_the_formats_that_a_step_has():
    def gap(policy, *callbacks):
        monitor = FidelityMonitor(1)
        callbacks = [*callbacks, monitor, OverflowMonitor()]
        fit(task(), PerLayerPrecision(policy), Batches(6, count=2), callbacks=callbacks)
        return monitor.latest["loss_gap"]

    assert gap("fp32") == 0
    assert gap("fp32", PrecisionScheduler([{"at": 1, "policy": "bf16"}])) > 0
    assert gap("bf16", PrecisionScheduler([{"at": 1, "policy": "fp32"}])) == 0


def test_a_scheduler_that_is_used_again_begins_again():
    scheduler = PrecisionScheduler([{"at": 2, "policy": "bf16"}])
    for _ in range(2):
        model = Task(probes())
        fit(model, PerLayerPrecision("fp32"), callbacks=[scheduler])
        assert [seen[1] for seen in model.net[0].seen] == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_a_run_that_is_prolonged_goes_on():
    plugin, scheduler = PerLayerPrecision("fp32"), PrecisionScheduler([{"at": 2, "policy": "bf16"}])
    run = fit(task(), plugin, callbacks=[scheduler])
    run.fit_loop.max_epochs = 2
    run.fit(run.lightning_module, Batches(6))
    assert [each["step"] for each in scheduler.came] == [entry["step"] for entry in plugin.history] == [2]
