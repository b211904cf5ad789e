"""The largest magnitude that each layer handed on in a run, read from its rows: whether fp16 has the range for it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.records.journal import FILE_NAME, ROWS, rows_in
from lightning_mixprec.records.schema import matches


@dataclass(frozen=True)
class Range:
    """What was recorded of a layer.

    Attributes:
        amax: The largest magnitude of its outputs.
        fits_fp16: False if a sampled step's output or gradient fitted fp16 at no loss scale.
    """

    amax: float
    fits_fp16: bool = True

    def __or__(self, other: "Range") -> "Range":
        """That of both together."""
        return Range(max(self.amax, other.amax), self.fits_fp16 and other.fits_fp16)


def read_ranges(given: object) -> dict[str, Range]:
    """The ranges of layers, in the order in which they are given or were written.

    Args:
        given: A mapping from a layer's name to the largest magnitude that it hands on, or the log directory of a run
            with ``UnderflowMonitor``, or its ``mixprec.jsonl``; of several runs in it the latest counts.

    Raises:
        MixPrecError: It is neither, or nothing was recorded; one line that says what to give.

    >>> read_ranges({"net.0": 12.5})
    {'net.0': Range(amax=12.5, fits_fp16=True)}
    """
    if isinstance(given, Mapping):
        return {_name(name): Range(_magnitude(name, amax)) for name, amax in given.items()}
    if not isinstance(given, (str, os.PathLike)):
        raise MixPrecError(
            f"ranges is a {type(given).__name__}; give a mapping from a layer's name to its largest magnitude, or the "
            "log directory of a run with UnderflowMonitor."
        )
    path = Path(given).expanduser()
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise MixPrecError(f"there is no {str(path)!r}; give the log directory of a run with UnderflowMonitor.")
    found: dict[str, Range] = {}
    rows = list(rows_in(path))
    latest = rows[-1].get("run_id") if rows else None  # a folder may have rows of several runs
    for row in (each for each in rows if each.get("run_id") == latest):
        if row.get("monitor") == "underflow" and "what_if" in row and matches(row, ROWS["underflow"], in_json=True):
            found[row["layer"]] = found.get(row["layer"], Range(0.0)) | _range(row)
    if not found:
        raise MixPrecError(
            f"{str(path)!r} has no rows of UnderflowMonitor, which tell how large outputs are; train with it for a few "
            "steps, or give a mapping from a layer's name to its largest magnitude."
        )
    return found


def _range(row: Mapping[str, Any]) -> Range:
    """What a row says: the headroom is that of the row's format."""
    bits, in_fp16 = row["output_headroom_bits"], row["what_if"].get("fp16")
    amax = 0.0 if bits is None else get_format(row["format"]).forward.max * 2.0**-bits
    return Range(amax, in_fp16 is None or in_fp16["fits"])


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise MixPrecError(f"ranges has the name {name!r}; a layer's name is a string, as in named_modules().")
    return name


def _magnitude(name: str, amax: Any) -> float:
    if isinstance(amax, bool) or not isinstance(amax, (int, float)) or not amax >= 0:
        raise MixPrecError(f"ranges says {amax!r} of {name!r}; the largest magnitude is a number that is not negative.")
    return float(amax)
