"""The rule of CPUs: which instruction sets torch may use, and which formats they compute in.

On x86 torch computes products and convolutions of 16 and 8 bits in oneDNN, which can be told by an environment variable
to leave instruction sets alone: what it may not use is not there. The like variable of torch's own kernels,
``ATEN_CPU_CAPABILITY``, changes nothing of these.
"""

import os

import torch

from lightning_mixprec.numerics.devices.support import Support
from lightning_mixprec.numerics.devices.timing import timed_support
from lightning_mixprec.numerics.formats import Format

_X86 = {"x86_64", "amd64"}
_ARM = {"arm64", "aarch64"}

_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""What limits oneDNN, the first that is set; see its guide on the CPU dispatcher."""

_ADDED_BY = {
    "SSE41": (),
    "AVX": (),
    "AVX2": (),
    "AVX2_VNNI": ("avx_vnni",),
    "AVX2_VNNI_2": (),
    "AVX512_CORE": (),
    "AVX512_CORE_VNNI": ("avx512_vnni",),
    "AVX512_CORE_BF16": ("avx512_bf16",),
    "AVX512_CORE_FP16": ("avx512_fp16",),
    "AVX10_1_512": (),
    "AVX512_CORE_AMX": ("amx_bf16", "amx_int8"),
    "AVX10_1_512_AMX": (),
    "AVX512_CORE_AMX_FP16": ("amx_fp16",),
    "AVX10_1_512_AMX_FP16": (),
}
"""The limits that oneDNN knows, each allowing what those before it allow and these features."""


def cpu_support(format: Format) -> Support:
    """The support of this machine's CPU for a format, as torch may use it."""
    if format.bits > 16:
        return Support(True, f"every CPU has {format.name} arithmetic")
    if not (format.use.x86_features or format.use.arm_features):
        return Support(False, f"CPUs have no {format.name} arithmetic, and torch imitates only part of it")
    features = torch.cpu.get_capabilities()
    asked = _asked(format, str(features.get("architecture", "")).lower())
    found = [feature for feature in asked if features.get(feature)]
    limit, hidden = _limit()
    if usable := [feature for feature in found if feature not in hidden]:
        # A build without oneDNN has kernels that may or may not use them.
        if torch.backends.mkldnn.is_available():
            return Support(True, f"this CPU has {' and '.join(map(_spelled, usable))}")
    elif found:
        has = " and ".join(map(_spelled, found))
        return Support(False, f"this CPU has {has}, but {limit} keeps torch from using it")
    elif asked and all(feature in features for feature in asked):
        return Support(False, f"this CPU has no {' or '.join(map(_spelled, asked))}")
    return timed_support(format)


def _asked(format: Format, architecture: str) -> tuple[str, ...]:
    """The features to ask for; none on a CPU of another architecture."""
    if architecture in _X86:
        return format.use.x86_features
    return format.use.arm_features if architecture in _ARM else ()


def _limit() -> tuple[str, set[str]]:
    """The limit that is set for oneDNN, as the user wrote it, and the features that it hides."""
    name = next((name for name in _LIMITS if name in os.environ), None)
    if name is None or (isa := os.environ[name].upper()) not in _ADDED_BY:
        return "", set()
    known = list(_ADDED_BY)
    hidden = {feature for later in known[known.index(isa) + 1 :] for feature in _ADDED_BY[later]}
    return f"{name}={os.environ[name]}", hidden


def _spelled(feature: str) -> str:
    """A feature as the makers of CPUs spell it, near enough.

    >>> _spelled("avx512_bf16"), _spelled("fp16_arith")
    ('AVX512-BF16', 'FP16-ARITH')
    """
    return feature.upper().replace("_", "-")
