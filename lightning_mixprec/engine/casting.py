"""Casts of the floating tensors in whatever a module takes or returns."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mixprec.engine.objects import mapped, tensors_in
from lightning_mixprec.numerics.formats import stored_dtypes

Casts = Mapping[torch.dtype, torch.dtype]
"""Casts by dtype: a key becomes its value; any other dtype is left alone."""

FLOATING = (*stored_dtypes(), torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
"""The dtypes whose values a cast keeps; block scales and packed formats mean nothing by themselves."""


def all_to(dtype: torch.dtype) -> Casts:
    """The casts of every floating dtype to one."""
    return {other: dtype for other in FLOATING if other != dtype}


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """Casts every real floating tensor in a value; what does not change is handed back itself.

    >>> cast_floating({"x": torch.ones(1), "label": torch.ones(1, dtype=torch.int64)}, torch.bfloat16)
    {'x': tensor([1.], dtype=torch.bfloat16), 'label': tensor([1])}
    """
    return cast(value, all_to(dtype))


def cast(value: Any, casts: Casts) -> Any:
    """Casts the tensors in a value by their dtype; see :func:`~lightning_mixprec.engine.objects.mapped`.

    Args:
        value: anything.
        casts: which dtype becomes which.

    >>> pair = (torch.ones(1), [torch.ones(1).half()])
    >>> cast(pair, {torch.float16: torch.float32})
    (tensor([1.]), [tensor([1.])])
    >>> cast(pair, {torch.float64: torch.float32}) is pair
    True
    """

    def to_target(tensor: Tensor) -> Tensor:
        target = casts.get(tensor.dtype)
        return tensor if target is None else tensor.to(target)

    return mapped(value, to_target)


def first_floating(value: Any) -> Tensor | None:
    """The first real floating tensor in a value, in their order, or ``None``."""
    for tensor in tensors_in(value):
        if tensor.is_floating_point():
            return tensor
    return None


def holds_dtype(value: Any, dtype: torch.dtype) -> bool:
    """True if a tensor in a value has this dtype."""
    return any(tensor.dtype == dtype for tensor in tensors_in(value))
