"""The number formats: one table with what each of them is and what it means in training.

A format is defined by a handful of facts (IEEE 754-2019, section 3; for fp8 the OCP 8-bit floating point
specification): how many exponent and mantissa bits it has, and what its largest exponent code stands for. Everything
else about its numbers is derived. int8 is the format without exponent bits: all its numbers are subnormal, that is,
whole multiples of the smallest one. What it is used for is written beside it, in the table and nowhere else: lists of
formats are asked of the table when they are needed, so that a new row is known everywhere.

>>> get_format("fp16").max, get_format("e4m3").max
(65504.0, 448.0)
>>> get_format("fp16").use.for_range, get_format("fp16").use.for_precision, compute_formats()
('bf16', 'fp32', ('fp64', 'fp32', 'bf16', 'fp16', 'fp8', 'int8'))
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from lightning_mixprec.errors import FormatError

REFERENCE = "fp32"
"""The format that low precision is compared with, and in which weights are stored unless a policy says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """The use of a format in training.

    Attributes:
        is_computed_in: Whether layers compute in it.
        stores_weights: Whether a policy may store weights in it.
        needs_scaling: Whether gradients need a loss scale to be kept in it.
        scales_itself: Whether each tensor is scaled, before it is cast, by the largest magnitude in it.
        products: The layers' own products that compute in it where a rule does not say which: ``"all"``, or
            ``"forward"`` alone; empty for a format that all operations compute in.
        for_range: The format to promote to where numbers are too large or too small for this one.
        for_precision: The format to promote to where this one rounds too coarsely.
        lightning_name: What ``Trainer(precision=...)`` calls training in it; empty if Lightning has no name for it.
        cuda_capability: The least compute capability of an NVIDIA GPU whose arithmetic units take it.
        tensor_cores: The least one whose tensor cores do, where that is a later one.
        amd_targets: How the names of the AMD GPUs begin whose arithmetic units take it, as LLVM calls their targets.
        x86_features: The features of an x86 CPU, as ``torch.cpu.get_capabilities()`` names them, any of which is
            arithmetic in it.
        arm_features: Those of an Arm CPU.
    """

    is_computed_in: bool = False
    stores_weights: bool = False
    needs_scaling: bool = False
    scales_itself: bool = False
    products: Literal["", "all", "forward"] = ""
    for_range: str | None = None
    for_precision: str | None = None
    lightning_name: str = ""
    cuda_capability: tuple[int, int] = (0, 0)
    tensor_cores: tuple[int, int] | None = None
    amd_targets: tuple[str, ...] = ()
    x86_features: tuple[str, ...] = ()
    arm_features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A binary format with a sign bit, and everything that follows from its definition.

    ``overflow`` says what the largest exponent code means. ``"inf"``: infinity and NaNs, as IEEE 754 has it. ``"nan"``:
    ordinary numbers except for the very last code, which is the only NaN (the `fn` formats of OCP fp8), so what is too
    large becomes NaN. ``"max"``: ordinary numbers, so what is too large becomes the largest of them.

    Without exponent bits it is the whole numbers from ``-max`` to ``max``.

    Two formats of one width may go under one name: ``parts`` are the one for weights and activations, whose numbers are
    those of the whole, and the one with more range for gradients.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    overflow: Literal["inf", "nan", "max"]
    dtype: torch.dtype
    use: Use = Use()
    parts: "tuple[Format, Format] | None" = None

    @property
    def bits(self) -> int:
        """Bits of one number."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def is_integer(self) -> bool:
        """True if its numbers are whole ones: no tensor is stored in it without a scale."""
        return self.exponent_bits == 0

    @property
    def is_low_precision(self) -> bool:
        """True if a number takes 16 bits or fewer."""
        return self.bits <= 16

    @property
    def is_half(self) -> bool:
        """True if a number takes 16 bits: operations are cast to it one by one, by autocast."""
        return self.bits == 16

    @property
    def is_coarse(self) -> bool:
        """True if it keeps fewer digits than fp16, so that gradients of a healthy model differ visibly from fp32's."""
        return self.mantissa_bits < 10

    @cached_property
    def max_exponent(self) -> int:
        """Exponent of the largest finite number: it lies in ``[2**max_exponent, 2**(max_exponent + 1))``."""
        if self.is_integer:
            return self.mantissa_bits - 1
        return self._bias if self.overflow == "inf" else self._bias + 1

    @cached_property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number; of an integer format, of the first number that is none of its."""
        return self.mantissa_bits if self.is_integer else 1 - self._bias

    @cached_property
    def max(self) -> float:
        """Largest finite number."""
        if self.is_integer:
            return self.smallest_normal - self.smallest_subnormal
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
        """The format of weights and activations: itself, unless it has parts."""
        return self.parts[0] if self.parts else self

    @property
    def backward(self) -> "Format":
        """The format of gradients: itself, unless it has parts."""
        return self.parts[1] if self.parts else self

    def contains(self, other: "Format") -> bool:
        """True if every number of ``other``, infinities included, is one of this format's.

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


_FP64 = Use(is_computed_in=True, stores_weights=True, lightning_name="64-true")
_FP32 = Use(is_computed_in=True, stores_weights=True, for_range="fp64", for_precision="fp64", lightning_name="32-true")
_BF16 = Use(
    is_computed_in=True,
    stores_weights=True,
    for_range="fp32",
    for_precision="fp32",
    lightning_name="bf16-mixed",
    cuda_capability=(8, 0),  # Ampere
    amd_targets=("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"),  # CDNA, RDNA 3
    x86_features=("avx512_bf16", "amx_bf16"),
    arm_features=("bf16",),
)
_FP16 = Use(
    is_computed_in=True,
    stores_weights=True,
    needs_scaling=True,
    for_range="bf16",
    for_precision="fp32",
    lightning_name="16-mixed",
    cuda_capability=(5, 3),  # Maxwell, the last of it
    tensor_cores=(7, 0),  # Volta
    amd_targets=("gfx9", "gfx10", "gfx11", "gfx12"),
    x86_features=("avx512_fp16", "amx_fp16"),
    arm_features=("fp16_arith",),
)
_PLAIN_FP8 = Use(needs_scaling=True, for_range="bf16", for_precision="bf16", cuda_capability=(8, 9))  # Ada
_FP8 = replace(_PLAIN_FP8, is_computed_in=True, needs_scaling=False, scales_itself=True, products="all")
_INT8 = Use(
    is_computed_in=True,
    scales_itself=True,
    products="forward",
    for_range="bf16",
    for_precision="bf16",
    cuda_capability=(7, 5),  # Turing
    x86_features=("avx512_vnni", "avx_vnni", "amx_int8"),
    arm_features=("dot", "i8mm"),
)
_E4M3 = Format("e4m3", 4, 3, "nan", torch.float8_e4m3fn, _PLAIN_FP8)
_E5M2 = Format("e5m2", 5, 2, "inf", torch.float8_e5m2, _PLAIN_FP8)

_ROWS = (
    Format("fp64", 11, 52, "inf", torch.float64, _FP64),
    Format("fp32", 8, 23, "inf", torch.float32, _FP32),
    Format("bf16", 8, 7, "inf", torch.bfloat16, _BF16),
    Format("fp16", 5, 10, "inf", torch.float16, _FP16),
    replace(_E4M3, name="fp8", use=_FP8, parts=(_E4M3, _E5M2)),
    _E4M3,
    _E5M2,
    Format("int8", 0, 7, "max", torch.int8, _INT8),
)

FORMATS: dict[str, Format] = {format.name: format for format in _ROWS}
"""Every format by its name, widest first. Of several with one dtype, the first is what a stored tensor is called."""

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
    "i8": "int8",
}


def compute_formats() -> tuple[str, ...]:
    """The names of the formats that layers compute in, in the order of the table."""
    return tuple(name for name, format in FORMATS.items() if format.use.is_computed_in)


def region_formats() -> tuple[str, ...]:
    """The names of those that every operation of a layer can compute in: 16 bits and wider.

    >>> region_formats()
    ('fp64', 'fp32', 'bf16', 'fp16')
    """
    return tuple(name for name in compute_formats() if not FORMATS[name].use.products)


def param_formats() -> tuple[str, ...]:
    """The names of the formats that a policy may store weights in."""
    return tuple(name for name, format in FORMATS.items() if format.use.stores_weights)


def low_precision_formats(*, in_parts: bool = False) -> tuple[str, ...]:
    """The names of the floating-point formats of 16 bits or fewer: more bits first, of equally many the least range.

    Args:
        in_parts: Whether a pair stands for itself, or its two formats do.

    >>> low_precision_formats(), low_precision_formats(in_parts=True)
    (('fp16', 'bf16', 'fp8'), ('fp16', 'bf16', 'e4m3', 'e5m2'))
    """
    low = [format for format in FORMATS.values() if format.is_low_precision and not format.is_integer]
    left_out = [left for format in low if format.parts for left in ([format] if in_parts else format.parts)]
    ordered = sorted((each for each in low if each not in left_out), key=lambda each: (-each.bits, each.forward.max))
    return tuple(format.name for format in ordered)


def stored_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes of all floating-point formats, each once."""
    return tuple({format.dtype: None for format in _stored()})


def compute_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes of the formats that layers compute in and that tensors are stored in, each once."""
    return tuple({format.dtype: None for format in _stored() if format.use.is_computed_in})


def half_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes of the 16-bit formats, each once.

    >>> half_dtypes()
    (torch.bfloat16, torch.float16)
    """
    return tuple({format.dtype: None for format in _stored() if format.is_half})


def is_scaling_needed(formats: Iterable[str]) -> bool:
    """True if gradients need a loss scale to be kept in one of these formats.

    >>> is_scaling_needed(["bf16", "fp32"]), is_scaling_needed(["fp16", "fp32"])
    (False, True)
    """
    return any(get_format(format).use.needs_scaling for format in formats)


def is_wider(format: str, other: str) -> bool:
    """True if a format keeps what another one loses: more bits, or of equally many more range.

    >>> is_wider("bf16", "fp16"), is_wider("bf16", "bf16"), is_wider("fp32", "bf16")
    (True, False, True)
    """
    one, two = get_format(format), get_format(other)
    return (one.bits, one.forward.max) > (two.bits, two.forward.max)


def promoted_for_range(format: str, magnitude: float | None = None) -> str | None:
    """The nearest format with more range, enough for a magnitude if one is given; None if there is none.

    >>> promoted_for_range("fp16"), promoted_for_range("fp16", 3.4e38), promoted_for_range("fp64")
    ('bf16', 'fp32', None)
    """
    wider = get_format(format).use.for_range
    while wider is not None and not (magnitude is None or magnitude <= get_format(wider).forward.max):
        wider = get_format(wider).use.for_range
    return wider


def trained_in(precision: str) -> str | None:
    """The format that ``Trainer(precision=...)`` trains in.

    >>> trained_in("16-mixed"), trained_in("16-true"), trained_in("transformer-engine")
    ('fp16', 'fp16', None)
    """
    start = precision.partition("-")[0]
    return next((name for name, each in FORMATS.items() if each.use.lightning_name.partition("-")[0] == start), None)


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        FormatError: there is none; the message names the one that was probably meant.

    >>> get_format("bf16").bits
    16
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

    >>> meant_by("half"), meant_by(torch.bfloat16), meant_by("int32")
    ('fp16', 'bf16', None)
    """
    if isinstance(name, bool) or not isinstance(name, str | int | torch.dtype):
        return None
    text = str(name).strip().lower().removeprefix("torch.").split("-")[0]
    for part in (part for format in FORMATS.values() for part in format.parts or ()):
        if part.name in text:
            return part.name
    of_dtypes = {str(format.dtype).removeprefix("torch."): format.name for format in reversed(_stored())}
    names = {known: known for known in FORMATS} | _OTHER_NAMES | of_dtypes
    close = difflib.get_close_matches(text, names, n=1, cutoff=0.7)
    return names[close[0]] if close else None


def format_of(dtype: torch.dtype) -> str | None:
    """The name of the format in which tensors of this dtype are stored, ``None`` if it is not in the table.

    >>> format_of(torch.bfloat16), format_of(torch.int64)
    ('bf16', None)
    """
    format = stored_format(dtype)
    return None if format is None else format.name


def stored_format(dtype: torch.dtype) -> Format | None:
    """The format in which tensors of this dtype are stored, ``None`` if it is not in the table."""
    return next((format for format in _stored() if format.dtype == dtype), None)


def _stored() -> list[Format]:
    return [format for format in FORMATS.values() if not format.parts and not format.is_integer]
