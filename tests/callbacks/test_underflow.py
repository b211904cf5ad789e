"""What UnderflowMonitor says of gradients, against the model recomputed in float64 and real casts."""

import copy
import json
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from plugin_models import Batches, Call, Task, fit, ours, stock
from torch import nn

from lightning_mixprec import FidelityMonitor, PerLayerPrecision, UnderflowMonitor

pytestmark = pytest.mark.filterwarnings("ignore:.*vanish in")

CASTS = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "e5m2": ml_dtypes.float8_e5m2, "fp32": np.float32}
TINY = {"fp16": 2.0**-14, "bf16": 2.0**-126, "e5m2": 2.0**-14, "fp32": 2.0**-126}
HUGE = {"fp16": 65504.0, "bf16": 3.3895313892515355e38, "e5m2": 57344.0, "fp32": 3.4028234663852886e38}


class Uneven(nn.Module):
    """Multiplies by constants whose logarithms are spread widely, and so spreads gradients."""

    def __init__(self, features: int, width: float, seed: int) -> None:
        super().__init__()
        spread = torch.randn(features, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("factors", torch.exp(width * spread))

    def forward(self, x):
        return x * self.factors


def spread() -> nn.Sequential:
    """Gradients that are partly below fp16 at usual loss scales; some are zero, where a ReLU is dead."""
    torch.manual_seed(5)
    layers = [nn.Linear(6, 16), nn.ReLU(), Uneven(16, 4.0, 1), nn.Linear(16, 16, bias=False), Uneven(16, 2.0, 2)]
    net = nn.Sequential(*layers, nn.Linear(16, 2))
    nn.init.constant_(net[0].bias, -0.3)
    return net


class Weighted(Task):
    """A regression whose loss has a small weight."""

    def __init__(self, net: nn.Module, weight: float) -> None:
        super().__init__(net)
        self.weight = weight

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.weight


def oracle(task, batch, divisor=1):
    """Gradients in float64 of each layer's weights, and those that arrive at each layer's output."""
    net = copy.deepcopy(task.net).double()
    arriving, handles = {}, []
    for name, module in net.named_children():
        hook = lambda module, to_input, to_output, name=name: arriving.update({name: to_output[0].numpy()})  # noqa: E731
        handles.append(module.register_full_backward_hook(hook))
    x, y = (each.double() for each in batch)
    x.requires_grad_()  # or a first layer's hook has nothing to report
    (nn.functional.mse_loss(net(x), y) * getattr(task, "weight", 1.0) / divisor).backward()
    own = {
        name: np.concatenate([param.grad.flatten().numpy() for param in module.parameters()])
        for name, module in net.named_children()
        if [*module.parameters()]
    }
    return own, arriving


def lost(gradient, format, scale):
    gradient = gradient[gradient != 0] * scale
    with np.errstate(over="ignore"):
        return float((gradient.astype(CASTS[format]).astype(np.float64) == 0).mean())


def subnormal(gradient, format, scale):
    gradient = np.abs(gradient[gradient != 0] * scale)
    with np.errstate(over="ignore"):
        survives = gradient.astype(CASTS[format]).astype(np.float64) != 0
    return float((survives & (gradient < TINY[format])).mean())


def measured(plugin, weight, monitor=None, net=spread, **options):
    """The monitor's findings of the first batch, and the oracle's."""
    task, monitor = Weighted(net(), weight), monitor or UnderflowMonitor(1000, max_elements=None)
    expected = oracle(task, Batches(6).batches[0], options.get("accumulate_grad_batches", 1))
    fit(task, plugin, callbacks=[monitor], **options)
    return monitor.latest, *expected


MIXED = {"default": "fp16", "net.0": "bf16", "net.5": "fp32"}


@pytest.mark.parametrize("weight", [1.0, 1e-8, 1e-10])
@pytest.mark.parametrize(
    ("plugin", "scale"),
    [
        (lambda: ours("fp16"), 1024.0),
        (lambda: stock("fp16"), 1024.0),
        (lambda: ours(MIXED), 1024.0),
        (lambda: PerLayerPrecision("fp16", loss_scaling=4096), 4096.0),
        (lambda: PerLayerPrecision("fp16", loss_scaling=False), 1.0),
        (lambda: ours("bf16"), 1.0),
        (lambda: None, 1.0),
    ],
    ids=["fp16", "stock fp16", "mixed", "static scale", "no loss scaling", "bf16", "stock fp32"],
)
def test_what_is_lost_is_what_a_cast_of_the_float64_gradient_loses(plugin, scale, weight):
    latest, own, arriving = measured(plugin(), weight)
    for layer, gradients in (("net." + name, (own.get(name, each), each)) for name, each in arriving.items()):
        values = latest[layer]
        for prefix, gradient in zip(("", "flow_"), gradients, strict=True):
            # fp32 and fp64 fall on different sides of a limit now and then.
            rate, share = lost(gradient, values["format"], scale), subnormal(gradient, values["format"], scale)
            assert values[f"{prefix}underflow_rate"] == pytest.approx(rate, abs=0.02)
            assert values[f"{prefix}subnormal_share"] == pytest.approx(share, abs=0.02)
            bits = math.log2(HUGE[values["format"]] / np.abs(gradient * scale).max())
            assert values[f"{prefix}headroom_bits"] == pytest.approx(bits, abs=1e-4)


def test_a_scale_that_is_no_power_of_two_is_known_to_the_width_of_a_bin():
    latest, own, _ = measured(PerLayerPrecision("fp16", loss_scaling=1000), 1e-10)
    for name in ("0", "3"):
        least, most = lost(own[name], "fp16", 1024.0), lost(own[name], "fp16", 512.0)
        assert least - 0.02 <= latest[f"net.{name}"]["underflow_rate"] <= most + 0.02
        bits = math.log2(65504 / (1000 * np.abs(own[name]).max()))
        assert latest[f"net.{name}"]["headroom_bits"] == pytest.approx(bits, abs=1e-4)


def test_the_models_of_these_tests_lose_a_part_of_their_gradients():
    own, arriving = oracle(Weighted(spread(), 1e-10), Batches(6).batches[0])
    rates = [lost(each, "fp16", 1024.0) for each in (*own.values(), *arriving.values())]
    assert len([rate for rate in rates if 0.15 < rate < 0.85]) >= 3
    assert any((each == 0).any() for each in own.values())


def test_each_layer_is_judged_in_its_own_format():
    latest, *_ = measured(ours(MIXED), 1e-9)
    assert [latest[f"net.{place}"]["format"] for place in (0, 3, 5)] == ["bf16", "fp16", "fp32"]
    assert latest["net.3"]["underflow_rate"] > 0.2
    assert latest["net.0"]["underflow_rate"] == latest["net.5"]["underflow_rate"] == 0


def test_accumulation_divides_the_gradients():
    latest, own, _ = measured(ours("fp16"), 1e-5, accumulate_grad_batches=4)
    assert latest["net.3"]["headroom_bits"] == pytest.approx(
        math.log2(65504 / (1024 * np.abs(own["3"]).max())), abs=1e-4
    )


def test_a_sample_of_the_elements_is_close_and_its_largest_exact():
    def wide():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(6, 128), Uneven(128, 3.0, 1), nn.Linear(128, 128), nn.Linear(128, 2))

    latest, own, _ = measured(ours("fp16"), 1e-7, UnderflowMonitor(1000, max_elements=2000), net=wide)
    assert latest["net.2"]["underflow_rate"] == pytest.approx(lost(own["2"], "fp16", 1024.0), abs=0.05)
    bits = math.log2(65504 / (1024 * np.abs(own["2"]).max()))
    assert latest["net.2"]["headroom_bits"] == pytest.approx(bits, abs=1e-4)


@pytest.mark.parametrize("weight", [1e-5, 1e-10])
def test_what_other_formats_would_lose(weight):
    latest, own, _ = measured(ours("fp16"), weight)
    what_if = latest["net.3"]["what_if"]
    assert what_if.keys() == {"fp16", "bf16", "fp8"}
    assert what_if["fp8"]["underflow_rate"] == pytest.approx(lost(own["3"], "e5m2", 1024.0), abs=0.02)
    assert what_if["bf16"]["underflow_rate"] == pytest.approx(lost(own["3"], "bf16", 1.0), abs=0.02)
    assert what_if["fp16"]["underflow_rate"] == latest["net.3"]["underflow_rate"]


def test_the_best_scale_keeps_what_can_be_kept_and_overflows_nothing():
    latest, own, arriving = measured(ours("fp16"), 1e-9)
    for name in ("0", "3", "5"):
        what_if = latest[f"net.{name}"]["what_if"]["fp16"]
        scale, gradients = what_if["best_scale"], (own[name], arriving[name])
        assert math.log2(scale) == round(math.log2(scale))
        assert all(np.isfinite((each * scale).astype(np.float16)).all() for each in gradients)
        # "fits" is of all scales; near the best one it is decided by what is lost there.
        loses = max(lost(each, "fp16", 2 * scale) for each in gradients)
        assert what_if["fits"] is (loses <= 0.01)


def test_a_layer_without_weights_has_the_rate_of_the_gradient_that_arrives_at_it():
    latest, *_ = measured(ours("fp16"), 1e-9)
    assert latest["net.2"]["underflow_rate"] == latest["net.2"]["flow_underflow_rate"] > 0


def test_a_layer_that_writes_to_its_input_is_a_layer_like_any_other():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    _, arriving = oracle(Weighted(net, 1e-6), Batches(6).batches[0])
    net[1].inplace = True
    monitor = UnderflowMonitor(1000)
    fit(Weighted(net, 1e-6), ours("fp16"), callbacks=[monitor])
    latest = monitor.latest
    assert latest["net.1"]["flow_headroom_bits"] != latest["net.0"]["flow_headroom_bits"]
    rate = lost(arriving["1"], "fp16", 1024.0)
    assert latest["net.1"]["flow_underflow_rate"] == pytest.approx(rate, abs=0.02)


# Warnings


def test_a_layer_that_loses_much_is_named_with_a_loss_scale_that_would_keep_it():
    with pytest.warns(
        UserWarning, match=r"step 0: [0-9]+% of the gradient of layer 'net.*' .*vanish in fp16"
    ) as caught:
        latest, *_ = measured(
            ours("fp16"), 1e-11, UnderflowMonitor(1), net=lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
        )
    [message] = [str(each.message) for each in caught if "vanish" in str(each.message)]
    assert "raise init_scale, or compute it in bf16" in message
    assert "'net.0'" in message
    assert "'net.1'" in message  # all that lose are one warning


def test_a_layer_for_which_no_scale_does_is_to_compute_in_bf16():
    net = nn.Sequential(nn.Linear(6, 64), Uneven(64, 30.0, 1), nn.Linear(64, 2))
    net[1].factors.clamp_(max=1.0)
    with pytest.warns(UserWarning, match=r"vanish in fp16 .*compute it in bf16, for example policy=.*'bf16'"):
        measured(ours("fp16"), 1.0, UnderflowMonitor(1, max_elements=None), net=lambda: net)


class Apart(nn.Module):
    """Two branches, one of whose gradients are so small that they need a larger loss scale than the other one bears."""

    def __init__(self):
        super().__init__()
        self.loud, self.faint = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        return self.loud(x) + self.faint(x) * 1e-9


def test_no_loss_scale_is_advised_at_which_another_layer_overflows():
    with pytest.warns(UserWarning, match="of the gradient of layer 'net.faint' vanish") as caught:
        latest, own, _ = measured(ours("fp16"), 1.0, UnderflowMonitor(1), net=Apart)
    [message] = [str(each.message) for each in caught if "vanish" in str(each.message)]
    advised = float(re.search(r"a loss scale of ([\d.]+) would keep more of it", message)[1])
    assert (
        advised
        == latest["net.loud"]["what_if"]["fp16"]["best_scale"]
        < latest["net.faint"]["what_if"]["fp16"]["best_scale"]
    )
    assert np.abs(own["loud"] * advised).max() < 65504


@pytest.mark.filterwarnings("error:.*vanish in")
def test_a_healthy_run_is_not_warned_of():
    measured(ours("fp16"), 1.0, UnderflowMonitor(1), net=lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)))


# Stagnation


class Straight(Task):
    """The gradient of every weight is 1."""

    def __init__(self, weights, lr):
        super().__init__(nn.Linear(len(weights), 1, bias=False), lambda params: torch.optim.SGD(params, lr=lr))
        self.net.weight.data = torch.tensor([weights])

    def training_step(self, batch, batch_idx):
        return self.net(torch.ones(1, self.net.in_features)).sum()


@pytest.mark.parametrize(
    ("weights", "lr", "rate"),
    [
        ([1.0, 2.0, 4.0, 1e9], 2.0**-24, 0.75),  # below 1 numbers are 2**-24 apart, from 1 to 2 twice that
        ([0.0, 1e-3, 8.0, 16.0], 1e-3, 0.0),
        ([3e8, 3e8, 3e8, 3e8], 1e-3, 1.0),
    ],
)
@pytest.mark.parametrize("plugin", [lambda: ours("bf16"), lambda: None], ids=["ours", "stock fp32"])
def test_updates_that_change_nothing_are_counted(plugin, weights, lr, rate):
    monitor = UnderflowMonitor(1)
    fit(Straight(weights, lr), plugin(), callbacks=[monitor], max_steps=1)
    assert monitor.latest["net"]["stagnation_rate"] == rate


def test_a_frozen_weight_does_not_stagnate_whatever_gradient_it_has_left():
    task, monitor = Straight([3e8, 3e8, 3e8, 3e8], 1e-3), UnderflowMonitor(1)
    before = Call("on_before_optimizer_step", lambda run, model: model.net.weight.requires_grad_(False))
    fit(task, None, callbacks=[before, monitor], max_steps=1)
    assert monitor.latest["net"].get("stagnation_rate") is None


def test_weights_stored_in_bf16_stagnate_where_fp32_would_not():
    rates = {}
    for precision in ("bf16-true", "32-true"):
        monitor, task = UnderflowMonitor(1), Straight([1.0, 0.001, 100.0, 0.5], 1e-3)
        fit(task, callbacks=[monitor], precision=precision, max_steps=1)
        rates[precision] = monitor.latest["net"]["stagnation_rate"]
    # bf16 has 8 bits: the steps below 1, 0.5, 0.001 and 100 are 2**-8, 2**-9, 2**-17 and 2**-2... half of it counts.
    assert rates == {"bf16-true": 0.5, "32-true": 0.0}


@pytest.mark.parametrize("plugin", [lambda: ours("fp16"), lambda: stock("fp16")], ids=["ours", "stock"])
def test_a_step_that_was_skipped_says_nothing_of_stagnation(plugin):
    spoil = Call("on_after_backward", lambda run, model: model.net.weight.grad.fill_(math.inf), at=0)
    monitor = UnderflowMonitor(1)
    fit(Straight([1.0, 2.0], 0.1), plugin(), callbacks=[monitor, spoil], limit_train_batches=1)
    assert monitor.latest["net"]["stagnation_rate"] is None


@pytest.mark.parametrize("every", [1, 4])
def test_stagnation_is_that_of_the_next_step_where_gradients_are_accumulated(every):
    monitor = UnderflowMonitor(every)
    fit(Straight([3e8, 1.0], 1e-3), ours("bf16"), callbacks=[monitor], accumulate_grad_batches=2)
    assert monitor.latest["net"]["stagnation_rate"] == 0.5


def test_a_checkpoint_has_what_the_latest_sampled_step_did():
    monitor, states = UnderflowMonitor(3), []
    look = Call("on_train_batch_end", lambda run, model: states.append(monitor.state_dict()))
    fit(Straight([3e8, 1.0], 1e-3), ours("bf16"), callbacks=[monitor, look])
    assert [state["latest"]["net"]["stagnation_rate"] for state in states] == [0.5] * 4


def test_each_row_of_stagnation_belongs_to_the_step_it_is_about():
    fit(Straight([3e8, 1.0], 1e-3), ours("bf16"), callbacks=[UnderflowMonitor(2)])
    rows = [json.loads(line) for line in Path("mixprec.jsonl").read_text().splitlines()]
    assert [row["batch_idx"] for row in rows if "stagnation_rate" in row and "format" not in row] == [0, 2]


@pytest.mark.parametrize("layer", ["net.0", ""])
def test_the_summary_and_the_drawing_name_the_layers(layer, capsys):
    import matplotlib

    matplotlib.use("Agg")
    monitor = UnderflowMonitor(1)
    task = Task(nn.Sequential(nn.Linear(6, 2)))
    task.register_parameter("offset", nn.Parameter(torch.zeros(())))
    step = task.training_step
    task.training_step = lambda batch, batch_idx: step(batch, batch_idx) + 1e-12 * task.offset
    fit(task, ours("fp16"), callbacks=[monitor])
    assert (layer or '""') in capsys.readouterr().out
    figure, axes = monitor.plot()
    assert (layer or '""') in [label.get_text() for label in axes.get_yticklabels()]
    matplotlib.pyplot.close(figure)


def test_a_loss_scale_of_zero_ends_no_run_and_everything_vanishes():
    plugin, monitor = stock("fp16"), UnderflowMonitor()
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-200)
    plugin.scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))  # what halving fp32's least number comes to
    assert plugin.scaler.get_scale() == 0
    fit(Task(spread()), plugin, callbacks=[monitor])
    assert {values["underflow_rate"] for values in monitor.latest.values() if "underflow_rate" in values} == {1.0}


class Scored(Task):
    """A task whose network returns its loss from its forward, as models of other people's do."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(Scoring(weight))

    def training_step(self, batch, batch_idx):
        return self.net(*batch)["loss"]


class Scoring(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.head, self.weight = nn.Linear(6, 2), weight

    def forward(self, x, y):
        logits = self.head(x) * 1
        return {"loss": self.weight * nn.functional.mse_loss(logits, y), "logits": logits}


@pytest.mark.parametrize("plugin", [lambda: PerLayerPrecision("fp16"), lambda: stock("fp16")], ids=["ours", "stock"])
@pytest.mark.parametrize("watching", [[], [FidelityMonitor(1)]], ids=["alone", "with fidelity"])
@pytest.mark.filterwarnings("ignore:.*gradient of layer")
def test_a_loss_inside_the_network_is_no_number_of_fp16(plugin, watching):
    """Its gradient is the loss scale, which would be infinite in fp16; the one of what it is computed from is small."""
    monitor, chosen = UnderflowMonitor(1), plugin()
    if not isinstance(chosen, PerLayerPrecision):
        chosen.scaler = torch.amp.GradScaler("cpu")
    fit(Scored(weight=0.1), chosen, callbacks=[monitor, *watching])
    values = monitor.latest["net"]
    assert values["format"] == "fp16" and 2 < values["flow_headroom_bits"] < 16 and values["flow_underflow_rate"] == 0
    assert monitor.latest["net.head"]["format"] == "fp16"


def test_what_vanishes_on_its_way_through_an_fp32_loss_is_found_all_the_same():
    monitor = UnderflowMonitor(1000)
    fit(Scored(weight=1e-15), PerLayerPrecision("fp16"), callbacks=[monitor])
    assert monitor.latest["net.head"]["underflow_rate"] == 1


class OwnGradients(Task):
    """Puts gradients of its own into the weights: no loss goes backward through Lightning, so none is scaled."""

    def __init__(self):
        super().__init__(nn.Linear(6, 2))
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = 16 * super().training_step(batch, batch_idx)
        for param, grad in zip(self.parameters(), torch.autograd.grad(loss, list(self.parameters())), strict=True):
            param.grad = grad
        self.optimizers().step()


def test_gradients_of_a_loss_that_is_not_scaled_are_told_of_without_the_loss_scale():
    monitor, fidelity = UnderflowMonitor(), FidelityMonitor()
    fit(OwnGradients(), PerLayerPrecision("fp16"), Batches(6, count=1), callbacks=[monitor, fidelity])
    assert monitor.latest["net"]["headroom_bits"] > 8
    assert fidelity.latest["layers"]["net"]["grad_cosine"] > 0.99
