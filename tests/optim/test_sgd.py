"""``SGD`` against torch's own, bit for bit where no bit is lost."""

import pytest
import torch
from optimizer_runs import are_equal, begun, everything, full_weights, gradients, take

from lightning_mixprec.optim import SGD, pieces

SHAPES = [(7, 5), (64,), (3, 4, 3), (), (5000,)]
OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "foreach": True},
    {"momentum": 0.9, "fused": True},
    {"maximize": True, "foreach": False},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_exact_weights_are_torchs_bit_for_bit(options, dtype):
    grads = [[grad.half().float() for grad in each] for each in gradients(SHAPES, 12)]
    reference, theirs = begun(torch.optim.SGD, shapes=SHAPES, lr=1e-2, **options)
    take(theirs, reference, grads)
    params, ours = begun(SGD, dtype, SHAPES, lr=1e-2, **options)
    take(ours, params, grads)
    assert are_equal(full_weights(params, ours), [param.detach() for param in reference])
    if "momentum" in options:
        their_state = [theirs.state[param]["momentum_buffer"] for param in reference]
        assert are_equal([ours.state[param]["momentum_buffer"] for param in params], their_state)


def test_in_rows_of_large_tensors_it_is_the_same(monkeypatch):
    """The first step too, which begins with the gradient whatever the dampening."""
    shapes = [(40, 300), (4097,)]
    results = []
    for chunk in (1 << 22, 1000):
        monkeypatch.setattr(pieces, "CHUNK", chunk)
        params, optimizer = begun(SGD, torch.bfloat16, shapes, lr=1e-2, momentum=0.9, dampening=0.5, states="bf16")
        take(optimizer, params, gradients(shapes, 3))
        results.append(everything(params, optimizer))
    assert are_equal(*results)


@pytest.mark.parametrize(("states", "bytes_each"), [("fp32", 10), ("bf16", 8), ("int8", 7)])
def test_bytes_of_a_parameter(states, bytes_each):
    """Weight, gradient, remainder and momentum; the counter and the scales left out."""
    params, optimizer = begun(SGD, torch.bfloat16, [(64, 256)], momentum=0.9, states=states)
    take(optimizer, params, gradients([(64, 256)], 1))
    (param,) = params
    kept = [value for key, value in optimizer.state[param].items() if key not in ("step", "momentum_buffer_scales")]
    assert sum(each.numel() * each.element_size() for each in (param, param.grad, *kept)) == param.numel() * bytes_each


def test_without_momentum_there_is_none():
    params, optimizer = begun(SGD, torch.bfloat16, [(8,)])
    take(optimizer, params, gradients([(8,)], 2))
    assert set(optimizer.state[params[0]]) == {"step", "remainder", "remainder_low"}


def test_a_skipped_step_of_the_fused_optimizer_changes_no_bit():
    params, optimizer = begun(SGD, torch.bfloat16, SHAPES, momentum=0.9, states="bf16", fused=True)
    take(optimizer, params, gradients(SHAPES, 2))
    before = everything(params, optimizer)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    take(optimizer, params, gradients(SHAPES, 1, seed=6))
    assert are_equal(everything(params, optimizer), before)
