"""The cost of emulated products, measured on the spot."""

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_mixprec.engine.backends import products
from lightning_mixprec.numerics.formats import get_format

_SIZE, _REPEATS = 256, 7


@functools.cache
def factor_against_fp32(format: str, device: str) -> float:
    """The time of an emulated product as a multiple of the same product in fp32, once per process: some milliseconds.

    Args:
        format: A 16-bit format.
        device: A device that is present.
    """
    a, b = (torch.ones(_SIZE, _SIZE, device=device) for _ in range(2))
    narrow = [tensor.to(get_format(format).forward.dtype) for tensor in (a, b)]
    with torch.no_grad():
        return _seconds(products.mm, *narrow) / _seconds(torch.mm, a, b)


def _seconds(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    """The median time of a product; the first one warms up."""
    times = []
    for _ in range(_REPEATS + 1):
        _wait(a)
        start = time.perf_counter()
        multiply(a, b)
        _wait(a)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
