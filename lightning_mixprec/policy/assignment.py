"""What a policy came to on one model: every layer's formats, and the rule that decided them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_mixprec.policy.rules import Rule
from lightning_mixprec.policy.table import render

if TYPE_CHECKING:
    from lightning_mixprec.policy.policy import PrecisionPolicy


@dataclass(frozen=True)
class LayerPrecision:
    """The formats of one layer's own operations.

    ``param`` is the format its weights are stored in, ``compute`` the one its own operations are autocast to,
    ``output`` the one its output is handed on in: a format, ``"input"``, or None for as computed. ``rule`` decided;
    None is the policy's default.
    """

    param: str
    compute: str
    output: str | None
    rule: Rule | None

    @property
    def formats(self) -> tuple[str, str, str | None]:
        """Param, compute and output."""
        return self.param, self.compute, self.output

    @property
    def is_stored_by_rule(self) -> bool:
        """Whether a rule says how the weights are stored; otherwise they stay as the model has them."""
        return self.rule is not None and self.rule.param is not None

    def __str__(self) -> str:
        """The triple with slashes; ``-`` is as computed."""
        return f"{self.param}/{self.compute}/{self.output or '-'}"


@dataclass(frozen=True)
class LayerFacts:
    """What is worth knowing about a layer without having it.

    ``parameters`` counts its own parameters, each of the model's parameters once, at the first layer that has it;
    None if they are not initialised yet. ``is_tied`` says that it has parameters that were counted elsewhere,
    ``first_name`` is the layer's first name, ``has_forward`` whether it has operations of its own, ``is_matched``
    whether the rule that decided matches the layer itself and not one around it.
    """

    type_name: str
    first_name: str
    parameters: int | None
    is_tied: bool
    has_forward: bool
    is_matched: bool


@dataclass(frozen=True)
class RuleTally:
    """How a rule fared: layers matched, layers decided, and matches lost to other rules (position to how many).

    A match is lost to an earlier rule for the same layer; the key None stands for an attention module that decides for
    its parts.
    """

    matched: int
    decided: int
    lost: Mapping[int | None, int]


class Assignment(Mapping[str, LayerPrecision]):
    """Every layer's name, aliases included, and what it gets. Keeps no hold on the model; printing it shows a table.

    Attributes:
        policy: The policy it came from.
        facts: What the layers are, by the same names.
        tallies: How each rule of the policy fared, in its order.
    """

    def __init__(
        self,
        policy: "PrecisionPolicy",
        layers: Mapping[str, LayerPrecision],
        facts: Mapping[str, LayerFacts],
        tallies: tuple[RuleTally, ...],
    ) -> None:
        self.policy = policy
        self.facts = facts
        self.tallies = tallies
        self._layers = layers

    def __getitem__(self, name: str) -> LayerPrecision:
        """What the layer of that name gets."""
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        """The names, parents first."""
        return iter(self._layers)

    def __len__(self) -> int:
        """The number of names."""
        return len(self._layers)

    def hands_on(self, name: str) -> str | None:
        """In what a layer hands its output on. A rule says this of the layers it matches, not of those inside them."""
        return self._layers[name].output if self.facts[name].is_matched else None

    @property
    def compute_formats(self) -> frozenset[str]:
        """The formats that some layer with operations of its own computes in."""
        return frozenset(layer.compute for name, layer in self.items() if self.facts[name].has_forward)

    @property
    def is_uniform(self) -> bool:
        """Whether all layers compute in one format and none hands on in another."""
        return len(self.compute_formats) <= 1 and all(layer.output is None for layer in self.values())

    def changes_to(self, other: "Assignment") -> dict[str, tuple[LayerPrecision, LayerPrecision]]:
        """The layers, each under its first name, whose formats differ in another assignment of the same model."""
        return {
            name: (layer, other[name])
            for name, layer in self.items()
            if self.facts[name].first_name == name and name in other and layer.formats != other[name].formats
        }

    def __str__(self) -> str:
        """The table."""
        return render(self)

    def __repr__(self) -> str:
        """Short, because pytest and debuggers print it."""
        formats = ", ".join(sorted(self.compute_formats))
        return f"<Assignment of {len(self)} layers, computing in {formats}>"
