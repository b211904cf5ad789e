"""Costs: what each layer takes of time and memory in each format, and what follows for a whole assignment.

Costs of layers add up; where one layer hands its output to another that computes in a different format, a cast comes on
top.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from typing_extensions import TypedDict

from lightning_mixprec.errors import PlanError
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.records.schema import matches

_VERSION: Literal["1"] = "1"


@dataclass(frozen=True)
class LayerCost:
    """What a layer's own operations take in one step, in one format.

    Attributes:
        seconds: Forward and backward.
        weight_bytes: Weights, gradients and the optimizer's moments of its own parameters, cast copies included.
        saved_bytes: Activations saved for backward.
        flops: Of its own matrix products, forward.
    """

    seconds: float
    weight_bytes: float
    saved_bytes: float
    flops: float


@dataclass(frozen=True)
class Handover:
    """One layer's output that another one takes.

    Attributes:
        first: The one layer.
        second: The other.
        elements: How many elements are handed on in a step.
    """

    first: str
    second: str
    elements: float


@dataclass(frozen=True)
class Predicted:
    """What is predicted of a step.

    Attributes:
        loss_gap: The loss gap to the reference; None if that was not measured.
        seconds: The time of a step.
        memory_bytes: The memory of a step.
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
    """

    device: str
    layers: Mapping[str, Mapping[str, LayerCost]]
    handovers: tuple[Handover, ...]
    fixed_seconds: float
    fixed_bytes: float
    seconds_per_cast_byte: float

    def handover_cost(self, handover: Handover, first_format: str, second_format: str) -> Mapping[str, float]:
        """What a handover costs: ``time`` in seconds, ``memory`` in bytes; nothing where formats agree."""
        if first_format == second_format:
            return {}
        width = {format: get_format(format).bits / 8 for format in (first_format, second_format)}
        moved = 2 * handover.elements * (width[first_format] + width[second_format])  # there, and the gradient back
        return {"time": moved * self.seconds_per_cast_byte, "memory": handover.elements * width[second_format]}

    def predicted(self, formats: Mapping[str, str]) -> Predicted:
        """What a step takes where layers compute in these formats.

        Args:
            formats: The format of each layer.
        """
        costs = {name: by_format[formats[name]] for name, by_format in self.layers.items()}
        casts = [
            self.handover_cost(each, formats[each.first], formats[each.second])
            for each in self.handovers
            if each.first in formats and each.second in formats
        ]
        flops = sum(each.flops for each in costs.values())
        low = sum(each.flops for name, each in costs.items() if get_format(formats[name]).is_low_precision)
        return Predicted(
            loss_gap=None,
            seconds=self.fixed_seconds
            + sum(each.seconds for each in costs.values())
            + sum(cast.get("time", 0.0) for cast in casts),
            memory_bytes=self.fixed_bytes
            + sum(each.weight_bytes + each.saved_bytes for each in costs.values())
            + sum(cast.get("memory", 0.0) for cast in casts),
            low_precision_share=low / flops if flops else 0.0,
        )

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
        return cls(layers=layers, handovers=handovers, **kept)
