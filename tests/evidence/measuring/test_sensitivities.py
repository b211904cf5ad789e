"""Sensitivities: beside sums by hand, what moves together, range, and that nothing is left behind."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_mixprec import MixPrecError, PrecisionPolicy, Rule
from lightning_mixprec.engine.apply import attach
from lightning_mixprec.evidence.measuring.sensitivities import measure_sensitivities, variables_of


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.drop, self.two = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x):
        return self.two(self.drop(self.norm(self.one(x)).relu_()))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def batches(count=2):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(count)
    ]


def offers_of(found, layer):
    return found.offers[found.variable_of[layer]]


@pytest.mark.parametrize("format", ["bf16", "fp8", "int8"])
def test_a_layers_part_is_what_sums_by_hand_say(format):
    module, (batch,) = Net(), batches(1)
    module.drop.p = 0.0
    found = measure_sensitivities(module, [batch], [format])
    inputs, labels = batch
    hidden = module.one(inputs)
    normed = module.norm(hidden).relu()
    output = module.two(normed)
    [gradient] = torch.autograd.grad(F.cross_entropy(output, labels), output)
    attachment = attach(module.two, {"": alone(nn.Linear(1, 1), format)}, "cpu")
    with attachment.context():
        low = module.two(normed)
    attachment.detach()
    changes = (low.float() - output).double() * gradient
    by_hand = (changes.square().sum() + changes.sum().square()).item() / 2
    assert offers_of(found, "two")[format].sensitivity == pytest.approx(by_hand, rel=1e-3)


def test_what_meets_in_another_16_bits_is_rounded_as_sums_by_hand_say():
    module, (batch,) = Net(), batches(1)
    module.drop.p = 0.0
    found = measure_sensitivities(module, [batch], ["bf16", "fp16"])
    output = module.two(module.norm(module.one(batch[0])).relu())
    [gradient] = torch.autograd.grad(F.cross_entropy(output, batch[1]), output)
    changes = (output.bfloat16().float() - output).double() * gradient
    by_hand = (changes.square().sum() + changes.sum().square()).item() / 2
    assert [(each.inner, each.outer) for each in found.borders] == [
        (name, "") for name in ("drop", "norm", "one", "two")
    ]
    assert found.borders[-1].sensitivity == pytest.approx(by_hand, rel=1e-3)
    assert measure_sensitivities(module, [batch], ["bf16"]).borders == ()


def alone(layer, format):
    """What a policy assigns to a layer in a format."""
    rules = [Rule("0", compute=format)]
    return PrecisionPolicy("fp32", rules).resolve(nn.Sequential(layer))["0"]


def test_nothing_of_the_module_or_the_generators_changes():
    module = Net()
    before, attributes = copy.deepcopy(module.state_dict()), [set(vars(each)) for each in module.modules()]
    random, training = torch.get_rng_state(), [each.training for each in module.modules()]
    measure_sensitivities(module, batches(), ["bf16", "fp16", "fp8", "int8"])
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert [set(vars(each)) for each in module.modules()] == attributes
    assert [each.training for each in module.modules()] == training
    assert torch.equal(random, torch.get_rng_state())
    assert all(param.grad is None for param in module.parameters())


def test_the_same_is_measured_in_one_round_and_in_many():
    one = measure_sensitivities(Net(), batches(), ["bf16", "fp16"], seed=3)
    many = measure_sensitivities(Net(), batches(), ["bf16", "fp16"], seed=3, max_bytes=1)
    assert one == many
    assert one != measure_sensitivities(Net(), batches(), ["bf16", "fp16"], seed=4)  # another dropout


def test_formats_of_products_are_offered_to_linear_layers_alone():
    found = measure_sensitivities(Net(), batches(), ["fp8", "int8", "bf16"])
    assert list(offers_of(found, "one")) == ["fp32", "fp8", "int8", "bf16"]
    assert list(offers_of(found, "norm")) == ["fp32", "bf16"]
    assert offers_of(found, "one")["fp8"].sensitivity > 10 * offers_of(found, "one")["bf16"].sensitivity


def test_pinned_layers_are_offered_nothing_else():
    found = measure_sensitivities(Net(), batches(), ["bf16"], pin=["one", "norm"])
    assert [list(offers_of(found, name)) for name in ("one", "norm", "two")] == [["fp32"], ["fp32"], ["fp32", "bf16"]]


def test_layers_that_share_a_weight_are_one_variable():
    module = Net()
    module.again = nn.Linear(6, 8)
    module.again.weight = module.one.weight
    found = measure_sensitivities(module, batches(), ["bf16"])
    assert ("one", "again") in found.variables
    assert sorted(name for layers in found.variables for name in layers) == sorted(
        name for name, _ in module.named_modules()
    )


@pytest.fixture
def _world_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_world_of_one")
def test_what_is_gathered_together_is_one_variable():
    module = Holder()
    fully_shard(module.scores)
    fully_shard([module.one, module.norm])
    found = variables_of(module, PrecisionPolicy("fp32").resolve(module))
    together = [each.layers for each in found if len(each.layers) > 1]
    assert together == [("one", "norm")]


def test_numbers_too_large_for_a_format_are_a_problem_and_no_score():
    module = Net()
    with torch.no_grad():
        module.one.weight.mul_(1e6)
    found = measure_sensitivities(module, batches(), ["fp16", "bf16"])
    assert "overflow fp16" in offers_of(found, "one")["fp16"].problem
    assert offers_of(found, "one")["bf16"].problem is None


def test_a_batch_too_large_for_a_format_is_a_problem_of_the_layer_that_takes_it():
    ((inputs, labels),) = batches(1)
    module = Net()
    module.again = nn.Linear(8, 8)
    found = measure_sensitivities(module, [(inputs * 1e6, labels)], ["fp16", "bf16"])
    assert offers_of(found, "one")["fp16"].problem is not None
    assert offers_of(found, "one")["bf16"].problem is None
    assert offers_of(found, "two")["fp16"].problem is None


def test_gradients_that_vanish_beside_larger_ones_are_a_problem():
    class Steep(Net):
        def training_step(self, batch, batch_idx):
            return 1e-9 * super().training_step(batch, batch_idx) + 1e6 * self.two(torch.zeros(1, 8)).square().mean()

    found = measure_sensitivities(Steep(), batches(), ["fp16", "bf16"])
    assert "vanish in fp16, at the best loss scale" in offers_of(found, "one")["fp16"].problem
    assert offers_of(found, "one")["bf16"].problem is None


class Taught(Net):
    """With a frozen encoder and a teacher, at which no gradient arrives, and a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.before, self.teacher, self.idle = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3), nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            aim = self.teacher(batch[0]).softmax(1)
        return F.cross_entropy(self(self.before(batch[0])), aim)


def test_where_no_gradient_arrives_the_gap_is_measured():
    module = Taught()
    found = measure_sensitivities(module, batches(1), ["bf16"])
    parts = {
        layers[0]: offers["bf16"].sensitivity for layers, offers in zip(found.variables, found.offers, strict=True)
    }
    assert parts["idle"] == 0
    assert parts["before"] > 0
    assert parts["teacher"] == pytest.approx(measured_gap(module, "teacher"), rel=1e-6)


def measured_gap(module, layer):
    losses = []
    (batch,) = batches(1)
    for format in ("bf16", "fp32"):
        torch.manual_seed(0)
        running = copy.deepcopy(module)
        policy = PrecisionPolicy("fp32", [Rule(layer, compute=format)] if format == "bf16" else [])
        attachment = attach(running, policy.resolve(running), "cpu")
        with attachment.context():
            losses.append(running.training_step(batch, 0).item())
        attachment.detach()
    return (losses[0] - losses[1]) ** 2


class Twice(pl.LightningModule):
    """A layer that is called twice in a step, the second time as checkpointing does."""

    def __init__(self, uses_reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.uses_reentrant = nn.Linear(6, 6), uses_reentrant

    def training_step(self, batch, batch_idx):
        middle = self.layer(batch[0]).tanh()
        if self.uses_reentrant is None:
            last = self.layer(middle)
        else:
            last = checkpoint(self.layer, middle, use_reentrant=self.uses_reentrant)
        return F.cross_entropy(last, batch[1])


def test_changes_of_a_layers_calls_add_up():
    module, (batch,) = Twice(), batches(1)
    first = module.layer(batch[0])
    second = module.layer(first.tanh())
    gradients = torch.autograd.grad(F.cross_entropy(second, batch[1]), [first, second])
    attachment = attach(module.layer, {"": alone(nn.Linear(1, 1), "bf16")}, "cpu")
    with attachment.context():
        low = module.layer(batch[0]), module.layer(first.tanh())
    attachment.detach()
    outputs = (first, second)
    changes = torch.stack([(a.float() - b).double() * g for a, b, g in zip(low, outputs, gradients, strict=True)])
    by_hand = (changes.square().sum() + changes.sum().square()).item() / 2
    found = measure_sensitivities(module, [batch], ["bf16"])
    assert offers_of(found, "layer")["bf16"].sensitivity == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize("uses_reentrant", [True, False])
def test_checkpointing_changes_nothing(uses_reentrant):
    found = measure_sensitivities(Twice(uses_reentrant), batches(), ["bf16"])
    expected = measure_sensitivities(Twice(), batches(), ["bf16"])
    assert offers_of(found, "layer")["bf16"].sensitivity == pytest.approx(
        offers_of(expected, "layer")["bf16"].sensitivity, rel=1e-6
    )


class Holder(Net):
    """A layer around others, with an operation of its own; and one without."""

    def __init__(self):
        super().__init__()
        self.plain, self.scores = nn.Sequential(nn.Linear(6, 6)), Scores()

    def forward(self, x):
        return super().forward(self.scores(self.plain(x)))


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.key = nn.Linear(6, 6)

    def forward(self, x):
        return (x @ self.key(x).T).softmax(-1) @ x


def test_of_a_layer_that_holds_others_its_own_operations_count():
    found = measure_sensitivities(Holder(), batches(1), ["bf16"])
    assert offers_of(found, "plain")["bf16"].sensitivity == 0
    assert offers_of(found, "plain.0")["bf16"].sensitivity > 0
    assert offers_of(found, "scores")["bf16"].sensitivity > 0


class Infinite(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / 0


@pytest.mark.parametrize(
    ("module", "given", "options", "says"),
    [
        (Net, [], {}, "there are no batches"),
        (Net, [torch.ones(2)], {}, "the step could not be run in fp32: "),
        (Infinite, None, {}, "not finite in fp32"),
        (Net, None, {"formats": ["bf17"]}, "did you mean 'bf16'"),
        (Net, None, {"formats": ["e4m3"]}, "layers do not compute in 'e4m3'"),
        (Net, None, {"pin": ["nowhere"]}, "nowhere"),
    ],
)
def test_mistakes_are_one_line(module, given, options, says):
    options = {"formats": ["bf16"]} | options
    with pytest.raises(MixPrecError, match=says) as error:
        measure_sensitivities(module(), batches() if given is None else given, options.pop("formats"), **options)
    assert "\n" not in str(error.value)
