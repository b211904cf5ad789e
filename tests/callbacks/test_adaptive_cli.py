"""AdaptivePrecision in LightningCLI, from a config file or a command line, and its policy in the next run."""

from pathlib import Path

import pytest
import yaml
from adaptive_models import ADAM, Lessons, Loud
from lightnings import LightningCLI
from plugin_models import Task

from lightning_mixprec.callbacks.adaptive import AdaptivePrecision

CLASS = "lightning_mixprec.callbacks.adaptive.AdaptivePrecision"
CULPRIT = [["net.down", "fp16", "bf16"]]
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "."}},
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "plugins": {"class_path": "lightning_mixprec.PerLayerPrecision", "init_args": {"policy": "fp16"}},
}


class CliTask(Task):
    def __init__(self, width: int = 16) -> None:
        super().__init__(Loud(), ADAM)

    def train_dataloader(self):
        return Lessons(8)


def main(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        # Lightning itself calls what jsonargparse is about to remove.
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        patch.setattr("sys.argv", ["script.py", "fit", *arguments])
        cli = LightningCLI(CliTask, save_config_kwargs={"overwrite": True})
    [adaptive] = [each for each in cli.trainer.callbacks if isinstance(each, AdaptivePrecision)] or [None]
    return adaptive, cli.trainer


def run(arguments, *others):
    callback = {"class_path": CLASS} | ({"init_args": arguments} if arguments else {})
    config = {"seed_everything": 0, "trainer": {**TRAINER, "callbacks": [callback]}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return main("--config=config.yaml", *others)


def test_a_config_file_at_default_arguments():
    adaptive, trainer = run({})
    assert [decision["moves"] for decision in adaptive.decisions] == [CULPRIT]
    assert trainer.callback_metrics["mixprec/policy_version"] == 1.0


def test_every_argument_in_a_config_file_is_as_in_python():
    arguments = {
        "mode": "advise",
        "pin": ["net.up", "net.h*"],
        "min_low_precision_share": 0.5,
        "every_n_steps": 10,
        "dwell_steps": 20,
        "max_trials": 30,
        "max_assignments": 4,
    }
    adaptive, trainer = run(arguments)
    expected = AdaptivePrecision(**arguments)
    assert (adaptive.mode, adaptive.pin, adaptive._options) == (expected.mode, expected.pin, expected._options)
    assert [decision["moves"] for decision in adaptive.decisions] == [CULPRIT]
    assert trainer.precision_plugin.history == []


def test_one_pin_on_the_command_line():
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": TRAINER}))
    adaptive, trainer = main("--config=config.yaml", f"--trainer.callbacks={CLASS}", "--trainer.callbacks.pin=net.down")
    assert adaptive.pin == ["net.down"]
    assert trainer.precision_plugin.assignment["net.down"].compute == "fp16"


def test_discover_then_freeze():
    _, trainer = run({})
    learned = Path(trainer.log_dir, "learned_policy.yaml")
    scaling = {"init_scale": 1024}
    plugin = {**TRAINER["plugins"], "init_args": {"policy": str(learned), "loss_scaling": scaling}}
    Path("frozen.yaml").write_text(yaml.safe_dump({"seed_everything": 0, "trainer": {**TRAINER, "plugins": plugin}}))
    adaptive, frozen = main("--config=frozen.yaml")
    assert adaptive is None
    assert frozen.precision_plugin.skipped_steps == 0
    assert frozen.precision_plugin.policy == trainer.precision_plugin.policy


def test_a_saved_config_runs_again():
    first, _ = run({"pin": "net.head", "every_n_steps": 5})
    [saved] = Path("lightning_logs").rglob("config.yaml")
    again, _ = main(f"--config={saved}")
    assert again.decisions == first.decisions


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mode": "observe"}, "mode"),
        ({"every_n_steps": 0}, "it has to be a positive integer"),
        ({"min_low_precision_share": 2}, "it has to be a number from 0 to 1"),
        ({"pin": ["net.dwon"]}, "net.down"),
    ],
    ids=str,
)
def test_a_mistake_in_a_config_file_shows_our_line(arguments, says, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        run(arguments)
    assert says in capsys.readouterr().err + str(caught.value)
