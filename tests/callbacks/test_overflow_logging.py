"""What the monitor logs, prints, draws, and keeps across a resume."""

import contextlib
import csv
import gc
import math
import os
import weakref

import pytest
import torch
from known_results import INF, Batches, Line, Saving, stock, trainer_of
from lightnings import CSVLogger, EarlyStopping, ModelCheckpoint, pl
from monitor_models import Memory, Watched, batches, mlp, watch
from plugin_models import one_line

from lightning_mixprec import MixPrecError, OverflowMonitor, PerLayerPrecision

KEYS = {"mixprec/loss_scale", "mixprec/overflow_rate", "mixprec/skipped_steps"}
VALUES = [0.5, INF, 0.25, INF, 0.5, 0.25]


class Validated(Line):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch).float().mean())


def test_every_logger_gets_exactly_the_three_keys_each_time_lightning_logs():
    loggers = [Memory(), Memory()]
    watch(Line(), values=VALUES, logger=loggers, log_every_n_steps=2, max_epochs=2)
    for logger in loggers:
        mine = [(step, row) for step, row in logger.rows if any(key.startswith("mixprec/") for key in row)]
        assert {frozenset(row) for _, row in mine} == {frozenset(KEYS)}
        theirs = [(step, row) for step, row in logger.rows if "loss" in row]
        assert [step for step, _ in mine] == [step for step, _ in theirs]
        assert len(mine) == 6


def test_what_is_logged_is_what_has_happened_so_far():
    logger = Memory()
    watch(Line(), values=VALUES, logger=logger, log_every_n_steps=1)
    rows = [row for _, row in logger.rows if "mixprec/skipped_steps" in row]
    assert [row["mixprec/skipped_steps"] for row in rows] == [0, 1, 1, 2, 2, 2]
    assert [row["mixprec/overflow_rate"] for row in rows] == [0, 1 / 2, 1 / 3, 2 / 4, 2 / 5, 2 / 6]
    scales = [row["mixprec/loss_scale"] for row in rows]
    assert scales == [65536, 65536, 32768, 32768, 16384, 16384]


def test_the_rate_looks_back_on_a_window():
    seen = watch(Line(), values=VALUES, monitor=OverflowMonitor(window=3))
    assert seen.trainer.callback_metrics["mixprec/overflow_rate"] == pytest.approx(1 / 3)


def test_the_columns_of_a_csv_file_are_the_same_from_the_first_row_on(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version=0)
    watch(Line(), values=VALUES, logger=logger, log_every_n_steps=1, max_epochs=2)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= KEYS
    assert sum(row["mixprec/skipped_steps"] != "" for row in rows) == 12
    skipped = [float(row["mixprec/skipped_steps"]) for row in rows if row["mixprec/skipped_steps"]]
    assert skipped == sorted(skipped)
    assert skipped[-1] == 4


@pytest.mark.parametrize("key", ["mixprec/overflow_rate", "mixprec/skipped_steps"])
def test_early_stopping_can_watch(key):
    stopping = EarlyStopping(key, check_on_train_epoch_end=True, patience=1, mode="min", check_finite=False)
    seen = watch(Line(), values=[0.5, INF], max_epochs=9, callbacks=[stopping])
    assert stopping.stopped_epoch > 0
    assert seen.trainer.current_epoch < 9


def test_a_checkpoint_can_be_kept_for_the_least_overflow_rate(tmp_path):
    keeping = ModelCheckpoint(
        tmp_path, monitor="mixprec/overflow_rate", mode="min", save_on_train_epoch_end=True, filename="{epoch}"
    )
    seen = watch(Line(), values=[0.5, INF], max_epochs=2, callbacks=[keeping], enable_checkpointing=True)
    assert keeping.best_model_score == 0.5
    assert seen.trainer.callback_metrics["mixprec/skipped_steps"] == 2


def test_early_stopping_can_watch_on_validation(tmp_path):
    stopping = EarlyStopping("mixprec/skipped_steps", patience=0, mode="min", stopping_threshold=-1.0)
    monitor = OverflowMonitor()
    trainer = trainer_of(PerLayerPrecision("fp16"), callbacks=[monitor, stopping], max_epochs=5)
    trainer.fit(Validated(), Batches([0.5, 0.25]), Batches([0.5]))
    assert stopping.best_score == 0


def summary_of(capsys):
    lines = capsys.readouterr().out.splitlines()
    starts = [place for place, line in enumerate(lines) if line.startswith("OverflowMonitor: ")]
    return lines[starts[0] :] if starts else []


def test_the_summary_is_one_line_where_nobody_is_accused(capsys):
    watch(Watched(mlp(None), weight=1.0), values=batches(6))
    (line,) = summary_of(capsys)
    assert line == "OverflowMonitor: 3 of 6 optimizer steps skipped (scale 3), loss scale 8192 at the end"


def test_the_summary_names_the_accused(capsys):
    watch(Watched(mlp("forward")), values=[*batches(1), torch.full((4, 8), INF)])
    title, names, *rows = summary_of(capsys)
    assert title == (
        "OverflowMonitor: 2 of 2 optimizer steps skipped (data 1, precision 1), loss scale 32768 at the end"
    )
    assert names.split() == ["layer", "step", "verdict", "direction", "operation", "format", "value", "fits"]
    assert [row.split()[:6] for row in rows] == [
        ["net.2.spike", "0", "precision", "forward", "mul", "fp16"],
        ["-", "0", "data", "-", "-", "-"],
    ]
    assert len({len(line) for line in (names, *rows)}) == 1


@pytest.mark.parametrize("mode", ["fast_dev_run", "barebones"])
def test_modes_that_are_to_be_quiet_are_quiet_and_leave_no_file(mode, capsys):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    options = {"fast_dev_run": 2, **quiet} if mode == "fast_dev_run" else {"barebones": True}
    monitor = OverflowMonitor()
    trainer = pl.Trainer(
        plugins=[PerLayerPrecision("fp16")], accelerator="cpu", callbacks=[monitor], max_epochs=1, **options
    )
    with pytest.warns(UserWarning, match="the batch itself is not finite"):
        trainer.fit(Quiet(), Batches([0.5, INF]))
    assert summary_of(capsys) == []
    assert monitor.skipped_steps == 1
    assert not [name for _, _, names in os.walk(".") for name in names]


class Quiet(Line):
    def training_step(self, batch, batch_idx):
        return self.layer(batch).float().mean()


def off_default():
    monitor = OverflowMonitor(window=5)
    where = {"step": 3, "layer": "net", "direction": "forward", "op": "addmm", "format": "fp16"}
    monitor.events = [{**where, "verdict": "precision", "value": 1e9, "fits": "bf16"}]
    monitor.skipped_steps, monitor.reasons = 7, {"scale": 6, "precision": 1}
    monitor._recent, monitor._steps, monitor._last_step, monitor._diagnoses = [1, 0, 1], 12, 4, 5
    monitor._scales, monitor._warned = [[0.0, 65536.0], [1.0, 32768.0]], ["key"]
    monitor._values = dict.fromkeys(monitor._values, 0.25)
    return monitor


def plain_attributes(monitor):
    """What a monitor holds besides its options and the run it is in."""
    options = {"save_batch", "window", "max_diagnoses"}
    return {name: value for name, value in vars(monitor).items() if name not in options and name[1:] not in _OF_A_RUN}


_OF_A_RUN = {"formats", "journal", "trainer", "evaluation"}


def test_a_state_goes_through_a_file_and_back_with_every_field_off_its_default(tmp_path):
    state = off_default().state_dict()
    fresh = OverflowMonitor(window=5)
    assert state.keys() == fresh.state_dict().keys()
    assert all(state[name] != value for name, value in fresh.state_dict().items() if name != "version")
    torch.save(state, tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert fresh.state_dict() == state
    assert plain_attributes(fresh) == plain_attributes(off_default())
    fresh.events[0]["step"] = 99
    assert state["events"][0]["step"] == 3


def test_a_state_of_another_version_is_refused_in_one_line():
    with pytest.raises(MixPrecError) as caught:
        OverflowMonitor().load_state_dict({**off_default().state_dict(), "version": 2})
    assert "version 2" in one_line(caught)


@pytest.mark.parametrize("make_plugin", [lambda: PerLayerPrecision("fp16"), stock], ids=["ours", "stock"])
# Lightning takes a global_step that is no multiple of the batches for a checkpoint from within an epoch.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_counts_on_as_one_that_was_not_interrupted(make_plugin, tmp_path):
    def run(epochs, ckpt_path=None, callbacks=()):
        monitor = OverflowMonitor(window=10)
        trainer = trainer_of(make_plugin(), callbacks=[monitor, *callbacks], max_epochs=epochs)
        torch.manual_seed(0)
        trainer.fit(Line(), Batches([INF, 0.5, 0.25, 0.5]), ckpt_path=ckpt_path)
        return monitor, trainer

    with pytest.warns(UserWarning, match="the batch itself is not finite"):
        whole, trainer = run(3)
        run(1, callbacks=[Saving(tmp_path / "one.ckpt")])
    resumed, again = run(3, tmp_path / "one.ckpt")
    assert resumed.state_dict() == whole.state_dict()
    mine = {key: value for key, value in again.callback_metrics.items() if key in KEYS}
    assert mine == {key: value for key, value in trainer.callback_metrics.items() if key in KEYS}
    assert mine["mixprec/overflow_rate"] == pytest.approx(2 / 10)
    assert len(resumed.events) == 3


def test_rows_are_in_the_file_when_a_run_ends_in_an_exception(tmp_path):
    class Stops(Line):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("enough")
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path, name="run", version=0)
    with pytest.raises(RuntimeError, match="enough"):
        watch(Stops(), values=[0.5, INF, 0.25], logger=logger)
    with open(f"{logger.log_dir}/mixprec.jsonl") as file:
        assert len(file.readlines()) == 1


def test_no_batch_is_kept_when_a_run_ends_in_an_exception():
    batches = []

    class Stops(Line):
        def training_step(self, batch, batch_idx):
            batches.append(weakref.ref(batch))
            if batch_idx == 1:
                raise RuntimeError("enough")
            return super().training_step(batch, batch_idx)

    trainer = trainer_of(PerLayerPrecision("fp16"), callbacks=[OverflowMonitor()], accumulate_grad_batches=3)
    with contextlib.suppress(RuntimeError):
        trainer.fit(Stops(), torch.utils.data.DataLoader(torch.ones(6, 2)))
    gc.collect()
    assert batches[0]() is None  # the latest one Lightning keeps itself


def test_the_next_run_of_the_same_trainer_starts_with_a_clean_slate():
    monitor = OverflowMonitor()
    trainer = trainer_of(PerLayerPrecision("fp16"), callbacks=[monitor])
    with pytest.warns(UserWarning, match="not finite"):
        trainer.fit(Line(), Batches([0.5, INF]))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Line(), Batches([0.5, 0.25]))
    assert monitor.skipped_steps == 1
    trainer.validate(Validated(), Batches([0.5]), verbose=False)


def test_the_loss_scale_and_the_failed_steps_are_drawn():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seen = watch(Watched(mlp(None), weight=1.0), values=[*batches(5), torch.full((4, 8), math.nan), *batches(4)])
    figure, ax = seen.monitor.plot()
    figure.savefig("overflow.png")
    line = ax.lines[0]
    assert list(line.get_ydata())[:4] == [65536, 32768, 16384, 8192]
    assert list(line.get_ydata())[-1] == 4096
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["scale", "data"]
    (marks,) = [each for each in ax.lines if each.get_label() == "data"]
    data = [event["step"] for event in seen.events if event["verdict"] == "data"]
    assert list(marks.get_xdata()) == data
    plt.close(figure)
