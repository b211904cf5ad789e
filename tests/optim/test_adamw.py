"""``AdamW`` against torch's own: bit for bit where no bit is lost, in bytes, and in what it does not touch."""

import pytest
import torch
from optimizer_runs import are_equal, begun, everything, full_weights, gradients, take

from lightning_mixprec.optim import AdamW, pieces

SHAPES = [(7, 5), (64,), (3, 4, 3), (), (5000,)]
STEPS = 12
OPTIONS = [
    {},
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"amsgrad": True, "maximize": True},
    {"weight_decay": 0.0, "betas": (0.8, 0.9), "eps": 1e-4},
    {"lr": torch.tensor(1e-2), "foreach": False},
]
TABLE = {  # bytes of weight, gradient and state of each parameter, the counter of steps left out
    ("fp32", "exact", "fp32"): 16,
    ("bf16", "exact", "fp32"): 14,
    ("bf16", "exact", "bf16"): 10,
    ("bf16", "kahan", "bf16"): 10,
    ("bf16", "stochastic", "bf16"): 8,
    ("bf16", "nearest", "bf16"): 8,
    ("bf16", "stochastic", "int8"): 6,
    ("bf16", "exact", "int8"): 8,
    ("fp16", "exact", "fp32"): 16,
    ("fp16", "kahan", "bf16"): 10,
    ("fp32", "exact", "bf16"): 12,
    ("fp32", "exact", "int8"): 10,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def named(options):
    return ",".join(f"{key}={getattr(value, 'item', lambda value=value: value)()}" for key, value in options.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_exact_weights_are_torchs_bit_for_bit(options, dtype):
    grads = gradients(SHAPES, STEPS)
    if dtype == "fp16":  # whose range the gradients must fit
        grads = [[grad.half().float() for grad in each] for each in grads]
    options = {"lr": 1e-2, **options}
    reference, theirs = begun(torch.optim.AdamW, shapes=SHAPES, **options)
    take(theirs, reference, grads)
    params, ours = begun(AdamW, DTYPES[dtype], SHAPES, **options)
    take(ours, params, grads)
    assert are_equal(full_weights(params, ours), [param.detach() for param in reference])
    for key in ("exp_avg", "exp_avg_sq", "step"):
        their_state = [theirs.state[param][key] for param in reference]
        assert are_equal([ours.state[param][key] for param in params], their_state)


def test_in_chunks_and_in_rows_of_large_tensors_it_is_the_same(monkeypatch):
    """The second moment in 8 bits in whole blocks, random rounding by the numbers of elements."""
    shapes = [(40, 300), (4097,), (3, 5, 700), (1, 5000)]
    results = []
    for chunk in (1 << 22, 1000):
        monkeypatch.setattr(pieces, "CHUNK", chunk)
        for weights, states in (("exact", "fp32"), ("stochastic", "bf16"), ("exact", "int8")):
            params, optimizer = begun(AdamW, torch.bfloat16, shapes, lr=1e-2, weights=weights, states=states)
            take(optimizer, params, gradients(shapes, 3))
            results.append(everything(params, optimizer))
    assert all(are_equal(whole, parts) for whole, parts in zip(results[:3], results[3:], strict=True))


@pytest.mark.parametrize(("dtype", "weights", "states"), TABLE)
def test_bytes_of_a_parameter_are_those_of_the_table(dtype, weights, states):
    """Counted from the tensors that exist after a step."""
    count = 256 * 64
    params, optimizer = begun(AdamW, DTYPES[dtype], [(count,)], weights=weights, states=states)
    take(optimizer, params, gradients([(count,)], 1))
    (param,) = params
    state = [value for key, value in optimizer.state[param].items() if key != "step"]
    scales = 2 * count // 256 * 4 if states == "int8" else 0
    total = sum(tensor.numel() * tensor.element_size() for tensor in (param, param.grad, *state))
    assert total - scales == count * TABLE[dtype, weights, states]


def test_gradients_may_accumulate_in_fp32():
    """Two bytes more for each weight; what bf16 would lose in the sum is there."""
    params, optimizer = begun(AdamW, torch.bfloat16, [(8,)], grad_dtype=torch.float32)
    (param,) = params
    for factor in (1.0, 2.0**-12):
        (param.float() * factor).sum().backward()
    assert param.grad.dtype == torch.float32
    assert (param.grad == 1.0 + 2.0**-12).all()
    optimizer.step()


def test_two_kinds_of_storage_in_one_group_and_words_of_a_groups_own():
    wide, narrow, alone = (
        torch.nn.Parameter(torch.ones(5000, dtype=dtype)) for dtype in [torch.float32] + 2 * [torch.bfloat16]
    )
    optimizer = AdamW([{"params": [wide, narrow]}, {"params": [alone], "weights": "kahan", "states": "bf16"}])
    take(optimizer, [wide, narrow, alone], gradients([(5000,)] * 3, 2))
    assert set(optimizer.state[wide]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[narrow]) == {"step", "exp_avg", "exp_avg_sq", "remainder", "remainder_low"}
    assert set(optimizer.state[alone]) == {"step", "exp_avg", "exp_avg_sq", "compensation"}
    assert optimizer.state[alone]["exp_avg"].dtype == torch.bfloat16


def test_weights_whose_memory_is_ordered_otherwise():
    """Channels last, as convolutions have them, beside a gradient that is not."""
    grads = gradients([(4, 3, 5, 5)], STEPS)
    reference, theirs = begun(torch.optim.AdamW, shapes=[(4, 3, 5, 5)], lr=1e-2)
    take(theirs, reference, grads)
    params, ours = begun(AdamW, torch.bfloat16, [(4, 3, 5, 5)], lr=1e-2)
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    take(ours, params, grads)
    assert params[0].is_contiguous(memory_format=torch.channels_last)
    assert are_equal([value.contiguous() for value in full_weights(params, ours)], [reference[0].detach()])


@pytest.mark.parametrize("weights", ["exact", "kahan", "stochastic", "nearest"])
@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
def test_a_skipped_step_of_a_fused_optimizer_changes_no_bit(weights, states):
    params, optimizer = begun(AdamW, torch.bfloat16, SHAPES, lr=1e-2, weights=weights, states=states, fused=True)
    take(optimizer, params, gradients(SHAPES, 2))
    before = everything(params, optimizer)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    take(optimizer, params, gradients(SHAPES, 1, seed=6))
    assert are_equal(everything(params, optimizer), before)
    optimizer.found_inf = torch.zeros(())
    take(optimizer, params, gradients(SHAPES, 1, seed=6))
    del optimizer.grad_scale, optimizer.found_inf
    again, other = begun(AdamW, torch.bfloat16, SHAPES, lr=1e-2, weights=weights, states=states, fused=True)
    take(other, again, [*gradients(SHAPES, 2), *gradients(SHAPES, 1, seed=6)])
    assert are_equal(everything(params, optimizer), everything(again, other))


def test_a_parameter_without_a_gradient_is_left_alone():
    """Frozen for a while, and then moving on as torch's does."""
    grads = gradients(SHAPES, STEPS)
    results = []
    for optimizer_class, dtype in ((torch.optim.AdamW, torch.float32), (AdamW, torch.bfloat16)):
        params, optimizer = begun(optimizer_class, dtype, SHAPES, lr=1e-2)
        for number, each in enumerate(grads):
            for param, grad in zip(params, each, strict=True):
                param.grad = None if param is params[1] and 3 <= number < 6 else grad.to(dtype)
            optimizer.step()
        weights = [param.detach() for param in params] if dtype == torch.float32 else full_weights(params, optimizer)
        results.append([*weights, optimizer.state[params[1]]["step"]])
    assert are_equal(*results)


def test_seeds_are_other_draws_and_the_same_seed_the_same():
    """Whatever torch's generator does."""
    results = []
    for seed in (0, 0, 1):
        torch.rand(3 + seed)
        params, optimizer = begun(AdamW, torch.bfloat16, SHAPES, lr=1e-2, weights="stochastic", seed=seed)
        take(optimizer, params, gradients(SHAPES, 3))
        results.append(everything(params, optimizer))
    assert are_equal(results[0], results[1])
    assert not are_equal(results[0], results[2])


def test_no_generator_of_torchs_is_drawn_from():
    before = torch.get_rng_state()
    params, optimizer = begun(AdamW, torch.bfloat16, SHAPES, weights="stochastic", states="bf16")
    take(optimizer, params, [[torch.ones(shape) for shape in SHAPES]] * 2)
    fresh = torch.get_rng_state()
    assert torch.equal(before, fresh)


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_moments_in_fewer_bits_follow_those_of_fp32(states):
    """A hundred steps of one distribution: a moment that stood still would not have its mean."""
    shapes = [(64, 256)]
    results = []
    for word in ("fp32", states):
        params, optimizer = begun(AdamW, torch.bfloat16, shapes, lr=1e-3, states=word, betas=(0.9, 0.999))
        take(optimizer, params, gradients(shapes, 100))
        results.append((full_weights(params, optimizer)[0], optimizer))
    (exact, _), (rough, optimizer) = results
    moved = exact - begun(AdamW, shapes=shapes)[0][0].detach()
    assert (rough - exact).norm() < 0.1 * moved.norm()
    if states == "bf16":
        second = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg_sq"]
        assert second.float().mean().item() == pytest.approx(1 - 0.999**100, rel=0.02)
