"""``lightning.pytorch`` and ``pytorch_lightning`` in one process: plugin and callbacks work under both.

A test in a process of its own per order of imports takes some ten seconds, nearly all of it imports.
"""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import lightning.pytorch
import pytest
import torch
from torch import nn

import lightning_mixprec
from lightning_mixprec import (
    AdaptivePrecision,
    FidelityMonitor,
    MixPrecError,
    OverflowMonitor,
    PerLayerFSDPPrecision,
    PerLayerPrecision,
    PrecisionReport,
    PrecisionScheduler,
    UnderflowMonitor,
)
from lightning_mixprec.plugin import lightnings

pytorch_lightning = pytest.importorskip("pytorch_lightning")

PACKAGES = [lightning.pytorch, pytorch_lightning]
CALLBACKS = [
    AdaptivePrecision,
    FidelityMonitor,
    OverflowMonitor,
    PrecisionReport,
    UnderflowMonitor,
    lambda: PrecisionScheduler([{"at": 2, "edit": {"head": "fp32"}}]),
]
THIRD_PARTY = Path(__file__).parents[1] / "common" / "third_party.py"
ORDERS = {
    "ours first": "import lightning_mixprec, pytorch_lightning",
    "lightning first": "import lightning.pytorch, lightning_mixprec, pytorch_lightning",
    "pytorch_lightning first": "import pytorch_lightning, lightning_mixprec",
    "both first": "import lightning.pytorch, pytorch_lightning, lightning_mixprec",
}


def of(package):
    """A LightningModule of a package, which keeps what happened in it."""

    class Model(package.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 1)
            self.losses, self.hooks, self.norms = [], [], []

        def training_step(self, batch, batch_idx):
            loss = self.head(self.net(batch)).float().square().mean()
            self.log("loss", loss)
            self.losses.append(loss.item())
            return loss

        def on_before_backward(self, loss):
            self.hooks.append("before backward")

        def on_after_backward(self):
            self.hooks.append("after backward")

        def on_before_optimizer_step(self, optimizer):
            self.hooks.append("before step")

        def on_before_zero_grad(self, optimizer):
            grads = [param.grad for param in self.parameters() if param.grad is not None]
            self.norms += [torch.stack([grad.norm() for grad in grads]).norm().item()] if grads else []

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    return Model()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.DataLoader(torch.randn(6, 8, 4, generator=generator), batch_size=None)


def trainer_of(package, plugin, *callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings = {"enable_checkpointing": False, "max_epochs": 1, **quiet, **options}
    return package.Trainer(plugins=plugin, callbacks=[*callbacks], devices=1, **settings)


def trained(package, plugin, *callbacks, **options):
    model = of(package)
    trainer_of(package, plugin, *callbacks, **options).fit(model, data())
    return model


def test_there_are_two_and_none_of_one_is_of_the_other():
    assert lightnings.PACKAGES == PACKAGES
    assert not issubclass(pytorch_lightning.Trainer, lightning.pytorch.Trainer)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("make", CALLBACKS)
def test_a_callback_is_one_of_each_package(package, make):
    assert isinstance(make(), package.Callback)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_plugins_are_of_each_package(package):
    precision = package.plugins.precision
    assert isinstance(PerLayerPrecision(), precision.Precision)
    assert isinstance(PerLayerFSDPPrecision(), precision.FSDPPrecision)


@pytest.mark.parametrize("format", ["bf16", "fp16", "fp32"])
def test_a_run_is_the_same_under_both_each_hook_called_once(format):
    first, second = (trained(package, PerLayerPrecision(format), gradient_clip_val=0.01) for package in PACKAGES)
    assert first.losses == second.losses
    assert first.hooks == second.hooks == ["before backward", "after backward", "before step"] * 6


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("skips", [True, False])
def test_gradients_are_clipped_as_the_trainer_says(package, skips):
    class Clips(package.Callback):
        norms = []

        def on_train_batch_end(self, trainer, model, *args):
            self.norms.append(torch.cat([param.grad.flatten() for param in model.parameters()]).norm().item())

    trained(package, PerLayerPrecision("fp32", skip_nonfinite=skips), Clips(), gradient_clip_val=0.01)
    assert Clips.norms == pytest.approx([0.01] * 6, rel=1e-3)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_callbacks_watch_and_act(package, tmp_path):
    plugin = PerLayerPrecision("fp16")
    callbacks = [make() for make in CALLBACKS]
    model = trained(package, plugin, *callbacks, default_root_dir=tmp_path)
    assert len(model.losses) == 6
    assert plugin.assignment["head"].compute == "fp32"


@pytest.mark.parametrize(("writes", "reads"), [PACKAGES, PACKAGES[::-1]])
def test_a_checkpoint_of_one_is_gone_on_from_under_the_other(writes, reads, tmp_path):
    model, plugin = of(writes), PerLayerPrecision("fp16", {"init_scale": 2.0**20})
    first = trainer_of(writes, plugin, OverflowMonitor())
    first.fit(model, data())
    first.save_checkpoint(tmp_path / "last.ckpt")

    def resumed(package):
        plugin, model = PerLayerPrecision("fp16", {"init_scale": 2.0**20}), of(package)
        trainer = trainer_of(package, plugin, OverflowMonitor(), max_epochs=2)
        trainer.fit(model, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
        return trainer.global_step, model.losses, plugin.skipped_steps, plugin.scaler.get_scale(), plugin.history

    assert resumed(reads) == resumed(writes)
    assert resumed(reads)[2] >= plugin.skipped_steps > 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda plugin: pickle.loads(pickle.dumps(plugin))])
def test_a_copy_of_the_plugin_trains_under_the_other(duplicate):
    plugin = PerLayerPrecision({"default": "bf16", "head": "fp32"})
    first = trained(lightning.pytorch, plugin)
    assert trained(pytorch_lightning, duplicate(plugin)).losses == first.losses


def test_one_plugin_trains_under_one_after_the_other():
    plugin = PerLayerPrecision("bf16")
    assert trained(lightning.pytorch, plugin).losses == trained(pytorch_lightning, plugin).losses


@pytest.mark.parametrize(("package", "other"), [PACKAGES, PACKAGES[::-1]])
def test_a_module_of_the_other_package_is_refused_by_the_trainer_before_it_reaches_us(package, other):
    with pytest.raises(TypeError, match="LightningModule"):
        trainer_of(package, PerLayerPrecision("bf16"), OverflowMonitor()).fit(of(other), data())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_module_that_nobody_trains_is_refused_in_one_line_that_names_both(package):
    with pytest.raises(MixPrecError) as caught:
        PerLayerPrecision("fp16").convert_module(of(package))
    assert "no Trainer of lightning.pytorch or pytorch_lightning runs" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", PACKAGES)
def test_diagnose_takes_a_module_of_each(package):
    assert lightning_mixprec.diagnose(of(package), torch.ones(3, 4))["verdict"] is None


@pytest.mark.parametrize("strategy", ["DDPStrategy", "SingleDeviceStrategy", "FSDPStrategy", "ModelParallelStrategy"])
def test_the_strategies_of_both_have_one_row(strategy):
    from lightning_mixprec.plugin.strategies import STRATEGIES

    rows = [[row for row in STRATEGIES if getattr(each.strategies, strategy) in row.classes] for each in PACKAGES]
    assert rows[0] == rows[1] and len(rows[0]) == 1


# Each order of imports, in a process of its own


def ran(script, folder):
    """What a script printed in a fresh process, in which a warning is an error unless Lightning's own code warns."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(lightning_mixprec.__file__).parents[1])])}
    command = [sys.executable, "-W", "error", "-W", "ignore::FutureWarning", "-W", "ignore::UserWarning", "-c", script]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_third_partys_module_trains_with_plugin_monitors_and_controller(order, tmp_path):
    said = ran(f"{ORDERS[order]}\n{THIRD_PARTY.read_text()}", tmp_path)
    assert "trained 10 steps, resumed to 22" in said  # two of 24 were skipped, while the loss scale was found


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_the_log_stays_the_one_of_the_package_that_was_there_before_us(order, tmp_path):
    known = {"ours first": "lightning.pytorch", "lightning first": "lightning.pytorch"}
    script = f"""
{ORDERS[order]}
from lightning_utilities.core import rank_zero
assert rank_zero.log.name == "{known.get(order, "pytorch_lightning")}.utilities.rank_zero", rank_zero.log.name
"""
    assert ran(script, tmp_path) == ""
