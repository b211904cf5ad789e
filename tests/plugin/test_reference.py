"""``reference_context``: everything in fp32 between two steps, and then as it was."""

import torch
from plugin_models import Call, Task, fit, ours, probes, snapshot

from lightning_mixprec import PerLayerPrecision

MIXED = {"default": "fp16", "net.1": "c=fp32,o=input", "net.2": "bf16"}


def formats_in(plugin, run, model, context):
    for layer in model.net:
        layer.seen.clear()
    with context:
        result = model(torch.ones(4, 6))
    return [computed for layer in model.net for computed in layer.computed], result.dtype


def inside_and_after(policy):
    model, plugin = Task(probes()), ours(policy)

    def look(run, module):
        before = snapshot(module), plugin.assignment, list(plugin.history)
        inside = formats_in(plugin, run, module, plugin.reference_context())
        assert (snapshot(module), plugin.assignment, list(plugin.history)) == before
        return inside, formats_in(plugin, run, module, plugin.forward_context())

    call = Call("on_train_batch_start", look, at=1)
    fit(model, plugin, callbacks=[call])
    return call.results[0]


def test_every_layer_computes_in_fp32_inside_and_as_before_afterwards():
    inside, after = inside_and_after(MIXED)
    assert inside == ([torch.float32] * 3, torch.float32)
    assert after == ([torch.float16, torch.float32, torch.bfloat16], torch.float16)


def test_what_computes_in_fp64_still_does():
    inside, _ = inside_and_after({"default": "fp16", "net.1": "fp64"})
    assert inside == ([torch.float32, torch.float64, torch.float32], torch.float32)


def test_a_step_after_it_is_the_same_to_the_last_bit():
    def trained(look):
        torch.manual_seed(0)
        model, plugin = Task(probes()), ours(MIXED)
        fit(model, plugin, callbacks=[Call("on_train_batch_start", look(plugin))])
        return [*model.losses, *model.state_dict().values()]

    def peek(plugin):
        def look(run, module):
            with plugin.reference_context():
                module(torch.ones(4, 6))

        return look

    plain, peeked = trained(lambda plugin: lambda run, module: None), trained(peek)
    assert all(torch.equal(a, b) for a, b in zip(plain, peeked, strict=True))


def test_without_a_run_it_is_no_context_at_all():
    with PerLayerPrecision("fp16").reference_context():
        assert not torch.is_autocast_enabled("cpu")
