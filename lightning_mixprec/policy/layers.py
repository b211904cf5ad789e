"""The inventory of a model: its distinct layers with their names, children, parameters and stored formats."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from lightning_mixprec.numerics.formats import REFERENCE, format_of, is_wider
from lightning_mixprec.policy.matching import NameTree
from lightning_mixprec.policy.module_names import is_scripted, walk

stored_by_rule = WeakIdKeyDictionary()
"""The tensors of running models that are stored otherwise than the model had them, because a rule says so."""


@dataclass(frozen=True)
class Inventory:
    """The layers of a model, numbered in the order of their first names.

    Attributes:
        tree: All names.
        layer_at: The layer's number for each place in the tree.
        modules: The module, by layer, as in the lists that follow.
        names: Its names.
        children: The numbers of its children.
        has_forward: Whether it has operations of its own.
        unit: The layer that another one is a mere part of: ``nn.MultiheadAttention`` reads the weights of its parts and
            never calls their forward, and TorchScript computes in the format of what calls it.
    """

    tree: NameTree
    layer_at: list[int]
    modules: list[nn.Module]
    names: list[list[str]]
    children: list[tuple[int, ...]]
    has_forward: list[bool]
    unit: dict[int, int]

    def takes_narrow_products(self, layer: int) -> bool:
        """True of ``nn.Linear`` and its subclasses, unless they are mere parts of a layer that never calls them."""
        module = self.modules[layer]
        return isinstance(module, nn.Linear) and layer not in self.unit and not is_scripted(module)

    def own_parameters(self, layer: int) -> Iterator[nn.Parameter]:
        """Its floating-point parameters, those of its children not included; complex ones are not floating-point."""
        for parameter in self.modules[layer]._parameters.values():
            if parameter is not None and parameter.dtype.is_floating_point:
                yield parameter


def take_inventory(model: nn.Module) -> Inventory:
    """The inventory of a model; wrappers are looked through."""
    nodes = list(walk(model))
    number: dict[int, int] = {}
    layer_at = [number.setdefault(id(node.module), len(number)) for node in nodes]
    modules: list[nn.Module] = []
    names: list[list[str]] = [[] for _ in number]
    children: dict[int, dict[int, None]] = {}
    for node, layer in zip(nodes, layer_at, strict=True):
        if layer == len(modules):
            modules.append(node.module)
        names[layer].append(node.name)
        if node.parent is not None:
            children.setdefault(number[id(node.parent)], {})[layer] = None
    kids = [tuple(children.get(layer, ())) for layer in range(len(number))]
    return Inventory(
        tree=NameTree([node.name for node in nodes]),
        layer_at=layer_at,
        modules=modules,
        names=names,
        children=kids,
        has_forward=[_has_forward(module) for module in modules],
        unit=_units(modules, kids, number),
    )


def _has_forward(module: nn.Module) -> bool:
    return is_scripted(module) or type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _units(modules: list[nn.Module], children: list[tuple[int, ...]], number: dict[int, int]) -> dict[int, int]:
    unit: dict[int, int] = {}
    for layer, module in enumerate(modules):
        known = [number[id(part)] for part in _parts(module) if id(part) in number]
        if layer not in unit:
            unit |= dict.fromkeys(with_below(known, children), layer)
    return unit


def _parts(module: nn.Module) -> Iterable[nn.Module]:
    if isinstance(module, nn.MultiheadAttention):
        return filter(None, (module._modules.get(name) for name in ("out_proj", "parametrizations")))
    return filter(is_scripted, module.children())


def with_below(layers: Iterable[int], children: Sequence[tuple[int, ...]]) -> set[int]:
    """Some layers and all layers below them."""
    reached = set(layers)
    waiting = list(reached)
    while waiting:
        further = set(children[waiting.pop()]) - reached
        reached |= further
        waiting += further
    return reached


def stored_formats(inventory: Inventory, ruled: dict[int, str]) -> list[str]:
    """The format of each layer's weights: of its own, else of those below it, else of its parent's, else fp32.

    Args:
        inventory: the model's layers.
        ruled: formats that rules give to parameters, by the parameter's id.
    """
    order, children = _children_first(inventory), inventory.children
    stored = [_own_format(inventory, layer, ruled) for layer in range(len(inventory.modules))]
    for layer in order:
        stored[layer] = stored[layer] or next(filter(None, (stored[child] for child in children[layer])), None)
    stored[0] = stored[0] or REFERENCE
    for layer in reversed(order):
        for child in children[layer]:
            stored[child] = stored[child] or stored[layer]
    return [format or REFERENCE for format in stored]


def wide_layers(inventory: Inventory, ruled: dict[int, str]) -> list[bool]:
    """True of each layer whose weights, and those below it, the model has in fp64: autocast leaves it alone.

    Args:
        inventory: the model's layers; one without weights is like what holds it.
        ruled: formats that rules give to parameters, by the parameter's id.
    """
    order, children = _children_first(inventory), inventory.children
    narrowed = {parameter for parameter, format in ruled.items() if not is_wider(format, REFERENCE)}
    found: list[set[bool]] = [set() for _ in inventory.modules]
    for layer in order:
        found[layer] = {is_wide_by_nature(p) and id(p) not in narrowed for p in inventory.own_parameters(layer)}
        found[layer].update(*(found[child] for child in children[layer]))
    for layer in reversed(order):
        for child in children[layer]:
            found[child] = found[child] or found[layer]
    return [found[inventory.unit.get(layer, layer)] == {True} for layer in range(len(found))]


def is_wide_by_nature(tensor: Tensor) -> bool:
    """True for a tensor that is wider than fp32 without our having stored it so."""
    format = format_of(tensor.dtype)
    return format is not None and is_wider(format, REFERENCE) and tensor not in stored_by_rule


def _own_format(inventory: Inventory, layer: int, ruled: dict[int, str]) -> str | None:
    for parameter in inventory.own_parameters(layer):
        stored = ruled.get(id(parameter)) or format_of(parameter.dtype)
        return stored or str(parameter.dtype).removeprefix("torch.")
    return None


def _children_first(inventory: Inventory) -> list[int]:
    order: list[int] = []
    entered = {0}

    def enter(layer: int) -> None:
        for child in inventory.children[layer]:
            if child not in entered:
                entered.add(child)
                enter(child)
        order.append(layer)

    enter(0)
    return order


def count_parameters(inventory: Inventory) -> list[tuple[int | None, bool]]:
    """For each layer the number of parameters first met in it (None if uninitialised), and whether it has others."""
    seen: set[int] = set()
    counts: list[tuple[int | None, bool]] = []
    for module in inventory.modules:
        mine = [parameter for parameter in module._parameters.values() if parameter is not None]
        new = [parameter for parameter in mine if id(parameter) not in seen]
        seen.update(map(id, new))
        is_waiting = any(is_lazy(parameter) for parameter in new)
        counts.append((None if is_waiting else sum(parameter.numel() for parameter in new), len(new) < len(mine)))
    return counts
