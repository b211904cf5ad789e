"""The plan of borders: the modules of a model that get one under an assignment, and the work of each."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

from lightning_mixprec.engine.backends import Backends, Manner
from lightning_mixprec.engine.borders import Crossing
from lightning_mixprec.engine.fastpath import FUSED
from lightning_mixprec.engine.weights import Slot, mismatches, unusable_in
from lightning_mixprec.errors import PolicyError
from lightning_mixprec.numerics.formats import REFERENCE, compute_formats, get_format
from lightning_mixprec.policy.assignment import LayerPrecision
from lightning_mixprec.policy.module_names import is_scripted, walk


@dataclass(eq=False)
class Site:
    """A module that has a forward of its own, with what computes as part of it.

    Attributes:
        name: the first of its names.
        module: the module.
        parts: the module and those below it that have no forward of their own, or whose forward does not run.
        parents: the sites that may call it.
        children: the sites it may call.
    """

    name: str
    module: nn.Module
    parts: list[nn.Module]
    parents: list["Site"] = field(default_factory=list)
    children: list["Site"] = field(default_factory=list)

    def below(self) -> Iterator["Site"]:
        """This site and all sites it may reach, each once."""
        seen, waiting = {id(self)}, [self]
        while waiting:
            site = waiting.pop()
            yield site
            for child in site.children:
                if id(child) not in seen:
                    seen.add(id(child))
                    waiting.append(child)


def survey(model: nn.Module) -> list[Site]:
    """The sites of a model, the root first and parents before children under their first names.

    ModuleList and the like are transparent: a child's parent is the next module with a forward. An attention module is
    one unit, because it computes with its children's weights and never calls them, and so is what TorchScript made.
    """
    sites: dict[int, Site] = {}
    site_of: dict[str, Site] = {}
    for name, module, _ in walk(model):
        parent = site_of.get(name.rpartition(".")[0]) if name else None
        if parent is not None and (_has_no_forward(module) or _is_unit(parent.module)):
            site_of[name] = parent
            if not any(module is part for part in parent.parts):
                parent.parts.append(module)
            continue
        site = sites.setdefault(id(module), Site(name, module, [module]))
        site_of[name] = site
        if parent is not None and not any(parent is known for known in site.parents):
            site.parents.append(parent)
            parent.children.append(site)
    return list(sites.values())


def heights(sites: Sequence[Site]) -> dict[str, int]:
    """Depth of each site in layers, on its longest side; a shared layer that holds itself counts once."""
    known: dict[str, int] = {}

    def height(site: Site, above: frozenset[str]) -> int:
        if site.name not in known:
            inside = [child for child in site.children if child.name not in above]
            known[site.name] = max((1 + height(child, above | {site.name}) for child in inside), default=0)
        return known[site.name]

    for site in sites:
        height(site, frozenset())
    return known


def _has_no_forward(module: nn.Module) -> bool:
    if is_scripted(module) or "forward" in module.__dict__:
        return False
    return type(module).forward is nn.Module.forward


def _is_unit(module: nn.Module) -> bool:
    return is_scripted(module) or isinstance(module, nn.MultiheadAttention)


class Plan(NamedTuple):
    """The borders and formats that an assignment gives to a model.

    Attributes:
        crossings: by site, what its border does; sites without a border are missing.
        formats: by site, in what its own operations compute.
        is_mixed: whether formats meet anywhere.
        narrow: by site, how its products compute, if that is in 8 bits.
    """

    crossings: dict[Site, Crossing]
    formats: dict[Site, str]
    is_mixed: bool
    narrow: Mapping[Site, Manner] = MappingProxyType({})

    def is_meeting(self, site: Site) -> bool:
        """True if a site's own format, or what it hands on, differs from what a caller computes in."""
        crossing = self.crossings.get(site)
        if crossing is None or crossing.lifts:
            return False
        return crossing.output is not None or _differs(site, self.formats, self.narrow)


def draw(sites: list[Site], assignment: Mapping[str, LayerPrecision], backends: Backends) -> Plan:
    """Plans the borders.

    A module is a border if its format differs from that of any of its callers, if its output is set, or if it has
    weights that its operations cannot use as they are stored. What a border swaps are the weights of the whole region
    below it, because a container may use its children's weights; and each module below swaps its own again, because
    checkpointing recomputes it without the container. So does each module of a region that replaces functions of torch.

    Raises:
        PolicyError: a format cannot be computed in, or a module cannot be instrumented.
    """
    formats = {site: _checked(site.name, assignment[site.name].region, backends) for site in sites}
    narrow = {site: manner for site in sites if (manner := _manner(assignment[site.name])) is not None}
    unusable = {format: unusable_in(_dtype(format)) for format in set(formats.values())}
    slots = {site: own for site in sites if (own := _own_slots(site, unusable[formats[site]], assignment[site.name]))}
    root = sites[0]
    crossings = {}
    for site in sites[1:]:
        layer = assignment[site.name]
        output = layer.output
        differs = _differs(site, formats, narrow)
        is_top = differs or (root in site.parents and formats[root] == formats[site])
        seen = _region_slots(site, formats, slots) if slots and (is_top or output or site in slots) else ()
        if differs or output or seen:
            crossings[site] = Crossing(
                formats[site],
                _wide(formats[parent] for parent in site.parents),
                "input" if output == "input" else _dtype(_checked(site.name, output, backends)) if output else None,
                layer.stays_wide,
                seen,
                narrow=narrow.get(site),
                leaves=site not in narrow and any(parent in narrow for parent in site.parents),
            )
    replaced = {format for format in set(formats.values()) if backends.region(format).mode is not None}
    entrances = {
        site: Crossing(formats[site], only_enters=True)
        for site in sites[1:]
        if formats[site] in replaced and site not in crossings and not is_scripted(site.module)
    }
    _refuse_scripted(crossings)
    is_mixed = bool(crossings) or len(set(formats.values())) > 1
    return Plan(crossings | entrances, formats, is_mixed, narrow)


def _manner(layer: LayerPrecision) -> Manner | None:
    how = layer.eight_bits
    return Manner(layer.compute, how.scaling, how.gradients) if layer.has_narrow_products else None


def _differs(site: Site, formats: Mapping[Site, str], narrow: Mapping[Site, Manner]) -> bool:
    own = formats[site], narrow.get(site)
    return any((formats[parent], narrow.get(parent)) != own for parent in site.parents)


def bypassing(sites: list[Site], plan: Plan) -> list[nn.Module]:
    """The attention modules whose fused inference path would ignore formats inside them."""
    if not plan.is_mixed:
        return []
    return [site.module for site in sites if isinstance(site.module, FUSED) and not _is_all_fp32(site, plan)]


def _is_all_fp32(site: Site, plan: Plan) -> bool:
    return all(
        plan.formats[inner] == REFERENCE and (inner not in plan.crossings or plan.crossings[inner].output is None)
        for inner in site.below()
    )


def _checked(name: str, format: str, backends: Backends) -> str:
    if backends.backend_for(format) is not None:
        return format
    formats = ", ".join(filter(backends.backend_for, compute_formats()))
    raise PolicyError(
        f"layer {name!r} is to compute in {format!r}, and layers compute in {formats}; choose one of these"
    )


def _dtype(format: str) -> torch.dtype:
    return get_format(format).forward.dtype


def _is_half(format: str) -> bool:
    return get_format(format).is_half


def _wide(callers: Iterable[str]) -> torch.dtype | None:
    wide = {_dtype(format) for format in callers if not _is_half(format)} or {torch.float32}
    return wide.pop() if len(wide) == 1 else None


def _own_slots(site: Site, unusable: Mapping[torch.dtype, torch.dtype], layer: LayerPrecision) -> list[Slot]:
    if layer.stays_wide:
        return []
    parts = [part for part in site.parts if not is_scripted(part)]
    return [slot for part in parts for slot in mismatches(part, unusable, layer.leaves_wide)]


def _region_slots(top: Site, formats: dict[Site, str], slots: dict[Site, list[Slot]]) -> tuple[Slot, ...]:
    """The slots of a site and of those below that compute in the same format without leaving it."""
    found: list[Slot] = []
    seen, waiting = {top}, [top]
    while waiting:
        site = waiting.pop()
        found += slots.get(site, [])
        for child in site.children:
            if child not in seen and formats[child] == formats[top]:
                seen.add(child)
                waiting.append(child)
    return tuple(found)


def _refuse_scripted(crossings: Iterable[Site]) -> None:
    for site in crossings:
        if is_scripted(site.module):
            raise PolicyError(
                f"layer {site.name!r} is a TorchScript module, whose forward cannot be given a format of its own; give "
                "it the format of the layer that calls it, or use the module it was scripted from"
            )
