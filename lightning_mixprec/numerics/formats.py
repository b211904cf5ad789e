"""The number formats, and rounding to them.

A format is defined by a handful of facts (IEEE 754-2019, section 3; for fp8 the OCP 8-bit floating point
specification): how many exponent and mantissa bits it has, and what its largest exponent code stands for. Everything
else follows and is derived.

>>> get_format("fp16").max, get_format("e4m3").max
(65504.0, 448.0)
>>> round_to(torch.tensor([0.1, 2049.0, 70000.0]), "fp16").tolist()
[0.0999755859375, 2048.0, inf]
"""

import difflib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from lightning_mixprec.errors import FormatError, SupportError


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with a sign bit, and everything that follows from its definition.

    ``overflow`` says what the largest exponent code means. ``"inf"``: infinity and NaNs, as IEEE 754 has it. ``"nan"``:
    ordinary numbers except for the very last code, which is the only NaN (the `fn` formats of OCP fp8), so what is too
    large becomes NaN.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    overflow: Literal["inf", "nan"]
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bytes(self) -> int:
        """Bytes of one number."""
        return self.bits // 8

    @property
    def is_low_precision(self) -> bool:
        """Whether a number takes 16 bits or fewer."""
        return self.bits <= 16

    @cached_property
    def max_exponent(self) -> int:
        """Exponent of the largest finite number: it lies in ``[2**max_exponent, 2**(max_exponent + 1))``."""
        return self._bias if self.overflow == "inf" else self._bias + 1

    @cached_property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self._bias

    @cached_property
    def max(self) -> float:
        """Largest finite number."""
        codes_lost_to_nan = 0 if self.overflow == "inf" else 1
        return math.ldexp(2.0 - (1 + codes_lost_to_nan) * self.epsilon, self.max_exponent)

    @cached_property
    def smallest_normal(self) -> float:
        """Smallest positive number with full precision."""
        return math.ldexp(1.0, self.min_exponent)

    @cached_property
    def smallest_subnormal(self) -> float:
        """Smallest positive number; its half and all below round to zero."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @cached_property
    def epsilon(self) -> float:
        """Distance from 1 to the next larger number."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def forward(self) -> "Format":
        """Itself: a plain format is its own forward format (see :class:`FormatPair`)."""
        return self

    @property
    def backward(self) -> "Format":
        """Itself: a plain format is its own backward format (see :class:`FormatPair`)."""
        return self

    def contains(self, other: "Format") -> bool:
        """Whether every number of ``other``, infinities included, is one of this format's.

        >>> get_format("fp32").contains(get_format("bf16")), get_format("bf16").contains(get_format("fp16"))
        (True, False)
        """
        # Exponent ranges are symmetric, so one that reaches as far up reaches as far down.
        return self == other or (
            self.overflow == "inf" and self.mantissa_bits >= other.mantissa_bits and self.max >= other.max
        )

    @cached_property
    def _bias(self) -> int:
        return int(2 ** (self.exponent_bits - 1)) - 1


@dataclass(frozen=True)
class FormatPair:
    """Two formats of one width: one for weights and activations, one with more range for gradients."""

    name: str
    forward: Format
    backward: Format

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return self.forward.bits

    @property
    def bytes(self) -> int:
        """Bytes of one number."""
        return self.forward.bytes

    @property
    def is_low_precision(self) -> bool:
        """Whether a number takes 16 bits or fewer."""
        return self.forward.is_low_precision


@dataclass(frozen=True)
class Support:
    """Whether a device computes in a format by itself, and why or why not."""

    native: bool
    reason: str


_E4M3 = Format("e4m3", 4, 3, "nan", torch.float8_e4m3fn)
_E5M2 = Format("e5m2", 5, 2, "inf", torch.float8_e5m2)

FORMATS: dict[str, Format | FormatPair] = {
    format.name: format
    for format in (
        Format("fp64", 11, 52, "inf", torch.float64),
        Format("fp32", 8, 23, "inf", torch.float32),
        Format("bf16", 8, 7, "inf", torch.bfloat16),
        Format("fp16", 5, 10, "inf", torch.float16),
        FormatPair("fp8", forward=_E4M3, backward=_E5M2),
        _E4M3,
        _E5M2,
    )
}
"""Every format by its name, widest first."""

_BY_DTYPE = {format.dtype: format for format in FORMATS.values() if isinstance(format, Format)}

_OTHER_NAMES = {
    "64": "fp64",
    "double": "fp64",
    "32": "fp32",
    "float": "fp32",
    "single": "fp32",
    "tf32": "fp32",
    "16": "fp16",
    "half": "fp16",
    "bfloat": "bf16",
    "brain": "bf16",
    "float8": "fp8",
    "8": "fp8",
} | {str(dtype).removeprefix("torch."): format.name for dtype, format in _BY_DTYPE.items()}

# Least compute capability of an NVIDIA GPU whose arithmetic units take the format; Ampere for bf16, Ada for fp8.
_CUDA_CAPABILITY = {"bf16": (8, 0), "fp8": (8, 9), "e4m3": (8, 9), "e5m2": (8, 9)}


def get_format(name: str) -> Format | FormatPair:
    """The format of that name.

    Raises:
        FormatError: there is none; the message names the one that was probably meant.

    >>> get_format("bf16").bytes
    2
    >>> get_format("float16")
    Traceback (most recent call last):
    lightning_mixprec.errors.FormatError: unknown format 'float16', did you mean 'fp16'? ...
    """
    if isinstance(name, str) and name in FORMATS:
        return FORMATS[name]
    meant = meant_by(name)
    hint = f", did you mean {meant!r}?" if meant else ";"
    raise FormatError(f"unknown format {name!r}{hint} the formats are {', '.join(FORMATS)}")


def meant_by(name: object) -> str | None:
    """The format that was probably meant by a name, a number of bits or a dtype, None if nothing is near.

    >>> meant_by("half"), meant_by(torch.bfloat16), meant_by("int8")
    ('fp16', 'bf16', None)
    """
    if isinstance(name, bool) or not isinstance(name, str | int | torch.dtype):
        return None
    text = str(name).strip().lower().removeprefix("torch.").split("-")[0]
    for exact in ("e4m3", "e5m2"):
        if exact in text:
            return exact
    names = {known: known for known in FORMATS} | _OTHER_NAMES
    close = difflib.get_close_matches(text, names, n=1, cutoff=0.7)
    return names[close[0]] if close else None


def format_of(dtype: torch.dtype) -> str | None:
    """The name of the format in which tensors of this dtype are stored, ``None`` if it is not in the table.

    >>> format_of(torch.bfloat16), format_of(torch.int64)
    ('bf16', None)
    """
    format = _BY_DTYPE.get(dtype)
    return None if format is None else format.name


def round_to(tensor: Tensor, format: str) -> Tensor:
    """Round each element to the nearest number of a format, ties to even, in one rounding.

    What is too large becomes infinite, in e4m3, which has no infinity, NaN; and so does an infinity in e4m3. NaN stays
    NaN and zero keeps its sign. ``"fp8"`` rounds to its forward format, e4m3.

    Args:
        tensor: any shape, device and floating-point dtype.
        format: a format's name.

    Returns:
        A new tensor of the same shape, device and dtype, without a gradient. Only where the dtype cannot hold the
        result is it fp32: from fp16 to bf16 (65504 rounds to 65536), and from float8 dtypes outside the table.

    Raises:
        FormatError: the format is unknown, or the tensor is no floating-point tensor.

    >>> round_to(torch.tensor([1.0625, 1.1875, 500.0, -0.0009]), "e4m3").tolist()
    [1.0, 1.25, nan, -0.0]
    """
    target = get_format(format).forward
    source = _stored_format(tensor)
    values = tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)
    if not target.contains(source or _BY_DTYPE[values.dtype]):
        values = torch.copysign(_rounded_magnitude(values.abs(), target), values)
    return values.to(tensor.dtype) if source and _holds_rounded(source, target) else values


def native_support(format: str, device: str | torch.device) -> Support:
    """Whether a device computes in a format with arithmetic of its own, without emulation.

    Raises:
        FormatError: the format is unknown.
        SupportError: this is no device.

    >>> native_support("bf16", "cpu").native, native_support("fp8", "cpu").native
    (True, False)
    """
    name = get_format(format).name
    device = _checked_device(device)
    if device.type == "cuda":
        return _cuda_support(name, device)
    if device.type == "cpu":
        return _cpu_support(name)
    return Support(False, f"{device.type} devices are not supported, only cuda and cpu are")


def _stored_format(tensor: Tensor) -> Format | None:
    if not isinstance(tensor, Tensor):
        raise FormatError(
            f"cannot round a {type(tensor).__name__}, only a floating-point tensor: use torch.tensor(...)"
        )
    if not tensor.is_floating_point() or tensor.dtype == torch.float4_e2m1fn_x2:
        raise FormatError(f"cannot round a tensor of {tensor.dtype}, only of an unpacked floating-point dtype: cast it")
    return _BY_DTYPE.get(tensor.dtype)


def _holds_rounded(source: Format, target: Format) -> bool:
    step = math.ldexp(1.0, source.max_exponent - target.mantissa_bits)
    largest = round(source.max / step) * step
    return largest <= source.max or largest > target.max


def _rounded_magnitude(magnitude: Tensor, target: Format) -> Tensor:
    """Round fp32 or fp64 magnitudes to a format with fewer mantissa bits.

    In the normal range, where the exponent is the number's own, by adding just under half a step to the bit pattern and
    cutting it off. In the subnormal range, where the step is fixed, by adding and subtracting the power of two whose
    own last place is that step. Neither depends on how a device casts, or on flush-to-zero.
    """
    work = _BY_DTYPE[magnitude.dtype]
    dropped = work.mantissa_bits - target.mantissa_bits
    bits = magnitude.view(torch.int64 if work.bits == 64 else torch.int32)
    half_to_even = (bits >> dropped & 1) + ((1 << (dropped - 1)) - 1)
    rounded = (bits + half_to_even & -(1 << dropped)).view(magnitude.dtype)
    if target.min_exponent > work.min_exponent:
        shifter = math.ldexp(1.0, target.min_exponent + dropped)
        rounded = torch.where(magnitude < target.smallest_normal, (magnitude + shifter) - shifter, rounded)
    rounded = torch.where(rounded > target.max, math.inf if target.overflow == "inf" else math.nan, rounded)
    return torch.where(magnitude.isnan(), math.nan, rounded)


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
    have, need = torch.cuda.get_device_capability(device), _CUDA_CAPABILITY.get(name, (0, 0))
    capability = f"{gpu} (compute capability {have[0]}.{have[1]})"
    if have < need:
        return Support(False, f"{capability} has no {name} arithmetic, which came with {need[0]}.{need[1]}")
    return Support(True, f"{capability} has {name} arithmetic")


def _cpu_support(name: str) -> Support:
    if get_format(name).bits == 8:
        return Support(False, f"CPUs have no {name} arithmetic, and torch imitates only part of it")
    slow = ", whose fp16 matrix products are slow without AVX512-FP16 or AMX-FP16" if name == "fp16" else ""
    return Support(True, f"torch has CPU kernels for {name}{slow}")
