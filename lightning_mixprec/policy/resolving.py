"""Resolving a policy against a model: which rule decides for which layer, and what the layer gets.

Layers are told apart as objects, not by name: a rule matches a layer if it matches any of its names. The rule that
matches the layer itself decides, the first in the list if there are several; else the one that matches the nearest
enclosing layer, over all the layers that hold it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.assignment import Assignment, LayerFacts, LayerPrecision, RuleTally
from lightning_mixprec.policy.layers import Inventory, count_parameters, stored_formats, take
from lightning_mixprec.policy.patterns import parse
from lightning_mixprec.policy.rules import Rule
from lightning_mixprec.policy.type_patterns import ClassIndex

if TYPE_CHECKING:
    from lightning_mixprec.policy.policy import PrecisionPolicy

_Sources = dict[int, int]
"""Rules that reach a layer from above, each with the enclosing layer it matches."""


class Decision(NamedTuple):
    """Who decided what: layers and rules by their numbers, None for the policy's default."""

    policy: "PrecisionPolicy"
    inventory: Inventory
    classes: ClassIndex
    matched: list[set[int]]
    decided_by: list[int | None]
    layers: list[LayerPrecision]


def decide(policy: "PrecisionPolicy", model: nn.Module) -> Decision:
    """Decide for every layer.

    Raises:
        PolicyError: a shared layer or a tied parameter would get two formats.
    """
    inventory = take(model)
    classes = ClassIndex(type(module) for module in inventory.modules)
    matched = _match(policy.rules, inventory, classes)
    first = _first_matches(policy.rules, matched)
    reach = _reach(policy.rules, matched, inventory)
    decided_by: list[int | None] = []
    for layer, sources in enumerate(reach):
        own = first.get(layer)
        decided_by.append(own if own is not None else min(sources, default=None))
    for part, unit in inventory.unit.items():
        decided_by[part] = decided_by[unit]
    stored = stored_formats(inventory, _ruled_parameters(policy.rules, inventory, decided_by))
    for layer, sources in enumerate(reach):
        if layer not in first and len(sources) > 1 and layer not in inventory.unit:
            _check_agreement(policy, inventory, layer, sources, stored[layer])
    kinds = {kind: _precision(policy, *kind) for kind in set(zip(decided_by, stored, strict=True))}
    layers = [kinds[kind] for kind in zip(decided_by, stored, strict=True)]
    return Decision(policy, inventory, classes, matched, decided_by, layers)


def assign(decision: Decision) -> Assignment:
    """The assignment that a decision makes, free of the model."""
    inventory = decision.inventory
    names = inventory.tree.names
    counts = count_parameters(inventory)
    facts = [
        LayerFacts(
            type(module).__name__,
            inventory.names[layer][0],
            *counts[layer],
            inventory.has_forward[layer],
            rule is not None and layer in decision.matched[rule],
        )
        for layer, (module, rule) in enumerate(zip(inventory.modules, decision.decided_by, strict=True))
    ]
    return Assignment(
        decision.policy,
        {name: decision.layers[layer] for name, layer in zip(names, inventory.layer_at, strict=True)},
        {name: facts[layer] for name, layer in zip(names, inventory.layer_at, strict=True)},
        tuple(_tallies(decision)),
    )


def matches_of(rule: Rule, inventory: Inventory, classes: ClassIndex, pattern: str | None = None) -> set[int]:
    """The layers that a rule matches, or one of its patterns together with its types."""
    patterns = rule.patterns if pattern is None else (pattern,)
    by_name = {inventory.layer_at[place] for text in patterns for place in inventory.tree.find(parse(text))}
    if not rule.type_patterns:
        return by_name
    wanted = set().union(*(classes.matching(text) for text in rule.type_patterns))
    layers = by_name if rule.patterns else range(len(inventory.modules))
    return {layer for layer in layers if type(inventory.modules[layer]) in wanted}


def _match(rules: Sequence[Rule], inventory: Inventory, classes: ClassIndex) -> list[set[int]]:
    return [matches_of(rule, inventory, classes) for rule in rules]


def _first_matches(rules: Sequence[Rule], matched: list[set[int]], recursive_only: bool = False) -> dict[int, int]:
    first: dict[int, int] = {}
    for number in reversed(range(len(rules))):
        if rules[number].recurse or not recursive_only:
            first.update(dict.fromkeys(matched[number], number))
    return first


def _reach(rules: Sequence[Rule], matched: list[set[int]], inventory: Inventory) -> list[_Sources]:
    heads = _first_matches(rules, matched, recursive_only=True)
    nothing: _Sources = {}
    reach = [nothing] * len(inventory.modules)
    frontier = {layer: {rule: layer} for layer, rule in heads.items()}
    reached = set(frontier)
    while frontier:
        further: dict[int, _Sources] = {}
        for layer, sources in frontier.items():
            reach[layer] = sources
            for child in inventory.children[layer]:
                if child not in reached:
                    further[child] = sources if child not in further else sources | further[child]
        reached.update(further)
        frontier = further
    return reach


def _ruled_parameters(rules: Sequence[Rule], inventory: Inventory, decided_by: list[int | None]) -> dict[int, str]:
    ruled: dict[int, str] = {}
    holder: dict[int, int] = {}
    for layer, number in enumerate(decided_by):
        if number is None or (param := rules[number].param) is None:
            continue
        for parameter in inventory.own_parameters(layer):
            if ruled.setdefault(id(parameter), param) != param:
                one, other = inventory.names[holder[id(parameter)]][0], inventory.names[layer][0]
                raise PolicyError(
                    f"{_origin(rules[number])}layers {one!r} and {other!r} share a weight, but rules store it as "
                    f"{ruled[id(parameter)]} and as {param}; give both layers the same param"
                )
            holder.setdefault(id(parameter), layer)
    return ruled


def _check_agreement(
    policy: "PrecisionPolicy", inventory: Inventory, layer: int, sources: _Sources, stored: str
) -> None:
    one, *others = sorted(sources)
    expected = _precision(policy, one, stored)
    for other in others:
        found = _precision(policy, other, stored)
        if found.formats != expected.formats:
            names = [_name_under(inventory, layer, sources[number]) for number in (one, other)]
            labels = [policy.rules[number].label for number in (one, other)]
            raise PolicyError(
                f"{_origin(policy.rules[other])}layer {names[0]!r} is also {names[1]!r}, and rule {labels[0]!r} makes "
                f"it {expected} while rule {labels[1]!r} makes it {found}; write a rule for {names[0]} itself"
            )


def _name_under(inventory: Inventory, layer: int, ancestor: int) -> str:
    above = tuple(f"{name}." for name in inventory.names[ancestor] if name)
    return next((name for name in inventory.names[layer] if name.startswith(above)), inventory.names[layer][0])


def _precision(policy: "PrecisionPolicy", number: int | None, stored: str) -> LayerPrecision:
    if number is None:
        return LayerPrecision(stored, policy.default, None, None)
    rule = policy.rules[number]
    return LayerPrecision(rule.param or stored, rule.compute or policy.default, rule.output, rule)


def _tallies(decision: Decision) -> list[RuleTally]:
    decided = Counter(decision.decided_by)
    return [
        RuleTally(
            len(matched),
            decided[number],
            dict(
                Counter(
                    None if layer in decision.inventory.unit else decision.decided_by[layer]
                    for layer in sorted(matched)
                    if decision.decided_by[layer] != number
                )
            ),
        )
        for number, matched in enumerate(decision.matched)
    ]


def _origin(rule: Rule) -> str:
    return f"{rule.origin}: " if rule.origin else ""
