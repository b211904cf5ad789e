"""AdaptivePrecision on CUDA: rescues what it rescues on the CPU, changes no bit of a healthy run, waits for nothing."""

from functools import partial

import pytest
import torch
from adaptive_models import Lessons, Saturated, adapt, attending, encoded, late, loud, silent, solved, train
from lightnings import MixedPrecision
from observed_models import Busy, plain, trace
from plugin_models import Batches, Call, Task, fit, ours, same
from torch import nn

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]
CUDA = {"accelerator": "gpu"}

FAILURES = {
    "a projection beyond 65504": (loud, Lessons, "net.down", "fp16"),
    "attention written inline": (attending, Lessons, "net", "fp16"),
    "an epsilon in the loss": (Saturated, Lessons, "", "fp16"),
    "phases in the thousands": (silent, encoded, "net.encode", "fp16"),
}


@pytest.mark.parametrize(("make", "batches", "culprit", "format"), FAILURES.values(), ids=FAILURES)
def test_a_run_that_fp16_spoils_ends_as_in_fp32_and_only_the_culprit_moves(make, batches, culprit, format):
    stock = MixedPrecision("16-mixed", "cuda")
    reference, lost = (late(train(make, plugin, batches=batches(), **CUDA)[0].losses) for plugin in (None, stock))
    assert not lost < 2 * reference
    run = adapt(make, batches=batches(), **CUDA)
    assert late(run.module.losses) < 1.35 * reference + 1e-3
    assert run.is_finite
    assert [(name, old) for name, old, _ in run.moves] == [(culprit, format)]
    if culprit == "net.encode":
        assert run.formats[culprit] == "fp32"


class OnTheDevice(Busy):
    """Keeps count without waiting for the device, and draws on it."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        x.mul_(1 + 0.1 * torch.rand((), device=x.device))
        loss = nn.functional.mse_loss(self.net(x), y)
        self.steps += 1
        self.mean.update(loss.detach().float())
        self.log("loss", loss)
        return loss


FUSED = partial(torch.optim.Adam, lr=0.01, fused=True)
PLUGINS = {
    "fp16": lambda: ours("fp16"),
    "bf16": lambda: ours("bf16"),
    "mixed": lambda: ours({"default": "fp16", "net.0": "bf16", "net.1": "c=fp32,o=input"}),
}


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, FUSED], ids=["looped", "fused"])
def test_a_healthy_run_is_the_same_to_the_last_bit_dropout_included(plugin, optimizer):
    adaptive, traces = AdaptivePrecision(every_n_steps=1), []
    for watching in ([], [adaptive]):
        batches = Batches(6, count=12)
        traces.append(trace(lambda: OnTheDevice(plain(), optimizer), PLUGINS[plugin](), watching, batches, **CUDA))
    assert [key for key in traces[0] if not same(traces[0][key], traces[1][key])] == []
    assert adaptive.decisions == []


@pytest.mark.parametrize("make", [loud, silent], ids=["range", "precision"])
def test_advice_changes_no_bit(make):
    adaptive, runs = AdaptivePrecision("advise"), []
    for watching in ([], [adaptive]):
        batches = encoded(8) if make is silent else Lessons(8)
        module, run = train(make, plugin := PerLayerPrecision("fp16"), watching, batches, **CUDA)
        weights = {name: value.cpu() for name, value in module.state_dict().items()}
        runs.append([weights, torch.cuda.get_rng_state(), torch.get_rng_state(), run.optimizers[0].state_dict()])
    assert same(*runs)
    assert adaptive.decisions
    assert plugin.history == []


class Strict(Task):
    """Lets nothing wait for the device inside the step and around it, once samples are over."""

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx > 14:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")


def test_steps_that_are_not_sampled_wait_for_nothing():
    try:
        options = {"callbacks": [AdaptivePrecision()], "log_every_n_steps": 1000, **CUDA}
        fit(Strict(plain(), FUSED), ours("fp16"), batches=Batches(6, count=24), **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


RUNS = {"range": (loud, Lessons), "precision": (silent, encoded), "undoing": (solved, encoded)}


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, FUSED], ids=["looped", "fused"])
@pytest.mark.parametrize(("make", "batches"), RUNS.values(), ids=RUNS)
def test_interrupted_at_any_step_it_decides_the_same_and_ends_with_the_same_bits(make, batches, optimizer):
    def made():
        module = make()
        module.make_optimizer = partial(optimizer, lr=module.make_optimizer.keywords["lr"])
        return module

    def go(path=None, callbacks=()):
        run = adapt(made, callbacks=callbacks, batches=batches(8), ckpt_path=path, **CUDA)
        weights = {name: value.cpu() for name, value in run.module.state_dict().items()}
        skipped = run.plugin.skipped_steps
        return [run.adaptive.decisions, run.plugin.history, weights, skipped, run.plugin.scaler.state_dict()]

    def saving(prefix):
        def save(run, model):
            run.save_checkpoint(f"{prefix}{run.fit_loop.epoch_loop.batch_idx}.ckpt")

        return [Call("on_train_batch_end", save)]

    whole = go(callbacks=saving("whole"))
    assert [decision["kind"] for decision in whole[0]] == ["promote"]
    assert [batch for batch in range(7) if not same(go(f"whole{batch}.ckpt", saving("again")), whole)] == []
