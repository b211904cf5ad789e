"""The assignment that a policy gives on one model: every layer's formats, and the rule that decided them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lightning_mixprec.numerics.formats import REFERENCE, get_format, is_wider
from lightning_mixprec.policy.rules import Rule, is_of_products
from lightning_mixprec.policy.table import Table, shortened
from lightning_mixprec.policy.table_folding import Row

_MAX_LABEL_WIDTH = 80


@dataclass(frozen=True)
class EightBits:
    """The manner in which a layer computes whose products are in fp8 or int8.

    Attributes:
        around: The 16-bit format of what the products take and give, and of the layer's other operations.
        scaling: What one scale is of: ``"tensor"`` or ``"row"``.
        gradients: Which gradients are products in 8 bits as well: ``"all"``, ``"input"`` or ``"none"``.
    """

    around: str = "bf16"
    scaling: str = "tensor"
    gradients: str = "all"

    @classmethod
    def usual(cls, format: str, around: str = "bf16") -> "EightBits":
        """The manner of a format of products where no rule says another.

        >>> EightBits.usual("int8")
        EightBits(around='bf16', scaling='row', gradients='none')
        """
        found = get_format(format)
        gradients = {"all": "all", "forward": "none"}[found.use.products]
        return cls(around, "row" if found.is_integer else "tensor", gradients)


@dataclass(frozen=True)
class LayerPrecision:
    """The formats of one layer's own operations.

    Attributes:
        param: The format that its weights are stored in.
        compute: The format that its own operations are autocast to; fp64, if its weights are and no rule says another.
            Or that of its products: fp8 or int8.
        output: The format that its output is handed on in, or ``"input"``; None for as computed.
        rule: The rule that decided; None for the policy's default.
        leaves_wide: Whether what the model has in fp64 is left alone, as by autocast: no rule says how the layer
            computes or is stored, and the default is not fp64.
        eight_bits: How its products compute if that is fp8 or int8.
    """

    param: str
    compute: str
    output: str | None = None
    rule: Rule | None = None
    leaves_wide: bool = False
    eight_bits: EightBits = EightBits()

    @property
    def region(self) -> str:
        """The format of all its operations, but for products in 8 bits: 16 bits or wider.

        >>> LayerPrecision("fp32", "fp8").region, LayerPrecision("fp32", "fp16").region
        ('bf16', 'fp16')
        """
        return self.eight_bits.around if self.has_narrow_products else self.compute

    @property
    def has_narrow_products(self) -> bool:
        """True if its products, and they alone, compute in 8 bits."""
        return is_of_products(self.compute)

    @property
    def formats(self) -> tuple[str, str, str | None]:
        """Param, compute and output."""
        return self.param, self.compute, self.output

    def computes_as(self, other: "LayerPrecision") -> bool:
        """True if formats, and the manner of products, are another's."""
        return (self.formats, self.eight_bits) == (other.formats, other.eight_bits)

    @property
    def is_stored_by_rule(self) -> bool:
        """True if a rule says how the weights are stored; otherwise they stay as the model has them."""
        return self.rule is not None and self.rule.param is not None

    @property
    def stays_wide(self) -> bool:
        """True if it computes in fp64 because its weights are, and not because the policy says so."""
        return self.leaves_wide and is_wider(self.compute, REFERENCE)

    def __str__(self) -> str:
        """The triple with slashes; ``-`` is as computed."""
        return f"{self.param}/{self.compute}/{self.output or '-'}"


@dataclass(frozen=True)
class LayerFacts:
    """Facts about a layer that are known without having it.

    Attributes:
        type_name: The name of its class.
        first_name: The first of its names.
        parameters: The number of its own parameters, each of the model's counted once, at the first layer that has it;
            None if they are not initialised yet.
        is_tied: Whether it has parameters that were counted elsewhere.
        has_forward: Whether it has operations of its own.
        is_matched: Whether the rule that decided matches the layer itself and not one around it.
    """

    type_name: str
    first_name: str
    parameters: int | None
    is_tied: bool
    has_forward: bool
    is_matched: bool


@dataclass(frozen=True)
class RuleTally:
    """The tally of a rule.

    Attributes:
        rule: The rule.
        matched: The number of layers matched.
        decided: The number of layers decided.
        lost: The numbers of matches lost to earlier rules for the same layer, by their position, and, under None, to
            attention modules, which decide for their parts.
    """

    rule: Rule
    matched: int
    decided: int
    lost: Mapping[int | None, int]

    def __str__(self) -> str:
        """The rule and its tally, in a line."""
        numbers = f"matched {self.matched}, decided {self.decided}" if self.matched else "matched nothing"
        winners = [
            f"{count} to {'attention modules' if winner is None else f'rule {winner + 1}'}"
            for winner, count in self.lost.items()
        ]
        numbers += f", lost {', '.join(winners)}" if winners else ""
        return f"{shortened(self.rule.label, _MAX_LABEL_WIDTH)} -> {self.rule.value}: {numbers}"


class Assignment(Mapping[str, LayerPrecision]):
    """The formats of every layer by its name, aliases included. Keeps no hold on the model; printing it shows a table.

    Attributes:
        facts: Facts about the layers, by the same names.
        tallies: The tally of each rule of the policy, in its order.

    >>> from torch import nn
    >>> from lightning_mixprec.policy.policy import as_policy
    >>> policy = as_policy({"default": "bf16", "1": "c=fp32,o=input"})
    >>> print(policy.resolve(nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9))))
    layer  type        parameters  param/compute/output  rule
    ""     Sequential           -  fp32/bf16/-           default
    0      Linear              90  fp32/bf16/-           default
    1      LayerNorm           18  fp32/fp32/input       1
    rule 1: 1 -> c=fp32,o=input: matched 1, decided 1
    """

    def __init__(
        self,
        layers: Mapping[str, LayerPrecision],
        facts: Mapping[str, LayerFacts],
        tallies: tuple[RuleTally, ...],
    ) -> None:
        self.facts = facts
        self.tallies = tallies
        self._layers = layers

    def __getitem__(self, name: str) -> LayerPrecision:
        """The formats of the layer of that name."""
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        """The names, parents first."""
        return iter(self._layers)

    def __len__(self) -> int:
        """The number of names."""
        return len(self._layers)

    def hands_on(self, name: str) -> str | None:
        """The format in which a layer hands its output on; rules say it of layers they match, not of those inside."""
        return self._layers[name].output if self.facts[name].is_matched else None

    @property
    def compute_formats(self) -> frozenset[str]:
        """The formats that some layer with operations of its own computes in, itself or around its products."""
        own = [layer for name, layer in self.items() if self.facts[name].has_forward]
        return frozenset(format for layer in own for format in (layer.compute, layer.region))

    def changes_to(self, other: "Assignment") -> dict[str, tuple[LayerPrecision, LayerPrecision]]:
        """The layers, each under its first name, whose formats differ in another assignment of the same model."""
        return {
            name: (layer, other[name])
            for name, layer in self.items()
            if self.facts[name].first_name == name and name in other and not layer.computes_as(other[name])
        }

    @property
    def table(self) -> Table:
        """The table; what is inside a shared layer stands in it once."""
        rows = []
        for name, layer in self.items():
            facts, above = self.facts[name], name.rpartition(".")[0]
            if self.facts[above].first_name == above:
                is_alias = facts.first_name != name
                row = Row(
                    name=name,
                    type_name=f"= {facts.first_name}" if is_alias else facts.type_name,
                    parameters=0 if is_alias else facts.parameters,
                    is_tied=facts.is_tied and not is_alias,
                    formats=str(replace(layer, output=self.hands_on(name))),
                    rule="default" if layer.rule is None else layer.rule.label,
                )
                rows.append(row)
        return Table(rows, [f"rule {number}: {tally}" for number, tally in enumerate(self.tallies, start=1)])

    def __str__(self) -> str:
        """The table as plain text."""
        return self.table.render()

    def __repr__(self) -> str:
        """Short, because pytest and debuggers print it."""
        formats = ", ".join(sorted(self.compute_formats))
        return f"<Assignment of {len(self)} layers, computing in {formats}>"
