"""PrecisionScheduler in LightningCLI, as a config file or a command line gives it."""

from pathlib import Path

import pytest
import yaml
from lightnings import LightningCLI
from plugin_models import Batches, Task, mlp

from lightning_mixprec.callbacks.scheduler import PrecisionScheduler
from lightning_mixprec.planning.phases import read_phases

CLASS = "lightning_mixprec.callbacks.scheduler.PrecisionScheduler"
PHASES = """
- {at: 0, policy: fp32}
- {at: 1, policy: {default: bf16, net.6: fp32}}
- {at: 50%, edit: {net.0: "c=fp32,o=input"}}
- at: {event: plateau, monitor: loss, mode: max, patience: 2}
  policy: {default: bf16, rules: [{types: LayerNorm, compute: fp32}]}
- {at: {event: lr_below, share: 0.1}, policy: configured}
- {at: {epoch: 1}, policy: policy.yaml}
"""
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "."}},
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": 2,
    "log_every_n_steps": 4,
    "plugins": {"class_path": "lightning_mixprec.PerLayerPrecision", "init_args": {"policy": "bf16"}},
}
# The schedule of phase 5 waits for a learning rate that is constant here.
pytestmark = pytest.mark.filterwarnings("ignore:phase 5 waits for the learning rate")


class CliTask(Task):
    def __init__(self, width: int = 8) -> None:
        super().__init__(mlp())

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, batch_size=4)
        return loss

    def train_dataloader(self):
        return Batches(6)


def main(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        # Lightning itself calls what jsonargparse is about to remove.
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        patch.setattr("sys.argv", ["script.py", "fit", *arguments])
        cli = LightningCLI(CliTask, save_config_kwargs={"overwrite": True})
    [scheduler] = [each for each in cli.trainer.callbacks if isinstance(each, PrecisionScheduler)]
    return scheduler, cli.trainer.precision_plugin


def run(phases, *arguments):
    Path("policy.yaml").write_text(yaml.safe_dump({"default": "fp32", "net.4": "bf16"}))
    callbacks = [{"class_path": CLASS, "init_args": {"phases": phases}}]
    config = {"seed_everything": 0, "trainer": {**TRAINER, "callbacks": callbacks}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return main("--config=config.yaml", *arguments)


def test_a_config_file_gives_what_python_gives():
    phases = yaml.safe_load(PHASES)
    scheduler, plugin = run(phases)
    assert scheduler.phases == read_phases(phases)
    assert [(each["phase"], each["step"]) for each in scheduler.came] == [(1, 0), (2, 1), (3, 4), (6, 4)]
    assert plugin.policy.to_dict() == {"default": "fp32", "rules": [{"layers": "net.4", "compute": "bf16"}]}


def test_a_saved_config_runs_again():
    first, _ = run(yaml.safe_load(PHASES))
    [saved] = Path("lightning_logs").rglob("config.yaml")
    again, _ = main(f"--config={saved}")
    assert again.phases == first.phases
    assert again.came == first.came


def test_the_command_line():
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": TRAINER}))
    phases = '[{"at": "25%", "policy": "fp32"}, {"at": {"epoch": 1}, "edit": {"net.0": "bf16"}}]'
    scheduler, _ = main("--config=config.yaml", f"--trainer.callbacks={CLASS}", f"--trainer.callbacks.phases={phases}")
    assert [(each["phase"], each["step"]) for each in scheduler.came] == [(1, 2), (2, 4)]


@pytest.mark.parametrize(
    ("phase", "says"),
    [
        ({"at": "plateau", "policy": "bf16"}, "phase 2: at is 'plateau'"),
        ({"at": {"epok": 1}, "policy": "bf16"}, "did you mean epoch"),
        ({"at": 1, "policy": "bf61"}, "did you mean 'bf16'"),
        ({"at": 1, "edits": {"net.0": "fp32"}}, "did you mean edit"),
    ],
    ids=str,
)
def test_a_mistake_in_a_config_file_shows_our_line(phase, says, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        run([{"at": 0, "policy": "fp32"}, phase])
    assert says in capsys.readouterr().err + str(caught.value)
