"""Costs: what each layer takes of time and memory in each format, and what follows for a whole assignment.

Costs of layers add up; where one layer hands its output to another that computes in a different format, a cast comes on
top.
"""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from lightning_mixprec.errors import PlanError
from lightning_mixprec.numerics.formats import REFERENCE, get_format
from lightning_mixprec.policy.assignment import LayerPrecision
from lightning_mixprec.records.schema import Named, matches

_VERSION: Literal["1"] = "1"


@dataclass(frozen=True)
class LayerCost:
    """What a layer's own operations take in one step, in one format.

    Attributes:
        seconds: Forward and backward.
        weight_bytes: Weights, gradients and the optimizer's moments of its own parameters, cast copies included.
        saved_bytes: Activations saved for backward.
        flops: Of its own matrix products, forward.
        gradient_bytes: The gradients of its own parameters, a part of ``weight_bytes``.
        passing_bytes: What it is handed and gives, which is there while it computes.
    """

    seconds: float
    weight_bytes: float
    saved_bytes: float
    flops: float
    gradient_bytes: float = 0.0
    passing_bytes: float = 0.0


@dataclass(frozen=True)
class Handover:
    """One layer's output that another one takes.

    Attributes:
        first: The one layer.
        second: The other.
        elements: How many elements are handed on in a step.
        kept: How many elements both keep for backward, in one memory where their formats agree.
    """

    first: str
    second: str
    elements: float
    kept: float = 0.0


@dataclass(frozen=True)
class Predicted(Named):
    """What is predicted of a step; its numbers are attributes and, as in a dict, by name.

    Attributes:
        loss_gap: The loss gap to the reference; None if that was not measured.
        seconds: The time of a step.
        memory_bytes: The memory of a step, at its peak; added up (``Costs.predicted``), with everything there at once.
        low_precision_share: The share of the matrix products' flops in at most 16 bits.
    """

    loss_gap: float | None
    seconds: float
    memory_bytes: float
    low_precision_share: float


class _Written(TypedDict):
    """The plain form."""

    version: Literal["1"]
    device: str
    layers: dict[str, dict[str, LayerCost]]
    handovers: list[Handover]
    fixed_seconds: float
    fixed_bytes: float
    seconds_per_cast_byte: float
    note: NotRequired[str]


@dataclass(frozen=True)
class Costs:
    """What was measured or traced of a model on a device.

    Attributes:
        device: The device.
        layers: By layer and format, the cost.
        handovers: Which layer hands its output to which.
        fixed_seconds: The time that does not depend on formats.
        fixed_bytes: The memory that does not depend on formats.
        seconds_per_cast_byte: The time that a cast takes for each byte it reads and writes.
        note: Where the numbers come from, if not from where they were asked for.
    """

    device: str
    layers: Mapping[str, Mapping[str, LayerCost]]
    handovers: tuple[Handover, ...]
    fixed_seconds: float
    fixed_bytes: float
    seconds_per_cast_byte: float
    note: str = ""

    def handover_cost(self, handover: Handover, first_format: str, second_format: str) -> Mapping[str, float]:
        """What a handover costs: ``time`` in seconds, ``memory`` in bytes; nothing where formats agree.

        A layer without products computes in a 16-bit format what comes in it, and in fp32 what comes in fp32, as
        autocast does; any other cast is made at the border, and what both keep is then kept twice.
        """
        first, second = region_of(first_format), region_of(second_format)
        if first == second:
            return {}
        taken = self.layers.get(handover.second, {})
        is_as_it_comes = {first, second_format} <= taken.keys() and _is_narrowed(first, second)
        if is_as_it_comes and self._follows(handover.second):
            more = taken[first].saved_bytes - taken[second_format].saved_bytes
            return {"time": 0.0, "memory": max(more, 0.0) if handover.elements else 0.0}
        return self._cast(handover, first, second)

    def predicted(self, formats: Mapping[str, str]) -> Predicted:
        """What a step takes where layers compute in these formats.

        Args:
            formats: The format of each layer.
        """
        casts = [self.handover_cost(each, formats[each.first], formats[each.second]) for each in self.handovers]
        costs = [by_format[formats[name]] for name, by_format in self.layers.items()]
        return Predicted(
            loss_gap=None,
            seconds=self._seconds(costs, casts),
            memory_bytes=self.fixed_bytes
            + sum(each.weight_bytes + each.saved_bytes for each in costs)
            + sum(cast.get("memory", 0.0) for cast in casts),
            low_precision_share=self._low_precision_share(formats),
        )

    def of_step(self, formats: Mapping[str, str]) -> Predicted:
        """What a step takes, with what is not a sum over layers and pairs of them.

        Layers without products compute in what they are handed, whatever hands it on in between; and memory is that of
        the peak: gradients come while what was saved goes.

        Args:
            formats: The format of each layer.
        """
        in_effect = self._in_effect(formats)
        costs = {name: by_format[in_effect[name]] for name, by_format in self.layers.items()}
        kept = dict.fromkeys(self.layers, 0.0)
        casts = []
        for handover in self.handovers:
            casts += (made := self._casts_of(handover, in_effect))
            kept[handover.second] += sum(cast.get("memory", 0.0) for cast in made)
        return Predicted(
            loss_gap=None,
            seconds=self._seconds(costs.values(), casts),
            memory_bytes=self.fixed_bytes + _peak(costs, kept, set(self._callers.values()), self.handovers),
            low_precision_share=self._low_precision_share(formats),
        )

    def _seconds(self, costs: Iterable[LayerCost], casts: Iterable[Mapping[str, float]]) -> float:
        in_layers = sum(each.seconds for each in costs)
        return self.fixed_seconds + in_layers + sum(cast.get("time", 0.0) for cast in casts)

    def _low_precision_share(self, formats: Mapping[str, str]) -> float:
        flops = {name: by_format[formats[name]].flops for name, by_format in self.layers.items()}
        low = sum(each for name, each in flops.items() if get_format(formats[name]).is_low_precision)
        return low / sum(flops.values()) if any(flops.values()) else 0.0

    def saved_bytes(self, formats: Mapping[str, str]) -> float:
        """The bytes that a step keeps for its backward where layers compute in these formats."""
        formats = self._in_effect(formats)
        own = sum(by_format[formats[name]].saved_bytes for name, by_format in self.layers.items())
        casts = (cast for each in self.handovers for cast in self._casts_of(each, formats))
        return own + sum(cast.get("memory", 0.0) for cast in casts)

    def _in_effect(self, formats: Mapping[str, str]) -> dict[str, str]:
        """The formats that layers compute in: in a wide one for a layer without products that is handed it."""
        found = {name: formats[name] for name in self.layers}
        follows = {name for name in found if self._follows(name)}
        changed = True
        while changed:
            changed = False
            for each in self.handovers:
                if each.elements and each.second in follows:
                    came = self._arriving(each, found)
                    if came in self.layers[each.second] and _is_narrowed(came, found[each.second]):
                        found[each.second], changed = came, True
        return found

    def _follows(self, name: str) -> bool:
        """True for a layer that computes in what it is given: one that calls no other, without products."""
        return bool(name) and name not in self._callers.values() and not self.layers[name][REFERENCE].flops

    @cached_property
    def _callers(self) -> dict[str, str]:
        """By layer the next one around it."""
        callers = {}
        for name in filter(None, self.layers):
            around = name.rpartition(".")[0]
            while around and around not in self.layers:
                around = around.rpartition(".")[0]
            if around in self.layers:
                callers[name] = around
        return callers

    def _arriving(self, handover: Handover, formats: Mapping[str, str]) -> str:
        """The format in which a layer is handed something: a wide layer that hands it on in between casts it."""
        first = formats[handover.first]
        between = self._path(handover.first, handover.second)
        return next((formats[name] for name in between if _is_narrowed(formats[name], first)), first)

    def _path(self, first: str, second: str) -> list[str]:
        """The layers around two, up to the innermost one that is around both."""
        above, around = self._around(first), self._around(second)
        common = next((name for name in around if name in above or name == first), None)
        if common is None or common == first:
            return around[: around.index(first)] if first in around else around
        return [*around[: around.index(common) + 1], *above[: above.index(common)]]

    def _around(self, name: str) -> list[str]:
        found = []
        while name in self._callers:
            name = self._callers[name]
            found.append(name)
        return found

    def _casts_of(self, handover: Handover, formats: Mapping[str, str]) -> list[Mapping[str, float]]:
        """What a handover costs between formats in effect: into a wide caller's, and out of it."""
        came, second = region_of(self._arriving(handover, formats)), formats[handover.second]
        into = self._cast(replace(handover, kept=0.0), region_of(formats[handover.first]), came)
        return [into, self._cast(handover, came, region_of(second))]

    def _cast(self, handover: Handover, first: str, second: str) -> Mapping[str, float]:
        if first == second:
            return {}
        widths = {region: get_format(region).bits / 8 for region in (first, second)}
        moved = 2 * handover.elements * (widths[first] + widths[second])  # there, and the gradient back
        return {"time": moved * self.seconds_per_cast_byte, "memory": handover.kept * widths[second]}

    def calibrated(self, reference_seconds: float) -> "Costs":
        """The same with all times scaled so that a step in fp32 takes what one was measured to take.

        Args:
            reference_seconds: The seconds of forward and backward in fp32, on this device.
        """
        predicted = self.predicted(dict.fromkeys(self.layers, REFERENCE)).seconds
        if not 0 < reference_seconds < math.inf:
            raise PlanError(f"a step was measured to take {reference_seconds} seconds; give a positive number")
        factor = reference_seconds / predicted if predicted else 1.0
        layers = {
            name: {format: replace(cost, seconds=cost.seconds * factor) for format, cost in by_format.items()}
            for name, by_format in self.layers.items()
        }
        fixed, cast = self.fixed_seconds * factor, self.seconds_per_cast_byte * factor
        return replace(self, layers=layers, fixed_seconds=fixed, seconds_per_cast_byte=cast)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        plain = asdict(self)
        plain["handovers"] = list(plain["handovers"])
        return {"version": _VERSION, **plain}

    @classmethod
    def from_dict(cls, data: object) -> "Costs":
        """Reads :meth:`to_dict`.

        Raises:
            PlanError: It is something else.
        """
        if not matches(data, _Written):
            raise PlanError("these are no costs as a plan keeps them; measure them again with plan(...)")
        assert isinstance(data, dict)
        layers = {
            name: {format: LayerCost(**cost) for format, cost in by_format.items()}
            for name, by_format in data["layers"].items()
        }
        handovers = tuple(Handover(**each) for each in data["handovers"])
        kept = {key: data[key] for key in ("device", "fixed_seconds", "fixed_bytes", "seconds_per_cast_byte")}
        return cls(layers=layers, handovers=handovers, note=data.get("note", ""), **kept)


def _peak(
    costs: Mapping[str, LayerCost],
    kept: Mapping[str, float],
    callers: Container[str],
    handovers: Iterable[Handover],
) -> float:
    """The most bytes there are at once in a step, of layers in the order in which they end.

    Backward is at each layer in turn: what it and those before it saved is still there, and so are the gradients of
    its weights and of those of layers after it; beside them, what passes through it. What a layer that calls others
    computes itself is backward where it hands something on, and where it ends; the gradients of what it saved for that
    are there as well.
    """
    own = {name: each.saved_bytes if name in callers else 0.0 for name, each in costs.items()}
    handed = dict.fromkeys(costs, 0.0)
    for each in handovers:
        handed[each.second] = max(handed[each.second], 2 * own[each.first] if each.elements else 0.0)
    gradients = sum(cost.gradient_bytes for cost in costs.values())
    weights = sum(cost.weight_bytes for cost in costs.values()) - gradients
    saved, most = 0.0, 0.0
    for name, cost in costs.items():
        before = saved
        saved += cost.saved_bytes + kept[name]
        most = max(most, saved + gradients + cost.passing_bytes + own[name], before + gradients + handed[name])
        gradients -= cost.gradient_bytes
    return weights + most


def _is_narrowed(first: str, second: str) -> bool:
    """True if numbers in the first format are to be in 16 bits in the second."""
    return get_format(region_of(second)).is_half and not get_format(region_of(first)).is_half


@cache
def region_of(format: str) -> str:
    """The format that a layer's numbers are in around its products."""
    return LayerPrecision(REFERENCE, format).region
