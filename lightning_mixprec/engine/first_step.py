"""The first-step check: borders that the model walks around, and layers in 8 bits that have no product of theirs."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from lightning_mixprec.engine.backends import NarrowLinear
from lightning_mixprec.engine.border_plan import Plan, Site
from lightning_mixprec.engine.borders import Border
from lightning_mixprec.engine.compiling import compiled_parts
from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.assignment import LayerPrecision
from lightning_mixprec.policy.module_names import is_scripted


class _Witness:
    """A forward pre-hook that notes that its module ran."""

    def __init__(self) -> None:
        self.ran = False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not is_compiling():
            self.ran = True


class _Products:
    """Hooks of a layer whose products are to be in 8 bits, which note whether any of its calls had one."""

    def __init__(self, module: nn.Module, mode: NarrowLinear) -> None:
        self.mode = mode
        self.ran, self.had_one, self._before = False, False, 0
        self.handles = [module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end)]

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._before = self.mode.calls

    def _end(self, module: nn.Module, args: Any, result: Any) -> None:
        self.ran = self.ran or not is_compiling()
        self.had_one = self.had_one or self.mode.calls > self._before


class FirstStepCheck:
    """The check that each border is entered in a step if a module behind it runs, and that products are in 8 bits.

    Begins at once, ends at :meth:`end`.

    Modules inside a compiled part are not checked: a hook there would compile it twice.

    Args:
        model: the model with its wrappers.
        sites: all sites of the model, the root first.
        plan: the plan in force.
        borders: the border of each site that has one.
    """

    def __init__(self, model: nn.Module, sites: list[Site], plan: Plan, borders: Mapping[Site, Border]) -> None:
        self._root = sites[0]
        compiled = _compiled(model, sites)
        self._watched = {
            site: border for site, border in borders.items() if plan.is_meeting(site) and site not in compiled
        }
        self._borders = borders
        self._witnesses: dict[Site, _Witness] = {}
        self._handles: list[RemovableHandle] = []
        for border in borders.values():
            border.entered = False
        for site in {inner: None for watched in self._watched for inner in watched.below()}:
            if site not in borders and site not in compiled and not is_scripted(site.module):
                self._witnesses[site] = _Witness()
                self._handles.append(site.module.register_forward_pre_hook(self._witnesses[site]))
        self._products = {
            site: _Products(site.module, border.mode)
            for site, border in borders.items()
            if isinstance(border.mode, NarrowLinear) and site not in compiled
        }
        self._handles += [handle for products in self._products.values() for handle in products.handles]

    def end(self, assignment: Mapping[str, LayerPrecision]) -> None:
        """Takes the hooks off again and judges.

        Raises:
            PolicyError: a border was never entered although a module that is reached only through it ran; or a layer
                whose products are to be in 8 bits ran without any.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for site, border in self._watched.items():
            if not border.entered and (ran := self._ran_below(site)) is not None:
                raise PolicyError(_message(site, ran, assignment[site.name]))
        for site, products in self._products.items():
            if products.ran and not products.had_one:
                raise PolicyError(_without_products(site, assignment[site.name]))

    def _ran_below(self, site: Site) -> Site | None:
        ran = [inner for inner in site.below() if inner is not site and self._has_run(inner)]
        if not ran:
            return None
        elsewhere = _reached_without(self._root, site)
        return next((inner for inner in ran if inner not in elsewhere), None)

    def _has_run(self, site: Site) -> bool:
        if site in self._borders:
            return self._borders[site].entered
        return site in self._witnesses and self._witnesses[site].ran


def _compiled(model: nn.Module, sites: list[Site]) -> set[Site]:
    """The sites in or below modules that torch.compile or Lightning has compiled."""
    inside = {id(inner) for part in compiled_parts(model) for inner in part.modules()}
    return {site for site in sites if id(site.module) in inside}


def _reached_without(root: Site, avoided: Site) -> set[Site]:
    seen, waiting = {root}, [root]
    while waiting:
        for child in waiting.pop().children:
            if child is not avoided and child not in seen:
                seen.add(child)
                waiting.append(child)
    return seen


def _message(site: Site, ran: Site, precision: LayerPrecision) -> str:
    written = precision.rule and (precision.rule.layers or precision.rule.types)
    by = f" by the rule for {written!r}" if written else ""
    says = f"computes in {precision.compute}" + (f" and hands on {precision.output}" if precision.output else "")
    return (
        f"layer {site.name!r} {says}{by}, but in the first step its forward was never called although {ran.name!r} "
        f"inside it ran: another method of it, or a part of it, was called directly, past the format; write the rule "
        f"for '{site.name}.*' instead, so that each part has its format by itself"
    )


def _without_products(site: Site, precision: LayerPrecision) -> str:
    return (
        f"the products of layer {site.name!r} are to be in {precision.compute}, but in the first step its forward "
        f"({type(site.module).__name__}.forward) never called torch.nn.functional.linear, which computes them; call "
        f"that there, or give the layer {precision.region}"
    )
