"""A promotion: the wider formats that a layer gets, beyond what the user's policy gives it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_mixprec.policy.rules import parse_short_form, short_form


@dataclass(frozen=True)
class Promotion:
    """The formats of a promoted layer.

    Attributes:
        compute: The format that its own operations compute in.
        output: The format that its output is handed on in, or ``"input"``; None for as computed.
    """

    compute: str
    output: str | None = None

    @property
    def said(self) -> dict[str, Any]:
        """The formats that are given, as an edit of a policy says them."""
        return {"compute": self.compute} | ({} if self.output is None else {"output": self.output})

    def to_text(self) -> str:
        """The short form of a policy, in which checkpoints keep it.

        >>> Promotion("bf16", "fp32").to_text(), Promotion("fp32").to_text()
        ('c=bf16,o=fp32', 'c=fp32')
        """
        return short_form(self.said)

    @classmethod
    def from_text(cls, text: str) -> "Promotion":
        """Reads :meth:`to_text`.

        Raises:
            PolicyError: It has no such form.
            TypeError: It says no compute format, or more than a promotion does.

        >>> Promotion.from_text("c=fp32,o=input")
        Promotion(compute='fp32', output='input')
        """
        return cls(**parse_short_form(text))


Promotions = Mapping[str, Promotion]
"""Promotions by layer."""


def written(promotions: Promotions) -> dict[str, str]:
    """Promotions as checkpoints keep them."""
    return {name: promotion.to_text() for name, promotion in promotions.items()}


def read(promotions: Mapping[str, str]) -> dict[str, Promotion]:
    """Reads what :func:`written` gave; raises as :meth:`Promotion.from_text`."""
    return {name: Promotion.from_text(text) for name, text in promotions.items()}
