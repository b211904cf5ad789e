"""Ways to compute in a format, one file each behind one protocol, and which of them computes in what."""

from lightning_mixprec.engine.backends.autocast import Autocast
from lightning_mixprec.engine.backends.protocol import Backend, Region

__all__ = ["BACKENDS", "Backend", "Region", "backend_for"]

BACKENDS: tuple[Backend, ...] = (Autocast(),)
"""The backends; of several for one format the first one computes in it."""


def backend_for(format: str) -> Backend | None:
    """The backend that computes in a format; None if there is none.

    >>> backend_for("bf16") is BACKENDS[0], backend_for("fp8")
    (True, None)
    """
    return next((backend for backend in BACKENDS if backend.computes(format)), None)
