"""Tensors of 8 bits with a scale that is their own: what fp8 and int8 products take.

A tensor is scaled by its largest magnitude, or each of its rows by the row's, to fill the format's range before it is
cast. Nothing saturates that way, and a number that is not finite is never lost: it makes its tensor's, or its row's,
scale infinite or NaN, and with that every product of it.

>>> scaled_to(torch.tensor([[1.0, 2.0], [3.0, 896.0]]), "e4m3", per_row=True).scale
tensor([[0.0045],
        [2.0000]])
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_mixprec.numerics.formats import get_format

Scaling = Literal["tensor", "row"]
"""What a scale is of: all of a tensor, or each of its rows."""

SCALINGS: tuple[str, ...] = get_args(Scaling)

_LEAST_MAGNITUDE = 2.0**-100
"""What the largest magnitude counts for at least, so that its reciprocal is finite and zeros stay zeros."""


class Scaled(NamedTuple):
    """A matrix of 8-bit numbers, ``values * scale``.

    Attributes:
        values: [rows, columns], of the format's dtype.
        scale: fp32, [rows, 1], or [1, 1] for all of them.
    """

    values: Tensor
    scale: Tensor

    def dequantized(self) -> Tensor:
        """The matrix in fp32."""
        return self.values.float() * self.scale


def scaled_to(matrix: Tensor, format: str, *, per_row: bool) -> Scaled:
    """A matrix cast to a format after it was scaled by its largest magnitude; does not wait for the device.

    Args:
        matrix: [rows, columns], floating-point, finite or not.
        format: ``"e4m3"``, ``"e5m2"`` or ``"int8"``.
        per_row: Whether each row has a scale of its own.
    """
    target = get_format(format)
    scale = largest_magnitude(matrix, per_row=per_row).clamp_min(_LEAST_MAGNITUDE) / target.max
    filled = matrix / scale
    if target.is_integer:
        # What is not finite has no 8 bits; the scale says that there was some. Ties go to even, as in other formats.
        filled = filled.nan_to_num(0.0).round()
    return Scaled(filled.to(target.dtype), scale)


def largest_magnitude(matrix: Tensor, *, per_row: bool) -> Tensor:
    """The largest magnitude in each row of a matrix, fp32 [rows, 1], or in all, [1, 1]; NaN where one is in there."""
    shape = (len(matrix) if per_row else 1, 1)
    if not matrix.numel():
        return torch.zeros(shape, device=matrix.device)
    dim = 1 if per_row else (0, 1)
    largest: Tensor = torch.linalg.vector_norm(matrix, torch.inf, dim=dim, dtype=torch.float32)
    return largest.view(shape)
