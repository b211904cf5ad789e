"""A run's layers and samples as the records of ``PrecisionReport``: short and of JSON's types."""

import math
import platform
from collections.abc import Callable, Collection

import lightning
import lightning.pytorch as pl
import torch
from torch.nn.parameter import is_lazy

from lightning_mixprec.evidence.findings import Findings, describe
from lightning_mixprec.evidence.instruments.probe import layers_of, own_parameters
from lightning_mixprec.evidence.run_formats import RunFormats
from lightning_mixprec.numerics.exponents import LOWEST, Histogram
from lightning_mixprec.numerics.formats import format_of
from lightning_mixprec.plugin.lightnings import Precision
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.records.runs import CountedExponents, DescribedLayer, Histograms, Sample, SampledLayer
from lightning_mixprec.records.samples import Losses
from lightning_mixprec.records.words import MEASURED, short

_CHOSEN = 8


def described(plugin: Precision, formats: RunFormats, module: pl.LightningModule) -> dict[str, DescribedLayer]:
    """The layers as they compute now, in the model's order."""
    layers = layers_of(module)
    assignment = plugin.assignment if isinstance(plugin, PerLayerPrecision) else None
    if assignment is None:
        return _described_alike(str(plugin.precision), formats, module)
    told = {}
    for name in layers:
        if name not in assignment:  # it came during the run
            continue
        layer, facts = assignment[name], assignment.facts[name]
        rule = "default" if layer.rule is None else layer.rule.label
        formats_of = (layer.param, layer.compute, layer.output or "")
        told[name] = DescribedLayer(name, facts.type_name, facts.parameters, *formats_of, rule)
    return told


def _described_alike(precision: str, formats: RunFormats, module: pl.LightningModule) -> dict[str, DescribedLayer]:
    """Under a plugin of Lightning's, which has one format for all."""
    layers, parameters, told = layers_of(module), dict(module.named_parameters()), {}
    owned = own_parameters(module, layers)
    for name, layer in layers.items():
        own = [parameters[each] for each in owned[name]]
        param = (format_of(own[0].dtype) or str(own[0].dtype)) if own else ""
        count = None if any(map(is_lazy, own)) else sum(each.numel() for each in own)
        told[name] = DescribedLayer(name, type(layer).__name__, count, param, formats.of(name), "", precision)
    return told


def environment(trainer: pl.Trainer, device: torch.device) -> dict[str, str]:
    """On what the run computes, and by which versions."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine(),
        "accelerator": device.type,
        "processes": str(trainer.world_size),
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision_plugin.precision),
        "plugin": type(trainer.precision_plugin).__name__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    } | ({"CUDA": str(torch.version.cuda)} if is_cuda else {})


def sampled(found: Findings, format_by_layer: Callable[[str], str], chosen: Collection[str] | None) -> Sample:
    """A sample.

    Args:
        found: What was found with statistics.
        format_by_layer: The format of a layer's operations: 16 bits or wider.
        chosen: The layers whose histograms are kept; None for those that fit their formats worst.
    """
    measured = [layer for layer in found.layers if layer in found.weights or layer in found.gradients]
    values = {layer: describe(layer, found, format_by_layer(layer)) for layer in measured}
    kept = [layer for layer in measured if layer in chosen] if chosen is not None else _worst(values)
    sample: Sample = {
        "layers": {layer: _shortened(losses) for layer, losses in values.items()},
        "histograms": {layer: _histograms(layer, found) for layer in kept},
        "loss_scale": found.scale,
    }
    if flops := {layer: count for layer, count in found.flops.items() if count}:
        sample["flops"] = flops
    return sample


def _shortened(losses: Losses) -> SampledLayer:
    return SampledLayer(
        format=losses["format"],
        underflow_rate=short(losses["underflow_rate"], MEASURED),
        subnormal_share=short(losses["subnormal_share"], MEASURED),
        headroom_bits=short(losses["headroom_bits"], MEASURED),
        output_headroom_bits=short(losses["output_headroom_bits"], MEASURED),
        best_scale=losses["what_if"]["fp16"]["best_scale"],
    )


def _worst(values: dict[str, Losses]) -> list[str]:
    """The layers that lose most of their gradient, then those that are nearest to an overflow; in the model's order."""

    def badness(layer: str) -> tuple[float, float]:
        told = values[layer]
        room = [bits for bits in (told["headroom_bits"], told["output_headroom_bits"]) if bits is not None]
        return -told["underflow_rate"], min(room, default=math.inf)

    worst = sorted(values, key=badness)[:_CHOSEN]
    return [layer for layer in values if layer in worst]


def _histograms(layer: str, found: Findings) -> Histograms:
    gradient = found.weights.get(layer, found.gradients.get(layer))
    return {"gradient": _histogram(gradient), "output": _histogram(found.outputs.get(layer))}


def _histogram(counted: Histogram | None) -> CountedExponents | None:
    """Counts by binary exponent from the lowest that occurs to the highest."""
    if counted is None:
        return None
    counts = counted.by_exponent.tolist()
    occupied = [place for place, count in enumerate(counts) if count]
    first, last = (occupied[0], occupied[-1]) if occupied else (0, -1)
    return {"lowest": first + LOWEST, "counts": counts[first : last + 1], "zeros": int(counted.zeros)}
