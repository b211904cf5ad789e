"""bf16 replaced, for what runs a file and has no bf16: by fp32 always, by fp16 where recorded ranges allow it."""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from lightning_mixprec.errors import ExportError
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.numerics.ranges import Range
from lightning_mixprec.policy.assignment import LayerPrecision

Ranges = Mapping[str, float] | str | os.PathLike[str]
"""The largest magnitude seen in each layer's output, by its name; or the file of a run that recorded it."""

_REPLACED = "bf16"
_ROOM = 2.0
"""How many times larger than recorded a number may become: one binary digit of headroom."""


def without_bf16(
    layers: Mapping[str, LayerPrecision], instead: str, ranges: Mapping[str, Range], weighted: Collection[str]
) -> dict[str, LayerPrecision]:
    """An assignment with bf16 replaced by another format.

    Args:
        layers: The assignment.
        instead: ``"fp32"`` or ``"fp16"``.
        ranges: What was recorded of each layer.
        weighted: The layers that have weights of their own, of which fp16 needs the range.

    Raises:
        ExportError: fp16 is to replace it in a layer whose range was not recorded, or is too large; it is named.
    """
    if instead not in ("fp16", "fp32"):
        raise ExportError(f"bf16_as is {instead!r}; it is 'fp32', or 'fp16' with ranges that were recorded")
    for name, layer in layers.items():
        if _REPLACED not in (layer.compute, layer.region):
            continue
        if instead == "fp16":
            _check_range(name, ranges[name].amax if name in ranges else None, name in weighted)
        elif layer.has_narrow_products:
            raise ExportError(
                f"layer {name!r} computes in {layer.compute}, and what its products take and give is in 16 bits, not "
                "in fp32; use bf16_as='fp16', or give it fp32 in the policy of the export"
            )
    return {name: _replaced(layer, instead) for name, layer in layers.items()}


def _replaced(layer: LayerPrecision, instead: str) -> LayerPrecision:
    def other(format: Any) -> Any:
        return instead if format == _REPLACED else format

    eight_bits = replace(layer.eight_bits, around=other(layer.eight_bits.around))
    return replace(layer, compute=other(layer.compute), output=other(layer.output), eight_bits=eight_bits)


def _check_range(name: str, largest: float | None, is_needed: bool) -> None:
    most = get_format("fp16").max / _ROOM
    if largest is None and is_needed:
        raise ExportError(
            f"layer {name!r} cannot go from bf16 to fp16: no range of its output was recorded; give ranges={{layer: "
            "largest magnitude}, or the log directory of a run with UnderflowMonitor, or bf16_as='fp32'"
        )
    if largest is not None and not largest <= most:
        raise ExportError(
            f"layer {name!r} cannot go from bf16 to fp16: its output reached {largest:.3g}, and {most:.3g} is what "
            "fp16 holds with room to spare; give it fp32 in the policy of the export, or use bf16_as='fp32'"
        )
