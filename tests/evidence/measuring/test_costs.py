"""Costs: kept bytes beside torch's own hooks, who takes whose output, devices by name; nothing is left behind."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_mixprec import MixPrecError, PrecisionPolicy
from lightning_mixprec.engine.apply import attach
from lightning_mixprec.evidence.measuring.costs import _Measuring, measure_costs


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.two(torch.tanh(self.one(self.body(x).mean((2, 3)))))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 9, 9, generator=generator), torch.randint(3, (4,), generator=generator)


def kept_bytes(module, format):
    """What torch says that a step under a uniform policy keeps, weights and buffers apart."""
    known = {each.untyped_storage().data_ptr() for each in (*module.parameters(), *module.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    attachment = attach(module, PrecisionPolicy(format).resolve(module), "cpu")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), attachment.context():
        loss = module.training_step(batch(), 0)
    attachment.detach()
    del loss
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_kept_bytes_are_those_of_torchs_hooks(format):
    found = measure_costs(Net(), [batch()], ["bf16"])
    assert sum(costs[format].saved_bytes for costs in found.layers.values()) == kept_bytes(Net(), format)


def test_products_and_weights_are_counted():
    found = measure_costs(Net(), [batch()], ["bf16"])
    assert found.layers["one"]["fp32"].flops == 2 * 4 * 8 * 16
    weights = 8 * 16 + 16
    assert found.layers["one"]["bf16"].weight_bytes == weights * 4 * 4  # weight, gradient and Adam's two moments
    plain = measure_costs(Net(), [batch()], [], optimizer=torch.optim.SGD(Net().parameters(), lr=1, momentum=0.9))
    assert plain.layers["one"]["fp32"].weight_bytes == weights * 4 * 3


def test_who_takes_whose_output():
    pairs = {(each.first, each.second): each.elements for each in measure_costs(Net(), [batch()], []).handovers}
    assert pairs["body.0", "body.1"] == pairs["body.1", "body.2"] == 4 * 8 * 7 * 7
    assert pairs["", "one"] == 4 * 8  # the mean is the module's own
    assert ("one", "two") not in pairs and pairs["", "two"] == 4 * 16


def test_each_layer_has_a_time_in_each_format_it_may_have():
    found = measure_costs(Net(), [batch()], ["bf16", "fp8"])
    assert list(found.layers["one"]) == ["fp32", "bf16", "fp8"] and list(found.layers["body.0"]) == ["fp32", "bf16"]
    assert all(cost.seconds > 0 for name in ("body.0", "one") for cost in found.layers[name].values())
    assert found.seconds_per_cast_byte > 0


class Checkpointed(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 6))
        self.head = nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        return self.head(checkpoint(self.body, batch, use_reentrant=False)).square().mean()


def test_layers_inside_checkpointing_are_timed_as_well():
    given = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))
    found = measure_costs(Checkpointed(), [given], ["bf16"])
    assert all(found.layers[name][format].seconds > 0 for name in ("body.0", "body.3") for format in ("fp32", "bf16"))


class InPlace(pl.LightningModule):
    """Its activation writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(64, 64), nn.ReLU(inplace=True)

    def training_step(self, batch, batch_idx):
        return self.act(self.first(batch)).square().mean()


def test_a_layer_that_writes_into_its_input_is_timed():
    found = measure_costs(InPlace(), [torch.randn(256, 64)], ["bf16"])
    assert all(cost.seconds > 0 for cost in found.layers["act"].values())


def test_a_step_in_fp32_is_predicted_to_take_what_it_was_measured_to(monkeypatch):
    measured = _Measuring._step_seconds
    for factor in (0.1, 10.0):  # shorter than the layers alone, and longer
        taken = []
        monkeypatch.setattr(
            _Measuring, "_step_seconds", lambda self, by=factor, to=taken: kept(to, by * measured(self))
        )
        found = measure_costs(Net(), [batch()], ["bf16"])
        assert found.of_step(dict.fromkeys(found.layers, "fp32")).seconds == pytest.approx(taken[0])


def kept(values, value):
    values.append(value)
    return value


def test_a_device_that_is_not_here_is_told_by_its_peaks():
    found = measure_costs(Net(), [batch()], ["bf16"], device="H100")
    assert found.device.startswith("H100")
    assert found.layers["one"]["bf16"].seconds < found.layers["one"]["fp32"].seconds
    with pytest.raises(MixPrecError, match="did you mean 'h100'"):
        measure_costs(Net(), [batch()], ["bf16"], device="h1000")


def test_nothing_of_the_module_or_the_generators_changes():
    module = Net()
    before, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    attributes = [set(vars(each)) for each in module.modules()]
    measure_costs(module, [batch()], ["bf16", "fp16"])
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert [set(vars(each)) for each in module.modules()] == attributes
    assert torch.equal(random, torch.get_rng_state())
    assert all(param.grad is None for param in module.parameters())


@pytest.mark.parametrize(
    ("batches", "formats", "says"),
    [([], ["bf16"], "there are no batches"), ([torch.ones(2)], ["bf16"], "could not be run in fp32"),
     (None, ["bf17"], "did you mean 'bf16'"), (None, ["e4m3"], "do not compute in 'e4m3'")],
)  # fmt: skip
def test_mistakes_are_one_line(batches, formats, says):
    with pytest.raises(MixPrecError, match=says) as error:
        measure_costs(Net(), [batch()] if batches is None else batches, formats)
    assert "\n" not in str(error.value)
