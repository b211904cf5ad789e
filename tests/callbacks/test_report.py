"""What PrecisionReport leaves: the run as other callbacks and other ways of counting have seen it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightnings import pl
from plugin_models import Batches, Call, Task, TwoOptimizers, fit, ours, same, stock, task, trainer
from processes import python_path
from selection import slow
from torch import nn

from lightning_mixprec import MixPrecError, OverflowMonitor, PerLayerPrecision, PrecisionReport, UnderflowMonitor
from lightning_mixprec.report.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:.*vanish in", "ignore:.*overflows in fp16", "ignore:.*not finite")


def watched(tmp_path: Path, model=None, plugin=None, report=None, callbacks=(), **options) -> dict:
    """Train with a report; return the run in its JSON file."""
    model = task() if model is None else model
    report = report or PrecisionReport(every_n_steps=2)
    fit(model, plugin, callbacks=[report, *callbacks], default_root_dir=tmp_path, **options)
    return run_in(tmp_path)


def run_in(folder: Path, name: str = "precision_report") -> dict:
    assert (folder / f"{name}.html").read_text().startswith("<!DOCTYPE html>")
    (run,) = json.loads((folder / f"{name}.json").read_text())["runs"]
    return run


def close(found, expected):
    return found == pytest.approx([float(each) for each in expected], rel=1e-3)


@pytest.mark.parametrize(
    "plugin", [lambda: ours("fp16"), slow(lambda: stock("bf16")), slow(lambda: None)], ids=["ours", "stock", "no"]
)
def test_the_curve_is_the_loss_that_the_model_saw(tmp_path, plugin):
    model = task()
    run = watched(tmp_path, model, plugin(), max_epochs=30)  # 120 batches: three chunks
    losses = model.losses
    assert len(run["curve"]["loss"]) == 120
    assert run["span"] == [0, 120]
    assert close(run["curve"]["loss"], losses[-120:])
    assert run["status"] == {"state": "finished", "message": ""}


def test_training_is_the_same_to_the_last_bit(tmp_path):
    without, with_report = task(), task()
    fit(without, ours("fp16"), max_epochs=3)
    watched(tmp_path, with_report, ours("fp16"), max_epochs=3)
    assert same(without.state_dict(), with_report.state_dict())


class Spiking(Task):
    """Its third batch overflows fp16."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * 1e6 if batch_idx == 2 and self.trainer.current_epoch == 0 else loss


@pytest.mark.parametrize("plugin", [lambda: ours("fp16"), lambda: stock("fp16")], ids=["ours", "stock"])
def test_skipped_steps_and_the_loss_scale_are_the_scaler_s(tmp_path, plugin):
    plugin, scales = plugin(), []
    note = pl.Callback()
    note.on_train_batch_start = lambda run, model, *_: scales.append(plugin.scaler.get_scale())
    run = watched(tmp_path, task(Spiking), plugin, callbacks=[note], max_epochs=3)
    scaled = [scale for scale in run["curve"]["scale"] if scale is not None]
    assert min(scaled) == min(scales) == 512.0
    assert sum(run["curve"]["skipped"]) == 1
    assert run["curve"]["skipped"][2] == 1


def test_a_batch_of_nan_is_told_from_a_loss_that_is_not_known(tmp_path):
    batches = Batches(6)
    batches.batches[1] = (batches.batches[1][0] * math.nan, batches.batches[1][1])
    run = watched(tmp_path, task(), ours("bf16"), callbacks=[OverflowMonitor()], batches=batches)
    levels = {alert["title"]: alert["level"] for alert in run["alerts"]}
    assert levels["A batch is not finite itself"] == "error"
    assert levels["The loss was not finite"] == "note"  # its step was skipped
    assert sum(run["curve"]["skipped"]) == 1


def test_under_accumulation_the_loss_is_that_of_training_step(tmp_path):
    model = task()
    run = watched(tmp_path, model, ours("bf16"), accumulate_grad_batches=2, max_epochs=2)
    pairs = torch.stack(model.losses[-8:]).view(-1, 2)
    assert close(run["curve"]["loss"], pairs.mean(1))
    assert close(run["curve"]["loss_max"], pairs.amax(1))


class AtOnePlace(TwoOptimizers):
    """Returns its losses in the same memory at every step, as a graph of CUDA does."""

    def __init__(self, *args):
        super().__init__(*args)
        self.place, self.seen = torch.zeros(()), []

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        if "log" not in vars(self):  # not a replay's
            self.place.fill_(0.5 + self.global_step)
            self.seen.append(self.place.item())
        return {"loss": self.place}


def test_losses_of_manual_optimization_are_kept_even_if_the_next_is_written_to_the_same_place(tmp_path):
    model = task(AtOnePlace)
    run = watched(tmp_path, model, ours("bf16"))
    assert len(set(model.seen)) == len(model.seen) > 2
    assert run["curve"]["loss"] == model.seen


def test_manual_optimization_without_a_returned_loss(tmp_path):
    run = watched(tmp_path, task(TwoOptimizers), ours("bf16"))
    assert run["curve"]["loss"] == [None] * len(run["curve"]["loss"])
    assert all(fact["label"] != "loss" for fact in run["facts"])
    assert any(alert["title"] == "Overflows were not watched" for alert in run["alerts"])


def test_a_move_is_in_the_band_the_history_and_the_assignment(tmp_path):
    move = Call(
        "on_train_batch_end", lambda run, model: run.precision_plugin.edit_policy({"net.4": "bf16"}, reason="why"), 2
    )
    run = watched(tmp_path, task(), ours({"default": "fp16", "net.0": "fp32"}), callbacks=[move], max_epochs=2)
    assert [(move["step"], move["from"], move["to"], move["layers"]) for move in run["moves"]] == [
        (3, "fp16", "bf16", ["net.4"])
    ]
    bands = {row["label"]: row["spans"] for row in run["rows"]}
    assert bands["net.4"] == [[0, 3, "fp16"], [3, 8, "bf16"]]
    assert bands["net.0"] == [[0, 8, "fp32"]]
    table = {row["layer"]: row for row in run["assignment"]}
    assert (table["net.4"]["compute"], table["net.4"]["rule"]) == ("bf16", "net.4")
    assert (table["net.0"]["compute"], table["net.0"]["type"], table["net.0"]["parameters"]) == ("fp32", "Linear", 56)


def test_arithmetic_is_that_of_the_matrix_products(tmp_path):
    run = watched(tmp_path, task(), ours({"default": "fp16", "net.0": "fp32"}))
    products = {"net.0": 6 * 8, "net.4": 8 * 8, "net.6": 8 * 2}
    total = sum(products.values())
    shares = {row["layer"]: row["flops"] for row in run["assignment"] if row["flops"]}
    assert shares == {name: pytest.approx(count / total, abs=1e-6) for name, count in products.items()}
    low = {row["format"]: row["share"] for row in run["arithmetic"]}
    assert low == {"fp16": pytest.approx(80 / total, abs=1e-6), "fp32": pytest.approx(48 / total, abs=1e-6)}


def test_histograms_count_gradients_in_fp32(tmp_path):
    model, batches = task(), Batches(6, count=1)
    x, y = batches.batches[0]
    nn.functional.mse_loss(model.net(x), y).backward()
    gradient = torch.cat([param.grad.flatten() for param in model.net[6].parameters()])
    model.zero_grad()
    run = watched(tmp_path, model, ours("fp16"), PrecisionReport(histograms="net.6"), batches=batches)
    (told,) = run["histograms"]
    exponents = torch.frexp(gradient[gradient != 0])[1] - 1
    lowest = int(exponents.min())
    assert told["layer"] == "net.6"
    assert told["loss_scale"] == 1024.0
    assert told["gradient"] == {
        "lowest": lowest,
        "counts": torch.bincount(exponents - lowest).tolist(),
        "zeros": int((gradient == 0).sum()),
    }


def test_it_says_what_underflow_monitor_says(tmp_path):
    monitor = UnderflowMonitor(every_n_steps=2)
    run = watched(tmp_path, task(), ours("fp16"), callbacks=[monitor])
    for row in run["rows"]:
        if row["label"] in monitor.latest:
            latest = monitor.latest[row["label"]]
            assert row["underflow_rate"][-1] == pytest.approx(latest["underflow_rate"], rel=1e-3)
            known = [bits for bits in (latest["headroom_bits"], latest["output_headroom_bits"]) if bits is not None]
            assert row["headroom_bits"][-1] == pytest.approx(min(known), rel=1e-3)


def test_an_exception_is_in_the_report_and_goes_on_its_way(tmp_path):
    def fail(run, model):
        raise RuntimeError("the disk of layer <b>\nis gone")

    failing = pl.Callback()
    failing.on_train_batch_end = lambda run, model, *_: fail(run, model) if run.global_step == 3 else None
    with pytest.raises(RuntimeError, match="is gone"):
        watched(tmp_path, task(), ours("bf16"), callbacks=[failing])
    run = run_in(tmp_path)
    assert run["status"] == {"state": "failed", "message": "RuntimeError: the disk of layer <b>"}
    assert run["alerts"][0]["title"] == "The run ended by an exception"
    assert "layer <b>" not in (tmp_path / "precision_report.html").read_text()


def test_a_killed_run_s_report_is_made_from_its_rows(tmp_path, capsys):
    watched(tmp_path, task(), ours("bf16"), max_epochs=20)
    rows = (tmp_path / "mixprec.jsonl").read_text().splitlines()
    cut = [row for row in rows if '"end"' not in row][:-1]
    (tmp_path / "mixprec.jsonl").write_text("\n".join(cut) + '\n{"monitor": "report", "st')
    for name in ("precision_report.html", "precision_report.json"):
        (tmp_path / name).unlink()
    assert main([str(tmp_path)]) == 0
    assert str(tmp_path / "precision_report.html") in capsys.readouterr().out
    run = run_in(tmp_path)
    assert run["status"]["state"] == "unfinished"
    assert any(alert["title"] == "The run has no end" for alert in run["alerts"])
    assert run["curve"]["loss"][0] is not None


def test_two_runs_in_one_file(tmp_path):
    watched(tmp_path / "a", task(), ours("bf16"))
    watched(tmp_path / "b", task(), ours("fp16"))
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "both.html")]) == 0
    runs = json.loads((tmp_path / "both.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no mixprec.jsonl in 'nowhere'; give the log directory of a run"),
        (["."], "give one run's folder, such as 'run'"),
    ],
)
def test_a_folder_without_a_run_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mixprec.jsonl").write_text("")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_three_runs_and_other_suffixes_are_refused(tmp_path, capsys):
    for arguments in (["a", "b", "c"], ["a", "--output", "a.txt"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2


def test_a_report_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "precision_report.html").mkdir()
    model = task()
    with pytest.warns(UserWarning, match=r"PrecisionReport could not write precision_report.html"):
        fit(model, ours("bf16"), callbacks=[PrecisionReport()], default_root_dir=tmp_path)
    assert len(model.losses) >= 4


def test_a_trial_run_leaves_nothing(tmp_path):
    fit(task(), ours("bf16"), callbacks=[PrecisionReport()], default_root_dir=tmp_path, fast_dev_run=True)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filename": "a/b.html"}, r"filename=...\) is 'a/b.html'; it has to be a file's name that ends in .html"),
        ({"filename": "report.pdf"}, "ends in .html"),
        ({"histograms": 3}, r"histograms=...\) is 3; it has to be a pattern of layers or a list"),
        ({"histograms": ["a", 1]}, "pattern of layers or a list"),
        ({"every_n_steps": 0}, "has to be a positive integer"),
    ],
)
def test_a_malformed_argument_is_one_line(arguments, message):
    with pytest.raises(MixPrecError, match=message) as raised:
        PrecisionReport(**arguments)
    assert "\n" not in str(raised.value)


def test_a_pattern_that_matches_nothing_is_refused_before_training(tmp_path):
    model = task()
    with pytest.raises(MixPrecError, match=r"PrecisionReport\(histograms=...\): .*net\.44.*did you mean.*net\.4"):
        fit(model, ours("bf16"), callbacks=[PrecisionReport(histograms="net.44")], default_root_dir=tmp_path)
    assert model.losses == []


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path):
    plugin = PerLayerPrecision("bf16")
    saving = Call("on_train_epoch_end", lambda run, model: run.save_checkpoint(tmp_path / "run.ckpt"))
    watched(tmp_path, task(), plugin, callbacks=[saving], max_epochs=2)
    model, report = task(), PrecisionReport(every_n_steps=2)
    again = trainer(PerLayerPrecision("bf16"), callbacks=[report], default_root_dir=tmp_path, max_epochs=3)
    again.fit(model, Batches(6), ckpt_path=tmp_path / "run.ckpt", weights_only=False)
    run = run_in(tmp_path)
    assert run["span"] == [0, 12]
    assert close(run["curve"]["loss"][8:], model.losses[-4:])


def test_a_healthy_watched_run_has_no_alerts(tmp_path):
    run = watched(tmp_path, task(), ours("bf16"), callbacks=[OverflowMonitor(), UnderflowMonitor(2)])
    assert run["alerts"] == []
    assert run["watched"] == ["PrecisionReport", "OverflowMonitor", "UnderflowMonitor"]


@pytest.mark.slow
def test_a_process_that_dies_leaves_its_curve(tmp_path):
    dying = (
        "import os, lightning.pytorch as pl\n"
        "from plugin_models import Call, fit, ours, task\n"
        "from lightning_mixprec import PrecisionReport\n"
        "die = Call('on_train_batch_end', lambda run, model: os._exit(9), at=170)\n"
        "watching = [PrecisionReport(), die]\n"
        f"fit(task(), ours('bf16'), callbacks=watching, default_root_dir={str(tmp_path)!r}, max_epochs=99)"
    )
    environment = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run([sys.executable, "-c", dying], env=environment, capture_output=True)
    assert done.returncode == 9
    assert main([str(tmp_path)]) == 0
    run = run_in(tmp_path)
    assert run["status"]["state"] == "unfinished"
    assert run["span"][1] >= 100
    assert None not in run["curve"]["loss"]


def test_several_optimizers_are_counted_as_lightning_does(tmp_path):
    run = watched(tmp_path, task(TwoOptimizers), ours("bf16"))
    assert run["facts"][0]["value"] == "8"
    assert run["span"] == [0, 8]


@pytest.mark.filterwarnings("ignore:PrecisionReport could not sample step 0")
def test_lazy_layers_and_layers_that_come_during_the_run(tmp_path):
    lazy = Task(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)))
    table = {row["layer"]: row for row in watched(tmp_path / "lazy", lazy, stock("bf16"))["assignment"]}
    assert table["net.0"]["parameters"] is None

    def grow(run, model):
        model.net.extra = nn.Identity()
        run.precision_plugin.edit_policy({"net.4": "fp32"})

    growing = Call("on_train_batch_end", grow, 1)
    run = watched(tmp_path / "growing", task(), ours("bf16"), PrecisionReport(every_n_steps=1), callbacks=[growing])
    assert run["status"]["state"] == "finished"


def test_the_first_batch_of_every_fit_is_sampled(tmp_path):
    report = PrecisionReport()
    for name in ("a", "b"):
        run = watched(tmp_path / name, task(), ours("bf16"), report)
        assert run["histograms"]
        assert run["arithmetic"]


def test_no_histograms_if_none_are_wanted(tmp_path):
    assert watched(tmp_path, task(), ours("bf16"), PrecisionReport(histograms=[]))["histograms"] == []


def test_an_interrupted_run_was_stopped(tmp_path):
    def interrupt(run, model):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        watched(tmp_path, task(), ours("bf16"), callbacks=[Call("on_train_batch_end", interrupt, 1)])
    run = run_in(tmp_path)
    assert run["status"] == {"state": "stopped", "message": "KeyboardInterrupt"}
    assert [alert["level"] for alert in run["alerts"]] == ["note", "note"]


def test_no_folder_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = pl.loggers.logger.DummyLogger()
    with pytest.warns(UserWarning, match="PrecisionReport has no folder to write to"):
        fit(task(), ours("bf16"), callbacks=[PrecisionReport()], logger=logger)
    assert [*tmp_path.iterdir()] == []


def test_a_run_that_fails_in_its_first_step_is_told_to_have_failed(tmp_path):
    """Its step is none, and leaves Lightning's count below zero."""

    class Hopeless(Task):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * math.inf

    plugin = PerLayerPrecision("fp16", loss_scaling={"init_scale": 1.0, "min_scale": 1.0})
    with pytest.raises(MixPrecError, match="loss scale is at its minimum"):
        watched(tmp_path, task(Hopeless), plugin)
    run = run_in(tmp_path)
    assert run["status"]["state"] == "failed"
    assert "The run ended by an exception" in {alert["title"] for alert in run["alerts"]}
