"""What each layer of a module takes of time and memory in each format: measured, or told of a device that is not here.

Three things are looked at, each in steps of the first batch inside the sandbox:

- what a step in fp32 computes and hands on: the matrix products of each layer, and which layer takes whose output;
- what a step keeps for its backward, under the uniform policy of each format: each memory once, at the layer that keeps
  it first, weights apart;
  For a device by name both are traced on fake tensors on ``cuda``, forward alone, and nothing is run;
- on the device at hand, the time of each layer's forward and backward in each format, in turns, once for each distinct
  class, weights and inputs. What a module that calls others computes itself takes the time of its matrix products at
  the rate of the other layers. For a device by name, the time of a layer is that of its products at the peak of the
  format or that of its numbers at the memory's bandwidth, whichever is longer, and that of launching its operations.
  What a step takes beyond its layers does not depend on formats.
"""

import contextlib
import math
import statistics
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from lightning_mixprec.engine.border_plan import Site, survey
from lightning_mixprec.engine.objects import tensors_in
from lightning_mixprec.errors import MixPrecError, PlanError, TraceLeftError, one_line
from lightning_mixprec.evidence.instruments.flops import FlopCount
from lightning_mixprec.evidence.instruments.sandbox import RandomState
from lightning_mixprec.evidence.measuring.handed_on import HandedOn
from lightning_mixprec.evidence.measuring.layer_times import TRIES, LayerTimes, cast_seconds
from lightning_mixprec.evidence.measuring.saved_by_layer import SavedByLayer
from lightning_mixprec.evidence.measuring.traced import Launches, trace
from lightning_mixprec.evidence.measuring.weight_bytes import KeptByOptimizer, gradient_bytes
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import PolicyFormats
from lightning_mixprec.numerics.devices import NamedDevice, named_device
from lightning_mixprec.numerics.devices.timing import seconds_of
from lightning_mixprec.numerics.formats import REFERENCE, compute_formats, get_format
from lightning_mixprec.planning.cost import Costs, Handover, LayerCost
from lightning_mixprec.policy.assignment import EightBits, LayerPrecision
from lightning_mixprec.policy.policy import PrecisionPolicy
from lightning_mixprec.policy.rules import Rule, is_of_products

EFFICIENCY = 0.6
"""The share of a device's peaks, of arithmetic and of bandwidth, that layers of ordinary sizes reach.

It is the same for all formats, so the order of policies depends little on it.
"""

LAUNCH_SECONDS = 2e-6
"""The least time that an operation takes on a GPU, however small: that of launching a kernel, about two microseconds.

It is counted of the step in fp32 for all formats: what low precision launches beside that are casts, which are counted
as bandwidth.
"""

_BACKWARD = 3.0
"""A step's arithmetic as a multiple of its forward: backward takes two products for each."""


def measure_costs(
    module: pl.LightningModule,
    batches: Sequence[Any],
    formats: Sequence[str],
    *,
    device: str | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    step_seconds: float | None = None,
) -> Costs:
    """Measures what each layer of a module takes in fp32 and in some formats; nothing of the module changes.

    Args:
        module: The LightningModule, on the device where it is to compute.
        batches: What its ``training_step`` takes, on the same device; the first one is looked at.
        formats: The formats.
        device: A device by name, for which times are told; None for the one that the module is on, where they are
            measured.
        optimizer: The optimizer or optimizers, of whose moments the memory is; None for torch's AdamW.
        step_seconds: The seconds of forward and backward of a step in fp32 on that device, if one was measured: all
            times are scaled to it.

    Raises:
        MixPrecError: The step cannot be run; or a format or device is unknown.
    """
    named = None if device is None else named_device(device)
    if named is not None and named.compute_capability is None:
        named = None  # the CPU of this machine, whose peaks nobody has listed
    if not batches:
        raise PlanError("there are no batches to measure on; give one at least.")
    for format in formats:
        if not get_format(format).use.is_computed_in:
            raise PlanError(f"layers do not compute in {format!r}; they do in {', '.join(compute_formats())}.")
    costs = _Measuring(module, batches[0], [REFERENCE, *formats]).costs(named, optimizer)
    return costs if step_seconds is None else costs.calibrated(step_seconds)


@dataclass
class _Shapes:
    """What a step computes, hands on and keeps, in the formats that were looked at.

    Attributes:
        flops: By layer its products' operations.
        handed: Which layer takes whose output.
        saved: By format what is kept for backward.
        launches: By layer how many operations it launches.
        note: Where all this comes from, if not from a trace for the device.
    """

    flops: Mapping[str, int]
    handed: HandedOn
    saved: Mapping[str, SavedByLayer]
    launches: Mapping[str, int] = field(default_factory=dict)
    note: str = ""


class _Measuring:
    """The costs of one module on one batch."""

    def __init__(self, module: pl.LightningModule, batch: Any, formats: Sequence[str]) -> None:
        self._module, self._batch = module, batch
        self._base = PrecisionPolicy(REFERENCE).resolve(module)
        self._sites = survey(module)
        self._modules = {site.name: site.module for site in self._sites}
        self._formats = list(dict.fromkeys(formats))

    def costs(self, named: NamedDevice | None, optimizer: Optimizer | Sequence[Optimizer] | None) -> Costs:
        shapes = self._ran() if named is None else self._traced(named)
        if named is None:
            times, cast_time = self._measured(shapes.flops), cast_seconds(self._module.device)
            step, in_layers = self._step_seconds(), sum(times[site.name, REFERENCE] for site in self._sites)
            if step < in_layers:  # each alone takes longer than among the others
                times = {key: seconds * step / in_layers for key, seconds in times.items()}
            fixed = max(step - in_layers, 0.0)
        else:
            times, cast_time, fixed = self._told(named, shapes), 1e-9 / _bandwidth(named), 0.0
        handovers = _handovers(shapes.handed.handovers, shapes.saved[REFERENCE].shared, self._modules)
        layers = self._layers(times, shapes, KeptByOptimizer(optimizer))
        on = named.name if named else str(self._module.device)
        return Costs(on, layers, handovers, fixed, self._fixed_bytes(), cast_time, shapes.note)

    def _ran(self) -> _Shapes:
        """The shapes of steps that were run where the module is."""
        flops, handed = FlopCount(self._modules), HandedOn(self._modules)
        self._step(REFERENCE, flops, handed)
        return _Shapes(flops.flops, handed, {format: self._saved(format) for format in self._formats})

    def _traced(self, named: NamedDevice) -> _Shapes:
        """The shapes of steps on a GPU, traced on fake tensors; where they cannot be, those of steps that were run."""
        flops, handed, launches = FlopCount(self._modules), HandedOn(self._modules), Launches(self._module)
        saved = {format: SavedByLayer(self._module) for format in self._formats}
        try:
            trace(self._module, self._batch, _uniform(REFERENCE), flops, handed, launches, saved[REFERENCE])
            for format in self._formats:
                if format != REFERENCE and self._has_layers_for(format):
                    trace(self._module, self._batch, _uniform(format), saved[format])
        except TraceLeftError:
            raise
        except Exception as error:
            shapes = self._ran()
            why = one_line(error)
            shapes.note = f"shapes and memory are those of a step on {self._module.device}, for on {named.name} {why}"
            return shapes
        return _Shapes(flops.flops, handed, saved, launches.counts)

    def _step_seconds(self) -> float:
        """The seconds of forward and backward in fp32, the shortest of some tries."""
        device, taken = self._module.device, list[float]()
        replay = StepReplay(self._module, PolicyFormats(self._module, REFERENCE, device, 1.0), device)
        with replay.opened(reference=True) as stand_ins:
            random = RandomState(device)
            for _ in range(TRIES + 1):
                own = replay.own_batch(stand_ins, self._batch)
                run = partial(replay.run_on_own, stand_ins, own, 0, random=random)
                taken.append(seconds_of(run, device))
        return min(taken[1:])

    def _has_layers_for(self, format: str) -> bool:
        return not is_of_products(format) or any(isinstance(each, nn.Linear) for each in self._modules.values())

    def _layers(
        self,
        times: Mapping[tuple[str, str], float],
        shapes: _Shapes,
        kept: KeptByOptimizer,
    ) -> dict[str, dict[str, LayerCost]]:
        """By layer and format its cost, in the order in which layers end."""
        sites, handed = {site.name: site for site in self._sites}, shapes.handed
        layers: dict[str, dict[str, LayerCost]] = {}
        for name in (*(each for each in sites if each not in handed.order), *handed.order):
            params = [param for part in sites[name].parts for param in part.parameters(recurse=False)]
            gradients = gradient_bytes(params)
            weights = sum(param.nbytes for param in params) + gradients + sum(map(kept.bytes_of, params))
            layers[name] = {
                format: LayerCost(
                    seconds=times[name, format],
                    weight_bytes=float(weights),
                    saved_bytes=float(shapes.saved[format].bytes.get(name, 0)),
                    flops=float(shapes.flops[name]),
                    gradient_bytes=gradients,
                    passing_bytes=handed.elements[name] * get_format(LayerPrecision(REFERENCE, format).region).bits / 8,
                )
                for format in self._of(sites[name])
            }
        return layers

    def _fixed_bytes(self) -> float:
        """Bytes of buffers and of the batch."""
        return float(sum(each.nbytes for each in (*self._module.buffers(), *tensors_in(self._batch))))

    def _of(self, site: Site) -> list[str]:
        """The formats that a site may have."""
        if self._base[site.name].stays_wide:
            return [REFERENCE]
        return [each for each in self._formats if isinstance(site.module, nn.Linear) or not is_of_products(each)]

    def _step(self, format: str, *seen: contextlib.AbstractContextManager[Any]) -> None:
        """Runs the step under a uniform policy, while something looks at it."""
        device = self._module.device
        replay = StepReplay(self._module, PolicyFormats(self._module, _uniform(format), device, 1.0), device)
        try:
            with replay.opened(reference=format == REFERENCE) as stand_ins, contextlib.ExitStack() as stack:
                for each in seen:
                    stack.enter_context(each)
                    if isinstance(each, SavedByLayer):
                        each.leave_out((*stand_ins.parameters.values(), *self._module.buffers()))
                replay.run(stand_ins, self._batch, 0)
        except MixPrecError:
            raise
        except Exception as error:
            raise PlanError(f"the step could not be run in {format}: {one_line(error)}") from error

    def _saved(self, format: str) -> SavedByLayer:
        """What layers keep for backward under a uniform policy; where its step fails, what they keep in fp32.

        The layer that fails there is not offered the format, and others may still have it.
        """
        saved = SavedByLayer(self._module)
        if self._has_layers_for(format):
            try:
                self._step(format, saved)
            except PlanError:
                if format == REFERENCE:
                    raise
                return self._saved(REFERENCE)
        return saved

    def _measured(self, flops: Mapping[str, int]) -> dict[tuple[str, str], float]:
        """By layer and format the seconds of forward and backward, measured where the module is."""
        formats = {site.name: self._of(site) for site in self._sites}
        leaves = [site for site in self._sites if not site.children and site.name]
        times = LayerTimes(leaves, formats, self._base, self._module.device)
        self._step(REFERENCE, times)
        rates = {
            format: [
                times.seconds[site.name, format] / flops[site.name]
                for site in leaves
                if flops[site.name] and times.seconds.get((site.name, format))
            ]
            for format in self._formats
        }
        rate = {format: statistics.median(found) if found else 0.0 for format, found in rates.items()}
        return {
            (site.name, format): times.seconds.get((site.name, format), flops[site.name] * rate[format])
            for site in self._sites
            for format in formats[site.name]
        }

    def _told(self, named: NamedDevice, shapes: _Shapes) -> dict[tuple[str, str], float]:
        """The same for a device that need not be there."""
        times = {}
        for site in self._sites:
            weights = sum(param.numel() for part in site.parts for param in part.parameters(recurse=False))
            for format in self._of(site):
                width = get_format(format).bits / 8
                arithmetic = _BACKWARD * shapes.flops[site.name] / (_peak(named, format) * 1e12)
                memory = _BACKWARD * (shapes.handed.elements[site.name] + weights) * width / (_bandwidth(named) * 1e9)
                launched = _BACKWARD * shapes.launches.get(site.name, 0) * LAUNCH_SECONDS
                times[site.name, format] = max(arithmetic, memory) / EFFICIENCY + launched
        return times


def _handovers(
    elements: Mapping[tuple[str, str], int], kept: Mapping[tuple[str, str], int], layers: Container[str]
) -> tuple[Handover, ...]:
    """Pairs of layers of which one takes the other's output, or that keep the same memory for backward."""
    pairs = [pair for pair in dict.fromkeys((*elements, *kept)) if pair[0] in layers and pair[1] in layers]
    return tuple(Handover(*pair, float(elements.get(pair, 0)), float(kept.get(pair, 0))) for pair in pairs)


def _uniform(format: str) -> PrecisionPolicy:
    """The policy that has all layers compute in a format, as far as they can."""
    if not is_of_products(format):
        return PrecisionPolicy(format)
    return PrecisionPolicy(EightBits().around, [Rule(types="Linear", compute=format)])


def _peak(named: NamedDevice, format: str) -> float:
    """The peak of a device in 10^12 operations per second; of a format that it lacks, that of fp32."""
    found = named.tflops.get(format, named.tflops.get(REFERENCE, math.nan))
    return max(found, named.tf32_tflops or 0.0) if format == REFERENCE else found


def _bandwidth(named: NamedDevice) -> float:
    assert named.bandwidth_gb_s is not None
    return named.bandwidth_gb_s
