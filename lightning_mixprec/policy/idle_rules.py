"""The strict part of resolving: a rule that silently does nothing is an error that says what to do about it."""

from collections.abc import Iterable

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.layers import Inventory
from lightning_mixprec.policy.near_misses import near_layers, near_words
from lightning_mixprec.policy.resolving import Decision, matches_of
from lightning_mixprec.policy.rules import Rule

_MAX_NAMED = 3


def check(decision: Decision) -> None:
    """Check that every rule does something.

    Raises:
        PolicyError: a rule matches nothing, is meant for layers whose forward never runs, or decides nothing and wants
            something else than was decided.
    """
    active = active_rules(decision)
    for number, rule in enumerate(decision.policy.rules):
        if not decision.matched[number]:
            if not decision.policy.allow_unmatched:
                raise PolicyError(f"{name_rule(decision, number)} {_why_unmatched(decision, rule)}")
            continue
        _check_parts(decision, number)
        if number not in active:
            _check_idle(decision, number)


def active_rules(decision: Decision) -> set[int]:
    """The rules that decide something for a layer that it makes a difference to."""
    inventory = decision.inventory
    return {
        number
        for layer, number in enumerate(decision.decided_by)
        if number is not None and _concerned(decision.policy.rules[number], inventory, layer)
    }


def name_rule(decision: Decision, number: int) -> str:
    """A rule's file and line, position and selection, to begin an error with."""
    rule = decision.policy.rules[number]
    origin = f"{rule.origin}: " if rule.origin else ""
    return f"{origin}rule {number + 1} ({rule.label})"


def no_such_layer(decision: Decision, pattern: str) -> str:
    """The end of an error about a pattern that matches nothing: what was probably meant."""
    tree = decision.inventory.tree
    if near := near_layers(pattern, tree):
        return f"did you mean {_listed(near)}?"
    return f"the layers at the top are {_listed(tree.children[0], 8)}"


def _why_unmatched(decision: Decision, rule: Rule) -> str:
    inventory, classes = decision.inventory, decision.classes
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
    hint = _type_hint(decision, rule) or no_such_layer(decision, rule.patterns[0])
    return f"matches no layer of {root}; {hint} (allow_unmatched accepts it)"


def _type_hint(decision: Decision, rule: Rule) -> str:
    """What to write where ``layers`` has the name of a type."""
    for pattern in rule.patterns:
        last = pattern.rpartition(".")[2]
        if last.strip("*?") and "[" not in last and decision.classes.matching(last):
            return f"{last} is a type of layers, not a name; in a rule of the full form write types: {last!r}"
    return ""


def _check_parts(decision: Decision, number: int) -> None:
    """Refuse a pattern that is meant for the parts of an attention module, which take what the whole gets."""
    inventory, rule = decision.inventory, decision.policy.rules[number]
    if inventory.unit.keys().isdisjoint(decision.matched[number]):
        return
    for pattern in rule.patterns or (None,):
        found = matches_of(rule, inventory, decision.classes, pattern)
        if not found <= inventory.unit.keys():
            continue
        for layer in sorted(found):
            if _disagrees(decision, rule, layer):
                unit = inventory.names[inventory.unit[layer]][0]
                raise PolicyError(
                    f"{name_rule(decision, number)} is for {inventory.names[layer][0]}, whose forward never runs: "
                    f"MultiheadAttention uses its weights directly; write the rule for {unit}"
                )


def _check_idle(decision: Decision, number: int) -> None:
    inventory, rule = decision.inventory, decision.policy.rules[number]
    covered = _covered(decision, number)
    if not any(_concerned(rule, inventory, layer) for layer in covered):
        names = _listed(inventory.names[layer][0] or '""' for layer in sorted(decision.matched[number]))
        wanted = "recurse=True" if not rule.recurse else "a rule for layers below or beside it"
        raise PolicyError(
            f"{name_rule(decision, number)} does nothing: {names} has no forward and no weights of its own that the "
            f"rule speaks of; write {wanted}"
        )
    for layer in sorted(covered):
        if _disagrees(decision, rule, layer):
            name, entry = inventory.names[layer][0] or '""', decision.layers[layer]
            winners, way_out = _winners(decision, number)
            raise PolicyError(
                f"{name_rule(decision, number)} decides nothing: {name} is {entry} by {winners}; {way_out}"
            )


def _winners(decision: Decision, number: int) -> tuple[str, str]:
    """The rules that decide in a rule's place, and what to do about it."""
    ahead = {decision.decided_by[layer] for layer in decision.matched[number]} - {number}
    nearer = {decision.decided_by[layer] for layer in _covered(decision, number)} - {number}
    names = (
        "the default" if winner is None else f"rule {winner + 1} ({decision.policy.rules[winner].label})"
        for winner in sorted(ahead or nearer, key=lambda winner: -1 if winner is None else winner)
    )
    way_out = "move it before that, or remove it" if ahead else "rules for layers below it win, so remove it"
    return _listed(names), way_out


def _covered(decision: Decision, number: int) -> set[int]:
    covered = set(decision.matched[number])
    waiting = list(covered) if decision.policy.rules[number].recurse else []
    while waiting:
        for child in decision.inventory.children[waiting.pop()]:
            if child not in covered:
                covered.add(child)
                waiting.append(child)
    return covered


def _concerned(rule: Rule, inventory: Inventory, layer: int) -> bool:
    is_root = layer == 0
    speaks_of_forward = rule.compute is not None or (rule.output is not None and not is_root)
    stores = rule.param is not None and next(inventory.own_parameters(layer), None) is not None
    return stores or (speaks_of_forward and inventory.has_forward[layer])


def _disagrees(decision: Decision, rule: Rule, layer: int) -> bool:
    inventory, entry = decision.inventory, decision.layers[layer]
    if rule.param not in (None, entry.param) and next(inventory.own_parameters(layer), None) is not None:
        return True
    wanted = {"compute": rule.compute, "output": rule.output}
    return inventory.has_forward[layer] and any(
        format is not None and format != getattr(entry, name) for name, format in wanted.items()
    )


def _listed(words: Iterable[str], most: int = _MAX_NAMED) -> str:
    listed = list(words)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")
