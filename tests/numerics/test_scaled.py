"""8-bit matrices with scales of their own, against NumPy and ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
import torch

from lightning_mixprec.numerics.scaled import largest_magnitude, scaled_to

MAX = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}
CAST = {
    "e4m3": lambda values: values.astype(ml_dtypes.float8_e4m3fn),
    "e5m2": lambda values: values.astype(ml_dtypes.float8_e5m2),
    "int8": lambda values: np.rint(values),
}
FORMATS, ROWS = sorted(MAX), [False, True]


def by_hand(matrix: torch.Tensor, format: str, per_row: bool) -> tuple[np.ndarray, np.ndarray]:
    """The values and the scale, as float32."""
    wide = matrix.float().numpy()
    amax = np.abs(wide).max(1, keepdims=True) if per_row else np.abs(wide).max().reshape(1, 1)
    scale = np.maximum(amax, np.float32(2.0**-100)) / np.float32(MAX[format])
    return CAST[format](wide / scale).astype(np.float32), scale


@pytest.mark.parametrize("per_row", ROWS, ids=["tensor", "row"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_values_and_scales_are_those_of_ml_dtypes(format: str, per_row: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(37, 29, generator=generator) * torch.logspace(-4, 3, 37)[:, None]
    for given in (matrix.to(dtype), matrix.to(dtype).t()):
        values, scale = by_hand(given, format, per_row)
        scaled = scaled_to(given, format, per_row=per_row)
        np.testing.assert_array_equal(scaled.scale.numpy(), scale)
        np.testing.assert_array_equal(scaled.values.float().numpy(), values)
        assert torch.equal(scaled.dequantized(), scaled.values.float() * scaled.scale)


@pytest.mark.parametrize("format", FORMATS)
def test_the_largest_magnitude_fills_the_range_and_nothing_saturates(format: str) -> None:
    matrix = torch.tensor([[1e-20, -3e-20], [2.0, 0.5], [3e38, -1e30]])
    largest = scaled_to(matrix, format, per_row=True).values.float().abs().amax(1)
    assert largest.tolist() == [MAX[format]] * 3


@pytest.mark.parametrize("per_row", ROWS, ids=["tensor", "row"])
@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format: str, per_row: bool) -> None:
    scaled = scaled_to(torch.zeros(3, 4), format, per_row=per_row)
    assert scaled.dequantized().tolist() == torch.zeros(3, 4).tolist()
    assert scaled.scale.isfinite().all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_is_never_lost(format: str, bad: float) -> None:
    matrix = torch.ones(3, 4)
    matrix[1, 2] = bad
    assert not scaled_to(matrix, format, per_row=False).dequantized().isfinite().any()
    by_row = scaled_to(matrix, format, per_row=True).dequantized()
    assert by_row.isfinite().all(1).tolist() == [True, False, True]
    assert not by_row[1].isfinite().any()


def test_the_largest_magnitude_of_nothing_is_zero() -> None:
    assert largest_magnitude(torch.zeros(0, 4), per_row=True).shape == (0, 1)
    assert largest_magnitude(torch.zeros(2, 0), per_row=True).tolist() == [[0.0], [0.0]]
    assert largest_magnitude(torch.zeros(0, 4), per_row=False).tolist() == [[0.0]]
