"""Compiled steps: what is stored in fewer bits is stepped as if nothing were compiled; nothing is compiled twice."""

import pytest
import torch
import torch._dynamo.config
from optimizer_runs import are_equal, begun, everything, full_weights, gradients, take
from selection import slow

from lightning_mixprec.optim import SGD, AdamW

SHAPES = [(80, 64), (64,)]
PAIRS = {
    "adamw": (torch.optim.AdamW, AdamW, {"lr": 1e-2, "foreach": True}),
    "sgd": (torch.optim.SGD, SGD, {"lr": 1e-2, "foreach": True, "momentum": 0.9}),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*Profiler record function")


def compiled_run(optimizer_class, dtype, **options):
    """Four steps, of which the third and fourth compile nothing more."""
    torch._dynamo.reset()
    params, optimizer = begun(optimizer_class, dtype, SHAPES, **options)
    step = torch.compile(optimizer.step)
    grads = [[grad.half().float() for grad in each] for each in gradients(SHAPES, 4)]
    take(optimizer, params, grads[:2], step)
    with torch._dynamo.config.patch(error_on_recompile=True):
        take(optimizer, params, grads[2:], step)
    return params, optimizer


@pytest.mark.parametrize(("kind", "dtype"), [("adamw", "bfloat16"), slow("adamw", "float16"), slow("sgd", "bfloat16")])
def test_exact_weights_are_those_of_torchs_optimizer(kind, dtype):
    """To the last bit: Inductor's kernels for these steps (torch 2.14) wrote where they should not."""
    torchs, ours, options = PAIRS[kind]
    reference, other = begun(torchs, torch.float32, SHAPES, **options)
    take(other, reference, [[grad.half().float() for grad in each] for each in gradients(SHAPES, 4)])
    params, optimizer = compiled_run(ours, getattr(torch, dtype), **options)
    assert are_equal(full_weights(params, optimizer), [param.detach() for param in reference])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "states"), [("kahan", "bf16"), ("stochastic", "bf16"), ("exact", "int8"), ("nearest", "fp32")]
)
def test_every_storage_compiles_once_and_follows_the_eager_run(weights, states):
    """All weights within the rounding of their storage; those that Kahan keeps to the bits of both numbers."""
    options = {"weights": weights, "states": states, "lr": 1e-2}
    params, optimizer = compiled_run(AdamW, torch.bfloat16, **options)
    eager, other = begun(AdamW, torch.bfloat16, SHAPES, **options)
    take(other, eager, [[grad.half().float() for grad in each] for each in gradients(SHAPES, 4)])
    for compiled, its in zip(full_weights(params, optimizer), full_weights(eager, other), strict=True):
        # A rounding of the arithmetic that falls otherwise becomes one of the storage; of few numbers.
        differs = (compiled - its).abs() > (2.0**-15 if weights in ("exact", "kahan") else 0.0) * its.abs().clamp(min=1)
        assert differs.float().mean() < 0.02
    assert [each.dtype for each in everything(params, optimizer)] == [each.dtype for each in everything(eager, other)]


@pytest.mark.slow
def test_compiled_kahan_sums_what_is_too_small_for_the_weight():
    """A thousand steps of 2e-4 from 1; written in floats, Inductor leaves out what Kahan is."""
    torch._dynamo.reset()
    weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = SGD([weight], lr=2.0**-12, weights="kahan")
    step = torch.compile(optimizer.step)
    for _ in range(512):
        weight.grad = torch.ones_like(weight)
        step()
    assert (weight.float() - 0.875).abs().max() <= 2.0**-9
