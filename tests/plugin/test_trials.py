"""``trial_context``: another policy between two steps, and then everything as it was."""

import contextlib

import pytest
import torch
from plugin_models import Batches, Call, Evaluable, Task, fit, mlp, one_line, ours, probes, same, snapshot, trainer
from torch import nn

from lightning_mixprec import MixPrecError, PerLayerPrecision, PrecisionPolicy
from lightning_mixprec.errors import PolicyError

RUN = {"default": "fp16", "net.4": "fp32"}
POLICIES = ["bf16", "fp32", {"default": "fp16", "net.0": "c=fp32,o=input", "net.[4:]": "bf16"}, {"default": "fp64"}]


def policy_of(given):
    return PrecisionPolicy(given) if isinstance(given, str) else PrecisionPolicy.from_dict(given)


def step_of(module):
    """Output, loss and gradients of a step, computed beside the run."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, generator=generator)
    out = module.eval()(x)
    module.train()
    loss = out.float().square().mean()
    return out.detach(), loss.detach(), torch.autograd.grad(loss, [*module.parameters()])


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_inside_everything_computes_as_in_a_run_under_that_policy(policy):
    def computed(plugin, context):
        torch.manual_seed(3)
        model = Task(mlp())

        def look(run, module):
            with context(plugin):
                return step_of(module)

        call = Call("on_train_start", look)
        fit(model, plugin, callbacks=[call], max_steps=1)
        return call.results

    expected = computed(ours(policy), lambda plugin: plugin.replay_context())
    assert same(computed(ours(RUN), lambda plugin: plugin.trial_context(policy_of(policy))), expected)


@pytest.mark.parametrize("run_in", ["bf16", RUN, {"default": "bf16", "net.1": "fp64", "net.5": "fp32"}], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_a_run_with_trials_is_one_without_to_the_last_bit(run_in, fails):
    def trained(look):
        torch.manual_seed(3)
        model, plugin = Task(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), *mlp()[2:])), ours(run_in)
        calls = [Call(hook, look) for hook in ("on_train_start", "on_train_batch_start", "on_train_batch_end")]
        fit(model, plugin, callbacks=calls)
        return [model.losses, [*model.state_dict().values()], plugin.state_dict()]

    def try_all(run, module):
        plugin = run.precision_plugin
        before = snapshot(module), plugin.policy, plugin.assignment, plugin.state_dict()
        for policy in POLICIES:
            with contextlib.suppress(RuntimeError), plugin.trial_context(policy_of(policy)):
                step_of(module)
                if fails:
                    raise RuntimeError("the trial failed")
        assert same((snapshot(module), plugin.policy, plugin.assignment, plugin.state_dict()), before)

    assert same(trained(try_all), trained(lambda run, module: None))


def test_what_fp64_layers_accumulate_keeps_its_bits():
    model = Task(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)))

    def look(run, module):
        mean = module.net[0].running_mean
        before = mean.clone()
        with run.precision_plugin.trial_context(PrecisionPolicy("bf16")):
            assert mean.dtype == torch.float32
        return before.dtype, torch.equal(mean, before), torch.equal(before, before.float().double())

    call = Call("on_train_batch_end", look, at=1)
    fit(model, PerLayerPrecision({"default": "fp32", "net.0": "fp64"}), callbacks=[call])
    assert call.results == [(torch.float64, True, False)]


def test_after_a_validation_in_other_formats_the_trial_is_of_training():
    model = Evaluable(probes())
    plugin = PerLayerPrecision("bf16", eval_policy="fp32")

    def look(run, module):
        with plugin.trial_context(plugin.policy.amend({"net.1": "fp64"}, module)):
            module(torch.ones(4, 6))
        return [probe.seen[-1][1] for probe in module.net]

    call = Call("on_validation_end", look)
    trainer(plugin, callbacks=[call]).fit(model, Batches(6), Batches(6, count=1))
    assert call.results == [[torch.bfloat16, torch.float64, torch.bfloat16]]
    assert plugin.history == []


NESTED = {
    "trial": lambda plugin: plugin.trial_context(PrecisionPolicy("fp32")).__enter__(),
    "replay": lambda plugin: plugin.replay_context().__enter__(),
    "reference": lambda plugin: plugin.reference_context().__enter__(),
    "edit": lambda plugin: plugin.edit_policy({"net.0": "fp32"}),
    "set": lambda plugin: plugin.set_policy("fp32"),
    "step": lambda plugin: plugin.train_step_context().__enter__(),
}


@pytest.mark.parametrize("misuse", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("outer", ["trial", "reference"])
def test_inside_a_trial_nothing_else_can_put_formats_in_force(misuse, outer):
    model, plugin = Task(probes()), PerLayerPrecision("bf16")

    def look(run, module):
        context = plugin.reference_context() if outer == "reference" else plugin.trial_context(PrecisionPolicy("fp64"))
        with context:
            with pytest.raises(PolicyError, match="inside") as caught:
                misuse(plugin)
            module(torch.ones(4, 6))
        return one_line(caught)

    call = Call("on_train_batch_end", look, at=0)
    fit(model, plugin, callbacks=[call])
    assert call.calls == 4
    inside = torch.float64 if outer == "trial" else torch.float32
    assert [seen[1] for seen in model.net[0].seen] == [torch.bfloat16, inside, *[torch.bfloat16] * 3]
    assert plugin.history == [] and plugin.policy == PrecisionPolicy("bf16")


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"default": "bf16", "net.11": "fp32"}, "net.1"),
        ({"default": "bf16", "net.1": "p=fp64,c=fp64"}, "param can only be chosen before training"),
    ],
)
def test_a_policy_that_could_not_be_set_cannot_be_tried(policy, says):
    model, plugin = Task(probes()), PerLayerPrecision("bf16")

    def look(run, module):
        before = snapshot(module)
        with pytest.raises(PolicyError, match=says) as caught, plugin.trial_context(policy_of(policy)):
            raise AssertionError("not reached")
        assert snapshot(module) == before
        return one_line(caught)

    call = Call("on_train_batch_end", look, at=1)
    fit(model, plugin, callbacks=[call])
    assert call.calls == 4


def test_a_trial_is_between_the_steps_of_a_run():
    plugin = PerLayerPrecision("bf16")
    with pytest.raises(MixPrecError, match="none is running") as caught, plugin.trial_context(PrecisionPolicy("fp32")):
        pass
    one_line(caught)

    def look(run, module):
        with plugin.trial_context(PrecisionPolicy("fp32")):
            pass

    with pytest.raises(MixPrecError, match="between steps") as caught:
        fit(Task(mlp()), plugin, callbacks=[Call("on_before_backward", look)])
    one_line(caught)
