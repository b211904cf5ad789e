"""What each layer's computing in a format is expected to do to the loss, measured on batches without a training.

A layer's part in the squared loss gap is estimated to first order: the error that the format makes of each element of
its output, times the gradient of the loss there. If errors are independent, the squares of these changes add up (as
``auto_quantize`` of NVIDIA's ModelOpt scores formats, and as arXiv:2505.13060 derives it); if they are one error, as
those of a rounded weight that all samples meet, the changes add up before they are squared. A layer's part is the mean
of both: on models that are trained for a while the squares alone are a quarter too small and the squared sum alone
is at the mercy of one batch. Parts of layers add up. Backward has no part: the loss of a step is known before it.

One fp32 step of each batch gives gradients and errors at once; layers are looked at in as many rounds as the errors
that wait for their gradients have room. Where no gradient arrives (what the LightningModule itself computes, the loss
above all; a frozen encoder, a teacher) the step is run in the format, and the squared gap is the measurement.

Range is no score. A format is not offered where numbers of a layer are too large for it, or where the gradients that
arrive there vanish in it at the best loss scale of the model.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mixprec.engine.border_plan import Site, survey
from lightning_mixprec.engine.objects import tensors_in
from lightning_mixprec.engine.sharding import groups_of
from lightning_mixprec.errors import MixPrecError, PlanError, one_line
from lightning_mixprec.evidence.comparison import MAX_BYTES, MAX_ELEMENTS, is_finite
from lightning_mixprec.evidence.instruments.own_dtypes import HookOf, hookable
from lightning_mixprec.evidence.instruments.probe import Observer
from lightning_mixprec.evidence.instruments.sandbox import RandomState, Sandbox
from lightning_mixprec.evidence.measuring.layer_errors import BORDER, LayerErrors
from lightning_mixprec.evidence.replay import Replayed, StepReplay
from lightning_mixprec.evidence.run_formats import PolicyFormats
from lightning_mixprec.numerics.exponents import Histogram
from lightning_mixprec.numerics.formats import REFERENCE, compute_formats, get_format, is_wider
from lightning_mixprec.numerics.rates import best_scale, overflow_rate, underflow_rate
from lightning_mixprec.planning.cost import region_of
from lightning_mixprec.planning.sensitivity import Border, Offer, Sensitivities
from lightning_mixprec.policy.assignment import Assignment, LayerPrecision
from lightning_mixprec.policy.module_names import walk
from lightning_mixprec.policy.patterns import literal
from lightning_mixprec.policy.policy import PrecisionPolicy
from lightning_mixprec.policy.rules import Rule, is_of_products
from lightning_mixprec.records.advice import MAX_UNDERFLOW

_BYTES_OF_ERROR = 4


def measure_sensitivities(
    module: pl.LightningModule,
    batches: Sequence[Any],
    formats: Sequence[str],
    *,
    pin: Sequence[str] = (),
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Sensitivities:
    """Measures what each of some formats would do to each layer of a module; nothing of the module changes.

    Takes for each batch two steps in fp32, one more for each ``max_bytes`` of errors that wait for their gradients, and
    one forward of each layer for each format (of a layer that calls others, of these as well).

    Args:
        module: The LightningModule, on the device where it is to compute.
        batches: What its ``training_step`` takes, on the same device.
        formats: The formats to look at.
        pin: Patterns of layers that stay in fp32, with all below them.
        seed: Of the random numbers that every step begins with.
        max_bytes: Memory for errors that wait for their gradients.

    Raises:
        MixPrecError: The step cannot be run, or is not finite in fp32; or a format or pattern means nothing.
    """
    offered = _checked(formats)
    batches = list(batches)
    if not batches:
        raise PlanError("there are no batches to measure on; give one at least.")
    base = PrecisionPolicy(REFERENCE).resolve(module)
    variables = variables_of(module, base, _pinned(module, pin))
    random = _random_of(seed, module.device)
    measured = [_Batch(module, batch, base, random).measure(variables, offered, max_bytes) for batch in batches]
    borders = _borders(variables, measured) if _may_meet(offered) else ()
    offers = []
    for each in variables:
        offer = {REFERENCE: Offer(0.0)}
        for format in each.among(offered):
            scores = [found.score(each, format) for found in measured]
            problems = [problem for found in measured if (problem := found.problem(each, format)) is not None]
            offer[format] = Offer(sum(scores) / len(scores), problems[0] if problems else None)
        offers.append(offer)
    return Sensitivities(tuple(each.layers for each in variables), tuple(offers), REFERENCE, len(batches), borders)


def _may_meet(formats: Iterable[str]) -> bool:
    """True if both 16-bit formats may be in one model."""
    return len({region for each in formats if get_format(region := region_of(each)).is_half}) > 1


def _borders(variables: Sequence["Variable"], measured: Sequence["_Found"]) -> tuple[Border, ...]:
    """Each layer and the nearest one around it, with what rounding the layer's output does to the loss."""
    names = {site.name for each in variables for site in each.sites}
    found = []
    for name in sorted(names - {""}):
        around = name.rpartition(".")[0]
        while around not in names and around:
            around = around.rpartition(".")[0]
        scores = [each.part([(name, BORDER)]) for each in measured]
        if around in names:
            found.append(Border(name, around, sum(scores) / len(scores)))
    return tuple(found)


@dataclass
class Variable:
    """Layers that move together.

    Attributes:
        layers: Their names, in the model's order.
        sites: The sites that they are called at.
        is_fixed: Whether they stay in the reference's format.
    """

    layers: tuple[str, ...]
    sites: list[Site]
    is_fixed: bool

    def among(self, formats: Sequence[str]) -> list[str]:
        """Those of some formats that it may have: products in 8 bits are of Linear layers alone."""
        if self.is_fixed:
            return []
        has_products = any(isinstance(site.module, nn.Linear) for site in self.sites)
        return [each for each in formats if has_products or not is_of_products(each)]


def variables_of(module: nn.Module, base: Assignment, pinned: Set[str] = frozenset()) -> list[Variable]:
    """The layers of a model that move together: parts of one site, what shares a weight, what FSDP2 gathers together.

    Args:
        module: The model.
        base: What each layer is assigned in fp32.
        pinned: The layers that stay in fp32.
    """
    sites = survey(module)
    gathered = {name: f"group {place}" for place, group in enumerate(groups_of(sites)) for name in group.layers}
    bonds = {site.name: _weights_of(site) | {gathered.get(site.name, site.name)} for site in sites}
    groups: list[list[Site]] = []
    for site in sites:
        bound = [group for group in groups if any(bonds[site.name] & bonds[other.name] for other in group)]
        groups = [group for group in groups if group not in bound] + [sum(bound, []) + [site]]
    site_of = {id(part): site for site in sites for part in site.parts}
    names: dict[int, list[str]] = {id(site): [] for site in sites}
    for node in walk(module):
        names[id(site_of[id(node.module)])].append(node.name)
    order = {name: place for place, name in enumerate(base)}
    found = []
    for group in groups:
        layers = sorted((name for site in group for name in names[id(site)]), key=order.__getitem__)
        is_fixed = any(base[name].stays_wide for name in layers) or not pinned.isdisjoint(layers)
        found.append(Variable(tuple(layers), group, is_fixed))
    return sorted(found, key=lambda each: order[each.layers[0]])


def _weights_of(site: Site) -> set[int | str]:
    return {id(param) for part in site.parts for param in part.parameters(recurse=False)}


@dataclass
class _Found:
    """What one batch said.

    Attributes:
        squares: By layer and format the sum of the squared changes that the errors of elements make to the loss.
        sums: By layer and format the sum of these changes.
        problems: By layer and format why it cannot be used there.
    """

    squares: dict[tuple[str, str], float] = field(default_factory=dict)
    sums: dict[tuple[str, str], float] = field(default_factory=dict)
    problems: dict[tuple[str, str], str] = field(default_factory=dict)

    def score(self, variable: Variable, format: str) -> float:
        """A variable's part in the squared loss gap."""
        return self.part([(site.name, format) for site in variable.sites])

    def part(self, keys: Sequence[tuple[str, str]]) -> float:
        """The part of some layers and formats together."""
        together = math.fsum(self.sums.get(key, 0.0) for key in keys) ** 2
        return (math.fsum(self.squares.get(key, 0.0) for key in keys) + together) / 2

    def problem(self, variable: Variable, format: str) -> str | None:
        """Why a variable cannot have a format."""
        told = (self.problems.get((site.name, format)) for site in variable.sites)
        return next(filter(None, told), None)


class _Batch:
    """The measurements on one batch."""

    def __init__(self, module: pl.LightningModule, batch: Any, base: Assignment, random: RandomState) -> None:
        self._module, self._batch, self._base, self._random = module, batch, base, random
        self._replay = StepReplay(module, PolicyFormats(module, REFERENCE, module.device, 1.0), module.device)
        self._found = _Found()

    def measure(self, variables: Sequence[Variable], formats: Sequence[str], max_bytes: int) -> _Found:
        sites = {site.name: (site, each) for each in variables for site in each.sites}
        reference, ranges = self._reference([site for site, _ in sites.values()])
        for name, (_, variable) in sites.items():
            for format in variable.among(formats):
                if (problem := ranges.problem(name, format)) is not None:
                    self._found.problems[name, format] = problem
        wanted = {name: variable.among(formats) for name, (_, variable) in sites.items() if name}
        for names in _rounds(wanted, ranges.elements, max_bytes):
            self._round([sites[name][0] for name in names], wanted)
        for format in formats:
            able = [name for name, (_, variable) in sites.items() if format in variable.among(formats)]
            self._without_gradient([name for name in able if self._is_open(name, format)], format, reference)
        return self._found

    def _is_open(self, name: str, format: str) -> bool:
        return (name, format) not in self._found.squares and (name, format) not in self._found.problems

    def _reference(self, sites: Sequence[Site]) -> tuple[Replayed, "_Ranges"]:
        layers = {site.name: site.module for site in sites}
        observer, sizes = Observer(layers, MAX_ELEMENTS), OutputSizes(layers)
        try:
            with self._replay.opened(reference=True) as stand_ins, observer, sizes:
                replayed = self._run(self._replay, stand_ins)
                weights = {name: _amax(module.parameters(recurse=False)) for name, module in layers.items()}
        except MixPrecError:
            raise
        except Exception as error:
            raise PlanError(f"the step could not be run in fp32: {one_line(error)}") from error
        if not replayed.losses:
            raise PlanError("training_step gave no loss on a batch; plan on batches that are trained on.")
        if not is_finite(replayed):
            raise PlanError("the step is not finite in fp32, with which formats are compared; diagnose() says where.")
        return replayed, _Ranges(list(layers), observer.outputs(), observer.gradients(), weights, sizes.elements)

    def _round(self, sites: Sequence[Site], formats: Mapping[str, Sequence[str]]) -> None:
        meet = _may_meet(format for offered in formats.values() for format in offered)
        errors = LayerErrors(sites, formats, self._base, self._module.device, has_borders=meet)
        with self._replay.opened(reference=True) as stand_ins, errors:
            self._run(self._replay, stand_ins)
        for key, square in errors.squares.items():
            if math.isfinite(found := float(square)):
                self._found.squares[key], self._found.sums[key] = found, float(errors.sums[key])
            elif key[1] != BORDER:
                self._found.problems.setdefault(key, f"its output is not finite in {key[1]}")
        for (name, format), problem in errors.problems.items():
            self._found.problems.setdefault((name, format), f"it fails in {format}: {problem}")

    def _without_gradient(self, names: Sequence[str], format: str, reference: Replayed) -> None:
        """Layers at which no gradient arrived: the step is run in the format, of all of them together and of each.

        If together they change nothing, as those that the step does not call, each is taken to change nothing.
        """
        if not names:
            return
        try:
            gap = self._gap(names, format, reference)
        except MixPrecError:
            raise
        except Exception as error:
            gap, raised = math.nan, f"it fails in {format}: {one_line(error)}"
        else:
            raised = f"the loss is not finite in {format}"
        if len(names) > 1 and gap != 0:
            for name in names:
                self._without_gradient([name], format, reference)
            return
        for name in names:
            if math.isfinite(gap):
                self._found.squares[name, format], self._found.sums[name, format] = gap * gap, gap
            else:
                self._found.problems[name, format] = raised

    def _gap(self, names: Sequence[str], format: str, reference: Replayed) -> float:
        """The change of the loss if the own operations of some layers are in a format."""
        rules = [Rule(literal(name), compute=format, recurse=False) for name in names]
        policy = PrecisionPolicy(REFERENCE, rules)
        replay = self._replay.in_formats(PolicyFormats(self._module, policy, self._module.device, 1.0))
        with replay.opened() as stand_ins:
            low = self._run(replay, stand_ins)
        return sum(map(float, low.losses)) - sum(map(float, reference.losses))

    def _run(self, replay: StepReplay, stand_ins: Sandbox) -> Replayed:
        return replay.run(stand_ins, self._batch, 0, random=self._random)


class OutputSizes:
    """Counts the elements of what layers give while a step runs.

    Attributes:
        elements: By layer how many.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._handles: list[RemovableHandle] = []
        self.elements: dict[str, int] = dict.fromkeys(layers, 0)

    def __enter__(self) -> "OutputSizes":
        for name, module in hookable(self._layers).items():
            self._handles.append(module.register_forward_hook(HookOf(module, partial(self._count, name))))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.elements[name] += sum(tensor.numel() for tensor in tensors_in(output) if tensor.is_floating_point())


class _Ranges:
    """The ranges of a step's numbers, layer by layer."""

    def __init__(
        self,
        layers: Sequence[str],
        outputs: Histogram,
        gradients: Histogram,
        weights: Mapping[str, float],
        elements: Mapping[str, int],
    ) -> None:
        self._outputs = {name: outputs.select(place) for place, name in enumerate(layers)}
        self._gradients = {name: gradients.select(place) for place, name in enumerate(layers)}
        self._weights, self.elements = weights, elements
        self._largest = max(self._gradients.values(), key=lambda each: each.largest)

    def problem(self, layer: str, format: str) -> str | None:
        """Why the range of a format is too small for a layer; None if it is not."""
        region = LayerPrecision(REFERENCE, format).region
        largest = max(self._weights[layer], self._outputs[layer].largest)
        if overflow_rate(self._outputs[layer], region).low > 0 or largest > get_format(region).max:
            return f"numbers as large as {largest:.3g} overflow {region}"
        if not get_format(region).use.needs_scaling:
            return None
        scale = best_scale(self._largest, region)
        lost = underflow_rate(self._gradients[layer], region, scale).middle
        if lost > MAX_UNDERFLOW:
            return f"{lost:.0%} of the gradient at its output vanish in {region}, at the best loss scale ({scale:g})"
        return None


def _rounds(wanted: Mapping[str, Sequence[str]], elements: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Layers that are looked at in one run: as many as there is room for, one at least."""
    names, left = list[str](), max_bytes
    for name, formats in wanted.items():
        if not (formats and elements[name]):
            continue
        needed = elements[name] * (len(formats) + 1) * _BYTES_OF_ERROR  # and one for its border
        if names and needed > left:
            yield names
            names, left = [], max_bytes
        names.append(name)
        left -= needed
    if names:
        yield names


def _amax(tensors: Iterable[Tensor]) -> float:
    return max((float(each.detach().abs().max()) for each in tensors if each.numel()), default=0.0)


def _random_of(seed: int, device: torch.device) -> RandomState:
    """The random numbers that a seed begins; those of the process go on as if nothing had been asked."""
    before = RandomState(device)
    torch.manual_seed(seed)
    random = RandomState(device)
    before.restore()
    return random


def _checked(formats: Sequence[str]) -> list[str]:
    known = compute_formats()
    for format in formats:
        if format not in known:
            get_format(format)  # which names what was probably meant
            raise PlanError(f"layers do not compute in {format!r}; the formats to choose from are {', '.join(known)}.")
    return [format for format in dict.fromkeys(formats) if format != REFERENCE]


def _pinned(module: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """The layers that patterns name, with all below them."""
    low = next(each for each in compute_formats() if each != REFERENCE and is_wider(REFERENCE, each))
    pinned = PrecisionPolicy(low, [Rule(pattern, compute=REFERENCE) for pattern in patterns]).resolve(module)
    return frozenset(name for name, layer in pinned.items() if patterns and layer.compute == REFERENCE)
