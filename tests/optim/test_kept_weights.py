"""What is kept of weights in 16 bits, eager and compiled, against models in scalars."""

import itertools
import math

import pytest
import torch
from selection import slow

from lightning_mixprec.numerics.splitting import random_bits
from lightning_mixprec.optim import AdamW
from lightning_mixprec.optim.kept_weights import WEIGHTS, empty_kept, keeping, keeping_in

DTYPES = [torch.bfloat16, torch.float16]
PAIRS = [*itertools.product(WEIGHTS, DTYPES)]
QUICK = [("exact", torch.bfloat16), ("kahan", torch.bfloat16)]
BYTES = {"exact": {torch.bfloat16: 2, torch.float16: 4}, "kahan": 2, "stochastic": 0, "nearest": 0}


def noise_for(wide: torch.Tensor) -> torch.Tensor:
    return (random_bits(torch.arange(wide.numel()), 7) >> 48).to(torch.int32) & 0xFFFF


def wide_numbers() -> torch.Tensor:
    """Every power of two of fp32 with a random fraction, either sign, and what is no usual number."""
    bits = torch.arange(0, 256)[:, None] * 2**23 + torch.randint(0, 2**23, (256, 16))
    usual = torch.cat([bits, bits - 2**31]).to(torch.int32).view(torch.float32).reshape(-1)
    edges = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65519.0, 65520.0, 3.3895e38, 3.4e38, 1e-45])
    return torch.cat([usual, edges])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_bytes_that_are_kept(weights, dtype):
    kept = empty_kept(torch.zeros(5, dtype=dtype), weights)
    expected = BYTES[weights]
    assert sum(value.element_size() for value in kept.values()) == (
        expected[dtype] if isinstance(expected, dict) else expected
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_is_every_finite_bit(dtype):
    way, wide = keeping("exact", dtype), wide_numbers()
    stored, kept = way.narrowed(wide, None)
    assert stored.dtype == dtype
    back = way.widened(stored, kept)
    assert torch.equal(back.view(torch.int32)[~wide.isnan()], wide.view(torch.int32)[~wide.isnan()])
    assert back[wide.isnan()].isnan().all()


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 17), (torch.float16, 22)])
def test_kahan_keeps_twice_the_bits_of_the_format(dtype, bits):
    way = keeping("kahan", dtype)
    wide = torch.randn(10**5)
    if dtype == torch.float16:
        wide = wide.sign() * wide.abs().clamp(0.25, 4.0)  # whose rests are no subnormal of fp16
    error = ((way.widened(*way.narrowed(wide, None)) - wide) / wide).abs().max()
    assert error <= 2.0**-bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_kahan_goes_on_from_the_sum_as_if_it_had_not_been_added_up(dtype):
    """A checkpoint of weights that were given back has the sum; half a step must not become the next number there."""
    way, wide = keeping("kahan", dtype), torch.cat([torch.randn(10**5), wide_numbers()])
    stored, (lost,) = way.narrowed(wide, None)
    again, (lost_again,) = way.narrowed(way.widened(stored, [lost]), None)
    is_number = ~stored.isnan()
    assert torch.equal(again[is_number], stored[is_number])
    assert torch.equal(lost_again, lost)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_is_torchs_rounding(dtype):
    wide = wide_numbers()
    stored, kept = keeping("nearest", dtype).narrowed(wide, None)
    assert not kept
    assert torch.equal(stored.isnan(), wide.isnan())
    assert torch.equal(stored.view(torch.int16)[~wide.isnan()], wide.to(dtype).view(torch.int16)[~wide.isnan()])


def test_a_master_of_another_weight_is_not_used():
    """Averaging or pruning wrote the weight itself."""
    way = keeping("exact", torch.float16)
    stored, kept = way.narrowed(torch.tensor([1.0001, 2.0001]), None)
    stored[0] = 5.0
    assert way.widened(stored, kept).tolist() == [5.0, pytest.approx(2.0001, abs=1e-6)]


def test_a_state_tells_what_left_it():
    for dtype in DTYPES:
        for weights in ("exact", "kahan"):
            param = torch.zeros(2, dtype=dtype)
            state = {"exp_avg": param, **empty_kept(param, weights)}
            assert keeping_in(state) == (keeping(weights, dtype), dtype)
    assert keeping_in({"exp_avg": torch.zeros(2), "remainder": torch.zeros(2), "step": 3.0}) is None


@pytest.mark.parametrize(("weights", "dtype"), [pair if pair in QUICK else slow(*pair) for pair in PAIRS])
def test_compiled_it_is_bit_for_bit_what_it_is_eager(weights, dtype):
    """Takes some seconds of the compiler; written in floats, Inductor leaves out the rounding that Kahan corrects."""
    way, wide = keeping(weights, dtype), wide_numbers()
    bits = noise_for(wide) if way.is_random else None

    def there(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stored, kept = way.narrowed(values * 1.25, bits)
        return stored, *kept

    def back(stored: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        return way.widened(stored, kept)

    torch._dynamo.reset()
    narrow = there(wide)
    pairs = [*zip(narrow, torch.compile(there)(wide), strict=True), (back(*narrow), torch.compile(back)(*narrow))]
    for eager, compiled in pairs:
        size = {1: torch.int8, 2: torch.int16, 4: torch.int32}[eager.element_size()]
        is_number = ~(wide * 1.25).isnan()
        assert torch.equal(eager.view(size)[is_number], compiled.view(size)[is_number])


def kahan_of(start: float, updates: list[float]) -> tuple[float, float]:
    """A weight and its compensation by scalars, each rounded to bf16 by itself."""

    def rounded(value: float) -> float:
        return torch.tensor(value, dtype=torch.float32).bfloat16().item()

    weight, lost = rounded(start), 0.0
    for update in updates:
        total = torch.tensor(weight, dtype=torch.float32) + torch.tensor(lost, dtype=torch.float32)
        total = (total * 1.0 - torch.tensor(update, dtype=torch.float32)).item()
        weight = rounded(total)
        lost = rounded(torch.tensor(total, dtype=torch.float32).item() - weight)
    return weight, lost


def test_kahan_sums_as_the_scalar_model_does():
    from lightning_mixprec.optim import SGD

    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = SGD([weight], lr=1.0, weights="kahan")
    updates = [2.0**-12] * 500 + [-(2.0**-13)] * 300
    for update in updates:
        weight.grad = torch.tensor([update], dtype=torch.bfloat16)
        optimizer.step()
    expected, lost = kahan_of(1.0, updates)
    assert weight.item() == expected
    assert optimizer.state[weight]["compensation"].item() == lost


@pytest.mark.parametrize(
    ("weights", "expected", "tolerance"),
    [("exact", 0.8, 1e-4), ("kahan", 0.8, 2e-3), ("stochastic", 0.8, 5 * 0.03 / 32), ("nearest", 1.0, 0.0)],
)
def test_weights_of_1_move_by_a_thousand_small_steps(weights, expected, tolerance):
    """By 2e-4 each, which is too little for bf16; stochastic in the mean of 1,024 weights, within five deviations."""
    weight = torch.nn.Parameter(torch.ones(1024, dtype=torch.bfloat16))
    optimizer = AdamW([weight], lr=2e-4, weight_decay=0.0, weights=weights)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert abs(weight.float().mean().item() - expected) <= tolerance + (2.0**-9 if weights != "stochastic" else 0)
