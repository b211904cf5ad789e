"""A skipped step is not a step: no learning rate, ``global_step``, average, limit or trigger moves with it."""

from functools import partial

import pytest
import torch
from known_results import (
    INF,
    SGD,
    Batches,
    Line,
    Manual,
    fails_on_stock,
    fit,
    holds_on_both,
    ours,
    slope,
    stock,
    trainer_of,
)
from lightnings import ModelCheckpoint, Precision, WeightAveraging, pl
from torch.optim.lr_scheduler import ChainedScheduler, ExponentialLR, ReduceLROnPlateau, SequentialLR

MIXED = [0.5, INF, 0.25, 0.5, INF, INF, 0.25, 0.125]
REAL = [value for value in MIXED if value != INF]


def halving(optimizer, interval="step", frequency=1):
    return {"scheduler": ExponentialLR(optimizer, 0.5), "interval": interval, "frequency": frequency}


def chained(optimizer):
    return {"scheduler": ChainedScheduler([ExponentialLR(optimizer, 0.5)]), "interval": "step"}


def sequential(optimizer):
    parts = [ExponentialLR(optimizer, 0.5), ExponentialLR(optimizer, 0.75)]
    return {"scheduler": SequentialLR(optimizer, parts, milestones=[2]), "interval": "step"}


def oracle_of(model, values=REAL, **options):
    """The same model trained in fp32 by Lightning on the batches that make real steps, and its Trainer."""
    return model, fit(model, stock("32-true"), values, **options)


def learning_rate(trainer):
    return trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("schedule", [halving, chained, sequential])
@fails_on_stock("learning rates move on with skipped steps")
def test_a_schedule_per_step_moves_with_real_steps(plugin, schedule):
    model = Line(schedule=schedule)
    trainer = fit(model, plugin(), MIXED)
    oracle, oracles_trainer = oracle_of(Line(schedule=schedule))
    assert learning_rate(trainer) == learning_rate(oracles_trainer)
    assert model.travelled == oracle.travelled


@pytest.mark.parametrize("first", [[], [0.5]], ids=["the step of a due batch", "a step in between"])
@fails_on_stock("learning rates move on with skipped steps")
def test_a_schedule_every_two_steps_counts_real_steps(plugin, first):
    schedule = partial(halving, frequency=2)
    values = [*first, 0.25, INF, 0.5, 0.25, INF, 0.125, 0.25, 0.125, 0.25]
    trainer = fit(Line(schedule=schedule), plugin(), values)
    _, oracles = oracle_of(Line(schedule=schedule), [value for value in values if value != INF])
    assert learning_rate(trainer) == learning_rate(oracles)


class Rates(pl.Callback):
    """The learning rate that the next batch gets."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(learning_rate(trainer))


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_a_schedule_is_never_ahead_of_the_real_steps(frequency):
    values = [0.25, INF, 0.5, 0.25, INF, 0.125, INF, INF, 0.25, 0.125, 0.25, 0.25]
    rates = Rates()
    fit(Line(schedule=partial(halving, frequency=frequency)), ours(), values, callbacks=[rates])
    for index, rate in enumerate(rates.seen):
        taken = sum(value != INF for value in values[: index + 1])
        assert rate >= 0.5 ** (taken // frequency)
    assert rates.seen[-1] == 0.5 ** (8 // frequency)


@pytest.mark.parametrize("frequency", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_skips_a_schedule_moves_as_lightning_moves_it(frequency, accumulate):
    schedule = partial(halving, frequency=frequency)
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    trainer = fit(Line(schedule=schedule), ours(), [0.5] * 7, **options)
    _, oracles = oracle_of(Line(schedule=schedule), [0.5] * 7, **options)
    assert learning_rate(trainer) == learning_rate(oracles)


def test_a_schedule_moves_with_an_optimizer_that_evaluates_the_loss_itself():
    model = Line(partial(torch.optim.LBFGS, lr=0.5, max_iter=2), halving)
    assert learning_rate(fit(model, ours("bf16"), [0.5, 0.25])) == 0.125


@pytest.mark.parametrize("last", [INF, 0.25], ids=["the epoch's last step skipped", "taken"])
@holds_on_both()
def test_a_schedule_per_epoch_moves_whatever_happened_to_the_last_step(plugin, last):
    trainer = fit(Line(schedule=partial(halving, interval="epoch")), plugin(), [0.5, last], max_epochs=3)
    assert learning_rate(trainer) == 0.125


def test_schedules_per_step_and_per_epoch_live_side_by_side():
    def configure(model):
        optimizer = SGD(model.parameters())
        per_epoch = {"scheduler": ExponentialLR(optimizer, 0.25), "interval": "epoch"}
        return [optimizer], [halving(optimizer), per_epoch]

    class Both(Line):
        configure_optimizers = configure

    trainer = fit(Both(), ours(), [0.5, INF, INF], max_epochs=3)
    assert learning_rate(trainer) == (0.5 * 0.25) ** 3


def on_plateau(optimizer, interval):
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    return {"scheduler": scheduler, "interval": interval, "monitor": "loss"}


@fails_on_stock("a plateau is looked for in the losses of skipped steps")
def test_a_plateau_is_not_looked_for_in_skipped_steps(plugin):
    schedule = partial(on_plateau, interval="step")
    trainer = fit(Line(schedule=schedule), plugin(), MIXED)
    _, oracles = oracle_of(Line(schedule=schedule))
    assert learning_rate(trainer) == learning_rate(oracles)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == len(REAL)


@holds_on_both()
def test_a_plateau_of_epochs_is_looked_for_whatever_happened_to_the_last_step(plugin):
    trainer = fit(Line(schedule=partial(on_plateau, interval="epoch")), plugin(), [0.5, INF], max_epochs=3)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3


def one_step(model, batch, _):
    optimizer, _ = model.optimizers()
    optimizer.zero_grad()
    model.manual_backward(slope(model.a, batch))
    optimizer.step()


def models():
    return pytest.mark.parametrize("model", [Line, partial(Manual, one_step)], ids=["automatic", "manual"])


@models()
@fails_on_stock("global_step counts skipped steps")
def test_global_step_counts_real_steps(plugin, model):
    assert fit(model(), plugin(), MIXED, max_epochs=2).global_step == 2 * len(REAL)


@fails_on_stock("global_step counts skipped steps")
def test_global_step_counts_real_accumulated_steps(plugin):
    assert fit(Line(), plugin(), MIXED, accumulate_grad_batches=2).global_step == 2


@models()
@fails_on_stock("max_steps is reached by skipped steps")
def test_max_steps_are_real_steps(plugin, model):
    model = model()
    trainer = fit(model, plugin(), MIXED, max_steps=4, max_epochs=-1)
    assert trainer.global_step == 4
    assert model.travelled in (1.5, [1.5, 0.0])


@fails_on_stock("steps that trigger checkpoints include skipped ones")
def test_checkpoints_every_n_steps_are_taken_after_n_real_steps(plugin, tmp_path):
    def saved(folder):
        return {
            path.name: torch.load(path, weights_only=True)["state_dict"]["layer.weight"] for path in folder.iterdir()
        }

    def every_two_steps(folder):
        callback = ModelCheckpoint(tmp_path / folder, "{step}", save_top_k=-1, every_n_train_steps=2)
        return {"callbacks": [callback], "enable_checkpointing": True}

    fit(Line(), plugin(), MIXED, **every_two_steps("run"))
    oracle_of(Line(), **every_two_steps("oracle"))
    run, oracle = saved(tmp_path / "run"), saved(tmp_path / "oracle")
    assert run.keys() == oracle.keys() == {"step=2.ckpt", "step=4.ckpt"}
    assert all(torch.equal(run[name], oracle[name]) for name in run)


@models()
@fails_on_stock("skipped steps enter the average of the weights")
def test_averaged_weights_average_real_steps(plugin, model):
    model, oracle = model(), model()
    fit(model, plugin(), MIXED, callbacks=[WeightAveraging()])
    oracle_of(oracle, callbacks=[WeightAveraging()])
    assert model.travelled == oracle.travelled


def test_skipped_steps_are_counted_and_readable_after_the_run():
    plugin = ours()
    fit(Line(), plugin, MIXED)
    assert plugin.skipped_steps == 3
    assert plugin.scaler.get_scale() == 65536.0 / 8


def test_every_optimizer_counts_its_own_skipped_steps():
    seen, plugin = [], ours()

    def two_steps(model, batch, _):
        for optimizer, layer, part in zip(model.optimizers(), (model.a, model.b), batch, strict=True):
            optimizer.zero_grad()
            model.manual_backward(slope(layer, part))
            optimizer.step()
        seen.append([plugin.step_was_skipped(optimizer) for optimizer in model.optimizers()])
        assert seen[-1] == [plugin.step_was_skipped(optimizer.optimizer) for optimizer in model.optimizers()]

    trainer = fit(Manual(two_steps), plugin, [(0.5, INF), (INF, INF), (0.5, 0.5)])
    assert seen == [[False, True], [True, True], [False, False]]
    assert plugin.skipped_steps == 3
    assert trainer.global_step == 3


def test_a_schedule_stepped_by_hand_can_ask_whether_the_step_was_skipped():
    def scheduled(model, batch, index):
        one_step(model, batch, index)
        if not model.trainer.precision_plugin.step_was_skipped(model.optimizers()[0]):
            model.lr_schedulers().step()

    def configure(model):
        optimizer = SGD(model.a.parameters())
        return [optimizer, SGD(model.b.parameters())], [halving(optimizer)]

    trainer = fit(Manual(scheduled, configure), ours(), MIXED)
    assert learning_rate(trainer) == 0.5 ** len(REAL)


class Validated(Line):
    """Asks in validation, where no step is being taken."""

    def validation_step(self, batch, batch_idx):
        self.log("skipped", float(self.trainer.precision_plugin.skipped_steps))


def test_skipped_steps_can_be_asked_for_during_validation():
    plugin = ours()
    trainer = trainer_of(plugin)
    trainer.fit(Validated(), Batches(MIXED), Batches([0.5]))
    assert trainer.callback_metrics["skipped"] == 3


def test_the_module_has_its_own_schedule_step_back_after_the_run():
    model = Line(schedule=halving)
    fit(model, ours(), MIXED)
    assert "lr_scheduler_step" not in vars(model)


class OwnSchedule(Line):
    def lr_scheduler_step(self, scheduler, metric):
        self.moves = getattr(self, "moves", 0) + 1
        scheduler.step()


def test_a_modules_own_schedule_step_is_called_for_real_steps_only():
    model = OwnSchedule(schedule=halving)
    fit(model, ours(), MIXED)
    assert model.moves == len(REAL)


def test_a_run_in_fp32_without_the_guard_steps_as_lightning_does():
    model, oracle = Line(schedule=halving), Line(schedule=halving)
    trainer = fit(model, ours("fp32", skip_nonfinite=False), REAL)
    oracles = fit(oracle, Precision(), REAL)
    assert (trainer.global_step, learning_rate(trainer)) == (oracles.global_step, learning_rate(oracles))
    assert torch.equal(model.layer.weight, oracle.layer.weight)
