"""Ways to compute in a format, one file each behind one protocol, and which of them computes in what."""

from typing import Literal

import torch

from lightning_mixprec.engine.backends.autocast import Autocast
from lightning_mixprec.engine.backends.emulated import Emulated
from lightning_mixprec.engine.backends.protocol import Backend, Region
from lightning_mixprec.numerics.devices import native_support
from lightning_mixprec.numerics.formats import compute_formats, get_format

__all__ = ["EMULATE", "Backend", "Backends", "Emulate", "Region"]

Emulate = bool | Literal["auto"]

EMULATE: tuple[Emulate, ...] = ("auto", True, False)
"""What ``emulate`` may be: emulation where the device has no arithmetic of its own, wherever it can, or nowhere."""


class Backends:
    """The backends that compute on a type of device: of several for one format the first one does.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        emulate: ``"auto"``: 16-bit formats are emulated that the device has no arithmetic for, if it is present; True:
            also those that it has; False: none.

    >>> Backends("cpu", emulate=False).region("bf16").dtype, Backends("cpu").backend_for("fp8")
    (torch.bfloat16, None)
    """

    def __init__(self, device: str, emulate: Emulate = "auto") -> None:
        self.device, self.emulate = device, emulate
        emulated = [format for format in compute_formats() if _is_emulated(format, device, emulate)]
        self._backends: tuple[Backend, ...] = (Emulated(device, emulated), Autocast())

    def backend_for(self, format: str) -> Backend | None:
        """The backend that computes in a format; None if there is none."""
        return next((backend for backend in self._backends if backend.computes(format)), None)

    def region(self, format: str) -> Region:
        """The state for a part of a model that computes in a format that a backend computes in."""
        backend = self.backend_for(format)
        assert backend is not None
        return backend.region(format, self.device)


def _is_emulated(format: str, device: str, emulate: Emulate) -> bool:
    if not get_format(format).is_half:
        return False
    if emulate != "auto":
        return emulate
    is_present = device == "cpu" or (device == "cuda" and torch.cuda.is_available())
    return is_present and not native_support(format, device).native
