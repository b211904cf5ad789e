"""Idle rules: one that silently does nothing is an error that says what to do about it."""

from collections.abc import Iterable, Sequence

from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.layers import Inventory, with_below
from lightning_mixprec.policy.matching import near_layers, near_words
from lightning_mixprec.policy.module_names import is_scripted
from lightning_mixprec.policy.resolving import Resolution, matches_of, resolve
from lightning_mixprec.policy.rules import Rule, is_of_products

_MAX_NAMED = 3


def check_rules(resolution: Resolution, allow_unmatched: bool) -> None:
    """Check that every rule does something.

    Raises:
        PolicyError: a rule matches nothing, is meant for layers whose forward never runs, or decides nothing and wants
            something else than was decided.
    """
    active = active_rules(resolution)
    for number, rule in enumerate(resolution.rules):
        if resolution.matched[number]:
            problem = _problem(resolution, number, active) or _narrow_problem(resolution, number)
        else:
            problem = None if allow_unmatched else _unmatched_problem(resolution, rule)
        if problem is not None:
            raise PolicyError(f"{rule.place}rule {number + 1} ({rule.label}) {problem}")


def covered_layers(patterns: Sequence[str], model: nn.Module, argument: str) -> set[str]:
    """The layers that patterns match, and those below them, for arguments that are not rules.

    Args:
        patterns: Patterns as in a rule's ``layers``.
        model: The model.
        argument: The argument's name for errors, such as ``"AdaptivePrecision(pin=...)"``.

    >>> sorted(covered_layers(["1"], nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU())), "an argument"))
    ['1', '1.0']

    Raises:
        PolicyError: A pattern is malformed or matches nothing.
    """
    covered: set[str] = set()
    for pattern in patterns:
        try:
            rule = Rule(pattern, compute="fp32")
        except PolicyError as error:
            raise PolicyError(f"{argument}: {error}") from None
        resolution = resolve("fp16", [rule], model)
        is_found, active = bool(resolution.matched[0]), active_rules(resolution)
        problem = _problem(resolution, 0, active) if is_found else _not_found(resolution, rule)
        if problem is not None:
            raise PolicyError(f"{argument}: ({rule.label}) {problem}")
        places = zip(resolution.inventory.tree.names, resolution.inventory.layer_at, strict=True)
        covered |= {name for name, layer in places if resolution.decided_by[layer] is not None}
    return covered


def active_rules(resolution: Resolution) -> set[int]:
    """The rules that decide for a layer to which it makes a difference."""
    inventory = resolution.inventory
    return {
        number
        for layer, number in enumerate(resolution.decided_by)
        if number is not None and _concerned(resolution.rules[number], inventory, layer)
    }


def no_such_layer(resolution: Resolution, pattern: str) -> str:
    """The end of an error about a pattern that matches nothing: the layers that were probably meant."""
    tree = resolution.inventory.tree
    if near := near_layers(pattern, tree):
        return f"did you mean {_listed(near)}?"
    return f"the layers at the top are {_listed(tree.children[0], 8)}"


def _unmatched_problem(resolution: Resolution, rule: Rule) -> str:
    inventory, classes = resolution.inventory, resolution.classes
    root = type(inventory.modules[0]).__name__
    for text in rule.type_patterns:
        if not any(classes.matching(other) for other in rule.type_patterns):
            near = near_words(text, classes.known)
            types = sorted({type(module).__name__ for module in inventory.modules})
            hint = f"did you mean {_listed(near)}?" if near else f"its types are {_listed(types, 8)}"
            return f"matches no layer of {root}: it has none of type {text}; {hint}"
    found = [place for text in rule.patterns for place in matches_of(Rule(text, compute="fp32"), inventory, classes)]
    if found:
        names = _listed(inventory.names[layer][0] or '""' for layer in found)
        return f"matches no layer of {root}: {names} has another type; one layer must match both layers and types"
    return f"{_not_found(resolution, rule)} (allow_unmatched accepts it)"


def _not_found(resolution: Resolution, rule: Rule) -> str:
    hint = _type_hint(resolution, rule) or no_such_layer(resolution, rule.patterns[0])
    return f"matches no layer of {type(resolution.inventory.modules[0]).__name__}; {hint}"


def _type_hint(resolution: Resolution, rule: Rule) -> str:
    """The advice where ``layers`` has the name of a type, else nothing."""
    for pattern in rule.patterns:
        last = pattern.rpartition(".")[2]
        if last.strip("*?") and "[" not in last and resolution.classes.matching(last):
            return f"{last} is a type of layers, not a name; in a rule of the full form write types: {last!r}"
    return ""


def _problem(resolution: Resolution, number: int, active: set[int]) -> str | None:
    """The error about a rule that matches layers and does nothing for them."""
    problem = _part_problem(resolution, number)
    return _idle_problem(resolution, number) if problem is None and number not in active else problem


def _narrow_problem(resolution: Resolution, number: int) -> str | None:
    """The error about a rule for 8-bit products that decides for no layer that has some."""
    rule, inventory = resolution.rules[number], resolution.inventory
    if not is_of_products(rule.compute):
        return None
    decided = [layer for layer, decider in enumerate(resolution.decided_by) if decider == number]
    if any(inventory.takes_narrow_products(layer) for layer in decided):
        return None
    known = [layer for layer in range(len(inventory.modules)) if inventory.takes_narrow_products(layer)]
    names = _listed([inventory.names[layer][0] or '""' for layer in known], 8)
    hint = f"the model's Linear layers are named {names}" if known else "the model has none, so leave the rule out"
    kinds = {type(inventory.modules[layer]).__name__ for layer in decided}
    return f"covers {_listed(sorted(kinds))}, and {rule.compute} is for products of nn.Linear alone; {hint}"


def _part_problem(resolution: Resolution, number: int) -> str | None:
    """The error about a pattern for mere parts of a layer, which take the formats of the whole."""
    inventory, rule = resolution.inventory, resolution.rules[number]
    if inventory.unit.keys().isdisjoint(resolution.matched[number]):
        return None
    for pattern in rule.patterns or (None,):
        found = matches_of(rule, inventory, resolution.classes, pattern)
        is_for_parts = found <= inventory.unit.keys()
        for layer in sorted(found & inventory.unit.keys()):
            scripted = is_scripted(inventory.modules[layer])
            if (is_for_parts or scripted) and _disagrees(resolution, rule, layer):
                name, unit = inventory.names[layer][0], inventory.names[inventory.unit[layer]][0] or '""'
                if scripted:
                    return (
                        f"is for {name}, which is TorchScript and computes in the format of the layer that calls it; "
                        f"write the rule for {unit}, or use the module it was made from"
                    )
                return (
                    f"is for {name}, whose forward never runs: MultiheadAttention uses its weights directly; write the "
                    f"rule for {unit}"
                )
    return None


def _idle_problem(resolution: Resolution, number: int) -> str | None:
    """The error about a rule that decides nothing, unless everything that it says is so anyway."""
    inventory, rule = resolution.inventory, resolution.rules[number]
    covered = _covered(resolution, number)
    if not any(_concerned(rule, inventory, layer) for layer in covered):
        names = _listed(inventory.names[layer][0] or '""' for layer in sorted(resolution.matched[number]))
        wanted = "recurse=True" if not rule.recurse else "a rule for layers below or beside it"
        return f"does nothing: {names} has no forward and no weights of its own that the rule speaks of; write {wanted}"
    for layer in sorted(covered):
        if _disagrees(resolution, rule, layer):
            name, entry = inventory.names[layer][0] or '""', resolution.layers[layer]
            winners, way_out = _winners(resolution, number)
            return f"decides nothing: {name} is {entry} by {winners}; {way_out}"
    return None


def _winners(resolution: Resolution, number: int) -> tuple[str, str]:
    """The rules that decide in a rule's place, and the way out."""
    ahead = {resolution.decided_by[layer] for layer in resolution.matched[number]} - {number}
    nearer = {resolution.decided_by[layer] for layer in _covered(resolution, number)} - {number}
    names = (
        "the default" if winner is None else f"rule {winner + 1} ({resolution.rules[winner].label})"
        for winner in sorted(ahead or nearer, key=lambda winner: -1 if winner is None else winner)
    )
    way_out = "move it before that, or remove it" if ahead else "rules for layers below it win, so remove it"
    return _listed(names), way_out


def _covered(resolution: Resolution, number: int) -> set[int]:
    matched = resolution.matched[number]
    return with_below(matched, resolution.inventory.children) if resolution.rules[number].recurse else matched


def _concerned(rule: Rule, inventory: Inventory, layer: int) -> bool:
    is_root = layer == 0
    speaks_of_forward = rule.compute is not None or (rule.output is not None and not is_root)
    stores = rule.param is not None and next(inventory.own_parameters(layer), None) is not None
    return stores or (speaks_of_forward and inventory.has_forward[layer])


def _disagrees(resolution: Resolution, rule: Rule, layer: int) -> bool:
    inventory, entry = resolution.inventory, resolution.layers[layer]
    if rule.param not in (None, entry.param) and next(inventory.own_parameters(layer), None) is not None:
        return True
    wanted = {"compute": rule.compute, "output": rule.output}
    return inventory.has_forward[layer] and any(
        format is not None and format != getattr(entry, name) for name, format in wanted.items()
    )


def _listed(words: Iterable[str], most: int = _MAX_NAMED) -> str:
    listed = list(words)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
