"""The policy that a person would write for formats that were chosen layer by layer: types and globs where these do.

A search with a check: rules by name are the fewest that give each layer its format (a dynamic programme over the tree
of layers), types are tried in their place, names that are alike are drawn together into globs and slices. What comes
out is resolved and has to give every layer what was chosen; else each layer is named.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.numerics.formats import REFERENCE
from lightning_mixprec.policy.layers import Inventory, take_inventory
from lightning_mixprec.policy.matching import ClassIndex
from lightning_mixprec.policy.patterns import literal, parse
from lightning_mixprec.policy.policy import PrecisionPolicy
from lightning_mixprec.policy.resolving import matches_of
from lightning_mixprec.policy.rules import Rule, is_of_products


class _Said(NamedTuple):
    """A rule by name: the layer, its format, and whether that holds for the layers below."""

    layer: int
    format: str
    recurse: bool


@dataclass(frozen=True)
class LayerOutline:
    """What a policy sees of a layer.

    Attributes:
        name: The layer's first name, or another of its names.
        first_name: The first one.
        classes: The names of its class and of that's bases, the nearest first; ``nn.Module`` left out.
        has_forward: Whether it has operations of its own.
        has_products: Whether it is an ``nn.Linear``, whose products may be in 8 bits.
        stays_wide: Whether its weights are in fp64, in which it computes as long as no rule says another format.
    """

    name: str
    first_name: str
    classes: list[str]
    has_forward: bool
    has_products: bool
    stays_wide: bool = False


def outline_of(model: nn.Module) -> list[LayerOutline]:
    """The layers of a model as a policy sees them, parents first; plain, so that a file can keep it."""
    inventory, base = take_inventory(model), PrecisionPolicy(REFERENCE).resolve(model)
    outline = []
    for name, layer in zip(inventory.tree.names, inventory.layer_at, strict=True):
        module = inventory.modules[layer]
        classes = [cls.__name__ for cls in type(module).__mro__[:-1] if cls is not nn.Module]
        has_forward = inventory.has_forward[layer] and layer not in inventory.unit
        products = inventory.takes_narrow_products(layer)
        wide = base[name].stays_wide
        outline.append(LayerOutline(name, inventory.names[layer][0], classes, has_forward, products, wide))
    return outline


def stand_in_of(outline: Sequence[LayerOutline]) -> nn.Module:
    """A module without weights that resolves policies as the model of an outline does."""
    made: dict[str, nn.Module] = {}
    kinds: dict[object, type[nn.Module]] = {}
    first = {layer.name: layer.first_name for layer in outline}
    for layer in outline:
        if layer.first_name not in made:
            cls = _stand_in_class(layer, kinds)
            made[layer.first_name] = module = cls.__new__(cls)
            nn.Module.__init__(module)
        above, _, segment = layer.name.rpartition(".")
        if layer.name:
            made[first[above]]._modules[segment] = made[layer.first_name]
    return made[""]


def _stand_in_class(layer: LayerOutline, kinds: dict[object, type[nn.Module]]) -> type[nn.Module]:
    key = tuple(layer.classes), layer.has_forward, layer.has_products
    if key not in kinds:
        made: type[nn.Module] = nn.Linear if layer.has_products else nn.Module
        for name in reversed(layer.classes):
            made = type(name, (made,), {})
        if layer.has_forward and not layer.has_products:
            made.forward = _forward
        kinds[key] = made
    return kinds[key]


def _forward(self: nn.Module) -> None:
    """Stands for operations of a layer's own."""


def folded_policy(model: nn.Module, formats: Mapping[str, str]) -> PrecisionPolicy:
    """A short policy under which layers compute in these formats.

    Args:
        model: The model, or a :func:`stand_in_of` it.
        formats: By name of a layer with operations of its own, its format; what is not named may have any. One that has
            no operations of its own does not count, nor a format of products where there are none: such a layer has the
            format around it.

    Raises:
        PolicyError: No policy gives this: layers that are one have two formats.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2), nn.LayerNorm(2))
    >>> chosen = {"": "bf16", "0": "bf16", "1": "fp32", "2": "bf16", "3": "fp32"}
    >>> folded_policy(model, chosen).to_dict()
    {'default': 'bf16', 'rules': [{'types': 'LayerNorm', 'compute': 'fp32'}]}
    """
    inventory = take_inventory(model)
    wanted = _wanted(inventory, formats)
    defaults = sorted({each for each in wanted.values() if not is_of_products(each)} or {"bf16"})
    counts = {each: sum(format == each for format in wanted.values()) for each in defaults}
    found = [_Folding(inventory, wanted, default).rules() for default in sorted(defaults, key=lambda f: -counts[f])]
    tried = sorted(found, key=lambda each: each[0])
    for _, default, rules in [*tried, (0.0, *_one_by_one(inventory, wanted, max(counts, key=lambda f: counts[f])))]:
        try:
            policy = PrecisionPolicy(default, rules)
            off = layers_off(policy, model, formats)
        except PolicyError as error:
            problem = str(error)
            continue
        if not off:
            return policy
        problem = f"layer {off[0]!r} cannot be given {formats[off[0]]}"
    raise PolicyError(f"no policy gives these formats: {problem}; let the layers concerned have one format")


def layers_off(policy: PrecisionPolicy, model: nn.Module, formats: Mapping[str, str]) -> list[str]:
    """The layers that a policy does not give their formats, as far as these count for :func:`folded_policy`.

    A layer that the model has in fp64 computes in it unless a rule says another format.

    Raises:
        PolicyError: The policy does not fit the model.
    """
    assignment, inventory = policy.resolve(model), take_inventory(model)
    wanted = {inventory.names[layer][0]: format for layer, format in _wanted(inventory, formats).items()}
    return [name for name, format in wanted.items() if assignment[name].compute not in (format, "fp64")]


def _wanted(inventory: Inventory, formats: Mapping[str, str]) -> dict[int, str]:
    """The formats that count, by layer."""
    number = dict(zip(inventory.tree.names, inventory.layer_at, strict=True))
    wanted: dict[int, str] = {}
    for name, format in formats.items():
        layer = number[name]
        if not inventory.has_forward[layer] or layer in inventory.unit:
            continue
        if is_of_products(format) and not inventory.takes_narrow_products(layer):
            continue
        if wanted.setdefault(layer, format) != format:
            one = inventory.names[layer][0]
            raise PolicyError(f"layers {one!r} and {name!r} are one, but get {wanted[layer]} and {format}; choose one")
    return wanted


def _one_by_one(inventory: Inventory, wanted: Mapping[int, str], default: str) -> tuple[str, list[Rule]]:
    """A rule for each layer that has another format than the default."""
    shared = {layer for layer in wanted if len(inventory.names[layer]) > 1}
    rules: list[Rule] = []
    for format in sorted(set(wanted.values())):
        own = [layer for layer in wanted if wanted[layer] == format and (format != default or layer in shared)]
        if own:
            names = [literal(inventory.names[layer][0]) for layer in own]
            rules.append(Rule(names if len(names) > 1 else names[0], compute=format, recurse=False))
    return default, rules


class _Folding:
    """The search for the shortest rules beside one default."""

    def __init__(self, inventory: Inventory, wanted: Mapping[int, str], default: str) -> None:
        self._inventory, self._wanted, self._default = inventory, wanted, default
        self._holder = self._holders()
        self._children: dict[int, list[int]] = {}
        for layer, holder in self._holder.items():
            self._children.setdefault(holder, []).append(layer)
        self._by_type: dict[int, str] = {}
        self._matters = self._with_wanted_below()

    def rules(self) -> tuple[float, str, list[Rule]]:
        """How long the rules are, the default, and the rules: by name first, as they are for single layers."""
        types: dict[str, str] = {}
        best = self._made(types)
        is_better = len(best[1]) > 0
        while is_better:
            is_better = False
            for name, format in self._type_candidates():
                if name not in types and (tried := self._made({**types, name: format}))[0] < best[0]:
                    best, chosen, is_better = tried, {**types, name: format}, True
            if is_better:
                types = chosen
        return best[0], self._default, best[1]

    def _holders(self) -> dict[int, int]:
        """By layer the one that holds it, by its first name."""
        tree = dict(zip(self._inventory.tree.names, self._inventory.layer_at, strict=True))
        first = {layer: names[0] for layer, names in enumerate(self._inventory.names)}
        return {layer: tree[name.rpartition(".")[0]] for layer, name in first.items() if name}

    def _with_wanted_below(self) -> set[int]:
        """The layers that have a format to get, themselves or below them."""
        found: set[int] = set()
        for layer in self._wanted:
            at: int | None = layer
            while at is not None and at not in found:
                found.add(at)
                at = self._holder.get(at)
        return found

    def _type_candidates(self) -> Iterator[tuple[str, str]]:
        """Names of classes whose layers hold no others and mostly have one format, which is not the default."""
        by_class: dict[str, list[int]] = {}
        for layer in self._wanted:
            by_class.setdefault(type(self._inventory.modules[layer]).__name__, []).append(layer)
        for name, layers in by_class.items():
            if any(below in self._matters for layer in layers for below in self._children.get(layer, ())):
                continue
            counts: dict[str, int] = {}
            for layer in layers:
                counts[self._wanted[layer]] = counts.get(self._wanted[layer], 0) + 1
            format = max(counts, key=lambda each: counts[each])
            if format != self._default:
                yield name, format

    def _made(self, types: Mapping[str, str]) -> tuple[float, list[Rule]]:
        """How long rules with some by type are, and the rules."""
        classes = ClassIndex(type(module) for module in self._inventory.modules)
        by_type = {
            name: matches_of(Rule(types=name, compute=format), self._inventory, classes)
            for name, format in types.items()
        }
        self._by_type = {layer: types[name] for name, layers in by_type.items() for layer in layers}
        self._memo: dict[tuple[int, str], tuple[int, tuple[_Said, ...]]] = {}
        said = self._fewest(0, self._default)[1]
        patterns: list[tuple[str, str, bool]] = []
        for format, recurse in dict.fromkeys((each.format, each.recurse) for each in said):
            layers = [each.layer for each in said if (each.format, each.recurse) == (format, recurse)]
            patterns += [(pattern, format, recurse) for pattern in self._drawn_together(layers)]
        rules = []
        for format, recurse in dict.fromkeys(each[1:] for each in patterns):
            own = [pattern for pattern, *rest in patterns if rest == [format, recurse]]
            rules.append(Rule(own if len(own) > 1 else own[0], compute=format, recurse=recurse))
        for format in dict.fromkeys(types.values()):
            names = [name for name in types if types[name] == format]
            rules.append(Rule(types=names if len(names) > 1 else names[0], compute=format))
        # A type says more than a name; a list of them, or of names, is longer than one.
        return len(patterns) + 0.9 * len(types) + 0.1 * len(rules), rules

    def _fewest(self, layer: int, around: str) -> tuple[int, tuple[_Said, ...]]:
        """The fewest rules by name in and below a layer, where the nearest one above it says a format."""
        if (layer, around) in self._memo:
            return self._memo[layer, around]
        below = [child for child in self._children.get(layer, ()) if child in self._matters]
        wanted, ruled = self._wanted.get(layer), self._by_type.get(layer)
        unsaid = ruled or around
        options: list[tuple[int, int, tuple[_Said, ...]]] = []
        if wanted in (None, unsaid):
            options.append(self._summed(below, unsaid, ()))
        for format in {wanted} if wanted else {self._wanted[each] for each in self._inside(layer)}:
            if layer or not below:
                options.append(self._summed(below, format, (_Said(layer, format, True),)))
            if below and wanted:
                options.append(self._summed(below, unsaid, (_Said(layer, format, False),)))
        least = min(options, key=lambda each: each[:2])
        self._memo[layer, around] = least[0], least[2]
        return self._memo[layer, around]

    def _summed(self, below: Sequence[int], around: str, own: tuple[_Said, ...]) -> tuple[int, int, tuple[_Said, ...]]:
        """Rules of a layer and of those below it: how many, how many of them are not recursive, and which."""
        parts = [self._fewest(child, around) for child in below]
        said = own + tuple(each for part in parts for each in part[1])
        return len(said), sum(not each.recurse for each in said), said

    def _inside(self, layer: int) -> Iterator[int]:
        waiting = [layer]
        while waiting:
            at = waiting.pop()
            if at in self._wanted:
                yield at
            waiting += [child for child in self._children.get(at, ()) if child in self._matters]

    def _drawn_together(self, layers: Sequence[int]) -> list[str]:
        """Patterns that match these layers and no others."""
        inventory = self._inventory
        held: dict[str, set[int]] = {literal(inventory.names[layer][0]): {layer} for layer in layers}
        by_last: dict[str, set[int]] = {}
        for layer in layers:
            by_last.setdefault(inventory.names[layer][0].rpartition(".")[2], set()).add(layer)
        for last, members in by_last.items():
            if len(members) > 1 and not last.isdecimal() and literal(last) == last:
                pattern = f"**.{last}"
                if self._found(pattern) == members:
                    held = {text: found for text, found in held.items() if not found <= members} | {pattern: members}
        while (merged := self._merged_once(held)) is not None:
            held = merged
        return list(held)

    def _found(self, pattern: str) -> set[int]:
        return {self._inventory.layer_at[place] for place in self._inventory.tree.find(parse(pattern))}

    def _merged_once(self, held: Mapping[str, set[int]]) -> dict[str, set[int]] | None:
        """Patterns of which some that differ in one number became one; None if none do."""
        alike: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for text in held:
            segments = text.split(".") if not text.startswith("re:") else []
            for place, segment in enumerate(segments):
                if segment.isdecimal():
                    key = ".".join(segments[:place]), ".".join(segments[place + 1 :])
                    alike.setdefault(key, []).append((int(segment), text))
        for (before, after), members in sorted(alike.items(), key=lambda each: -len(each[1])):
            members.sort()
            for run in _runs(members):
                covered = set().union(*(held[text] for _, text in run))
                last = run[-1][0]
                for segment in ("*", f"[{run[0][0]}:{last + 1}]") if len(run) > 1 else ():
                    pattern = ".".join(part for part in (before, segment, after) if part)
                    if self._found(pattern) == covered:
                        rest = {text: found for text, found in held.items() if text not in {each[1] for each in run}}
                        return rest | {pattern: covered}
        return None


def _runs(members: Sequence[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """All of them, whatever is between, and those whose numbers follow one another, the longest first."""
    runs: list[list[tuple[int, str]]] = [[members[0]]]
    for each in members[1:]:
        if each[0] == runs[-1][-1][0] + 1:
            runs[-1].append(each)
        else:
            runs.append([each])
    return [list(members), *sorted(runs, key=len, reverse=True)]
