"""fp32 without TF32, in which GPUs multiply fp32 convolutions by default, with fp16's 10 bits of mantissa."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Within, CUDA multiplies fp32 numbers in fp32, whatever the user's settings; afterwards these hold again.

    A reference in TF32 would be as coarse as what it judges.

    Args:
        device: The device that computes; others than CUDA have no TF32.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    units = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [unit.fp32_precision for unit in units]
    try:
        for unit in units:
            unit.fp32_precision = "ieee"
        yield
    finally:
        for unit, precision in zip(units, before, strict=True):
            unit.fp32_precision = precision
