"""Resolving a policy against a model: the rule that decides for each layer, and the formats that the layer gets.

Layers are told apart as objects, not by name: a rule matches a layer if it matches any of its names. The rule that
matches the layer itself decides, the first in the list if there are several; else the one that matches the nearest
enclosing layer, over all the layers that hold it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.numerics.formats import REFERENCE, get_format, is_wider
from lightning_mixprec.policy.assignment import Assignment, EightBits, LayerFacts, LayerPrecision, RuleTally
from lightning_mixprec.policy.layers import Inventory, count_parameters, stored_formats, take_inventory, wide_layers
from lightning_mixprec.policy.matching import ClassIndex
from lightning_mixprec.policy.patterns import parse
from lightning_mixprec.policy.rules import Rule

_AROUND = "bf16"
"""The format around products in 8 bits where nothing around them is in 16."""

_Sources = dict[int, int]
"""Rules that reach a layer from above, each with the enclosing layer it matches."""


class Resolution(NamedTuple):
    """The rule that decides for each layer; layers and rules by their numbers.

    Attributes:
        rules: The rules.
        inventory: The model's layers.
        classes: Their classes.
        matched: The layers that each rule matches.
        decided_by: The rule that decides for each layer; None for the policy's default.
        layers: The formats of each layer.
    """

    rules: Sequence[Rule]
    inventory: Inventory
    classes: ClassIndex
    matched: list[set[int]]
    decided_by: list[int | None]
    layers: list[LayerPrecision]


def resolve(default: str, rules: Sequence[Rule], model: nn.Module) -> Resolution:
    """Decide for every layer, by rules or else by the policy's default.

    Raises:
        PolicyError: a shared layer or a tied parameter would get two formats.
    """
    inventory = take_inventory(model)
    classes = ClassIndex(type(module) for module in inventory.modules)
    matched = [matches_of(rule, inventory, classes) for rule in rules]
    first = _first_matches(rules, matched)
    reach = _reach(rules, matched, inventory)
    decided_by: list[int | None] = []
    for layer, sources in enumerate(reach):
        own = first.get(layer)
        decided_by.append(own if own is not None else min(sources, default=None))
    for part, unit in inventory.unit.items():
        decided_by[part] = decided_by[unit]
    ruled = _ruled_parameters(rules, inventory, decided_by)
    stored, wide = stored_formats(inventory, ruled), wide_layers(inventory, ruled)
    for layer, sources in enumerate(reach):
        if layer not in first and len(sources) > 1 and layer not in inventory.unit:
            found = {n: _precision(rules[n], default, stored[layer], wide[layer]) for n in sorted(sources)}
            _check_agreement(rules, found, inventory, layer, sources)
    kinds = list(zip(decided_by, stored, wide, strict=True))
    made = {kind: _precision(None if kind[0] is None else rules[kind[0]], default, *kind[1:]) for kind in set(kinds)}
    layers = _with_surroundings([made[kind] for kind in kinds], inventory)
    return Resolution(rules, inventory, classes, matched, decided_by, layers)


def assignment_of(resolution: Resolution) -> Assignment:
    """The assignment that a resolution makes, free of the model."""
    inventory = resolution.inventory
    names = inventory.tree.names
    counts = count_parameters(inventory)
    facts = [
        LayerFacts(
            type(module).__name__,
            inventory.names[layer][0],
            *counts[layer],
            inventory.has_forward[layer],
            rule is not None and layer in resolution.matched[rule],
        )
        for layer, (module, rule) in enumerate(zip(inventory.modules, resolution.decided_by, strict=True))
    ]
    return Assignment(
        {name: resolution.layers[layer] for name, layer in zip(names, inventory.layer_at, strict=True)},
        {name: facts[layer] for name, layer in zip(names, inventory.layer_at, strict=True)},
        tuple(_tallies(resolution)),
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
                    f"{rules[number].place}layers {one!r} and {other!r} share a weight, but rules store it as "
                    f"{ruled[id(parameter)]} and as {param}; give both layers the same param"
                )
            holder.setdefault(id(parameter), layer)
    return ruled


def _check_agreement(
    rules: Sequence[Rule], found: Mapping[int, LayerPrecision], inventory: Inventory, layer: int, sources: _Sources
) -> None:
    """Check that all rules which reach a shared layer give it the same formats."""
    one, *others = found
    for other in others:
        if found[other].formats != found[one].formats:
            names = [_name_under(inventory, layer, sources[number]) for number in (one, other)]
            labels = [rules[number].label for number in (one, other)]
            raise PolicyError(
                f"{rules[other].place}layer {names[0]!r} is also {names[1]!r}, and rule {labels[0]!r} makes it "
                f"{found[one]} while rule {labels[1]!r} makes it {found[other]}; write a rule for {names[0]} itself"
            )


def _name_under(inventory: Inventory, layer: int, ancestor: int) -> str:
    above = tuple(f"{name}." for name in inventory.names[ancestor] if name)
    return next((name for name in inventory.names[layer] if name.startswith(above)), inventory.names[layer][0])


def _precision(rule: Rule | None, default: str, stored: str, is_wide: bool) -> LayerPrecision:
    if rule is not None and (rule.param or rule.compute):
        return LayerPrecision(rule.param or stored, rule.compute or default, rule.output, rule)
    compute, output = stored if is_wide else default, None if rule is None else rule.output
    return LayerPrecision(stored, compute, output, rule, leaves_wide=not is_wider(default, REFERENCE))


def _with_surroundings(layers: list[LayerPrecision], inventory: Inventory) -> list[LayerPrecision]:
    """The layers with what 8 bits mean for each: a Linear has them for its products, others the format around them.

    That is the nearest 16-bit format of the layers that hold it, by its first name, unless a wider one is nearer.
    """
    if not any(layer.has_narrow_products for layer in layers):
        return layers
    around: dict[int, str] = {}
    holder = {child: layer for layer in reversed(range(len(layers))) for child in inventory.children[layer]}
    found = list(layers)
    for number, layer in enumerate(layers):
        inherited = around.get(holder.get(number, -1), _AROUND)
        if not layer.has_narrow_products:
            around[number] = layer.compute if get_format(layer.compute).is_half else _AROUND
            continue
        around[number] = inherited
        if not inventory.takes_narrow_products(number):
            found[number] = replace(layer, compute=inherited)
            continue
        usual, rule = EightBits.usual(layer.compute, inherited), layer.rule
        scaling = (rule.scaling if rule is not None else None) or usual.scaling
        gradients = (rule.gradients if rule is not None else None) or usual.gradients
        found[number] = replace(layer, eight_bits=EightBits(inherited, scaling, gradients))
    return found


def _tallies(resolution: Resolution) -> Iterator[RuleTally]:
    decided_by, unit = resolution.decided_by, resolution.inventory.unit
    decided = Counter(decided_by)
    for number, (rule, matched) in enumerate(zip(resolution.rules, resolution.matched, strict=True)):
        lost = [layer for layer in sorted(matched) if decided_by[layer] != number]
        winners = Counter(None if layer in unit else decided_by[layer] for layer in lost)
        yield RuleTally(rule, len(matched), decided[number], dict(winners))
