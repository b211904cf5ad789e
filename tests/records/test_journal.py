"""Where monitors write and log: the file of rows, loggers, ``callback_metrics``, checkpoints, the command line."""

import json
import math
import os
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import Precision
from plugin_models import Batches, Call, Task, fit, mlp, ours, trainer

from lightning_mixprec import FidelityMonitor, MixPrecError, OverflowMonitor, UnderflowMonitor
from lightning_mixprec.errors import SupportError
from lightning_mixprec.records.journal import FILE_NAME, Journal

MONITORS = [OverflowMonitor, UnderflowMonitor, FidelityMonitor]
KEYS = {"loss_scale", "overflow_rate", "skipped_steps", "underflow_rate", "loss_gap", "min_grad_cosine"}


def watching():
    return [OverflowMonitor(), UnderflowMonitor(2), FidelityMonitor(2)]


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def rows(path=FILE_NAME):
    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_text().splitlines()]


# The file


def test_every_line_is_an_object_of_strict_json_that_says_who_wrote_it_and_when():
    fit(Task(mlp()), ours("fp16"), callbacks=watching())
    assert {row["monitor"] for row in rows()} == {"underflow", "fidelity"}
    assert all({"monitor", "step", "epoch", "batch_idx"} <= row.keys() for row in rows())
    assert len({row["run_id"] for row in rows()}) == 1
    layers = {row.get("layer") for row in rows()}
    assert {"net.0", "net.6", None} <= layers


def test_rows_are_in_the_file_when_the_sampled_batch_ends():
    seen = []
    look = Call("on_train_batch_end", lambda run, model: seen.append(len(rows())))
    fit(Task(mlp()), ours("fp16"), callbacks=[UnderflowMonitor(2), look])
    assert seen[0] > 0
    assert seen[0] < seen[2]


def test_rows_have_what_the_monitors_document():
    underflow, fidelity = UnderflowMonitor(1), FidelityMonitor(1)
    fit(Task(mlp()), ours("fp16"), callbacks=[underflow, fidelity], max_steps=1)
    place = {"monitor", "step", "epoch", "batch_idx", "run_id"}
    kinds = {frozenset(row.keys() - place) for row in rows()}
    losses = {"underflow_rate", "subnormal_share", "headroom_bits"}
    flow = {f"flow_{key}" for key in losses}
    measured = {"layer", "loss_scale", "format", "output_headroom_bits", "what_if", *losses, *flow}
    assert kinds == {
        frozenset(measured),
        frozenset({"layer", "stagnation_rate"}),
        frozenset({"loss_gap", "loss_scale", "too_large"}),
        frozenset({"layer", "grad_cosine", "sqnr_db"}),
    }
    documented = measured - {"layer", "loss_scale"} | {"stagnation_rate"}
    assert all(values.keys() == documented for values in underflow.latest.values() if "format" in values)


def test_numbers_that_are_not_finite_are_null():
    journal = Journal(".")
    journal.write(a=math.inf, b=[math.nan, 1.5], c={"d": -math.inf}, e=torch.float16, f=(1, True, None, "x"))
    journal.flush()
    assert rows() == [{"a": None, "b": [None, 1.5], "c": {"d": None}, "e": "torch.float16", "f": [1, True, None, "x"]}]


@pytest.mark.parametrize(("found", "expected"), [('{"a": 1}\n', 2), ('{"a": 1}\n{"a": ', 3), ("", 1)])
def test_rows_are_appended_and_a_line_that_was_cut_short_is_closed(found, expected):
    Path(FILE_NAME).write_text(found)
    journal = Journal(".")
    journal.write(b=2)
    journal.flush()
    lines = Path(FILE_NAME).read_text().splitlines()
    assert len(lines) == expected
    assert json.loads(lines[-1]) == {"b": 2}
    assert "".join(found.splitlines(keepends=True)[:1]) in Path(FILE_NAME).read_text()


@pytest.mark.parametrize("where", ["training_step", "on_train_batch_start"])
def test_what_was_seen_before_a_crash_is_in_the_file(where):
    class Crashing(Task):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1 and "log" not in vars(self):  # not in a replay
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    def fail(*args):
        raise RuntimeError("out of luck")

    callback = pl.Callback()
    if where != "training_step":
        callback.on_train_batch_start = lambda run, model, batch, index: fail() if index == 1 else None
    kind = Crashing if where == "training_step" else Task
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(kind(mlp()), ours("fp16"), callbacks=[UnderflowMonitor(1), callback])
    assert {row["batch_idx"] for row in rows()} == {0}


@pytest.mark.parametrize("failure", ["no directory", "full"])
def test_a_file_that_cannot_be_written_costs_a_warning(failure, monkeypatch, tmp_path):
    folder = tmp_path / "logs"
    if failure == "no directory":
        folder.write_text("a file where a directory should be")
    else:
        folder.mkdir()
        (folder / FILE_NAME).symlink_to("/dev/full")
    with pytest.warns(UserWarning, match=r"mixprec.jsonl cannot be written \(.*\); the run goes on") as caught:
        run = fit(Task(mlp()), ours("fp16"), callbacks=[UnderflowMonitor(1)], default_root_dir=str(folder))
    assert len([each for each in caught if "cannot be written" in str(each.message)]) == 1
    assert run.global_step == 4


def test_a_resumed_run_goes_on_in_the_file():
    run = fit(Task(mlp()), ours("fp16"), callbacks=[UnderflowMonitor(2)])
    run.save_checkpoint("run.ckpt")
    before = rows()
    second = trainer(ours("fp16"), callbacks=[UnderflowMonitor(2)], max_epochs=2)
    second.fit(Task(mlp()), Batches(6), ckpt_path="run.ckpt")
    assert rows()[: len(before)] == before
    assert {row["epoch"] for row in rows()[len(before) :]} == {1}


def test_a_trial_run_writes_nothing():
    fit(Task(mlp()), ours("fp16"), callbacks=watching(), fast_dev_run=True)
    assert not list(Path().rglob(FILE_NAME))


# Loggers and callback_metrics


class Notes(Logger):
    name, version = "notes", 0

    def __init__(self):
        super().__init__()
        self.noted = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.noted.append((step, dict(metrics)))


def test_exactly_the_documented_keys_reach_every_logger_and_callback_metrics():
    loggers = [Notes(), Notes()]
    run = fit(Task(mlp()), ours("fp16"), callbacks=watching(), logger=loggers, log_every_n_steps=1)
    assert set(run.callback_metrics) == {f"mixprec/{key}" for key in KEYS}
    assert all(math.isfinite(value) for value in run.callback_metrics.values())
    for logger in loggers:
        logged = [(step, metrics) for step, metrics in logger.noted if "mixprec/loss_gap" in metrics]
        assert [step for step, _ in logged] == [0, 1, 2, 3]
        assert all(metrics.keys() == {f"mixprec/{key}" for key in KEYS} for _, metrics in logged)


def test_loggers_get_values_when_lightning_logs():
    logger = Notes()
    fit(Task(mlp()), ours("fp16"), callbacks=watching(), logger=logger, log_every_n_steps=2)
    assert [step for step, metrics in logger.noted if "mixprec/loss_gap" in metrics] == [1, 3]


def test_the_file_lies_in_the_loggers_directory():
    logger = CSVLogger("logs")
    fit(Task(mlp()), ours("fp16"), callbacks=watching(), logger=logger, log_every_n_steps=1)
    assert rows(Path(logger.log_dir) / FILE_NAME)
    assert "mixprec/underflow_rate" in (Path(logger.log_dir) / "metrics.csv").read_text()


@pytest.mark.parametrize("key", ["mixprec/loss_gap", "mixprec/min_grad_cosine", "mixprec/underflow_rate"])
def test_a_key_can_be_monitored(key):
    stopping = EarlyStopping(key, patience=100, check_on_train_epoch_end=True)
    saving = ModelCheckpoint("saved", monitor=key, every_n_train_steps=1, save_top_k=1)
    run = fit(
        Task(mlp()), ours("fp16"), callbacks=[*watching(), stopping, saving], enable_checkpointing=True, max_epochs=2
    )
    assert run.current_epoch == 2
    assert math.isfinite(stopping.best_score)
    assert saving.best_model_score == pytest.approx(saving.current_score, abs=1)
    assert os.path.exists(saving.best_model_path)


# Checkpoints


def plain_types(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain_types(item) for key, item in value.items())
    return all(map(plain_types, value)) if type(value) is list else type(value) in (int, float, str, bool, type(None))


EVENT = {"step": 1, "layer": "a", "direction": "backward", "verdict": "model", "op": "mul", "format": "bf16"}
OFF = {
    OverflowMonitor: {"events": [{**EVENT, "value": 1.5, "fits": None}], "scales": [[1.0, 2.0]]},
    UnderflowMonitor: {"latest": {"a": {"stagnation_rate": 0.5}}},
    FidelityMonitor: {
        "latest": {"loss_gap": 1.5, "layers": {"a": {"sqnr_db": 9.0, "grad_cosine": None}}},
        "off": ["a"],
    },
}


@pytest.mark.parametrize("kind", MONITORS)
def test_state_is_plain_and_survives_a_file_with_every_field_off_its_default(kind):
    monitor = kind()
    state = monitor.state_dict()
    assert state["version"] == 1
    other = {**OFF[kind], "values": dict.fromkeys(state["values"], 2.0), "warned": ["y"]}
    changed = {key: other.get(key, value if key == "version" else _off(value)) for key, value in state.items()}
    assert all(changed[key] != state[key] for key in state if key != "version")
    monitor.load_state_dict(changed)
    assert monitor.state_dict() == changed
    torch.save(monitor.state_dict(), "state.pt")
    again = kind()
    again.load_state_dict(torch.load("state.pt", weights_only=True))
    assert again.state_dict() == changed
    assert plain_types(again.state_dict())


def _off(value):
    return {
        "bool": lambda: not value,
        "int": lambda: value + 3,
        "list": lambda: [*value, 1],
        "dict": lambda: value | {"new": 1},
    }[type(value).__name__]()


@pytest.mark.parametrize("kind", MONITORS)
def test_state_of_a_run_is_not_shared_with_the_monitor(kind):
    monitor = kind()
    fit(Task(mlp()), ours("fp16"), callbacks=[monitor])
    state = monitor.state_dict()
    assert plain_types(state)
    before = json.dumps(state)
    fit(Task(mlp()), ours("fp16"), callbacks=[monitor])
    assert json.dumps(state) == before


@pytest.mark.parametrize("kind", MONITORS)
def test_state_of_another_release_is_one_line(kind):
    with pytest.raises(MixPrecError, match=rf"{kind.__name__} state has version 2, .* reads version 1") as caught:
        kind().load_state_dict({"version": 2})
    assert "\n" not in str(caught.value)


# Arguments


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "3"])
@pytest.mark.parametrize("kind", [UnderflowMonitor, FidelityMonitor])
def test_a_bad_count_is_one_line(kind, value):
    with pytest.raises(MixPrecError, match=rf"^{kind.__name__}\(every_n_steps=...\) is .*positive integer\.$"):
        kind(every_n_steps=value)


@pytest.mark.parametrize(
    ("kind", "argument", "value"),
    [
        (UnderflowMonitor, "threshold", 1.5),
        (UnderflowMonitor, "threshold", math.nan),
        (UnderflowMonitor, "threshold", "much"),
        (UnderflowMonitor, "max_elements", 0),
        (FidelityMonitor, "layers_per_sample", 0),
        (FidelityMonitor, "min_cosine", -2),
        (FidelityMonitor, "max_loss_gap", 0),
        (FidelityMonitor, "max_loss_gap", math.nan),
        (FidelityMonitor, "max_loss_gap", True),
        (FidelityMonitor, "max_bytes", -1),
    ],
)
def test_a_bad_argument_is_one_line(kind, argument, value):
    with pytest.raises(MixPrecError, match=rf"^{kind.__name__}\({argument}=...\) is .*; it has to be a .*\.$"):
        kind(**{argument: value})


@pytest.mark.parametrize("kind", MONITORS)
def test_an_unknown_precision_plugin_is_refused_before_training(kind):
    class TheirPrecision(Precision):
        pass

    with pytest.raises(SupportError, match=f"{kind.__name__} does not know the precision plugin Their") as caught:
        fit(Task(mlp()), TheirPrecision(), callbacks=[kind()])
    assert "\n" not in str(caught.value)


# The command line


class CliTask(Task):
    def __init__(self):
        super().__init__(mlp())

    def train_dataloader(self):
        return Batches(6)


@pytest.mark.filterwarnings("ignore:.*LightningCLI")
def test_monitors_are_read_from_a_config(monkeypatch):
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    callbacks = [
        {"class_path": "lightning_mixprec.OverflowMonitor", "init_args": {"window": 10}},
        {"class_path": "lightning_mixprec.UnderflowMonitor", "init_args": {"every_n_steps": 10, "threshold": 0.2}},
        {"class_path": "lightning_mixprec.FidelityMonitor", "init_args": {"every_n_steps": 2, "max_loss_gap": 0.1}},
    ]
    config = {**quiet, "enable_model_summary": False, "enable_checkpointing": False, "max_steps": 3}
    config |= {"callbacks": callbacks, "plugins": {"class_path": "lightning_mixprec.PerLayerPrecision"}}
    Path("config.yaml").write_text(yaml.safe_dump({"seed_everything": 0, "trainer": config}))
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr("sys.argv", ["script.py", "fit", "--config=config.yaml"])
    cli = LightningCLI(CliTask, save_config_kwargs={"overwrite": True})
    overflow, underflow, fidelity = [
        next(each for each in cli.trainer.callbacks if isinstance(each, kind)) for kind in MONITORS
    ]
    assert (overflow.window, underflow.every_n_steps, underflow.threshold) == (10, 10, 0.2)
    assert (fidelity.every_n_steps, fidelity.max_loss_gap) == (2, 0.1)
    assert {row["batch_idx"] for row in rows()} == {0, 2}
