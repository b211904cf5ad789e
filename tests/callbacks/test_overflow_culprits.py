"""A planted culprit is named: the layer, the direction, and that precision is to blame."""

import copy

import pytest
import torch
from known_results import INF, stock
from monitor_models import CULPRITS, FACTOR, STARVED, Gain, Planted, Spike, Watched, batches, mlp, watch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mixprec import LossScaling, PerLayerPrecision

DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "backward"])
PLUGINS = pytest.mark.parametrize("make_plugin", [lambda: PerLayerPrecision("fp16"), stock], ids=["ours", "stock"])


def accused(event):
    return event["verdict"], event["layer"], event["direction"]


@PLUGINS
@DIRECTIONS
@pytest.mark.parametrize("name", CULPRITS)
def test_a_planted_culprit_is_named(name, direction, make_plugin):
    net, culprit = CULPRITS[name]
    (event,) = watch(Watched(net(direction)), make_plugin()).events
    assert accused(event) == ("precision", culprit, direction)
    assert (event["format"], event["fits"], event["smaller_scale"]) == ("fp16", "bf16", None)
    assert event["value"] > 65504


@DIRECTIONS
@pytest.mark.parametrize("name", CULPRITS)
def test_the_advice_of_the_message_ends_the_overflow(name, direction):
    # The culprit and what it hands its value or its gradient to, which is the calm or the rest of the block.
    regions = {"mlp": "net.2", "resnet": "net.blocks.1.planted", "transformer": "net.blocks.1", "shared": "net"}
    advised = PerLayerPrecision({"default": "fp16", regions[name]: "bf16"}, loss_scaling=1024)
    model = Watched(CULPRITS[name][0](direction), weight=1.0)
    assert watch(copy.deepcopy(model), PerLayerPrecision("fp16", loss_scaling=1024)).events != []
    assert watch(model, advised).events == []


@pytest.mark.parametrize("name", CULPRITS)
def test_gradients_that_a_smaller_scale_tames_accuse_no_layer(name):
    net, _ = CULPRITS[name]
    model = Watched(net("backward"), weight=1.0)
    (event,) = watch(copy.deepcopy(model)).events
    assert accused(event) == ("scale", None, None)
    assert event["smaller_scale"] < event["loss_scale"] == 65536
    steady = LossScaling(init_scale=event["smaller_scale"], growth_interval=1000)
    monitor = watch(model, PerLayerPrecision("fp16", loss_scaling=steady))
    assert (monitor.events, monitor.skipped_steps) == ([], 0)


def test_the_value_is_what_fp32_computes():
    model = Watched(nn.Sequential(nn.Linear(8, 4), Planted("forward")))
    batch = batches()[0]
    with torch.autocast("cpu", torch.float16):
        expected = model.net[0](batch).float().abs().max() * FACTOR
    (event,) = watch(model).events
    assert event["value"] == pytest.approx(expected.item(), rel=1e-2)


def test_the_value_of_a_gradient_is_times_the_loss_scale():
    model = Watched(nn.Sequential(nn.Linear(8, 4), Planted("backward")))
    with torch.no_grad():
        largest = (2 * model.net(batches()[0]) / 16).abs().max().item()
    (event,) = watch(model).events
    assert event["value"] == pytest.approx(largest * FACTOR * 65536, rel=1e-2)


class Own(Watched):
    """Overflows in what the LightningModule computes itself."""

    def __init__(self, loss):
        super().__init__(nn.Linear(8, 4))
        self.loss = loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch))


OWN = {
    "matmul": lambda h: (h * 512 @ (h * 512).T).mean().float() * 2**-18,
    "einsum": lambda h: torch.einsum("ij,ij->", h * 256, h * 256).float() * 2**-16,
    "product": lambda h: ((h * FACTOR) * (1 / FACTOR)).float().mean(),
    "penalty": lambda h: (h + (h > 0).logical_not() * torch.tensor(-1e9).to(h.dtype)).softmax(-1).float().mean(),
}


@pytest.mark.parametrize("loss", OWN.values(), ids=OWN)
def test_the_modules_own_operations_are_a_layer(loss):
    (event,) = watch(Own(loss)).events
    assert accused(event) == ("precision", "", "forward")
    assert event["fits"] == "bf16"
    assert "the LightningModule itself" in event["message"]


def test_the_modules_own_gradient_is_accused():
    def loss(h):
        return ((h * (1 / FACTOR)) * FACTOR).float().square().mean()

    class Backward(Own):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + STARVED * self.other(batch).float().sum()

    (event,) = watch(Backward(loss)).events
    assert accused(event) == ("precision", "", "backward")


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_a_loss_in_fp16_may_be_larger_times_the_scale_than_fp16_holds(size):
    # d(loss)/d(loss) = scale has to fit into fp16; the loss times the scale does not.
    monitor = watch(Own(lambda h: h.sum() * 0 + size), PerLayerPrecision("fp16", loss_scaling=32768))
    assert (monitor.events, monitor.skipped_steps) == ([], 0)
    (event,) = watch(Own(lambda h: h.sum() * 0 + size)).events
    assert (event["verdict"], event["smaller_scale"]) == ("scale", 32768)


class Recomputing(nn.Module):
    """Computes what is inside it again during backward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


@DIRECTIONS
def test_a_culprit_inside_a_checkpointed_layer_is_named(direction):
    (event,) = watch(Watched(nn.Sequential(nn.Linear(8, 8), Recomputing(mlp(direction))))).events
    assert accused(event) == ("precision", "net.1.inner.2.spike", direction)


@DIRECTIONS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_culprit_inside_a_compiled_layer_is_named_without_compiling(direction):
    model = Watched(mlp(direction))
    model.net = torch.compile(model.net, backend="eager")
    (event,) = watch(model).events
    assert accused(event) == ("precision", "net.2.spike", direction)


class FarApart(Watched):
    """Two tasks of one body whose weights differ by 1e12; autocast computes their losses in fp32."""

    def __init__(self):
        super().__init__(nn.Linear(8, 8))
        self.heavy, self.light = nn.Sequential(nn.Linear(8, 4)), nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        h, target = self.net(batch), batch[:, :4]
        heavy, light = nn.functional.mse_loss(self.heavy(h), target), nn.functional.mse_loss(self.light(h), target)
        return 1e6 * heavy + 1e-6 * light


@PLUGINS
def test_a_gradient_that_is_cast_is_blamed_on_the_layer_in_whose_format_it_has_to_fit(make_plugin):
    model = FarApart()
    with torch.no_grad():
        target = batches()[0][:, :4]
        largest = (1e6 * (model.heavy(model.net(batches()[0])) - target) / 8).abs().max().item()
    (event,) = watch(copy.deepcopy(model), make_plugin()).events
    assert (*accused(event), event["op"]) == ("precision", "heavy.0", "backward", "_to_copy")
    assert event["value"] == pytest.approx(largest * 65536, rel=1e-2)
    wide = "c=bf16,o=fp32"
    advised = PerLayerPrecision({"default": "fp16", "heavy.0": wide, "net": wide}, loss_scaling=64)
    assert watch(model, advised).events == []


class TwoLosses(Watched):
    """One task that overflows, one that does not; summed, or each with a backward of its own."""

    def __init__(self, direction, manual):
        super().__init__(nn.Linear(8, 8))
        self.automatic_optimization = not manual
        self.bad, self.good = nn.Sequential(Planted(direction), nn.Linear(8, 2)), nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        h = self.net(batch)
        losses = [self.good(h).float().square().mean(), self.bad(h).float().square().mean()]
        losses.append(STARVED * self.other(batch).float().sum())
        if self.automatic_optimization:
            return sum(losses)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for place, loss in enumerate(losses):
            self.manual_backward(loss, retain_graph=place == 0)
        optimizer.step()
        return None


@DIRECTIONS
@pytest.mark.parametrize("manual", [False, True], ids=["summed", "two backwards"])
def test_the_guilty_one_of_two_losses_is_named(direction, manual):
    (event,) = watch(TwoLosses(direction, manual)).events
    assert accused(event) == ("precision", "bad.0.spike", direction)


class Gan(Watched):
    """Generator and discriminator step in turn; either may overflow."""

    def __init__(self, generator=None, discriminator=None, toggle=None):
        super().__init__(nn.Linear(8, 8))
        self.automatic_optimization = False
        self.toggle = toggle
        self.generator = nn.Sequential(nn.Linear(8, 8), Planted(generator), nn.Linear(8, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 8), Planted(discriminator), nn.Linear(8, 1))

    def step(self, optimizer, loss):
        if self.toggle == "call":
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss())
        optimizer.step()
        if self.toggle == "call":
            self.untoggle_optimizer(optimizer)

    def training_step(self, batch, batch_idx):
        def for_discriminator():
            return (self.discriminator(batch) - self.discriminator(self.generator(batch).detach())).float().mean()

        def for_generator():
            return self.discriminator(self.generator(batch)).float().mean() + STARVED * self.other(batch).float().sum()

        for optimizer, loss in zip(self.optimizers(), (for_discriminator, for_generator), strict=True):
            if self.toggle == "context":
                with optimizer.toggle_model():
                    self.step(optimizer, loss)
            else:
                self.step(optimizer, loss)

    def configure_optimizers(self):
        generators = [*self.generator.parameters(), *self.other.parameters()]
        return [torch.optim.SGD(self.discriminator.parameters(), lr=1e-3), torch.optim.Adam(generators, lr=1e-3)]


@pytest.mark.parametrize("toggle", [None, "call", "context"])
@DIRECTIONS
@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_the_guilty_network_of_two_optimizers_is_named(player, direction, toggle):
    (event,) = watch(Gan(**{player: direction}, toggle=toggle)).events
    assert accused(event) == ("precision", f"{player}.1.spike", direction)


@DIRECTIONS
def test_a_culprit_in_one_layer_is_not_blamed_on_an_equal_layer_elsewhere(direction):
    net = nn.Sequential(Planted(None), nn.Linear(8, 8), Planted(direction), nn.Linear(8, 8), Planted(None))
    (event,) = watch(Watched(net)).events
    assert event["layer"] == "net.2.spike"


def test_a_cast_of_what_a_wider_layer_hands_on_is_blamed_on_the_layer_that_casts():
    net = nn.Sequential(nn.Linear(8, 8), Spike(), nn.Linear(8, 8), Gain(1 / FACTOR))
    plugin = PerLayerPrecision({"default": "fp16", "net.1": "fp32"})
    (event,) = watch(Watched(net), plugin).events
    assert (*accused(event), event["op"]) == ("precision", "net.2", "forward", "_to_copy")
    assert event["value"] > 65504


@pytest.mark.parametrize(("gain", "fits"), [(2.0**20, "bf16"), (2.0**100, "bf16"), (2.0**119, "bf16")])
def test_the_narrowest_format_that_holds_the_value_is_advised(gain, fits):
    (event,) = watch(Watched(nn.Sequential(nn.Linear(8, 8), Gain(gain), Gain(1 / gain)))).events
    assert (accused(event), event["fits"]) == (("precision", "net.1", "forward"), fits)


class Rim(nn.Module):
    """Kept off the rim by less than 16 bits resolve near 1, where its value is infinite."""

    def __init__(self, power):
        super().__init__()
        self.distance = 10.0**power

    def forward(self, x):
        return torch.atanh(torch.tanh(20 * x.abs()).clamp(max=1 - self.distance))


@pytest.mark.parametrize(("make_plugin", "fits"), [(lambda: PerLayerPrecision("fp16"), "fp32"), (stock, None)])
def test_a_format_is_tried_before_it_is_said_to_hold_what_fp16_has_the_range_for(make_plugin, fits):
    with torch.autocast("cpu", torch.bfloat16):
        assert not Rim(-5)(nn.Linear(8, 8)(torch.ones(4, 8))).isfinite().all()
    monitor = watch(Watched(nn.Sequential(nn.Linear(8, 8), Rim(-5), nn.Linear(8, 4))), make_plugin())
    (event,) = monitor.events
    assert (accused(event), event["fits"]) == (("precision", "net.1", "forward"), fits)
    assert event["value"] < 7 and "in fp32" in event["message"] and "bf16" not in event["message"]


def test_a_value_beyond_fp32_is_the_models_fault():
    (event,) = watch(Watched(nn.Sequential(nn.Linear(8, 8), Gain(2.0**127), Gain(2.0**10)))).events
    assert accused(event) == ("model", "net.2", "forward")


def test_a_value_that_bf16_rounds_to_infinity_is_held_by_fp32():
    value = torch.tensor(3.4e38)
    assert value.bfloat16() == INF
    model = Own(lambda h: (h * 1e-38).float().mean())
    model.net = nn.Sequential(nn.Linear(8, 4, bias=False))
    nn.init.constant_(model.net[0].weight, 0.125)
    (event,) = watch(model, PerLayerPrecision("bf16"), [torch.full((4, 8), value.item())]).events
    assert accused(event) == ("precision", "net.0", "forward")
    assert (event["format"], event["fits"]) == ("bf16", "fp32")
