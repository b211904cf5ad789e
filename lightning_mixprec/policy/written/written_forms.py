"""The forms a policy can be written in: full (``default`` and ``rules``) and short (from pattern to format)."""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_mixprec.policy.rules import (
    RULE_KEYS,
    FieldError,
    Rule,
    check_format,
    check_keys,
    did_you_mean,
    parse_short_form,
)

POLICY_KEYS = ("default", "rules", "allow_unmatched")


class Parts(NamedTuple):
    """The parts of a policy, and the path in the mapping to each rule."""

    default: str
    rules: tuple[Rule, ...]
    allow_unmatched: bool
    paths: tuple[tuple[str | int, ...], ...]


def read_mapping(mapping: object) -> Parts:
    """Read a policy in either form.

    Raises:
        FieldError: it is malformed.

    >>> read_mapping({"default": "fp16", "model.head": "fp32"}).rules[0].compute
    'fp32'
    """
    if not isinstance(mapping, Mapping):
        raise FieldError(f"a policy is a mapping, got {type(mapping).__name__}; write default: bf16 and rules: [...]")
    for key in mapping:
        if not isinstance(key, str):
            raise FieldError(f'key {key!r} is no string; write it in quotes: "{key}"')
    if "default" not in mapping:
        misspelled = difflib.get_close_matches("default", mapping, n=1)
        hint = f"did you mean default instead of {misspelled[0]!r}?" if misspelled else "write default: bf16, say"
        raise FieldError(f"the policy has no default, the format that most layers compute in; {hint}", *misspelled)
    check_format("default", mapping["default"])
    return _read_full(mapping) if _is_full(mapping) else _read_short(mapping)


def read_rule(given: object) -> Rule:
    """Read one rule of the full form.

    Raises:
        FieldError: it is malformed.
    """
    if isinstance(given, Rule):
        return given
    if not isinstance(given, Mapping):
        raise FieldError(f"a rule is {given!r}; write a mapping such as {{layers: model.head, compute: fp32}}")
    check_keys(given, RULE_KEYS, "a rule")
    return Rule(**given)


def read_rules(given: object) -> tuple[Rule, ...]:
    """Read the list of rules of the full form.

    Raises:
        FieldError: it is malformed.
    """
    if not isinstance(given, list | tuple):
        raise FieldError(f"rules is {given!r}; write a list of rules", "rules")
    rules = []
    for place, entry in enumerate(given):
        try:
            rules.append(read_rule(entry))
        except FieldError as error:
            raise FieldError(str(error), "rules", place, *error.path) from None
    return tuple(rules)


def _is_full(mapping: Mapping[str, Any]) -> bool:
    return isinstance(mapping.get("rules", ""), list | tuple) or set(mapping) <= {"default", "allow_unmatched"}


def _read_full(mapping: Mapping[str, Any]) -> Parts:
    for key in mapping:
        if key not in POLICY_KEYS:
            near = did_you_mean(key, POLICY_KEYS)
            raise FieldError(
                f"unknown key {key!r} beside rules{near} a pattern goes into the list: {{layers: {key}, ...}}",
                key,
            )
    rules = read_rules(mapping.get("rules", ()))
    paths = tuple(("rules", place) for place in range(len(rules)))
    return Parts(mapping["default"], rules, check_flag(mapping.get("allow_unmatched", False)), paths)


def _read_short(mapping: Mapping[str, Any]) -> Parts:
    rules, paths = [], []
    for key, value in mapping.items():
        if key == "default":
            continue
        if not isinstance(value, str):
            _check_key(key, value)
        try:
            rules.append(Rule(layers=key, **parse_short_form(value)))
        except FieldError as error:
            raise FieldError(f"{key!r}: {error}" if error.path[:1] != ("layers",) else str(error), key) from None
        paths.append((key,))
    return Parts(mapping["default"], tuple(rules), False, tuple(paths))


def _check_key(key: str, value: object) -> None:
    """Refuse a key of the full form, or what is nearly one, in the short form."""
    if key == "rules":
        raise FieldError(f"rules is a {type(value).__name__}; write a list of rules, each beginning with a dash", key)
    full = "the full form is {default: bf16, rules: [...], allow_unmatched: false}"
    if key == "allow_unmatched":
        raise FieldError(f"allow_unmatched goes beside rules, not beside patterns; {full}", key)
    if (near := did_you_mean(key, POLICY_KEYS)) != ";":
        raise FieldError(f"{key} is {value!r}, which is no format{near} {full}", key)


def check_flag(given: object) -> bool:
    """Check ``allow_unmatched``.

    Raises:
        FieldError: it is neither true nor false.
    """
    if not isinstance(given, bool):
        raise FieldError(f"allow_unmatched is {given!r}; it must be true or false", "allow_unmatched")
    return given
