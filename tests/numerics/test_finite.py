"""The search for NaN and infinities, against Python's own."""

import math

import pytest
import torch
from torch import Tensor

from lightning_mixprec.numerics.finite import all_finite, are_finite, are_nonfinite, finite_flags

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def layouts(dtype: torch.dtype) -> list[Tensor]:
    """Zeros as memory may hold them; what lies between the elements of the last two is infinite."""
    gapped = torch.full((6, 5, 4, 3), math.inf, dtype=dtype)
    return [
        torch.zeros((), dtype=dtype),
        torch.zeros(71, dtype=dtype),
        torch.zeros(2, 3, 4, 5, dtype=dtype),
        torch.zeros(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last),
        torch.zeros(3, 4, 5, dtype=dtype).permute(2, 0, 1),
        gapped[::2, 1:3].zero_(),
        gapped[:, 4, 3:, :].transpose(0, 2).zero_(),
    ]


@each_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    for tensor in layouts(dtype):
        assert finite_flags([tensor]).tolist() == [True]
        for place in [tuple(index) for index in torch.ones(tensor.shape).nonzero().tolist()]:
            tensor[place] = value
            assert finite_flags([tensor]).tolist() == [False]
            tensor[place] = 0.0


@each_dtype
def test_the_largest_and_the_least_numbers_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    extremes = [torch.full((4096,), value, dtype=dtype) for value in (limits.max, limits.min, limits.smallest_normal)]
    assert finite_flags([*extremes, torch.full((4096,), limits.smallest_normal / 2, dtype=dtype)]).all()


@each_dtype
def test_each_of_many_tensors_is_told_apart(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1 + number, generator=generator).to(dtype) for number in range(40)]
    expected = [bool(torch.rand((), generator=generator) < 0.5) for _ in tensors]
    for number, (tensor, bad) in enumerate(zip(tensors, expected, strict=True)):
        if bad:
            tensor[number // 2] = (math.nan, math.inf, -math.inf)[number % 3]
    assert are_nonfinite(tensors) == expected
    assert [not each for each in are_finite(tensors)] == expected
    assert not all_finite(tensors) and all_finite([t for t, bad in zip(tensors, expected, strict=True) if not bad])
