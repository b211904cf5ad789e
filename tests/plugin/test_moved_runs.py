"""A run in bf16 goes on where there is no bf16: its policy is translated by what a monitor recorded of the run."""

import pytest
import torch
from lightnings import CSVLogger, pl
from plugin_models import Batches, Task
from torch import nn

from lightning_mixprec import PerLayerPrecision, PrecisionPolicy, UnderflowMonitor
from lightning_mixprec.errors import PolicyError, ScalingError


class Wide(nn.Module):
    """Hands on numbers that fp16 has no range for, with a gradient that it has."""

    def forward(self, x):
        return 1e6 * torch.tanh(x)


def model():
    torch.manual_seed(0)
    return Task(nn.Sequential(nn.Linear(4, 4), Wide(), nn.LayerNorm(4), nn.Linear(4, 2)))


def trainer(plugin, steps, *callbacks):
    return pl.Trainer(
        accelerator="cpu",
        plugins=plugin,
        max_steps=steps,
        callbacks=list(callbacks),
        logger=CSVLogger(".", name="run"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture
def run():
    """A run in bf16, its checkpoint, and the folder with what was recorded."""
    first = trainer(PerLayerPrecision("bf16"), 4, UnderflowMonitor(every_n_steps=1))
    first.fit(model(), Batches(4))
    first.save_checkpoint("run.ckpt")
    return first.log_dir


def test_what_a_monitor_records_translates_the_policy(run):
    there = PrecisionPolicy("bf16").for_device("t4", ranges=run)
    formats = {name: layer.compute for name, layer in there.resolve(model()).items()}
    assert formats["net.1"] == formats["net.2"] == "fp32"
    assert formats["net.0"] == formats["net.3"] == "fp16"
    assert any("its output reaches" in each.reason and "'net.1'" in each.where for each in there.replacements)


def test_a_run_resumes_under_it_and_says_what_changed(run):
    there = PrecisionPolicy("bf16").for_device("t4", ranges=run)
    refusing = trainer(PerLayerPrecision(there), 8, UnderflowMonitor())
    with pytest.raises(PolicyError, match="default bf16 -> fp16; net.1 \\(c=fp32\\) added"):
        refusing.fit(model(), Batches(4), ckpt_path="run.ckpt")
    plugin, resumed = PerLayerPrecision(there, on_policy_change="accept"), model()
    going_on = trainer(plugin, 8, UnderflowMonitor())
    going_on.fit(resumed, Batches(4), ckpt_path="run.ckpt")
    assert going_on.global_step == 8
    assert all(torch.isfinite(loss) for loss in resumed.losses)
    moves = {move["layer"]: (move["from"], move["to"]) for move in plugin.history}
    assert moves["net.1"] == moves["net.2"] == ("bf16", "fp32")
    assert ("bf16", "fp16") in moves.values()
    assert {move["reason"] for move in plugin.history} == {"resumed with another configured policy"}


def test_under_fp16_alone_it_would_not_go_on(run):
    """What the translation is for: the same run in fp16 has no finite step."""
    plugin = PerLayerPrecision("fp16", on_policy_change="accept")
    with pytest.raises(ScalingError, match="layers with non-finite gradients: net.0"):
        trainer(plugin, 8, UnderflowMonitor()).fit(model(), Batches(4), ckpt_path="run.ckpt")
