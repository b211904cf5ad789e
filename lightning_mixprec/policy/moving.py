"""A policy for another device: the formats that the device has no arithmetic for are replaced, each with the reason."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.devices import Support, named_device, native_support
from lightning_mixprec.numerics.formats import REFERENCE, get_format
from lightning_mixprec.numerics.ranges import Range
from lightning_mixprec.policy.matching import NameTree
from lightning_mixprec.policy.patterns import literal, parse
from lightning_mixprec.policy.rules import Rule, is_of_products
from lightning_mixprec.records.words import counted, quoted

SPARE_BITS = 1
"""Bits by which fp16 has to be wider than what was recorded, which is of sampled steps alone."""

Supports = Callable[[str], Support]


@dataclass(frozen=True)
class Replacement:
    """A format that a policy for another device has in the place of one that the device lacks.

    Attributes:
        where: ``"default"``, a rule's selection of layers, or the name of a layer that got a rule of its own.
        key: What of it: ``"default"``, ``"compute"`` or ``"output"``.
        old: The format until now.
        new: The one from now on.
        reason: Why, in one line.
    """

    where: str
    key: str
    old: str
    new: str
    reason: str

    def __str__(self) -> str:
        """One line.

        >>> str(Replacement("model.head", "compute", "bf16", "fp32", "a T4 has no bf16 arithmetic"))
        'model.head: compute bf16 -> fp32 (a T4 has no bf16 arithmetic)'
        """
        key = "" if self.key == "default" else f"{self.key} "
        return f"{self.where}: {key}{self.old} -> {self.new} ({self.reason})"


def supports_of(device: object) -> Supports:
    """What a device says of a format.

    Args:
        device: A device of the table (``"t4"``, ``"cpu"``), or a CUDA device of this machine (``"cuda:0"``).

    Raises:
        SupportError: There is no such device.
    """
    if isinstance(device, str) and device.partition(":")[0] == "cuda":
        present: Supports = lambda format: native_support(format, device)  # noqa: E731
        if not (support := present(REFERENCE)).native:
            raise SupportError(f"{device!r} is no device of this machine: {support.reason}; give a name such as 't4'")
        return present
    return named_device(device).support if isinstance(device, str) else named_device(repr(device)).support


def moved(
    default: str, rules: Sequence[Rule], supports: Supports, ranges: Mapping[str, Range]
) -> tuple[str, list[Rule], list[Replacement]]:
    """A policy's default and rules for a device, and what was replaced.

    8 bits give way to bf16, bf16 to fp16 where that holds what was recorded and to fp32 elsewhere, fp16 to bf16, and
    what has none of these to fp32. Weights stay stored as they are, which takes no arithmetic. A layer that fp16 does
    not hold, where it holds others of its rule, gets a rule of its own; so does the layer after it, which may take its
    output. A layer that nothing was recorded of goes with the others.

    Args:
        default: The default.
        rules: The rules.
        supports: What the device says of a format.
        ranges: By layer what was recorded; empty if nothing was.
    """
    moving = _Moving(rules, supports, ranges)
    new_default = moving.choose("default", "default", default, None)
    kept = [moving.rule(number, rule) for number, rule in enumerate(rules)]
    return new_default, [*moving.own_rules, *kept], moving.replacements


class _Moving:
    """One translation; collects what is replaced, and rules for single layers."""

    def __init__(self, rules: Sequence[Rule], supports: Supports, ranges: Mapping[str, Range]) -> None:
        self.own_rules: list[Rule] = []
        self.replacements: list[Replacement] = []
        self._rules, self._supports, self._ranges = rules, supports, ranges
        self._decided = _decided(rules, list(ranges))
        self._unfit = dict(_unfit(ranges))

    def rule(self, number: int, rule: Rule) -> Rule:
        """A rule for the device."""
        changes: dict[str, str | None] = {}
        if rule.compute is not None:
            chosen = self.choose(rule.label, "compute", rule.compute, number)
            if chosen != rule.compute:
                changes |= {"compute": chosen}
                if is_of_products(rule.compute) and not is_of_products(chosen):
                    changes |= {"scaling": None, "gradients": None}
        if rule.output not in (None, "input"):
            changes["output"] = self.choose(rule.label, "output", str(rule.output), number)
        if all(getattr(rule, key) == value for key, value in changes.items()):
            return rule
        new = replace(rule, **changes)  # type: ignore[arg-type]
        return new if rule.origin is None else new.read_from(rule.origin)

    def choose(self, where: str, key: str, format: str, number: int | None) -> str:
        """The format in the place of one that a rule, or the default (None), says."""
        chosen, reasons, unfit = format, list[str](), list[str]()
        while not (support := self._supports(chosen)).native:
            reasons.append(support.reason)
            chosen, why, unfit = self._next(chosen, key, number)
            reasons += [why] if why else []
        if chosen == format:
            return format
        self.replacements.append(Replacement(where, key, format, chosen, "; ".join(reasons)))
        for layer in unfit:
            self._give_rule(layer, format, number, reasons[0])
        return chosen

    def _next(self, format: str, key: str, number: int | None) -> tuple[str, str, list[str]]:
        """The format to try instead, why, and the layers that it is not for."""
        if is_of_products(format):
            return "bf16", "", []
        if format == "fp16" and self._supports("bf16").native:
            return "bf16", "", []
        if format != "bf16" or not self._supports("fp16").native:
            return REFERENCE, "", []
        covered = [layer for layer in self._ranges if self._covers(number, layer)]
        if not covered:
            why = "nothing was recorded of its layers" if self._ranges else "no ranges were given that fp16 could hold"
            return REFERENCE, why, []
        unfit = [layer for layer in covered if layer in self._unfit]
        splits = key != "output" and not (number is not None and self._rules[number].type_patterns)
        if unfit and (not splits or len(unfit) == len(covered)):
            return REFERENCE, f"{quoted(unfit[0])}: {self._unfit[unfit[0]]}", []
        held = [layer for layer in covered if layer not in unfit]
        largest = max(held, key=lambda layer: self._ranges[layer].amax)
        amax = self._ranges[largest].amax
        return "fp16", f"fp16 holds {counted(len(held), 'layer')}, at most {amax:.3g} in {quoted(largest)}", unfit

    def _covers(self, number: int | None, layer: str) -> bool:
        """Whether a rule decides for a layer. Of rules by type names do not tell: each may be for all layers."""
        if number is not None and self._rules[number].type_patterns:
            return True
        return self._decided[layer] == number

    def _give_rule(self, layer: str, format: str, number: int | None, lacks: str) -> None:
        has_layers_inside = any(_is_inside(other, layer) for other in self._ranges)
        rule = Rule(literal(layer), compute=REFERENCE, recurse=not has_layers_inside)
        if number is not None:
            said = self._rules[number]
            output = said.output if said.output in (None, "input") else REFERENCE
            rule = replace(rule, param=said.param, output=output)
        self.own_rules.append(rule)
        reason = f"{lacks}; {self._unfit[layer]}"
        self.replacements.append(Replacement(quoted(layer), "compute", format, REFERENCE, reason))


def _unfit(ranges: Mapping[str, Range]) -> Iterator[tuple[str, str]]:
    """The layers that fp16 is not for, each with the reason."""
    most, names = get_format("fp16").max, list(ranges)
    found: dict[str, str] = {}
    for place, (layer, known) in enumerate(ranges.items()):
        if known.amax > most / 2**SPARE_BITS:
            is_out = "and fp16 ends at" if known.amax > most else f"with {SPARE_BITS} bit to spare beyond fp16's"
            found[layer] = f"its output reaches {known.amax:.3g}, {is_out} {most:g}"
            for after in _after(names, place):
                found.setdefault(after, f"it comes after {quoted(layer)}, whose output reaches {known.amax:.3g}")
        elif not known.fits_fp16:
            found.setdefault(layer, "what was recorded of it fits fp16 at no loss scale")
    yield from found.items()


def _after(names: Sequence[str], place: int) -> list[str]:
    """The layer after one and all inside it, in the model's order, and those that begin with that one's first."""
    later = [name for name in names[place + 1 :] if not _is_inside(name, names[place])]
    found = later[:1]
    for name in later[1:]:
        if not _is_inside(name, found[-1]):
            break
        found.append(name)
    return found


def _is_inside(name: str, other: str) -> bool:
    return name != other and (not other or name.startswith(f"{other}."))


def _decided(rules: Sequence[Rule], layers: Sequence[str]) -> dict[str, int | None]:
    """By layer the number of the rule that decides for it, as far as names tell; None for the default."""
    tree, found = NameTree(_with_parents(layers)), dict[str, list[int]]()
    for number, rule in enumerate(rules):
        if not rule.type_patterns:
            for place in {place for pattern in rule.patterns for place in tree.find(parse(pattern))}:
                found.setdefault(tree.names[place], []).append(number)
    return {layer: _nearest(layer, found, rules) for layer in layers}


def _with_parents(layers: Sequence[str]) -> list[str]:
    """Names and all names above them, each directly followed by those inside it.

    >>> _with_parents(["a.b", "c", "a.d"])
    ['', 'a', 'a.b', 'a.d', 'c']
    """
    prefixes = {layer: [*(layer[:place] for place, each in enumerate(layer) if each == "."), layer] for layer in layers}
    first: dict[str, int] = {"": -1}
    for each in prefixes.values():
        for prefix in each:
            first.setdefault(prefix, len(first))
    places = {name: tuple(first[name[:end]] for end in _ends(name)) for name in first}
    return sorted(first, key=lambda name: places[name])


def _ends(name: str) -> list[int]:
    """Where the name of each layer around a layer, and its own, ends; nowhere for the model itself."""
    return [*(place for place, each in enumerate(name) if each == "."), len(name)] if name else []


def _nearest(layer: str, found: Mapping[str, Sequence[int]], rules: Sequence[Rule]) -> int | None:
    """The first rule for the nearest of a layer and those around it that some rule is for."""
    for end in (*reversed(_ends(layer)), 0):
        name = layer[:end]
        numbers = [number for number in found.get(name, ()) if name == layer or rules[number].recurse]
        if numbers:
            return numbers[0]
    return None
