"""Sensitivities: what each offered format does to the loss, variable by variable, as it was measured.

A variable is a set of layers that move together. What its computing in a format adds to the squared loss gap adds up
over variables, which makes the choice of formats a problem that can be solved.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from typing_extensions import TypedDict

from lightning_mixprec.errors import PlanError
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


class _Written(TypedDict):
    """The plain form."""

    version: Literal["1"]
    variables: list[list[str]]
    offers: list[dict[str, Offer]]
    reference: str
    batches: Count


@dataclass(frozen=True)
class Sensitivities:
    """What was measured of a model on some batches.

    Attributes:
        variables: The layers that move together, in the model's order; each layer in exactly one.
        offers: By variable: its formats, and what each does.
        reference: The format that gaps are measured against.
        batches: How many batches were looked at.
    """

    variables: tuple[tuple[str, ...], ...]
    offers: tuple[Mapping[str, Offer], ...]
    reference: str
    batches: int

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
        return math.fsum(
            offers[format].sensitivity
            for layers, offers in zip(self.variables, self.offers, strict=True)
            if (format := formats.get(layers[0], self.reference)) in offers
        )

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
        return cls(variables, offers, data["reference"], data["batches"])
