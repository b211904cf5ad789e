"""The formats that a device computes in with arithmetic of its own.

>>> native_support("bf16", "cpu").native, native_support("fp8", "cpu").native
(True, False)
"""

from dataclasses import dataclass

import torch

from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.formats import get_format


@dataclass(frozen=True)
class Support:
    """The support of a device for a format: arithmetic of its own or none, and the reason."""

    native: bool
    reason: str


def native_support(format: str, device: str | torch.device) -> Support:
    """The support of a device for a format: whether it computes in it with arithmetic of its own, without emulation.

    Raises:
        FormatError: the format is unknown.
        SupportError: this is no device.
    """
    name = get_format(format).name
    device = _checked_device(device)
    if device.type == "cuda":
        return _cuda_support(name, device)
    if device.type == "cpu":
        return _cpu_support(name)
    return Support(False, f"{device.type} devices are not supported, only cuda and cpu are")


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SupportError(f"{device!r} is no device: give one as 'cpu', 'cuda' or 'cuda:0'") from error


def _cuda_support(name: str, device: torch.device) -> Support:
    if not torch.cuda.is_available():
        return Support(False, "torch sees no CUDA device")
    if device.index is not None and device.index >= torch.cuda.device_count():
        return Support(False, f"there is no {device}, the last CUDA device is cuda:{torch.cuda.device_count() - 1}")
    gpu = torch.cuda.get_device_name(device)
    if torch.version.hip and get_format(name).bits == 8:
        return Support(False, f"fp8 is supported on NVIDIA GPUs only, and this is {gpu}")
    have, need = torch.cuda.get_device_capability(device), get_format(name).use.cuda_capability
    capability = f"{gpu} (compute capability {have[0]}.{have[1]})"
    if have < need:
        return Support(False, f"{capability} has no {name} arithmetic, which came with {need[0]}.{need[1]}")
    return Support(True, f"{capability} has {name} arithmetic")


def _cpu_support(name: str) -> Support:
    if get_format(name).bits == 8:
        return Support(False, f"CPUs have no {name} arithmetic, and torch imitates only part of it")
    slow = ", whose fp16 matrix products are slow without AVX512-FP16 or AMX-FP16" if name == "fp16" else ""
    return Support(True, f"torch has CPU kernels for {name}{slow}")
