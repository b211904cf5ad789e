"""The monitors on CUDA: the same numbers, the same bits of the run, and no waiting between samples."""

import json

import pytest
import torch
from observed_models import Busy, monitors, plain, trace
from plugin_models import Batches, Task, fit, ours, same, stock
from torch import nn

from lightning_mixprec import FidelityMonitor, OverflowMonitor, PrecisionReport, UnderflowMonitor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*(vanish in|no longer points|differs from fp32)"),
]
CUDA = {"accelerator": "gpu"}


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


PLUGINS = {
    "fp16": lambda: ours("fp16"),
    "mixed": lambda: ours({"default": "fp16", "net.0": "bf16", "net.1": "c=fp32,o=input"}),
    "stock 16-mixed": lambda: stock("fp16", "cuda"),
    "stock bf16-mixed": lambda: stock("bf16", "cuda"),
    "stock 32-true": lambda: None,
}


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_run_is_the_same_to_the_last_bit_dropout_included(plugin):
    alone, watched = [
        trace(lambda: OnTheDevice(plain()), PLUGINS[plugin](), watching, **CUDA) for watching in ([], monitors())
    ]
    assert [key for key in alone if not same(alone[key], watched[key])] == []


def test_rates_cosines_and_ratios_are_those_of_the_cpu():
    found = []
    for device in ("cpu", "gpu"):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
        watching = [UnderflowMonitor(1000, max_elements=None), FidelityMonitor(1000)]
        fit(Task(net), ours("bf16"), callbacks=watching, accelerator=device)
        found.append([each.latest for each in watching])
    (underflow, fidelity), (other_underflow, other_fidelity) = found
    for layer, values in underflow.items():
        for key in ("underflow_rate", "subnormal_share", "headroom_bits"):
            assert other_underflow[layer][key] == pytest.approx(values[key], abs=0.05)
    assert other_fidelity["loss_gap"] == pytest.approx(fidelity["loss_gap"], abs=5e-3)
    for layer, values in fidelity["layers"].items():
        assert other_fidelity["layers"][layer]["grad_cosine"] == pytest.approx(values["grad_cosine"], abs=1e-2)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_report_has_the_losses_and_scales_of_the_run(tmp_path, accumulated):
    model, plugin = Task(plain()), ours("fp16")
    options = {"accumulate_grad_batches": accumulated, "default_root_dir": tmp_path}
    fit(model, plugin, Batches(6, count=120), callbacks=[PrecisionReport()], **options, **CUDA)
    (run,) = json.loads((tmp_path / "precision_report.json").read_text())["runs"]
    losses = torch.stack(model.losses[-120:]).view(-1, accumulated).mean(1)
    assert run["curve"]["loss"] == pytest.approx(losses.tolist(), rel=1e-3)
    assert run["curve"]["scale"][-1] == plugin.scaler.get_scale()
    assert dict(run["environment"])["accelerator"] == "cuda"


class Strict(OnTheDevice):
    """Lets nothing wait for the device inside the step and around it, from the second batch on.

    Nor does it itself: a MeanMetric would, which looks for NaN in what it is given.
    """

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx > 0:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")


def test_steps_that_are_not_sampled_wait_for_nothing(tmp_path):
    watching = [OverflowMonitor(), UnderflowMonitor(1000), FidelityMonitor(1000), PrecisionReport(1000)]
    fused = lambda params: torch.optim.Adam(params, fused=True)  # noqa: E731
    options = {"batches": Batches(6, count=110), "log_every_n_steps": 1000, "default_root_dir": tmp_path}  # two chunks
    try:
        fit(Strict(plain(), fused), ours("fp16"), callbacks=watching, **options, **CUDA)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_replay_compiles_nothing_again():
    torch._dynamo.reset()
    counts = []

    def run(watching):
        count = []

        def backend(graph, inputs):
            count.append(1)
            return graph.forward

        def make():
            module = OnTheDevice(plain())
            module.net = torch.compile(module.net, backend=backend)
            return module

        traced = trace(make, ours("fp16"), watching, **CUDA)
        counts.append(len(count))
        torch._dynamo.reset()
        return traced

    alone, watched = run([]), run(monitors())
    assert counts[0] == counts[1] > 0
    assert [key for key in alone if not same(alone[key], watched[key])] == []


def test_memory_that_runs_out_in_a_replay_is_caught():
    class Greedy(Task):
        def training_step(self, batch, batch_idx):
            if "log" in vars(self):  # a replay replaces it
                torch.empty(2**50, device="cuda")
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="could not sample step 0 .*out of memory"):
        run = fit(Greedy(plain()), ours("fp16"), batches=Batches(6), callbacks=[FidelityMonitor(4)], **CUDA)
    assert run.global_step == 4
