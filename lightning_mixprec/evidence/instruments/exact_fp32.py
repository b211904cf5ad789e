"""fp32 without TF32, in which GPUs multiply fp32 convolutions by default, with fp16's 10 bits of mantissa."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

_C: Any = torch._C  # torch.backends has these settings, too, but sets the generic one by the name of mkldnn's
_SWITCHES = (
    ("generic", "all"),
    ("cuda", "all"),
    ("mkldnn", "all"),
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("cuda", "rnn"),
    ("mkldnn", "matmul"),  # of the CPU: setting the precision of products by its old name sets it, too
)
"""Backend and operation of each precision; one that is "none" is that of its backend, and this the generic one."""


@contextlib.contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Within, CUDA multiplies fp32 numbers in fp32, whatever the user's settings; afterwards these hold again.

    A reference in TF32 would be as coarse as what it judges. torch has two names for each setting and raises where
    they are found to disagree, be it by ``torch.backends.cudnn.flags`` in a step; so both are set. cuDNN's default
    comes back as "tf32", as ``torch.backends.cudnn.flags`` itself leaves it.

    Args:
        device: The device that computes; others than CUDA have no TF32.
    """
    if device.type != "cuda":
        yield
        return
    before = _Settings.taken()
    try:
        _Settings("highest", False, ["ieee"] * len(_SWITCHES)).make()
        yield
    finally:
        before.make()


class _Settings(NamedTuple):
    """The precision of products and whether cuDNN has TF32, both by their old names, and each switch's own value."""

    products: str
    cudnn: bool
    switches: list[str]

    @classmethod
    def taken(cls) -> "_Settings":
        """The present settings, all of which are "none" afterwards, where old and new names cannot disagree."""
        switches = []
        for switch in _SWITCHES:
            switches.append(_C._get_fp32_precision_getter(*switch))
            _C._set_fp32_precision_setter(*switch, "none")
        with _quiet():
            try:
                cudnn = _C._get_cudnn_allow_tf32()
            except RuntimeError:  # it disagrees with "none"
                cudnn = True
            return cls(torch.get_float32_matmul_precision(), cudnn, switches)

    def make(self) -> None:
        """Sets them; the old names first, which set some of the switches."""
        with _quiet():
            torch.set_float32_matmul_precision(self.products)
            _C._set_cudnn_allow_tf32(self.cudnn)
        for switch, precision in zip(_SWITCHES, self.switches, strict=True):
            _C._set_fp32_precision_setter(*switch, precision)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Some releases of torch warn of the old names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
