"""The rules of GPUs: which of them have arithmetic for a format, by what the makers call their generations.

torch's own ``is_bf16_supported()`` counts emulation, and of an AMD GPU it says yes without asking.
"""

from lightning_mixprec.numerics.devices.support import Support
from lightning_mixprec.numerics.formats import Format


def nvidia_support(format: Format, gpu: str, capability: tuple[int, int]) -> Support:
    """The support of an NVIDIA GPU, present or not, for a format.

    Args:
        format: The format.
        gpu: What the GPU is called.
        capability: Its compute capability.

    >>> from lightning_mixprec.numerics.formats import get_format
    >>> nvidia_support(get_format("bf16"), "Tesla T4", (7, 5)).reason
    'Tesla T4 (compute capability 7.5) has no bf16 arithmetic, which came with 8.0'
    """
    name, use = format.name, format.use
    described = f"{gpu} (compute capability {_version(capability)})"
    if capability < use.cuda_capability:
        return Support(False, f"{described} has no {name} arithmetic, which came with {_version(use.cuda_capability)}")
    if use.tensor_cores is None:
        return Support(True, f"{described} has {name} arithmetic")
    if capability < use.tensor_cores:
        lacks = f"without tensor cores, which came with {_version(use.tensor_cores)}"
        return Support(True, f"{described} has {name} arithmetic, {lacks}")
    return Support(True, f"{described} has {name} arithmetic, with tensor cores from {_version(use.tensor_cores)} on")


def amd_support(format: Format, gpu: str, target: str) -> Support:
    """The support of an AMD GPU for a format; those of 8 bits are not used there, whatever the GPU has.

    Args:
        format: The format.
        gpu: What the GPU is called.
        target: The target that code for it is compiled for, such as ``"gfx942:sramecc+:xnack-"``. The compute
            capability that torch derives from it is no guide: gfx900 and gfx90a are both 9.0.
    """
    if format.bits == 8:
        return Support(False, f"{format.name} is supported on NVIDIA GPUs only, and this is {gpu}")
    described = f"{gpu} ({target.partition(':')[0]})"
    if format.is_low_precision and not target.startswith(format.use.amd_targets):
        known = ", ".join(f"{begins}*" for begins in format.use.amd_targets)
        return Support(False, f"{described} has no {format.name} arithmetic, which {known} have")
    return Support(True, f"{described} has {format.name} arithmetic")


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
