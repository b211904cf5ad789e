"""A compiled run computes what the plain one computes: in aot_eager, which keeps torch's kernels, to the last bit."""

import shutil

import pytest
import torch
import torch._functorch.config as functorch
import torch._inductor.config
from plugin_models import Batches, Call, ours, same, stock
from selection import slow_but_for
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

POLICIES = {
    "bf16 and fp32": {"default": "bf16", "**.norm": "c=fp32,o=input", "net.head": "fp32"},
    "fp16, bf16 and fp32": {"default": "fp16", "net.blocks.1": "bf16", "net.batch_norm": "fp32", "net.head": "fp32"},
    "fp32, bf16 and fp64": {"default": "fp32", "net.blocks.0": "bf16", "net.head": "fp64", "net.stem": "p=fp64"},
}


def test_losses_gradients_and_weights_are_those_of_the_plain_run(how, run):
    plain = run(POLICIES["fp16, bf16 and fp32"])
    compiled = run(POLICIES["fp16, bf16 and fp32"], how, backend="aot_eager")
    assert compiled.counter.frame_count > 0
    assert len(plain.losses) == len(plain.gradients) == 4
    assert same(compiled.numbers, plain.numbers)


@pytest.mark.parametrize("policy", slow_but_for({"fp16, bf16 and fp32"}, POLICIES))
def test_they_are_under(policy, run):
    compiled = run(POLICIES[policy], "a submodule", backend="aot_eager", options={"fullgraph": True})
    assert compiled.compiled_at == {0: 1}
    assert same(compiled.numbers, run(POLICIES[policy]).numbers)


@pytest.mark.parametrize("format", slow_but_for({"bf16"}, ["bf16", "fp16"]))
def test_a_uniform_policy_is_compiled_to_what_stock_is_compiled_to(format, run):
    ours_, theirs = (run(each, "a submodule", backend="aot_eager") for each in (ours(format), stock(format)))
    assert same(ours_.losses, theirs.losses)
    assert ours_.compiled_at == theirs.compiled_at == {0: 1}


@pytest.mark.parametrize("how", slow_but_for({"a submodule"}, ["the LightningModule", "a submodule", "each block"]))
def test_a_skipped_step_moves_neither_weights_nor_batch_statistics(how, run):
    def spoil(trainer, model):
        next(model.parameters()).grad.fill_(float("inf"))

    def skipping(how):
        seen = Call("on_train_batch_end", lambda trainer, model: [v.clone() for v in model.state_dict().values()])
        callbacks = [Call("on_after_backward", spoil, at=1), seen]
        return run(POLICIES["fp16, bf16 and fp32"], how, backend="aot_eager", callbacks=callbacks), seen

    (plain, _), (compiled, seen) = skipping(None), skipping(how)
    assert compiled.plugin.skipped_steps == plain.plugin.skipped_steps == 1
    assert compiled.trainer.global_step == 3
    assert same(seen.results[0], seen.results[1])
    assert not same(seen.results[1], seen.results[2])
    assert same(compiled.numbers[-1], plain.numbers[-1])


@pytest.mark.parametrize("how", slow_but_for({"a submodule"}, ["the LightningModule", "a submodule"]))
def test_outlier_batches_are_skipped_and_the_loss_scale_falls_as_in_the_plain_run(how, run):
    def batches():
        made = Batches(6, count=6)
        made.batches[2] = (torch.full((4, 6), 1e38), made.batches[2][1])
        return made

    policy = {"default": "fp16", "**.norm": "c=fp32,o=input"}
    plain, compiled = run(policy, batches=batches()), run(policy, how, backend="aot_eager", batches=batches())
    assert plain.plugin.skipped_steps == compiled.plugin.skipped_steps == 1
    assert compiled.plugin.scaler.get_scale() == plain.plugin.scaler.get_scale() == 512
    assert all(bool(torch.isfinite(value).all()) for value in compiled.module.state_dict().values())
    assert same(compiled.numbers[-1], plain.numbers[-1])


class Steep(nn.Module):
    """Between its layers the gradient is 2**20 times what arrives: beyond fp16, and nothing to fp32."""

    def __init__(self):
        super().__init__()
        self.first, self.wide = nn.Linear(6, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        for layer, factor in zip(self.wide, (2.0**-20, 2.0**20), strict=True):
            layer.weight.data = factor * torch.eye(2)

    def forward(self, x):
        return self.wide(self.first(x))


@pytest.mark.parametrize("how", slow_but_for({"a submodule in place"}, ["the LightningModule", "a submodule in place"]))
def test_the_backward_of_an_fp32_layer_is_computed_in_fp32(how, run):
    policy = {"default": "fp16", "net.wide": "fp32"}
    plain = run(policy, make=Steep, max_steps=1)
    compiled = run(policy, how, backend="aot_eager", make=Steep, max_steps=1)
    exact = run("fp32", make=Steep, max_steps=1)
    assert compiled.plugin.skipped_steps == 0
    assert same(compiled.gradients, plain.gradients)
    # The fp16 layer alone rounds, at 2**-11 for each of a few operations.
    for mine, theirs in zip(compiled.gradients[0], exact.gradients[0], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-2, atol=1e-2 * theirs.abs().max().item())


@pytest.mark.parametrize("how", slow_but_for({"a submodule"}, ["the LightningModule", "a submodule", "each block"]))
def test_evaluation_in_formats_of_its_own(how, run):
    def evaluated(how):
        plugin = ours("bf16", eval_policy={"default": "fp32", "net.blocks.1": "fp16"})
        return run(plugin, how, backend="aot_eager", validates=True, val_check_interval=2)

    plain, compiled = evaluated(None), evaluated(how)
    assert len(plain.val_losses) == 2
    assert same(compiled.numbers, plain.numbers)


@pytest.mark.parametrize("how", ["the LightningModule", "each block"])
def test_whole_graphs(how, run):
    compiled = run(POLICIES["fp16, bf16 and fp32"], how, options={"fullgraph": True}, max_steps=2)
    assert compiled.compiled_at == {0: compiled.graphs[0]}


# A compiled backward reads the setting when it is traced.


@pytest.mark.parametrize("chosen", ["same_as_forward", "off", [{"device_type": "cpu", "dtype": torch.bfloat16}]])
def test_what_is_set_for_compiled_backwards_is_put_back_and_a_users_choice_left(chosen, run):
    with functorch.patch(backward_pass_autocast=chosen):
        seen = Call("on_train_batch_end", lambda *_: functorch.backward_pass_autocast)
        run("bf16", callbacks=[seen], max_steps=1)
        assert seen.results == ["off" if chosen == "same_as_forward" else chosen]
        assert functorch.backward_pass_autocast == chosen


def test_it_is_put_back_after_an_error_too(run):
    def fail(*_):
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        run("bf16", callbacks=[Call("on_train_batch_end", fail)])
    assert functorch.backward_pass_autocast == "same_as_forward"


# Inductor


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler, and there is no g++ here")
def test_inductor_computes_what_the_plain_run_computes_up_to_rounding(run):
    def make():
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

    policy = {"default": "bf16", "net.2": "fp32"}
    with torch._inductor.config.patch(cpp_cache_precompile_headers=False):  # which take longer than this network
        plain, compiled = (run(policy, how, backend="inductor", make=make) for how in (None, "a submodule"))
    assert compiled.compiled_at == {0: 1}
    # It rounds less often than eager, which rounds every result to the 8 bits of bf16.
    assert torch.allclose(torch.stack(compiled.losses), torch.stack(plain.losses), rtol=2**-6)
    for mine, theirs in zip(compiled.gradients[0], plain.gradients[0], strict=True):
        assert torch.nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), 0) > 0.999


def test_the_gradient_of_dropout_in_16_bits_is_rounded_otherwise_by_torch_itself():
    """What the guide excepts: the same masks and outputs, and another last bit of the gradient, without any plugin."""

    def dropped(function, dtype):
        x = torch.linspace(-1, 1, 4096).to(dtype).requires_grad_()
        torch.manual_seed(0)
        output = function(x)
        output.float().square().sum().backward()
        return output.detach(), x.grad

    def drop(x):
        return nn.functional.dropout(x, 0.1)

    compiled = torch.compile(drop, backend="aot_eager")
    for dtype, is_same in ((torch.float32, True), (torch.bfloat16, False), (torch.float16, False)):
        (plain, gradient), (output, compiled_gradient) = dropped(drop, dtype), dropped(compiled, dtype)
        assert torch.equal(plain, output)
        assert torch.equal(gradient, compiled_gradient) == is_same
        torch.testing.assert_close(gradient, compiled_gradient)
