"""Checkpoints that 0.1.0 wrote are taken over whole and gone on from; README.md says how they were made."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from capabilities import auto_format
from compatibility.comparison import differences, plain
from compatibility.fsdp_script import POLICY, SCALING, values
from compatibility.old_models import Line
from compatibility.old_runs import DATA, RUNS, expected, outcome, resume, trainer_of, without_copy

from lightning_mixprec import PerLayerPrecision, PrecisionPolicy

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings(r"ignore:step \d+"),
]
PUBLIC = ("events", "skipped_steps", "reasons", "latest", "decisions", "came")


def checkpoint(name):
    return torch.load(DATA / f"{name}.pt", weights_only=True)


class States(pl.Callback):
    """Keeps the states of the plugin and the callbacks when training starts, before others do anything or after."""

    def on_train_start(self, trainer, pl_module):
        self.plugin = trainer.precision_plugin.state_dict()
        self.callbacks = {type(each).__name__: each.state_dict() for each in trainer.callbacks if each.state_dict()}


@cache
def resumed(name):
    """What the run comes to, and the states before its callbacks begin to train and after; made once."""
    folder = Path(f"resumed-{name}").absolute()
    first, last = States(), States()
    more = [first] if name == "pending" else [first, last]  # asked for its state, the controller does what is pending
    return resume(RUNS[name], DATA / f"{name}.pt", folder, *more), first, last


# What is taken over


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.callbacks() and "scaled" not in name])
def test_each_callback_takes_its_state_and_gives_it_back(name):
    saved = checkpoint(name)["callbacks"]
    for callback in RUNS[name].callbacks():
        state = saved[type(callback).__name__]
        callback.load_state_dict(state)
        assert differences(state, callback.state_dict()) == []
        shown = {key: getattr(callback, key) for key in PUBLIC if hasattr(callback, key)}
        assert differences({key: state[key] for key in shown}, shown) == []


@pytest.mark.parametrize("name", [name for name in RUNS if name != "stock"])
def test_a_resumed_run_has_what_was_saved_before_its_first_step(name):
    saved, (_, first, last) = checkpoint(name), resumed(name)
    if "PerLayerPrecision" in saved:
        # "auto" is chosen for the device at hand, which need not be the one that saved.
        anew = {"policy": PrecisionPolicy(auto_format()).to_dict()} if name == "auto" else {}
        assert differences(saved["PerLayerPrecision"] | anew, first.plugin) == []
    assert differences(saved["callbacks"], first.callbacks) == []
    if name != "pending":
        begun = {
            key: state for key, state in last.callbacks.items() if key != "PrecisionReport"
        }  # it asks for a sample
        assert begun.keys() == saved["callbacks"].keys() - {"PrecisionReport"}
        assert differences({key: saved["callbacks"][key] for key in begun}, begun) == []


def test_the_scale_of_lightnings_own_plugin_is_taken_over():
    saved, (_, first, _) = checkpoint("stock")["MixedPrecision"], resumed("stock")
    assert (saved["scale"], saved["_growth_tracker"]) == (1024.0, 2)
    assert first.plugin["scaler"] == {"scale": 1024.0, "growth_tracker": 2, "overflows": 0}


# What comes of it


@pytest.mark.parametrize("name", [name for name in RUNS if name != "auto"])
def test_it_goes_on_as_under_the_release_that_wrote_it(name):
    """What is counted and decided exactly; what 16-bit kernels compute, as near as other CPUs come."""
    old, (new, _, _) = expected(name), resumed(name)
    assert differences(old, without_additions(plain(new)), RUNS[name].is_exact) == []


def without_additions(new):
    """Without what later releases say besides: what counts as a step, which limit holds, of which run a row is."""
    for row in new.get("rows", ()):
        row.get("run", {}).pop("counts_skipped", None)
        row.pop("min_cosine", None)
        row.pop("run_id", None)
    return new


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if not run.is_exact])
def test_what_was_decided_before_the_checkpoint_stays_to_the_last_bit(name):
    saved, (new, _, _) = checkpoint(name), resumed(name)
    if "history" in new["plugin"]:
        history = saved["PerLayerPrecision"]["history"]
        assert differences(history, new["plugin"]["history"][: len(history)]) == []
    for key, state in new["callbacks"].items():
        for part in ("events", "decisions", "came"):
            old = saved["callbacks"][key].get(part, [])
            assert differences(old, state.get(part, [])[: len(old)]) == []


def test_auto_chooses_anew_for_the_device():
    """Batches and weights are such that every format gives the same losses."""
    old, (new, first, _) = expected("auto"), resumed("auto")
    assert first.plugin["configured"] == "auto"
    alike = ("global_step", "losses", "weights", "rates")
    assert differences({key: old[key] for key in alike}, {key: new[key] for key in alike}) == []
    fresh = PerLayerPrecision()
    trainer_of(fresh, [], Path.cwd()).fit(Line(), values())
    assert new["plugin"]["policy"] == fresh.policy.to_dict()
    assert new["plugin"]["history"] == []


# Sharded by FSDP1


def test_a_checkpoint_of_the_plugin_for_fsdp_goes_on_without_it():
    plugin, model = PerLayerPrecision(POLICY, loss_scaling=SCALING), Line()
    states = States()
    trainer = trainer_of(plugin, [states], Path.cwd())
    trainer.fit(model, values(), ckpt_path=DATA / "fsdp.pt")
    assert differences(checkpoint("fsdp")["PerLayerFSDPPrecision"], states.plugin) == []
    assert differences(expected("fsdp"), plain(outcome(model, trainer, plugin, []))) == []


@pytest.mark.slow
def test_a_checkpoint_of_the_plugin_for_fsdp_goes_on_with_it():
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, tests / "compatibility" / "fsdp_script.py", "resume", DATA / "fsdp.pt", "told.json"]
    subprocess.run(list(map(str, command)), env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True)
    assert differences(expected("fsdp"), json.loads(Path("told.json").read_text())) == []


# The data are what they are kept for


def test_scales_counters_and_moves_are_off_their_defaults():
    after, between = (checkpoint(f"scaled_{when}")["PerLayerPrecision"] for when in ("after_skip", "between"))
    assert after["steps"]["in_a_row"] == [2] and after["scaler"]["overflows"] == 2
    assert between["scaler"]["growth_tracker"] == 3 and between["steps"]["skipped_steps"] == 2
    for key in ("evidence", "output"):
        assert {key in entry for entry in between["history"]} == {True, False}
    assert checkpoint("two_optimizers")["PerLayerPrecision"]["steps"]["in_a_row"] == [0, 1]
    assert {after["version"], *(state["version"] for state in checkpoint("everybody")["callbacks"].values())} == {1}


def test_controllers_have_promoted_or_are_about_to_and_keep_copies():
    states = {name: checkpoint(name)["callbacks"]["AdaptivePrecision"] for name in ("promoted", "pending", "undoing")}
    assert states["promoted"]["decisions"] and states["promoted"]["steered"]["copy"]["params"]
    assert states["pending"]["steered"]["pending"]["moves"] == [["net.down", "fp16", "bf16"]]
    assert states["undoing"]["decisions"] == [] and states["undoing"]["steered"]["copy"]["step"] == 0
    (undone,) = expected("undoing")["callbacks"]["AdaptivePrecision"]["decisions"]
    assert undone["restores"]
    decided = expected("to_and_fro")["callbacks"]["AdaptivePrecision"]["decisions"]
    assert [each["kind"] for each in decided] == ["promote", "demote", "promote"]
    assert without_copy(states["promoted"]) != states["promoted"]


def test_a_schedule_has_come_in_part_and_looked_at_its_metric():
    state = checkpoint("scheduled")["callbacks"]["PrecisionScheduler"]
    assert [each["phase"] for each in state["came"]] == [1]
    assert state["looks"][1] == {"best": 0.0, "looks": 1}
    came = expected("scheduled")["callbacks"]["PrecisionScheduler"]["came"]
    assert [each["phase"] for each in came] == [1, 4, 2, 3, 5]


@pytest.mark.parametrize("name", ["watched", "watched_stock"])
def test_monitors_have_seen_each_verdict_and_what_is_lost(name):
    callbacks = checkpoint(name)["callbacks"]
    assert {event["verdict"] for event in callbacks["OverflowMonitor"]["events"]} == {
        "precision",
        "scale",
        "data",
        "model",
    }
    fidelity, latest = callbacks["FidelityMonitor"], callbacks["UnderflowMonitor"]["latest"]
    assert fidelity["off"]
    assert any(each["sqnr_db"] for each in fidelity["latest"]["layers"].values())
    assert any(each["stagnation_rate"] for each in latest.values())
    assert callbacks["PrecisionReport"]["batches_seen"] == 10
