"""Costs for a GPU that is not here: kept bytes by hand, what cannot be traced, and that nothing is run or stays."""

import copy
import time

import pytest
import torch
from costed_models import MODELS, Costed
from diary import Diary
from fake_cuda import needs_fake_cuda
from torch import nn

from lightning_mixprec import MixPrecError, PrecisionPolicy
from lightning_mixprec.engine.apply import attach
from lightning_mixprec.evidence.measuring.costs import measure_costs

SEEN = Diary()
"""The devices of inputs, in a list that no sandbox knows of."""


class Net(Costed):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, x):
        SEEN.append(x.device.type)
        return self.two(self.norm(self.one(x)))

    @staticmethod
    def batch():
        return torch.ones(8, 16), torch.zeros(8, dtype=torch.long)


def saved(costs, format):
    return {name: by_format[format].saved_bytes for name, by_format in costs.layers.items()}


@needs_fake_cuda
def test_what_is_kept_is_what_cudas_autocast_keeps():
    """In bf16, CUDA's norms compute in fp32: their inputs and statistics are kept in it, and casts of products'."""
    costs = measure_costs(Net.made(), [Net.batch()], ["bf16"], device="h100")
    statistics = 2 * 8 * 4
    assert saved(costs, "fp32")["one"] == 8 * 16 * 4
    assert saved(costs, "fp32")["norm"] == 8 * 32 * 4 + statistics
    assert saved(costs, "fp32")["two"] == 8 * 32 * 4
    assert saved(costs, "bf16")["one"] == 8 * 16 * 2  # its weight, cast, is not needed: the input has no gradient
    assert saved(costs, "bf16")["norm"] == 8 * 32 * 4 + statistics
    assert saved(costs, "bf16")["two"] == 8 * 32 * 2 + 32 * 4 * 2
    assert not costs.note


@needs_fake_cuda
def test_attention_keeps_no_square_of_the_length():
    """The math path, which fake tensors take by themselves, keeps batch x heads x length x length."""
    costs = measure_costs(MODELS["gpt"].made(), [torch.zeros(8, 25, dtype=torch.long)], ["bf16"], device="h100")
    for format, width in (("fp32", 4), ("bf16", 2)):
        kept = saved(costs, format)["blocks.0"]
        queries_keys_values_result = 4 * 8 * 24 * 32 * width
        assert queries_keys_values_result <= kept < queries_keys_values_result + 8 * 4 * 64 * 4 + 64


@needs_fake_cuda
@pytest.mark.parametrize("name", ["cnn", "gpt", "recommender"])
def test_products_and_who_takes_what_are_those_of_a_step_that_is_run(name):
    module, batch = MODELS[name].made(), MODELS[name].batch()
    traced, ran = (measure_costs(module, [batch], ["bf16"], device=device) for device in ("a100", None))
    assert not traced.note
    for layer, costs in ran.layers.items():
        assert traced.layers[layer]["fp32"].flops == costs["fp32"].flops
        assert traced.layers[layer]["fp32"].weight_bytes == costs["fp32"].weight_bytes
    assert [(each.first, each.second, each.elements) for each in traced.handovers if each.elements] == [
        (each.first, each.second, each.elements) for each in ran.handovers if each.elements
    ]


class Reads(Net):
    def forward(self, x):
        return super().forward(x) * float(x.sum())


class Differentiates(Net):
    def forward(self, x):
        y = super().forward(x.requires_grad_())
        return y + torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum()


class ByHand(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))


@pytest.mark.parametrize("kind", [Reads, Differentiates, ByHand, MODELS["lstm"]])
def test_what_cannot_be_traced_is_run_where_it_is_and_the_costs_say_so(kind):
    module = kind.made()
    batch = Net.batch() if isinstance(module, Net) else module.batch()
    costs = measure_costs(module, [batch], ["bf16"], device="h100")
    assert costs.note.startswith("shapes and memory are those of a step on cpu, for on H100")
    assert "\n" not in costs.note
    here = measure_costs(module, [batch], ["bf16"])
    assert saved(costs, "bf16") == saved(here, "bf16")
    assert type(costs).from_dict(costs.to_dict()) == costs


@needs_fake_cuda
def test_nothing_is_run_and_nothing_stays():
    module = Net.made()
    before, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    attributes = [set(vars(each)) for each in module.modules()]
    SEEN.clear()
    measure_costs(module, [Net.batch()], ["bf16", "fp8"], device="h100")
    assert SEEN == ["cuda"] * 3 and module.device.type == "cpu"
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert [set(vars(each)) for each in module.modules()] == attributes
    assert torch.equal(random, torch.get_rng_state())
    assert not torch.is_autocast_enabled("cuda")


@needs_fake_cuda
def test_small_layers_take_what_launching_them_takes_and_large_ones_what_their_products_take():
    class Wide(Net):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(16, 4096), nn.LayerNorm(4096), nn.Linear(4096, 4096)

    small, large = (
        measure_costs(kind.made(), [(torch.ones(rows, 16), torch.zeros(rows, dtype=torch.long))], ["bf16"],
                      device="h100").layers["two"]
        for kind, rows in ((Net, 8), (Wide, 8192))
    )  # fmt: skip
    assert small["fp32"].seconds / small["bf16"].seconds < 1.1
    assert large["fp32"].seconds / large["bf16"].seconds == pytest.approx(989.4 / 494.7, rel=0.1)
    assert large["bf16"].seconds == pytest.approx(3 * 2 * 8192 * 4096**2 / 989.4e12 / 0.6, rel=0.1)


def test_a_measured_step_scales_all_times():
    module = Net.made()
    costs = measure_costs(module, [Net.batch()], ["bf16"], device="h100", step_seconds=0.25)
    formats = dict.fromkeys(costs.layers, "fp32")
    assert costs.predicted(formats).seconds == pytest.approx(0.25)
    plain = measure_costs(module, [Net.batch()], ["bf16"], device="h100")
    ratio = [each.predicted(dict.fromkeys(each.layers, "bf16")).seconds / each.predicted(formats).seconds
             for each in (costs, plain)]  # fmt: skip
    assert ratio[0] == pytest.approx(ratio[1])
    with pytest.raises(MixPrecError, match="give a positive number"):
        measure_costs(module, [Net.batch()], [], step_seconds=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_peak_and_step_time_on_the_gpu_are_what_is_predicted(policy):
    """The peak within 10 %, and the order of fp32 and bf16 right, of a model that fills the device."""
    module = type(MODELS["gpt"].made())(width=1024, words=4096, blocks=4).cuda()
    batch = torch.randint(4096, (64, 24), device="cuda")
    costs = measure_costs(module, [batch], ["bf16"], device=torch.cuda.get_device_name())
    assert not costs.note
    optimizer = torch.optim.AdamW(module.parameters())
    attachment = attach(module, PrecisionPolicy(policy).resolve(module), "cuda")

    def step():
        with attachment.context():
            loss = module.training_step(batch, 0)
        loss.backward()

    for _ in range(2):  # moments are there, and what libraries allocate for themselves
        step()
        optimizer.step()
        optimizer.zero_grad()
    there = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() - there
    attachment.detach()
    resident = costs.fixed_bytes + 3 * sum(param.nbytes for param in module.parameters())
    predicted = costs.of_step(dict.fromkeys(costs.layers, policy))
    assert predicted.memory_bytes - resident == pytest.approx(peak, rel=0.1)
    assert seconds / 3 < predicted.seconds < seconds * 3
