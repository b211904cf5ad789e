"""Ways to compute in a format, one file each behind one protocol, and which of them computes in what."""

from lightning_mixprec.engine.backends.autocast import Autocast
from lightning_mixprec.engine.backends.protocol import Backend, Region
from lightning_mixprec.numerics.formats import compute_formats

__all__ = ["BACKENDS", "Backend", "Region", "backend_for", "computed_formats"]

BACKENDS: tuple[Backend, ...] = (Autocast(),)
"""The backends; of several for one format the first one computes in it."""


def backend_for(format: str) -> Backend | None:
    """The backend that computes in a format; None if there is none.

    >>> backend_for("bf16") is BACKENDS[0], backend_for("fp8")
    (True, None)
    """
    return next((backend for backend in BACKENDS if backend.computes(format)), None)


def computed_formats() -> list[str]:
    """The formats of the table that some backend computes in."""
    return [format for format in compute_formats() if backend_for(format) is not None]
