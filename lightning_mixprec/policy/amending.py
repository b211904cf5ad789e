"""Amending a policy while it is in force: new rules go in front, old ones with nothing left to decide go."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.idle_rules import active_rules, check_rules, no_such_layer
from lightning_mixprec.policy.resolving import Resolution, matches_of, resolve
from lightning_mixprec.policy.rules import (
    FieldError,
    Rule,
    check_format,
    did_you_mean,
    parse_short_form,
)

_EDIT_KEYS = ("compute", "output", "recurse", "scaling", "gradients")


def amended_rules(
    default: str, rules: Sequence[Rule], edits: Mapping[str, Any], model: nn.Module, allow_unmatched: bool
) -> list[Rule]:
    """The rules of a policy after edits; see :meth:`PrecisionPolicy.amend`."""
    if not isinstance(edits, Mapping):
        raise PolicyError(f"edits are {edits!r}; write a mapping from pattern to format: {{'model.head': 'fp32'}}")
    before = resolve(default, rules, model)
    new = [read_edit(pattern, value, rules) for pattern, value in edits.items()]
    for rule in new:
        if not matches_of(rule, before.inventory, before.classes):
            pattern = rule.patterns[0]
            raise PolicyError(f"edit {pattern!r} matches no layer; {no_such_layer(before, pattern)}")
    successors = {(_single_pattern(rule), rule.recurse) for rule in new}
    kept = [rule for rule in rules if (_single_pattern(rule), rule.recurse) not in successors]
    after = resolve(default, [*new, *kept], model)
    new = [_storing_as_before(before, after, number) for number in range(len(new))]
    active = active_rules(after)
    kept = [rule for number, rule in enumerate(kept, start=len(new)) if number in active or not after.matched[number]]
    check_rules(resolve(default, [*new, *kept], model), allow_unmatched)
    return [*new, *kept]


def read_edit(pattern: str, value: object, rules: Sequence[Rule] = ()) -> Rule:
    """The rule that an edit stands for.

    Args:
        pattern: The pattern.
        value: The edit: a compute format, ``"c=fp32,o=input"``, or a mapping with compute, output and recurse, and
            with scaling and gradients for fp8 and int8.
        rules: The rules of the policy, one of which may say what the edit does not say.

    Raises:
        PolicyError: the edit is malformed, or is about param.
    """
    try:
        said = _said(value)
        lender = _lender(rules, pattern, said.get("recurse"))
        if lender is not None and said.get("compute") not in (None, lender.compute):
            said = {"scaling": None, "gradients": None} | said  # which the lender says of another format
        return Rule(pattern, **said) if lender is None else replace(lender, **said)
    except FieldError as error:
        raise PolicyError(f"edit {pattern!r}: {error}") from None


def _lender(rules: Sequence[Rule], pattern: str, recurse: bool | None) -> Rule | None:
    """The rule of that very pattern, which lends what the edit does not say.

    There may be two, for the layer itself and for what is below; an edit that does not say which is for both.
    """
    rules = [rule for rule in rules if _single_pattern(rule) == pattern]
    wanted = recurse is not False
    lender = next((rule for rule in rules if rule.recurse == wanted), rules[0] if rules else None)
    if lender is None or recurse in (None, lender.recurse):
        return lender
    return replace(lender, param=None, recurse=wanted) if lender.said.keys() != {"param"} else None


def _said(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        said: dict[str, Any] = dict(parse_short_form(value))
    else:
        for key in value:
            if key not in ("param", *_EDIT_KEYS):
                near = did_you_mean(str(key), _EDIT_KEYS)
                raise FieldError(f"unknown key {key!r}{near} an edit takes compute, output and recurse")
        said = dict(value)
        for key, format in said.items():
            if key in ("param", "compute", "output"):
                check_format(key, format)
    if "param" in said:
        raise FieldError("param cannot change during a run; an edit takes compute and output")
    if said.keys() <= {"recurse"}:
        raise FieldError("an edit must say at least one of compute and output")
    return said


def _single_pattern(rule: Rule) -> str | None:
    return rule.patterns[0] if len(rule.patterns) == 1 and not rule.type_patterns else None


def _storing_as_before(before: Resolution, after: Resolution, number: int) -> Rule:
    """The new rule with the param of the rules it takes over from: an edit leaves weights as they are stored."""
    rule = after.rules[number]
    taken = [
        layer
        for layer, decider in enumerate(after.decided_by)
        if decider == number and next(after.inventory.own_parameters(layer), None) is not None
    ]
    params = {None if (old := before.decided_by[layer]) is None else before.rules[old].param for layer in taken}
    if len(params) > 1:
        stored = " and ".join(sorted(param or "unsaid" for param in params))
        raise PolicyError(
            f"edit {rule.patterns[0]!r} is for layers whose param differs by rule ({stored}), and an edit cannot "
            "change it; write one edit for each of them"
        )
    return replace(rule, param=params.pop()) if params else rule
