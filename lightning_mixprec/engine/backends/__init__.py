"""Ways to compute in a format, one file each behind one protocol, and which of them computes in what."""

from typing import Literal, NamedTuple

import torch

from lightning_mixprec.engine.backends.autocast import Autocast
from lightning_mixprec.engine.backends.emulated import Emulated
from lightning_mixprec.engine.backends.fp8 import Fp8
from lightning_mixprec.engine.backends.int8 import Int8
from lightning_mixprec.engine.backends.narrow import Narrow, WithoutNarrow
from lightning_mixprec.engine.backends.protocol import Backend, Region
from lightning_mixprec.engine.backends.scaled_linear import NarrowLinear
from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.devices import native_support
from lightning_mixprec.numerics.formats import compute_formats, get_format

__all__ = [
    "Backend",
    "Backends",
    "Emulate",
    "Emulated",
    "Manner",
    "Narrow",
    "NarrowLinear",
    "Region",
    "WithoutNarrow",
    "check_emulate",
]

Emulate = bool | Literal["auto"]


def check_emulate(value: object) -> None:
    """Raises unless it is ``"auto"`` (emulation where the device has no arithmetic of its own), True or False.

    Raises:
        SupportError: It is something else; 1 and 0 are.
    """
    if not isinstance(value, bool) and value != "auto":
        raise SupportError(f"emulate is {value!r}; allowed are 'auto', True, False")


class Manner(NamedTuple):
    """The manner in which a layer's products compute in 8 bits.

    Attributes:
        format: Their format.
        scaling: What one scale is of: ``"tensor"`` or ``"row"``.
        gradients: Which gradients are products in 8 bits as well: ``"all"``, ``"input"`` or ``"none"``.
    """

    format: str
    scaling: str
    gradients: str


class Backends:
    """The backends that compute on a type of device: of several for one format the first one does.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        emulate: ``"auto"``: 16-bit formats are emulated that the device has no arithmetic for, if it is present; True:
            also those that it has; False: none.

    >>> Backends("cpu", emulate=False).region("bf16").dtype, Backends("cpu").backend_for("e4m3")
    (torch.bfloat16, None)
    """

    def __init__(self, device: str, emulate: Emulate = "auto") -> None:
        self.device, self.emulate = device, emulate
        emulated = [format for format in compute_formats() if _is_emulated(format, device, emulate)]
        self._narrow: tuple[Narrow, ...] = (Fp8(device, emulate), Int8(device, emulate))
        self._backends: tuple[Backend, ...] = (Emulated(device, emulated), Autocast(), *self._narrow)

    def backend_for(self, format: str) -> Backend | None:
        """The backend that computes in a format; None if there is none."""
        return next((backend for backend in self._backends if backend.computes(format)), None)

    def narrow_for(self, format: str) -> Narrow | None:
        """The backend of products in a format; None if it is one of 16 bits or wider."""
        return next((backend for backend in self._narrow if backend.computes(format)), None)

    def region(self, format: str, narrow: Manner | None = None) -> Region:
        """The state for a part of a model.

        Args:
            format: The format of its operations, 16 bits or wider, that a backend computes in.
            narrow: How products of linear layers compute if that is in 8 bits.

        Raises:
            SupportError: The device has no such products, and is not to emulate them.
        """
        backend = self.backend_for(format)
        assert backend is not None
        region = backend.region(format, self.device)
        products = None if narrow is None else self.narrow_for(narrow.format)
        if narrow is None or products is None:
            return region
        return products.region_within(region, narrow.scaling, narrow.gradients)


def _is_emulated(format: str, device: str, emulate: Emulate) -> bool:
    if not get_format(format).is_half:
        return False
    if emulate != "auto":
        return emulate
    is_present = device == "cpu" or (device == "cuda" and torch.cuda.is_available())
    return is_present and not native_support(format, device).native
