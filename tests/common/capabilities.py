"""What this machine computes: the format of policy "auto" here, and what torch cannot compute, tried once.

Tests that met what it cannot compute are skipped and say why.
"""

from functools import cache

import torch
from torch import nn

_OF_LSTM = "could not create a primitive descriptor for the LSTM forward propagation primitive"
"""Without AVX-512, torch's CPU build has no LSTM in 16 bits under autocast, and says so by this of oneDNN."""


def auto_format() -> str:
    """The format that ``policy="auto"`` stands for on this CPU."""
    from lightning_mixprec.plugin.arguments import choose_format

    return choose_format(torch.device("cpu"))[0]


@cache
def lacks_16_bit_lstm() -> bool:
    """Whether torch refuses to compute an LSTM under autocast to bf16 on this processor."""
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(2, 2)(torch.ones(1, 1, 2))
    except RuntimeError as error:
        return _OF_LSTM in str(error)
    return False


def incapable(error: BaseException | None) -> str | None:
    """Why a test is to be skipped that ended in an error, or None where the error is the test's own."""
    while error is not None:
        if isinstance(error, RuntimeError) and _OF_LSTM in str(error) and lacks_16_bit_lstm():
            return f"torch {torch.__version__} computes no LSTM in 16 bits on this processor: {_OF_LSTM}"
        error = error.__cause__ or error.__context__
    return None
