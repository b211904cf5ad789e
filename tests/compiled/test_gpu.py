"""Inductor's kernels and CUDA graphs."""

import pytest
import torch
from plugin_models import Batches, Call, ours
from torch import nn

from lightning_mixprec import FidelityMonitor, OverflowMonitor, UnderflowMonitor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*(vanish in|no longer points|differs from fp32)"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:Not enough SMs"),
]

POLICY = {"default": "fp16", "net.blocks.0": "bf16", "**.norm": "c=fp32,o=input", "net.head": "fp32"}


GPU = {"accelerator": "gpu", "batches": Batches(6, count=6)}
GRAPHS = {"backend": None, "options": {"mode": "reduce-overhead"}}


def assert_close(compiled, plain):
    """Inductor fuses and rounds less often than eager, which rounds every result to the 8 bits of bf16."""
    assert len(compiled.losses) == len(plain.losses)
    assert torch.allclose(torch.stack(compiled.losses), torch.stack(plain.losses), rtol=2**-5)
    weights = (done.module.state_dict().values() for done in (compiled, plain))
    for mine, theirs in zip(*weights, strict=True):
        assert torch.allclose(mine.double(), theirs.double(), rtol=2**-5, atol=2e-2)


def test_inductor_computes_what_the_plain_run_computes_up_to_rounding(run):
    compiled = run(POLICY, "a submodule", backend="inductor", options={"fullgraph": True}, **GPU)
    assert compiled.compiled_at == {0: 1}
    assert_close(compiled, run(POLICY, **GPU))


class Steep(nn.Module):
    """Between its layers the gradient is 2**20 times what arrives: beyond fp16, and nothing to fp32."""

    def __init__(self):
        super().__init__()
        self.first, self.wide = nn.Linear(6, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        for layer, factor in zip(self.wide, (2.0**-20, 2.0**20), strict=True):
            layer.weight.data = factor * torch.eye(2)

    def forward(self, x):
        return self.wide(self.first(x))


def test_the_compiled_backward_of_an_fp32_layer_does_not_overflow_in_fp16(run):
    policy = {"default": "fp16", "net.wide": "fp32"}
    done = run(policy, "a submodule", backend="inductor", make=Steep, max_steps=1, accelerator="gpu")
    assert done.plugin.skipped_steps == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cuda_graphs_of_a_watched_run(accumulate, run):
    options = {"accumulate_grad_batches": accumulate, **GPU}
    watching = [UnderflowMonitor(2), FidelityMonitor(3), OverflowMonitor()]
    assert_close(run(POLICY, "a submodule", callbacks=watching, **GRAPHS, **options), run(POLICY, **options))
    assert all(monitor.latest for monitor in watching[:2])


def test_cuda_graphs_of_a_run_that_skips_a_step_and_changes_its_formats(run):
    def spoil(_, module):
        next(module.parameters()).grad.fill_(float("inf"))

    def disturbed(how=None, **options):
        plugin = ours(POLICY)
        move = Call("on_train_batch_end", lambda *_: plugin.edit_policy({"net.head": "bf16"}), at=3)
        callbacks = [Call("on_after_backward", spoil, at=2), move]
        return run(plugin, how, callbacks=callbacks, **options, **GPU)

    plain, graphs = disturbed(), disturbed("a submodule", **GRAPHS)
    assert plain.plugin.skipped_steps == graphs.plugin.skipped_steps == 1
    assert_close(graphs, plain)
