"""Statistics of a layer in its format: the losses of its gradient, and the room that is left."""

from collections.abc import Sequence
from typing import Any

from lightning_mixprec.evidence.findings import Findings
from lightning_mixprec.numerics.exponents import Histogram
from lightning_mixprec.numerics.formats import get_format, low_precision_formats
from lightning_mixprec.numerics.rates import best_scale, fits, headroom, overflow_rate, subnormal_share, underflow_rate

SHORT = ("underflow_rate", "subnormal_share", "headroom_bits", "output_headroom_bits")
"""The keys of :func:`describe` that a decision and the report show of a layer."""


def describe(layer: str, found: Findings, format: str) -> dict[str, Any]:
    """Rates and headroom of a layer that computes in a format, as ``UnderflowMonitor.latest`` has them."""
    flow = found.gradients.get(layer)
    own = found.weights.get(layer, flow)
    output = found.outputs.get(layer)
    assert own is not None
    return {
        "format": format,
        **_losses("", own, format, found.scale),
        **_losses("flow_", flow, format, found.scale),
        "output_headroom_bits": None if output is None else headroom(output, format),
        "what_if": {
            name: _what_if(name, [each for each in (own, flow) if each is not None], output, found.scale)
            for name in low_precision_formats()
            if name != format or get_format(name).use.needs_scaling
        },
    }


def _losses(prefix: str, gradient: Histogram | None, format: str, scale: float) -> dict[str, float | None]:
    keys = (f"{prefix}underflow_rate", f"{prefix}subnormal_share", f"{prefix}headroom_bits")
    if gradient is None:
        return dict.fromkeys(keys)
    rates = (
        underflow_rate(gradient, format, scale, direction="backward").middle,
        subnormal_share(gradient, format, scale, direction="backward").middle,
        headroom(gradient, format, scale, direction="backward"),
    )
    return dict(zip(keys, rates, strict=True))


def _what_if(format: str, gradients: Sequence[Histogram], output: Histogram | None, scale: float) -> dict[str, Any]:
    scale = scale if get_format(format).use.needs_scaling else 1.0
    outputs = 0.0 if output is None else overflow_rate(output, format).middle
    overflows = [overflow_rate(each, format, scale, direction="backward").middle for each in gradients]
    return {
        "underflow_rate": underflow_rate(gradients[0], format, scale, direction="backward").middle,
        "overflow_rate": max(outputs, *overflows),
        "best_scale": min(best_scale(each, format, direction="backward") for each in gradients),
        "fits": outputs == 0 and all(fits(each, format, direction="backward") for each in gradients),
    }
