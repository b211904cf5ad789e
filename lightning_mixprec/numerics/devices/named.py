"""Devices by name, present or not: what they compute natively, how fast, and how much they hold.

The numbers are the makers' own, peaks that no program reaches; each row says where they stand. Throughput is dense:
data sheets like to count the zeros of structured sparsity, which doubles every number of a tensor core. A format that
the maker says nothing of has no entry.

>>> named_device("NVIDIA A100-SXM4-40GB").name, named_device("h100").tflops["bf16"]
('A100 SXM 40GB', 989.4)
>>> named_device("t4").support("bf16").reason
'T4 (compute capability 7.5) has no bf16 arithmetic, which came with 8.0'
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.devices.gpu import nvidia_support
from lightning_mixprec.numerics.devices.native import native_support
from lightning_mixprec.numerics.devices.support import Support
from lightning_mixprec.numerics.formats import FORMATS, get_format


@dataclass(frozen=True, kw_only=True)
class NamedDevice:
    """A device of the table.

    Attributes:
        name: Its name: the model first, then what tells it from others of the model.
        other_words: Further words that torch, the driver or the maker use in its name.
        compute_capability: That of an NVIDIA GPU; None for the CPU of this machine.
        tflops: By format, 10^12 dense operations per second (a multiplication and an addition are two), on tensor cores
            where they take the format. Empty for the CPU of this machine, which nobody has measured.
        tf32_tflops: The same for products in fp32 that may round their operands to TF32; None where there is no TF32.
        bandwidth_gb_s: Bandwidth of its memory in GB/s (10^9 bytes); None where nobody has measured it.
        memory_gib: Its memory in GiB (2^30 bytes), which makers call GB. Driver and error correction take 1 to 6 % of
            it. None for the CPU.
        source: Where the numbers stand.
        address: The public address of the source; empty if there is none.
    """

    name: str
    other_words: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None
    tflops: Mapping[str, float] = field(default_factory=dict, hash=False)
    tf32_tflops: float | None = None
    bandwidth_gb_s: float | None = None
    memory_gib: float | None = None
    source: str
    address: str = ""

    def support(self, format: str) -> Support:
        """The support of the device for a format, by the rule that holds for a device at hand.

        Raises:
            FormatError: the format is unknown.
        """
        if self.compute_capability is None:
            return native_support(format, self.name)
        return nvidia_support(get_format(format), self.name, self.compute_capability)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that it computes natively, in the order of the table of formats."""
        return tuple(name for name in FORMATS if self.support(name).native)

    @property
    def model(self) -> str:
        """The first word of its name, in small letters."""
        return _words(self.name)[0]

    def is_called(self, name: str) -> bool:
        """True if a name gives its model and says nothing that is not so of it."""
        words = set(_words(name)) - _FILLING
        return self.model in words and words <= {*_words(self.name), *self.other_words}


def named_device(name: str) -> NamedDevice:
    """The device of the table that is called so.

    Args:
        name: A model (``"a100"``: the first of them in the table), a variant (``"A100 PCIe 40GB"``), or what
            ``torch.cuda.get_device_name`` says, in any case; ``"cpu"`` for the CPU of this machine.

    Raises:
        SupportError: there is none; the message names those that were probably meant.
    """
    found = next((device for device in DEVICES if isinstance(name, str) and device.is_called(name)), None)
    if found is not None:
        return found
    models = list(dict.fromkeys(device.model for device in DEVICES))
    near = [model for word in _words(str(name)) for model in difflib.get_close_matches(word, models, n=1, cutoff=0.75)]
    hint = f", did you mean {' or '.join(map(repr, near))}?" if near else ";"
    raise SupportError(f"{name!r} is not in the table of devices{hint} its models are {', '.join(models)}")


_FILLING = {"nvidia", "tesla"}


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


_CPU = NamedDevice(name="cpu", source="the CPU of this machine")

_V100 = NamedDevice(
    name="V100 SXM2 32GB",
    compute_capability=(7, 0),
    tflops={"fp64": 7.8, "fp32": 15.7, "fp16": 125.0},
    bandwidth_gb_s=900.0,
    memory_gib=32.0,
    source="NVIDIA V100 data sheet",
    address="https://www.nvidia.com/en-us/data-center/v100/",
)
_V100_PCIE = replace(_V100, name="V100 PCIe 32GB", tflops={"fp64": 7.0, "fp32": 14.0, "fp16": 112.0})

_T4 = NamedDevice(
    name="T4",
    other_words=("16gb",),
    compute_capability=(7, 5),
    tflops={"fp32": 8.1, "fp16": 65.0, "int8": 130.0},
    bandwidth_gb_s=320.0,
    memory_gib=16.0,
    source="NVIDIA Turing GPU architecture white paper",
    address="https://images.nvidia.com/aem-dam/en-zz/Solutions/design-visualization/technologies/turing-architecture/"
    "NVIDIA-Turing-Architecture-Whitepaper.pdf",
)

_A100 = NamedDevice(
    name="A100 SXM 80GB",
    other_words=("sxm4",),
    compute_capability=(8, 0),
    tflops={"fp64": 19.5, "fp32": 19.5, "bf16": 312.0, "fp16": 312.0, "int8": 624.0},
    tf32_tflops=156.0,
    bandwidth_gb_s=2039.0,
    memory_gib=80.0,
    source="NVIDIA A100 data sheet",
    address="https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
)

_L40S = NamedDevice(
    name="L40S",
    other_words=("48gb",),
    compute_capability=(8, 9),
    tflops={"fp32": 91.6, "bf16": 362.05, "fp16": 362.05, "fp8": 733.0, "int8": 733.0},
    tf32_tflops=183.0,
    bandwidth_gb_s=864.0,
    memory_gib=48.0,
    source="NVIDIA L40S data sheet",
    address="https://www.nvidia.com/en-us/data-center/l40s/",
)

_H100 = NamedDevice(
    name="H100 SXM 80GB",
    other_words=("sxm5", "hbm3"),
    compute_capability=(9, 0),
    tflops={"fp64": 66.9, "fp32": 66.9, "bf16": 989.4, "fp16": 989.4, "fp8": 1978.9, "int8": 1978.9},
    tf32_tflops=494.7,
    bandwidth_gb_s=3350.0,
    memory_gib=80.0,
    source="NVIDIA H100 data sheet, in the precision of the Hopper architecture white paper",
    address="https://www.nvidia.com/en-us/data-center/h100/",
)
_H100_PCIE = replace(
    _H100,
    name="H100 PCIe 80GB",
    other_words=("hbm2e",),
    tflops={"fp64": 51.0, "fp32": 51.0, "bf16": 756.0, "fp16": 756.0, "fp8": 1513.0, "int8": 1513.0},
    tf32_tflops=378.0,
    bandwidth_gb_s=2000.0,
)
_H100_NVL = replace(
    _H100,
    name="H100 NVL 94GB",
    tflops={"fp64": 60.0, "fp32": 60.0, "bf16": 835.5, "fp16": 835.5, "fp8": 1670.5, "int8": 1670.5},
    tf32_tflops=417.5,
    bandwidth_gb_s=3900.0,
    memory_gib=94.0,
)

_H200 = replace(
    _H100,
    name="H200 SXM 141GB",
    other_words=("sxm5", "hbm3e"),
    bandwidth_gb_s=4800.0,
    memory_gib=141.0,
    source="NVIDIA H200 data sheet, in the precision of the Hopper architecture white paper",
    address="https://www.nvidia.com/en-us/data-center/h200/",
)
_H200_NVL = replace(_H200, name="H200 NVL 141GB", tflops=_H100_NVL.tflops, tf32_tflops=_H100_NVL.tf32_tflops)

_B200 = NamedDevice(
    name="B200 SXM 180GB",
    other_words=("sxm6", "hbm3e", "hgx", "dgx"),
    compute_capability=(10, 0),
    tflops={"fp64": 40.0, "fp32": 80.0, "bf16": 2250.0, "fp16": 2250.0, "fp8": 4500.0, "int8": 4500.0},
    tf32_tflops=1100.0,
    bandwidth_gb_s=8000.0,  # its driver reports a bus of 7680 bits at 3996 MHz, which makes 7672
    memory_gib=180.0,
    source="NVIDIA Blackwell architecture technical brief (HGX B200), memory of the DGX B200 data sheet",
    address="https://nvdam.widen.net/s/xqt56dflgh/nvidia-blackwell-architecture-technical-brief",
)

DEVICES: tuple[NamedDevice, ...] = (
    _CPU,
    _V100,
    replace(_V100, name="V100 SXM2 16GB", memory_gib=16.0),
    _V100_PCIE,
    replace(_V100_PCIE, name="V100 PCIe 16GB", memory_gib=16.0),
    _T4,
    _A100,
    replace(_A100, name="A100 SXM 40GB", bandwidth_gb_s=1555.0, memory_gib=40.0),
    replace(_A100, name="A100 PCIe 80GB", other_words=(), bandwidth_gb_s=1935.0),
    replace(_A100, name="A100 PCIe 40GB", other_words=(), bandwidth_gb_s=1555.0, memory_gib=40.0),
    _L40S,
    _H100,
    _H100_PCIE,
    _H100_NVL,
    _H200,
    _H200_NVL,
    _B200,
)
"""Every device of the table; of several of one model, the first is what the model alone stands for."""
