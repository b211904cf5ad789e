"""Copies of a model that is being trained: they compute with their own weights, and belong to no run."""

import copy
import gc
import pickle

import pytest
import torch
from lightnings import pl
from plugin_models import Call, Scheduled, Task, TwoOptimizers, fit, mlp, ours, probes

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.plugin.steps import StepLedger

MIXED = {"default": "bf16", "net.0": "fp16", "net.6": "c=fp32,o=fp32"}
MIXED_PROBES = {"default": "bf16", "net.0": "fp16", "net.2": "fp32"}
COMPUTED = [{torch.float16}, {torch.bfloat16}, {torch.float32}]


def copies(run, model):
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    made = {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
    model.eval()
    with torch.no_grad():
        answers = {kind: other.eval()(x) for kind, other in made.items()}
        original = model(x)
        for other in made.values():
            for param in other.parameters():
                param.zero_()
        zeroed = {kind: other(x) for kind, other in made.items()}
        still = model(x)
    model.train()
    return made, answers, original, zeroed, still


@pytest.mark.parametrize("task", [Scheduled, Task])
@pytest.mark.parametrize("policy", ["bf16", MIXED], ids=["uniform", "mixed"])
def test_copies_compute_with_their_own_weights(policy, task):
    callback = Call("on_train_batch_start", copies, at=2)
    fit(task(mlp()), ours(policy), callbacks=[callback])
    [(made, answers, original, zeroed, still)] = callback.results
    assert torch.equal(original, still)
    for kind in made:
        assert torch.equal(answers[kind], original)
        assert not zeroed[kind].any()


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
@pytest.mark.parametrize("task", [Scheduled, TwoOptimizers])
def test_copies_drag_nothing_of_the_run_along(task, kind):
    callback = Call("on_train_batch_start", copies, at=2)
    fit(task(mlp()), ours(MIXED), callbacks=[callback])
    reached = reachable(callback.results[0][0][kind])
    assert not [thing for thing in reached if isinstance(thing, (pl.Trainer, PerLayerPrecision, StepLedger))]


def reachable(root):
    """Everything that an object holds on to, except through classes, modules and functions."""
    seen, waiting = {id(root): root}, [root]
    while waiting:
        for other in gc.get_referents(waiting.pop()):
            if id(other) not in seen and not isinstance(other, (type, type(gc), type(reachable))):
                seen[id(other)] = other
                waiting.append(other)
    return list(seen.values())


def test_a_copy_can_be_trained_elsewhere_while_the_original_runs():
    def train_the_copy(run, model):
        other = copy.deepcopy(model)
        fit(other, ours(MIXED_PROBES))
        return other

    callback = Call("on_train_batch_end", train_the_copy, at=1)
    model = Task(probes())
    plugin = ours(MIXED_PROBES)
    fit(model, plugin, callbacks=[callback])
    assert [probe.computed for probe in model.net] == COMPUTED
    assert len(model.losses) == 4
    assert [probe.computed for probe in callback.results[0].net] == COMPUTED
