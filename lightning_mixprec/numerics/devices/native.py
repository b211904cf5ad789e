"""What the devices of this machine compute natively."""

import torch

from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.devices.cpu import cpu_support
from lightning_mixprec.numerics.devices.gpu import amd_support, nvidia_support
from lightning_mixprec.numerics.devices.support import Support
from lightning_mixprec.numerics.formats import Format, get_format


def native_support(format: str, device: str | torch.device) -> Support:
    """The support of a device for a format: whether it computes in it with arithmetic of its own, without emulation.

    Of a GPU its compute capability is asked, of a CPU what torch says of its instruction sets; only where torch does
    not know, products are timed, for some ten milliseconds once per process.

    Args:
        format: The name of a format.
        device: A device of this machine, as torch names it. A device that is not there computes nothing.

    Raises:
        FormatError: the format is unknown.
        SupportError: this is no device.
    """
    described = get_format(format)
    device = _checked_device(device)
    if device.type == "cuda":
        return _gpu_support(described, device)
    if device.type == "cpu":
        return cpu_support(described)
    return Support(False, f"{device.type} devices are not supported, only cuda and cpu are")


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SupportError(f"{device!r} is no device: give one as 'cpu', 'cuda' or 'cuda:0'") from error


def _gpu_support(format: Format, device: torch.device) -> Support:
    if not torch.cuda.is_available():
        return Support(False, "torch sees no CUDA device")
    if device.index is not None and device.index >= torch.cuda.device_count():
        return Support(False, f"there is no {device}, the last CUDA device is cuda:{torch.cuda.device_count() - 1}")
    name = torch.cuda.get_device_name(device)
    if torch.version.hip:
        return amd_support(format, name, torch.cuda.get_device_properties(device).gcnArchName)
    return nvidia_support(format, name, torch.cuda.get_device_capability(device))
