"""The first-step check: a border that its model walks around gives nothing its format."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

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


class FirstStepCheck:
    """The check that each border is entered in a step if a module behind it runs. Begins at once, ends at :meth:`end`.

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

    def end(self, assignment: Mapping[str, LayerPrecision]) -> None:
        """Takes the hooks off again and judges.

        Raises:
            PolicyError: a border was never entered although a module that is reached only through it ran.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for site, border in self._watched.items():
            if not border.entered and (ran := self._ran_below(site)) is not None:
                raise PolicyError(_message(site, ran, assignment[site.name]))

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
