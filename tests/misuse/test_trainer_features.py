"""What a Trainer offers beside training: each works under a mixed policy, watched by every callback."""

import pytest
import torch
from capabilities import auto_format
from lightning.fabric.utilities import throughput
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelPruning,
    ThroughputMonitor,
    throughput_monitor,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from misuse_models import (
    around,
    check_healthy,
    every_format,
    mixed,
    pairs,
    plain_task,
    seeded,
    watched,
    watchers,
)
from monitor_models import Memory
from plugin_models import MOMENTUM, Batches, Call, Evaluable, Task, fit, ours, overflowing, same, trainer
from selection import slow
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_mixprec.numerics.formats import get_format

# Options of the Trainer


@every_format
def test_detect_anomaly(format):
    check_healthy(plain_task, mixed(format), detect_anomaly=True)


class Rooted(nn.Module):
    """Its gradient is NaN at zero: infinity times zero."""

    def forward(self, x):
        return (x * 0).sqrt() * 0 + x


@pytest.mark.filterwarnings("ignore:Error detected in")
@every_format
def test_an_anomaly_is_raised_as_by_lightnings_fp32(format):
    for plugin in (None, ours(mixed(format))):
        with pytest.raises(RuntimeError, match="returned nan values in its 0th output"):
            fit(Task(around(Rooted())), plugin, detect_anomaly=True)


@every_format
def test_overfit_batches(format):
    run = check_healthy(plain_task, mixed(format), overfit_batches=1, max_epochs=3)
    assert run.model.losses[2] < run.model.losses[0]


@every_format
def test_fast_dev_run_trains_and_writes_nothing(format, tmp_path, capsys):
    run = check_healthy(plain_task, mixed(format), fast_dev_run=True)
    assert len(run.model.losses) == 1
    assert list(tmp_path.iterdir()) == []
    assert "Monitor" not in capsys.readouterr().out


@every_format
def test_without_a_logger_files_go_to_the_root_directory(format, tmp_path):
    watched(seeded(plain_task), mixed(format))
    assert sorted(path.name for path in (tmp_path / "watched").iterdir()) == ["learned_policy.yaml", "mixprec.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["watched"]


@every_format
def test_several_loggers_get_the_same_and_files_go_where_the_first_one_writes(format, tmp_path):
    memories = [Memory(), Memory()]
    loggers = [CSVLogger("one"), memories[0], CSVLogger("two"), memories[1]]
    fit(seeded(plain_task), ours(mixed(format)), callbacks=watchers(), logger=loggers, log_every_n_steps=1)
    rows = [row for _, row in memories[0].rows if "mixprec/loss_scale" in row]
    assert [row["mixprec/skipped_steps"] for row in rows] == [0.0] * 4
    assert str(memories[0].rows) == str(memories[1].rows)
    metrics = [tmp_path / name / "lightning_logs" / "version_0" / "metrics.csv" for name in ("one", "two")]
    assert metrics[0].read_text() == metrics[1].read_text() != ""
    assert [path.parent for path in tmp_path.rglob("mixprec.jsonl")] == [metrics[0].parent]


# Two Trainers


@pytest.mark.parametrize(("one", "other"), [("fp16", "bf16"), ("bf16", "fp16")])
def test_two_trainers_in_turn_train_as_if_alone(one, other):
    def runs():
        return [(seeded(plain_task), trainer(ours(mixed(f)), callbacks=watchers())) for f in (one, other)]

    def go_on(run, epochs):
        run[1].fit_loop.max_epochs = epochs
        run[1].fit(run[0], Batches(6))

    alone, in_turn = runs(), runs()
    for run in alone:
        go_on(run, 1)
        go_on(run, 2)
    for epochs in (1, 2):
        for run in in_turn:
            go_on(run, epochs)
    for (expected, _), (model, _) in zip(alone, in_turn, strict=True):
        assert len(model.losses) == 8
        assert same(model.losses, expected.losses)


@pytest.mark.parametrize(("outer", "inner"), [("fp16", "bf16"), ("bf16", "fp16")])
def test_a_fit_inside_a_fit_disturbs_neither(outer, inner):
    def fit_inside(run, model):
        inside = seeded(plain_task)
        fit(inside, ours(mixed(inner)), callbacks=watchers(), default_root_dir="inside")
        return inside

    nested = Call("on_train_batch_end", fit_inside, at=1)
    run = watched(seeded(plain_task), mixed(outer), callbacks=[nested])
    alone = [seeded(plain_task) for _ in range(2)]
    for model, format in zip(alone, (outer, inner), strict=True):
        fit(model, ours(mixed(format)))
    assert same([run.model.losses, nested.results[0].losses], [model.losses for model in alone])


# Tuning before a fit


class Tuned(Task):
    def __init__(self):
        super().__init__(around(nn.Tanh()))
        self.lr, self.batch_size = 0.05, 2

    def train_dataloader(self):
        x, y = (torch.cat(parts) for parts in zip(*pairs() * 4, strict=True))
        return DataLoader(TensorDataset(x, y), self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def after(model, format):
    """The losses of an epoch of an untouched model with what was found for another one."""
    fresh = seeded(Tuned)
    fresh.lr, fresh.batch_size = model.lr, model.batch_size
    trainer(ours(mixed(format))).fit(fresh)
    return fresh.losses


@pytest.mark.parametrize(
    ("tune", "options", "format"),
    [
        ("lr_find", {"num_training": 14, "min_lr": 1e-3, "max_lr": 0.1}, "fp16"),
        slow("scale_batch_size", {"steps_per_trial": 2, "max_trials": 2}, "bf16"),
    ],
)
def test_the_tuner_finds_and_leaves_the_run_as_if_it_had_not_looked(tune, options, format):
    model = seeded(Tuned)
    run = trainer(ours(mixed(format)), callbacks=watchers())
    getattr(Tuner(run), tune)(model, **options)
    assert (model.lr, model.batch_size) != (0.05, 2)
    assert run.precision_plugin.history == []
    model.losses.clear()
    run.fit(model)
    assert same(model.losses, after(model, format))


@pytest.mark.parametrize(
    ("finder", "format"),
    [
        (lambda: LearningRateFinder(min_lr=1e-3, max_lr=0.1, num_training_steps=14), "bf16"),
        slow(lambda: BatchSizeFinder(steps_per_trial=2, max_trials=2), "fp16"),
    ],
    ids=["learning rate", "batch size"],
)
def test_finders_among_the_callbacks(finder, format):
    model = seeded(Tuned)
    run = trainer(ours(mixed(format)), callbacks=[*watchers(), finder()])
    run.fit(model)
    assert (model.lr, model.batch_size) != (0.05, 2)
    expected = after(model, format)
    assert same(model.losses[-len(expected) :], expected)


# Callbacks of Lightning's


@every_format
def test_pruning_that_goes_on_from_epoch_to_epoch(format):
    def callbacks():
        return [ModelPruning("l1_unstructured", amount=0.4)]

    run = check_healthy(plain_task, mixed(format), callbacks=callbacks, max_epochs=2)
    weights = torch.cat([param.detach().flatten() for param in run.model.parameters()])
    assert not prune.is_pruned(run.model)
    assert (weights == 0).float().mean() == pytest.approx(1 - 0.6 * 0.6, abs=0.02)
    assert set(run.model.state_dict()) == set(plain_task().state_dict())


class Transferred(Task):
    def __init__(self):
        super().__init__(around(nn.BatchNorm1d(8)))
        self.backbone = self.net[:2]

    def configure_optimizers(self):
        return torch.optim.SGD([param for param in self.parameters() if param.requires_grad], lr=0.05, momentum=0.9)


@every_format
def test_a_backbone_that_thaws(format):
    def callbacks():
        return [BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False, backbone_initial_ratio_lr=0.5)]

    run = check_healthy(Transferred, mixed(format), callbacks=callbacks, max_epochs=3)
    assert len(run.trainer.optimizers[0].param_groups) == 2
    assert not torch.equal(run.model.net[0].weight, seeded(Transferred).net[0].weight)


class Validated(Evaluable):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_loss", self.eval_losses[-1])


@every_format
def test_early_stopping_stops_where_fp32_stops(format):
    def stopped(plugin, callbacks):
        model = seeded(lambda: Validated(around(nn.Tanh()), MOMENTUM))
        early = EarlyStopping("val_loss", min_delta=0.05, patience=1)
        run = trainer(plugin, callbacks=[*callbacks, early], max_epochs=30)
        run.fit(model, Batches(6), Batches(6, count=2))
        return early.stopped_epoch

    wide = stopped(None, [])
    assert 1 < wide < 29
    assert stopped(ours(mixed(format)), watchers()) == wide


@every_format
def test_early_stopping_does_not_take_a_skipped_step_for_a_loss(format):
    early = EarlyStopping("loss", patience=9, check_finite=True)

    class Logging(Task):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    callbacks = [*overflowing(), early]
    run = watched(seeded(lambda: Logging(around(nn.Tanh()))), mixed(format), callbacks=callbacks, max_epochs=3)
    assert run.plugin.skipped_steps == 1
    assert early.stopped_epoch == 0
    assert run.trainer.current_epoch == 3


PEAK = {torch.float64: 1, torch.float32: 10, torch.float16: 100, torch.bfloat16: 200}
"""Available flops by dtype of a device that does not exist."""


@pytest.mark.parametrize(
    ("policy", "eval_policy", "training", "validation"),
    [
        (mixed("fp16"), None, torch.float16, torch.float16),
        (mixed("bf16"), None, torch.bfloat16, torch.bfloat16),
        ("fp64", None, torch.float64, torch.float64),
        ("auto", None, get_format(auto_format()).dtype, get_format(auto_format()).dtype),
        (mixed("fp16"), "fp64", torch.float16, torch.float64),
    ],
    ids=str,
)
def test_throughput_is_measured_against_the_peak_of_the_default_format(
    policy, eval_policy, training, validation, monkeypatch
):
    for module in (throughput, throughput_monitor):
        monkeypatch.setattr(module, "get_available_flops", lambda device, dtype: PEAK[dtype])
    monitor, memory = ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=2), Memory()
    model = seeded(lambda: Evaluable(around(nn.Tanh())))
    model.flops_per_batch = 1000
    run = trainer(ours(policy, eval_policy=eval_policy), callbacks=[monitor], logger=memory, log_every_n_steps=1)
    run.fit(model, Batches(6), Batches(6))
    rows = [row for _, row in memory.rows]
    for stage, dtype in (("train", training), ("validate", validation)):
        rates = [
            (row[f"{stage}/device/flops_per_sec"], row[f"{stage}/device/mfu"])
            for row in rows
            if f"{stage}/device/mfu" in row
        ]
        assert rates
        assert all(mfu == pytest.approx(flops / PEAK[dtype]) for flops, mfu in rates)
    assert monitor.available_flops == PEAK[training]
