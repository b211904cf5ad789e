"""What FidelityMonitor says, against runs made by hand, healthy ones and ones with a planted loss of precision."""

import contextlib
import copy
import json
import math
from pathlib import Path

import pytest
import torch
from plugin_models import Batches, Task, fit, mlp, ours, stock, trainer
from torch import Tensor, nn

from lightning_mixprec import FidelityMonitor, PerLayerPrecision
from lightning_mixprec.evidence import replay

QUIET = "ignore:.*(no longer points|differs from fp32)"


def watch(task, plugin, batches=None, **options):
    monitor = FidelityMonitor(**{"every_n_steps": 1, **options})
    fit(task, plugin, batches=batches, callbacks=[monitor])
    return monitor


# Healthy runs


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x.unsqueeze(1)))).flatten(1))


HEALTHY = {
    "mlp": mlp,
    "cnn": Convolutional,
    "encoder": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2)), nn.Linear(2, 8), nn.TransformerEncoderLayer(8, 2, 8), nn.Flatten(), nn.Linear(24, 2)
    ),
}


@pytest.mark.parametrize("plugin", [lambda: ours("fp16"), lambda: stock("fp16")], ids=["ours", "stock"])
@pytest.mark.parametrize("net", HEALTHY)
def test_a_healthy_run_is_close_to_fp32_and_nobody_is_warned(net, plugin):
    latest = watch(Task(HEALTHY[net]()), plugin(), Batches(6, count=6)).latest
    assert latest["loss_gap"] < 6e-3
    cosines = [values["grad_cosine"] for values in latest["layers"].values() if values["grad_cosine"] is not None]
    assert len(cosines) >= 2
    assert min(cosines) > 0.999


@pytest.mark.parametrize("plugin", [lambda: ours("fp32"), lambda: None], ids=["ours", "stock"])
def test_a_run_in_fp32_is_what_it_is_compared_with(plugin):
    latest = watch(Task(mlp()), plugin()).latest
    assert latest["loss_gap"] == 0
    assert {values["sqnr_db"] for values in latest["layers"].values()} == {math.inf}
    cosines = {values["grad_cosine"] for values in latest["layers"].values()} - {None}
    assert all(cosine == pytest.approx(1, abs=1e-12) for cosine in cosines)


# Planted failures


class Phases(nn.Module):
    """Fourier features of large frequencies: a phase in the hundreds has no digits left for the sine in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 32), nn.Linear(64, 2)
        self.embed.weight.data *= 1000.0

    def forward(self, x: Tensor) -> Tensor:
        phases = self.embed(x)
        return self.head(torch.cat([phases.sin(), phases.cos()], -1))


class Offset(nn.Module):
    """A constant of 500 added in 16 bits before a normalisation that takes it away again."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 2)
        self.body.weight.data *= 0.3
        self.body.bias.data.fill_(500.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


class Cancelling(Task):
    """A loss whose two terms are nearly the same, computed in what the network hands on."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 2))

    def training_step(self, batch, batch_idx):
        y = self.net(batch[0])
        square_of_mean_plus = (y + 30).square().mean(0)
        variance = square_of_mean_plus - (y + 30).mean(0).square()
        return variance.float().sum() + 0.01 * (y.float() - batch[1]).square().mean()


@pytest.mark.parametrize("plugin", [lambda: ours("fp16"), lambda: stock("fp16")], ids=["ours", "stock"])
@pytest.mark.parametrize("net", [Phases, Offset])
def test_a_silent_failure_is_found(net, plugin):
    said = r"the gradient of layer 'net\.\w+'.* no longer points where fp32's does|the loss differs from fp32's by"
    with pytest.warns(UserWarning, match=said):
        latest = watch(Task(net()), plugin(), Batches(6, count=2)).latest
    worst = min(each["grad_cosine"] for each in latest["layers"].values() if each["grad_cosine"] is not None)
    assert worst < 0.99 or latest["loss_gap"] > 0.05


@pytest.mark.parametrize("plugin", [lambda: ours("fp16"), lambda: stock("fp16")], ids=["ours", "stock"])
def test_a_cancelling_loss_is_found_although_each_layer_alone_is_precise(plugin):
    with pytest.warns(UserWarning, match="(the loss differs from fp32's by|no longer points)"):
        latest = watch(Cancelling(), plugin(), Batches(6, count=2)).latest
    assert latest["layers"]["net"]["sqnr_db"] > 60
    assert latest["loss_gap"] > 0.05


@pytest.mark.filterwarnings("error:.*(no longer points|differs from fp32)")
@pytest.mark.parametrize(("net", "rule"), [(Phases, "net"), (Offset, "net.body")])
def test_what_a_warning_asks_for_helps(net, rule):
    latest = watch(Task(net()), ours({"default": "fp16", rule: "fp32"}), Batches(6, count=2)).latest
    assert latest["loss_gap"] < 6e-3


def test_a_limit_of_zero_warns_of_opposite_gradients_alone():
    latest = watch(Task(Offset()), ours("fp16"), Batches(6, count=1), min_cosine=0.0, max_loss_gap=1e9).latest
    assert 0 < min(each["grad_cosine"] for each in latest["layers"].values() if each["grad_cosine"] is not None) < 0.99


def test_all_layers_that_are_off_are_one_warning():
    with pytest.warns(UserWarning) as caught:
        watch(Task(Offset()), ours("fp16"), Batches(6, count=3))
    assert len([each for each in caught if "no longer points" in str(each.message)]) == 1


@pytest.mark.filterwarnings("error:.*(no longer points|differs from fp32)")
@pytest.mark.parametrize("net", [Phases, Offset])
def test_one_sample_is_no_reason_to_warn(net):
    monitor = watch(Task(net()), ours("fp16"), Batches(6, count=1))
    assert monitor._off or monitor._gap_is_large


class Validated(Task):
    def validation_step(self, batch, batch_idx):
        return None


def test_a_step_after_a_validation_in_other_formats_is_studied_in_those_of_training():
    gaps = []
    for eval_policy in (None, "fp32"):
        monitor, plugin = FidelityMonitor(1), PerLayerPrecision("bf16", eval_policy=eval_policy)
        run = trainer(plugin, callbacks=[monitor], val_check_interval=1)
        torch.manual_seed(0)
        run.fit(Validated(mlp()), Batches(6), Batches(6, count=1))
        gaps.append(monitor.latest)
    assert gaps[0] == gaps[1]
    assert gaps[0]["loss_gap"] > 0


# The numbers themselves


def by_hand(task, batch, format):
    """Loss and gradients of a copy, as autocast computes them; fp16 gradients scaled and unscaled."""
    task, dtype = copy.deepcopy(task), {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}[format]
    scale = 1024.0 if format == "fp16" else 1.0
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = nn.functional.mse_loss(task.net(batch[0]), batch[1])
    (loss * scale).backward()
    return loss.item(), {name: param.grad.double() / scale for name, param in task.net.named_parameters()}


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("net", [mlp, Offset, Phases])
@pytest.mark.parametrize("format", ["fp16", "bf16"])
@pytest.mark.parametrize("plugin", [ours, stock], ids=["ours", "stock"])
def test_gap_and_cosines_are_those_of_two_runs_by_hand(net, format, plugin):
    task, [batch, *_] = Task(net()), Batches(6).batches
    state = torch.get_rng_state()
    results = []
    for each in (format, "fp32"):
        torch.set_rng_state(state)  # the same dropout
        results.append(by_hand(task, batch, each))
    (low, low_gradients), (reference, gradients) = results
    torch.set_rng_state(state)
    latest = watch(task, plugin(format), every_n_steps=1000).latest
    assert latest["loss_gap"] == pytest.approx(abs(low - reference) / abs(reference), rel=1e-4, abs=1e-9)
    for layer, module in task.net.named_modules():
        names = [f"{layer}.{name}" for name, _ in module.named_parameters(recurse=False)]
        if names:
            one, other = (torch.cat([each[name].flatten() for name in names]) for each in (low_gradients, gradients))
            cosine = nn.functional.cosine_similarity(one, other, 0).item()
            assert latest["layers"][f"net.{layer}"]["grad_cosine"] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_the_sqnr_of_a_layer_is_that_of_its_output_against_the_same_layer_in_fp32(format):
    task, [(x, _), *_] = Task(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))), Batches(6).batches
    net, dtype = copy.deepcopy(task.net), {"fp16": torch.float16, "bf16": torch.bfloat16}[format]
    expected = {}
    with torch.no_grad():
        for name, layer in net.named_children():
            with torch.autocast("cpu", dtype):
                low = layer(x)
            exact = layer(x.float())  # the input of each is what the run gave it
            noise = (low.double() - exact.double()).square().sum()
            expected[name] = 10 * torch.log10(exact.double().square().sum() / noise).item()
            x = low
    latest = watch(task, ours(format), every_n_steps=1000).latest
    for name, sqnr_db in expected.items():
        assert latest["layers"][f"net.{name}"]["sqnr_db"] == pytest.approx(sqnr_db, abs=0.01)


def test_a_layer_whose_state_moves_with_every_call_is_compared_in_the_same_state():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 64))
    latest = watch(Task(nn.Sequential(layer, nn.Linear(64, 2))), ours("fp16"), every_n_steps=1000).latest
    assert latest["layers"]["net.0"]["sqnr_db"] > 55
    assert latest["layers"]["net"]["sqnr_db"] > 55


def test_dropout_is_compared_with_the_same_dropout():
    net = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 2))
    layers = watch(Task(net), ours("fp16"), every_n_steps=1000).latest["layers"]
    assert all(layers[name]["sqnr_db"] > 50 for name in ("net", "net.1"))


@pytest.mark.filterwarnings(QUIET)
def test_gradients_are_compared_at_the_runs_loss_scale():
    class Small(Task):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 1e-7

    worst = {}
    for scale in (False, 2.0**16):
        torch.manual_seed(0)
        latest = watch(Small(mlp()), PerLayerPrecision("fp16", loss_scaling=scale), every_n_steps=1000).latest
        cosines = [values["grad_cosine"] for values in latest["layers"].values() if values["grad_cosine"] is not None]
        worst[scale] = min(cosines)
    assert worst[2.0**16] > 0.999
    assert worst[False] < 0.9


def test_two_losses_that_are_both_zero_do_not_differ():
    class Zero(Task):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0

    assert watch(Zero(mlp()), ours("fp16")).latest["loss_gap"] == 0


def test_a_step_that_runs_backward_itself_has_no_loss_to_compare_but_gradients():
    class ByHand(Task):
        def __init__(self):
            super().__init__(mlp())
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            super().training_step(batch, batch_idx).backward()
            self.optimizers().step()

    latest = watch(ByHand(), ours("bf16")).latest
    assert math.isnan(latest["loss_gap"])
    assert latest["layers"]["net.0"]["grad_cosine"] > 0.99


@pytest.mark.filterwarnings(QUIET)
def test_an_overflow_is_no_question_of_fidelity():
    class Overflowing(Task):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 1e6

    monitor = watch(Overflowing(mlp()), PerLayerPrecision("fp16"), Batches(6, count=1))
    cosines = [values["grad_cosine"] for values in monitor.latest["layers"].values()]
    assert cosines == [None] * len(cosines)
    assert not [key for key in monitor._warned if key.startswith("cosine")]


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("value", [60000.0, math.inf, math.nan])
def test_an_output_that_is_not_finite_is_all_noise_and_no_problem(value):
    batches = Batches(6, count=1)
    batches.batches[0][0].fill_(value)
    task = Task(nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 2)))
    nn.init.ones_(task.net[0].weight)
    monitor = watch(task, PerLayerPrecision("fp16"), batches, every_n_steps=1000)
    [sqnr] = [row["sqnr_db"] for row in rows() if row.get("layer") == "net.0"]
    assert sqnr is None
    expected = -math.inf if math.isfinite(value) else math.nan
    assert monitor.latest["layers"]["net.0"]["sqnr_db"] == pytest.approx(expected, nan_ok=True)


# Rotation and bounds


def rows():
    return [json.loads(line) for line in Path("mixprec.jsonl").read_text().splitlines()]


def test_the_turn_reaches_every_layer():
    monitor = watch(Task(mlp()), ours("fp16"), Batches(6, count=3), layers_per_sample=3)
    compared = [[row["layer"] for row in rows() if row["batch_idx"] == step and row.get("sqnr_db")] for step in (0, 1)]
    assert len(compared[0]) == 3 or len(compared[1]) == 3
    assert not {*compared[0]} & {*compared[1]}
    have = {name for name, values in monitor.latest["layers"].items() if values["sqnr_db"] is not None}
    assert have == {"net", *(f"net.{place}" for place in range(7))}


def test_layers_that_would_take_too_much_memory_are_left_out_and_listed():
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 500), nn.Linear(500, 2))
    latest = watch(Task(net), ours("fp16"), every_n_steps=1000, max_bytes=1000).latest
    [row] = [row for row in rows() if "too_large" in row]
    assert {"net.1", "net.2"} <= {*row["too_large"]}
    assert latest["layers"]["net.1"]["sqnr_db"] is None
    assert latest["layers"]["net.1"]["grad_cosine"] is not None


def test_the_summary_and_the_drawing_name_the_layers(capsys):
    import matplotlib

    matplotlib.use("Agg")
    monitor = watch(Task(mlp()), ours("fp16"))
    assert "net.6" in capsys.readouterr().out
    figure, axes = monitor.plot()
    assert "net.6" in [label.get_text() for label in axes.get_yticklabels()]
    matplotlib.pyplot.close(figure)


# Samples that overflow


def cosines_after(scale, batches, **options):
    """The monitor after a run whose loss scale begins at ``scale`` and overflows until it has come down."""
    monitor = FidelityMonitor(every_n_steps=100, **options)
    torch.manual_seed(1)
    plugin = PerLayerPrecision("fp16", loss_scaling={"init_scale": scale, "max_scale": scale})
    fit(
        Task(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))),
        plugin,
        Batches(6, count=batches),
        callbacks=[monitor],
    )
    assert plugin.skipped_steps > 1
    return monitor


def test_a_sample_whose_gradients_overflow_is_taken_again_until_they_do_not():
    monitor = cosines_after(2.0**20, batches=12)
    cosines = [values["grad_cosine"] for values in monitor.latest["layers"].values()]
    assert min(cosine for cosine in cosines if cosine is not None) > 0.999
    assert monitor._values["min_grad_cosine"] > 0.999


def test_it_is_taken_again_sixteen_times_at_most():
    monitor = cosines_after(2.0**120, batches=30)
    assert monitor._retries_left == 0
    assert math.isnan(monitor._values["min_grad_cosine"])


def test_the_reference_alone_is_computed_without_tf32(monkeypatch):
    asked = []

    @contextlib.contextmanager
    def noted(device):
        asked.append("begin")
        yield
        asked.append("end")

    class Noting(Task):
        def training_step(self, batch, batch_idx):
            asked.append("step")
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(replay, "without_tf32", noted)
    fit(Noting(mlp()), ours("bf16"), Batches(6, count=1), callbacks=[FidelityMonitor()])
    assert asked == ["step", "begin", "step", "end", "step"]


class Squaring(nn.Module):
    """Numbers above 256 become infinite in fp16, and what is handed on zero: nothing is learned, nothing fails."""

    def forward(self, x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.filterwarnings("ignore:.*the loss differs")
def test_a_layer_whose_output_is_noise_is_named_and_heads_the_table(capsys):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), Squaring(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    batches = Batches(6)
    batches.batches = [(1e4 * x, y) for x, y in batches.batches]
    with pytest.warns(UserWarning, match=r"The output of 'net\.1' is noise \(SQNR -?0\.0 dB\).*'net\.1': 'fp32'"):
        fit(Task(net), ours("fp16"), batches, callbacks=[FidelityMonitor(every_n_steps=1)])
    table = capsys.readouterr().out.split("FidelityMonitor:")[1].splitlines()
    assert table[2].split()[0] == "net.1"
