"""Sensitivities: what each offered format does to the loss, variable by variable, as it was measured.

A variable is a set of layers that move together. What its computing in a format adds to the squared loss gap adds up
over variables, which makes the choice of formats a problem that can be solved.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from lightning_mixprec.errors import PlanError
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.planning.cost import region_of
from lightning_mixprec.records.schema import Count, matches

_VERSION: Literal["1"] = "1"


@dataclass(frozen=True)
class Offer:
    """What one format does to one variable.

    Attributes:
        sensitivity: Its expected part of the squared loss gap, which adds up over variables; 0 for the reference.
        problem: Why the format cannot be used there; None if it can.
    """

    sensitivity: float
    problem: str | None = None


@dataclass(frozen=True)
class Border:
    """A layer and the one around it: what comes out of the one is rounded to bf16 where they are in other 16 bits.

    Attributes:
        inner: The layer.
        outer: The layer around it that is nearest.
        sensitivity: What rounding the layer's output to bf16 is expected to add to the squared loss gap.
    """

    inner: str
    outer: str
    sensitivity: float


class _Written(TypedDict):
    """The plain form."""

    version: Literal["1"]
    variables: list[list[str]]
    offers: list[dict[str, Offer]]
    reference: str
    batches: Count
    borders: NotRequired[list[Border]]


@dataclass(frozen=True)
class Sensitivities:
    """What was measured of a model on some batches.

    Attributes:
        variables: The layers that move together, in the model's order; each layer in exactly one.
        offers: By variable: its formats, and what each does.
        reference: The format that gaps are measured against.
        batches: How many batches were looked at.
        borders: Where fp16 and bf16 may meet.
    """

    variables: tuple[tuple[str, ...], ...]
    offers: tuple[Mapping[str, Offer], ...]
    reference: str
    batches: int
    borders: tuple[Border, ...] = ()

    @cached_property
    def variable_of(self) -> Mapping[str, int]:
        """By layer the place of its variable."""
        return {layer: place for place, layers in enumerate(self.variables) for layer in layers}

    def squared_gap(self, formats: Mapping[str, str]) -> float:
        """The predicted squared loss gap where layers compute in these formats; the others in the reference.

        Args:
            formats: Formats by layer; of a variable its first layer's counts.

        >>> both = Sensitivities((("a",), ("b", "c")), ({"bf16": Offer(1.0)}, {"bf16": Offer(2.0)}), "fp32", 1)
        >>> both.squared_gap({"a": "bf16", "b": "bf16", "c": "bf16"}), both.squared_gap({"a": "bf16", "b": "fp32"})
        (3.0, 1.0)
        """
        own = math.fsum(
            offers[format].sensitivity
            for layers, offers in zip(self.variables, self.offers, strict=True)
            if (format := formats.get(layers[0], self.reference)) in offers
        )
        return own + math.fsum(
            self.border_loss(each, *(formats.get(name, self.reference) for name in (each.inner, each.outer)))
            for each in self.borders
        )

    def border_loss(self, border: Border, inner: str, outer: str) -> float:
        """What a border adds to the squared loss gap: numbers in fp16 lose three bits in bf16.

        Where the inner layer computes in bf16, as much as its own computing there has not counted: a layer that only
        passes on counts nothing, and rounds what it is handed in fp16.

        Args:
            border: The border.
            inner: The format of the layer.
            outer: The format of the one around it.
        """
        regions = {region_of(inner), region_of(outer)}
        if len(regions) < 2 or not all(get_format(each).is_half for each in regions):
            return 0.0
        offer = self.offers[self.variable_of[border.inner]].get(inner)
        return max(border.sensitivity - (offer.sensitivity if offer is not None else 0.0), 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        offers = [
            {format: {"sensitivity": offer.sensitivity, "problem": offer.problem} for format, offer in each.items()}
            for each in self.offers
        ]
        variables = [list(layers) for layers in self.variables]
        return {
            "version": _VERSION,
            "variables": variables,
            "offers": offers,
            "reference": self.reference,
            "batches": self.batches,
            "borders": [asdict(each) for each in self.borders],
        }

    @classmethod
    def from_dict(cls, data: object) -> "Sensitivities":
        """Reads :meth:`to_dict`.

        Raises:
            PlanError: It is something else.
        """
        if not (isinstance(data, dict) and matches(data, _Written) and len(data["variables"]) == len(data["offers"])):
            raise PlanError("these are no sensitivities as a plan keeps them; measure them again with plan(...)")
        offers = tuple({format: Offer(**offer) for format, offer in each.items()} for each in data["offers"])
        variables = tuple(tuple(layers) for layers in data["variables"])
        borders = tuple(Border(**each) for each in data.get("borders", ()))
        return cls(variables, offers, data["reference"], data["batches"], borders)
