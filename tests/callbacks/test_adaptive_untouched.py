"""AdaptivePrecision that moves nothing changes nothing: healthy runs, and advice, are the same to the last bit."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from adaptive_models import Attending, Loud, adapt, encoded, silent
from observed_models import ADAM, MODULES, NETS, Adversarial, Busy, plain, trace
from plugin_models import Batches, Task, TwoOptimizers, ours, same
from torch import nn
from torch.utils._pytree import tree_map

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.callbacks.adaptive import AdaptivePrecision

COUNT = 8
# Others differ from these only in what test_sampling looks at.
KINDS = [
    "BatchNorm, dropout, in-place ReLU",
    "transformer",
    "tied weights",
    "checkpointing",
    "frozen and unused weights",
]
STEPS = [
    "an averaged copy of the weights",
    "held weights and hooks on weights",
    "a step without index",
    "sparse gradients",
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:Encountered `nan` values in tensor"),
]


def differences(first, second):
    return [key for key in first if not same(comparable(first[key]), comparable(second[key]))]


def comparable(value):
    """A NaN is the same as another one."""
    return tree_map(lambda leaf: leaf.nan_to_num(nan=1.25e30) if isinstance(leaf, torch.Tensor) else leaf, value)


def rows(**what):
    found = [json.loads(line) for line in Path("mixprec.jsonl").read_text().splitlines()]
    return [row for row in found if all(row.get(key) == value for key, value in what.items())]


def samples():
    return [row for row in rows(monitor="adaptive") if "sample" in row]


def assert_unchanged(make, make_plugin=None, mode="act", spoil=None, every=1, **options):
    """The run with and without the callback, which looks at every step; the callback and the plugin."""
    traces, adaptive, plugin = [], AdaptivePrecision(mode, every_n_steps=every), None
    for watching in ([], [adaptive]):
        plugin, batches = ours("fp16") if make_plugin is None else make_plugin(), Batches(6, count=COUNT)
        if spoil is not None:
            spoil(batches.batches)
        traces.append(trace(make, plugin, watching, batches, **options))
        torch._dynamo.reset()
    assert differences(*traces) == []
    assert plugin.history == []
    return adaptive


# Healthy runs


@pytest.mark.parametrize("net", KINDS)
def test_a_healthy_network_is_left_to_the_last_bit(net):
    assert assert_unchanged(lambda: Busy(NETS[net]())).decisions == []
    assert len(samples()) == COUNT - 1
    assert all(row["sample"]["is_finite"] and row["sample"]["min_grad_cosine"] > 0.99 for row in samples())


@pytest.mark.parametrize("module", STEPS)
def test_a_healthy_training_step_is_left_to_the_last_bit(module):
    assert assert_unchanged(MODULES[module]).decisions == []
    assert len(samples()) >= COUNT - 2


OPTIONS = {
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.1},
    "two epochs": {"max_epochs": 2},
}
PLUGINS = {
    "mixed": lambda: ours({"default": "fp16", "net.0": "bf16", "net.1": "c=fp32,o=input"}),
    "bf16": lambda: ours("bf16"),
    "fp32": lambda: ours("fp32"),
    "another policy for evaluation": lambda: ours("fp16", eval_policy="fp32"),
    "static loss scale": lambda: PerLayerPrecision("fp16", loss_scaling=1000),
    "without a guard": lambda: ours("fp16", skip_nonfinite=False),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_healthy_run_is_left_to_the_last_bit_under_the_option(options):
    assert assert_unchanged(lambda: Busy(plain()), **OPTIONS[options]).decisions == []
    assert samples()


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_healthy_run_is_left_to_the_last_bit_under(plugin):
    assert assert_unchanged(lambda: Busy(plain()), PLUGINS[plugin]).decisions == []
    assert samples()


def test_a_healthy_run_by_hand_with_two_optimizers_is_left_to_the_last_bit():
    make = partial(TwoOptimizers, make_optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    assert assert_unchanged(lambda: make(plain())).decisions == []
    assert assert_unchanged(Adversarial, lambda: ours("bf16")).decisions == []


def test_at_default_arguments_a_healthy_run_is_sampled_twice_in_twenty_steps():
    assert assert_unchanged(lambda: Busy(plain()), every=1000, max_epochs=2).decisions == []
    assert [(row["epoch"], row["batch_idx"]) for row in samples()] == [(0, 1), (1, 2)]


SPOILS = {
    "broken inputs": ([1, 3, 5, 7], lambda x, y: x.fill_(float("nan"))),
    "broken targets": ([1, 3, 5, 7], lambda x, y: y.fill_(float("inf"))),
    "an outlier": ([5], lambda x, y: x.mul_(1e6)),
}


@pytest.mark.parametrize(("places", "spoil"), SPOILS.values(), ids=SPOILS)
def test_bad_batches_move_nothing_and_change_nothing(places, spoil):
    adaptive = assert_unchanged(
        lambda: Task(plain(), ADAM), spoil=lambda batches: [spoil(*batches[place]) for place in places]
    )
    assert adaptive.decisions == []
    assert {row["verdict"] for row in rows(monitor="adaptive") if "verdict" in row} <= {"data"}


def test_a_single_outlier_moves_nothing_where_broken_batches_came_before_it():
    def spoil(batches):
        batches[2][0].fill_(float("nan"))
        batches[5][0].mul_(1e6)

    assert assert_unchanged(lambda: Task(plain(), ADAM), spoil=spoil).decisions == []


class Graphs:
    """A compiler that leaves graphs as they are and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("policy", [{"default": "bf16", "net.4": "fp32"}, "fp16"], ids=["mixed", "fp16"])
def test_looking_compiles_nothing_again(policy):
    torch._dynamo.reset()
    counts = []

    def make():
        counts.append(Graphs())
        module = Busy(plain())
        module.net = torch.compile(module.net, backend=counts[-1])
        return module

    assert assert_unchanged(make, partial(ours, policy)).decisions == []
    assert counts[0].count == counts[1].count > 0


# Advice

WRONG = {
    "overflow": lambda: Task(Loud(), ADAM),
    "inline attention": lambda: Task(Attending(), ADAM),
    "overflow beside dropout and BatchNorm": lambda: Task(nn.Sequential(nn.Dropout(0.2), Loud(), nn.BatchNorm1d(2))),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_advice_changes_nothing_to_the_last_bit(wrong):
    adaptive = assert_unchanged(WRONG[wrong], mode="advise")
    assert {move[2] for decision in adaptive.decisions for move in decision["moves"]} == {"bf16"}


def test_advice_about_precision_changes_nothing_to_the_last_bit_and_is_given_once(capsys):
    traces, adaptive = [], AdaptivePrecision("advise")
    for watching in ([], [adaptive]):
        plugin = PerLayerPrecision("fp16")
        traces.append(trace(silent, plugin, watching, encoded(30)))
    assert differences(*traces) == []
    assert (plugin.history, plugin.policy.to_dict()) == ([], {"default": "fp16", "rules": []})
    said = [line for line in capsys.readouterr().out.splitlines() if "would move" in line]
    assert len(said) == 1
    assert "'net.encode' fp16 -> fp32" in said[0]


def test_after_advice_the_search_for_it_is_not_repeated_at_once():
    adapt(silent, AdaptivePrecision("advise"), batches=encoded(30))
    first, *later = [row["step"] for row in rows(monitor="adaptive") if "decision" in row]
    assert first == 2
    assert len(later) <= 2


class Threshold(nn.Module):
    """A threshold that is NaN until it is known, beside a mask of -inf and a frozen weight that nobody has filled."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.unused = nn.Parameter(torch.full((2,), float("nan")), requires_grad=False)
        self.register_buffer("threshold", torch.tensor(float("nan")))
        self.register_buffer("mask", torch.tensor([float("-inf"), 0.0]))

    def forward(self, x):
        return self.layer(x)


def test_a_model_that_begins_with_nan_in_its_buffers_is_sampled_like_any_other():
    assert assert_unchanged(lambda: Task(Threshold(), ADAM)).decisions == []
    assert len(samples()) == COUNT - 1
    assert rows(monitor="adaptive") == samples()
