"""The memory that costs predict of mixed policies, beside torch's hooks and a count of what is alive."""

import random

import pytest
import torch
from costed_models import MODELS
from torch import nn

from lightning_mixprec import PrecisionPolicy, Rule
from lightning_mixprec.deploy.used_memory import LiveBytes
from lightning_mixprec.engine.apply import attach
from lightning_mixprec.evidence.measuring import costs as measuring
from lightning_mixprec.evidence.measuring.costs import measure_costs
from lightning_mixprec.numerics.devices import native_support
from lightning_mixprec.optim import AdamW
from lightning_mixprec.policy.patterns import literal

needs_bf16 = pytest.mark.skipif(
    not native_support("bf16", "cpu").native, reason="bf16 is emulated here, in buffers of fp32 that only a CPU has"
)


def policy_of(formats, module):
    """The policy that has each layer's own operations compute in a format."""
    rules = [
        Rule(literal(name) if name else "", compute=format, **({"recurse": False} if has_inside(module, name) else {}))
        for name, format in formats.items()
        if format != "fp32"
    ]
    return PrecisionPolicy("fp32", rules)


def has_inside(module, name):
    return any(True for _ in module.get_submodule(name).children())


def mixed(costs, offered, seed):
    """Formats at random: a share of the layers in those that are offered."""
    chance = random.Random(seed)
    share = chance.choice([0.0, 0.3, 0.5, 0.8, 1.0])
    found = {}
    for name, by_format in sorted(costs.layers.items()):
        usable = [each for each in offered if each in by_format]
        found[name] = chance.choice(usable) if usable and chance.random() < share else "fp32"
    return found


def measured(module, policy, batch):
    """What torch's own hooks say is saved, weights and buffers apart, and the most that is alive at once."""
    apart = {each.untyped_storage().data_ptr() for each in (*module.parameters(), *module.buffers())}
    saved = {}

    def pack(tensor):
        if (storage := tensor.untyped_storage()).data_ptr() not in apart:
            saved[storage.data_ptr()] = storage.nbytes(), tensor.detach()
        return tensor

    attachment = attach(module, policy.resolve(module), "cpu")
    with LiveBytes() as live:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), attachment.context():
            loss = module.training_step(batch, 0)
        kept = sum(size for size, _ in saved.values())
        saved.clear()
        loss.backward()
    attachment.detach()
    module.zero_grad()
    return kept, live.peak


@pytest.fixture
def without_times(monkeypatch):
    """Times are not asked for here, and take longest."""

    class NoTimes(measuring.LayerTimes):
        def __enter__(self):
            return self

    monkeypatch.setattr(measuring, "LayerTimes", NoTimes)


@pytest.mark.filterwarnings("ignore:.*emulated.*")
@pytest.mark.parametrize("name", MODELS)
def test_what_mixed_policies_save_is_known_to_five_percent(name, without_times):
    module, batch = MODELS[name].made(), MODELS[name].batch()
    costs = measure_costs(module, [batch], ["bf16", "fp8"])
    for seed in range(8):
        formats = mixed(costs, ["bf16", "fp8"] if seed % 2 else ["bf16"], seed)
        saved, _ = measured(module, policy_of(formats, module), batch)
        assert costs.saved_bytes(formats) == pytest.approx(saved, rel=0.05), formats


@needs_bf16
@pytest.mark.parametrize("name", MODELS)
def test_the_peak_of_mixed_policies_is_known_to_ten_percent(name, without_times):
    module, batch = MODELS[name].made(), MODELS[name].batch()
    costs = measure_costs(module, [batch], ["bf16"])
    weights = sum(param.nbytes for param in module.parameters())
    there_before = costs.fixed_bytes + 3 * weights  # with Adam's moments
    for seed in range(8):
        formats = mixed(costs, ["bf16"], seed)
        _, peak = measured(module, policy_of(formats, module), batch)
        predicted = costs.of_step(formats).memory_bytes
        assert predicted - there_before == pytest.approx(peak, rel=0.1), formats
        assert predicted <= costs.predicted(formats).memory_bytes * 1.1  # which has all there at once


OPTIMIZERS = {
    "none": (lambda params: None, 8),
    "sgd": (lambda params: torch.optim.SGD(params, lr=0.1), 0),
    "momentum": (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), 4),
    "rmsprop": (lambda params: torch.optim.RMSprop(params), 4),
    "amsgrad": (lambda params: torch.optim.AdamW(params, amsgrad=True), 12),
    "ours": (lambda params: AdamW(params, states="bf16"), 4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_weight_counts_with_its_gradient_and_what_the_optimizer_keeps(name, without_times):
    module = MODELS["recommender"].made()
    make, moments = OPTIMIZERS[name]
    costs = measure_costs(module, [module.batch()], [], optimizer=make(list(module.parameters())))
    cost = costs.layers["users"]["fp32"]
    assert cost.gradient_bytes == 500 * 24 * 4
    assert cost.weight_bytes == 500 * 24 * (4 + 4 + moments)


def test_of_several_optimizers_each_keeps_what_it_does_of_its_own_weights(without_times):
    module = MODELS["recommender"].made()
    users = [module.users.weight]
    others = [param for param in module.parameters() if param is not users[0]]
    costs = measure_costs(
        module, [module.batch()], [], optimizer=[torch.optim.AdamW(others), torch.optim.SGD(users, lr=0.1)]
    )
    rest = next(cost["fp32"] for name, cost in costs.layers.items() if name != "users" and cost["fp32"].gradient_bytes)
    assert costs.layers["users"]["fp32"].weight_bytes == 500 * 24 * (4 + 4)
    assert rest.weight_bytes == 4 * rest.gradient_bytes


@pytest.mark.parametrize(("weights", "kept"), [("exact", 2), ("kahan", 2), ("stochastic", 0)])
def test_a_weight_in_16_bits_counts_with_its_compensation(weights, kept, without_times):
    module = MODELS["gpt"].made()
    module.head = module.head.bfloat16()
    module.head.forward = lambda x: nn.functional.linear(x, module.head.weight.float())
    optimizer = AdamW(module.parameters(), weights=weights, states="bf16")
    cost = measure_costs(module, [module.batch()], [], optimizer=optimizer).layers["head"]["fp32"]
    assert cost.weight_bytes == 64 * 32 * (2 + 2 + kept + 2 * 2)
    assert all(not state for state in optimizer.state.values())
