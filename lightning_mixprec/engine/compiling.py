"""The settings of torch.compile while a model with formats runs.

Two of its defaults do not fit such a model. Compiled code computes backward under the autocast that surrounds its
forward (pytorch issue 179804), which would compute the gradients of an fp32 layer in the 16 bits of the layers around
it; backward runs outside autocast here. And Dynamo takes a function that it compiled eight times for one that never
holds still, and leaves it uncompiled from then on; but a change of formats is meant.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch._functorch.config as functorch
from torch import nn

from lightning_mixprec.engine.border_plan import Plan, Site
from lightning_mixprec.engine.borders import Border, Crossing
from lightning_mixprec.policy.module_names import unwrap

_INHERITED, _OFF = "same_as_forward", "off"


class CompilerSettings:
    """The settings of torch.compile while a model runs, until :meth:`end`. What a user chose otherwise is left."""

    _running: ClassVar[int] = 0
    _is_changed: ClassVar[bool] = False

    def __init__(self) -> None:
        self._limit: int | None = None
        self._added = 0
        self._variants: dict[Any, set[Any]] = {}
        self._has_ended = False
        CompilerSettings._running += 1
        if functorch.backward_pass_autocast == _INHERITED:
            functorch.backward_pass_autocast = _OFF
            CompilerSettings._is_changed = True

    def make_room(self, model: nn.Module, sites: list[Site], plan: Plan) -> None:
        """Lets Dynamo compile a function as often as its limit says for each variant of it that plans ask for.

        A function is the forward of a class, or the call that all borders share. Its variants are the different formats
        that plans, this one included, give to the model or to its compiled parts.
        """
        config = _dynamo_config()
        if config is None:
            return
        if self._limit is None:
            self._limit = config.recompile_limit
        site_of = {id(site.module): site for site in sites}
        for part in (unwrap(model), *compiled_parts(model)):
            inside = [site_of[id(inner)] for inner in part.modules() if id(inner) in site_of]
            is_border = bool(inside) and inside[0] in plan.crossings
            function = Border.__call__ if is_border else type(part).forward
            self._variants.setdefault(function, set()).add((type(part), _formats(inside, plan)))
        needed = self._limit * (max(map(len, self._variants.values())) - 1)
        config.recompile_limit += max(needed - self._added, 0)
        self._added = max(needed, self._added)

    def end(self) -> None:
        """Puts the settings back. Doing it again does nothing."""
        if self._has_ended:
            return
        self._has_ended = True
        CompilerSettings._running -= 1
        if CompilerSettings._is_changed and not CompilerSettings._running:
            CompilerSettings._is_changed = False
            functorch.backward_pass_autocast = _INHERITED
        config = _dynamo_config()
        if config is not None and self._limit is not None and self._added:
            config.recompile_limit = max(config.recompile_limit - self._added, self._limit)


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled code runs as it was written within, and nothing is compiled."""
    return contextlib.nullcontext() if _dynamo_config() is None else torch.compiler.set_stance("force_eager")


def compiled_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that torch.compile or Lightning has compiled."""
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule":
            yield unwrap(module)
        elif (
            getattr(module, "_compiled_call_impl", None) is not None
            or getattr(module, "_compiler_ctx", None) is not None
        ):
            yield module


def _formats(sites: list[Site], plan: Plan) -> tuple[Any, ...]:
    """The formats of a part of a model and of its callers, comparable with other parts of the same class."""
    callers = frozenset(plan.formats[parent] for parent in sites[0].parents) if sites else frozenset()
    return callers, *((plan.formats[site], _crossed(plan.crossings.get(site))) for site in sites)


def _crossed(crossing: Crossing | None) -> tuple[Any, ...] | None:
    if crossing is None:
        return None
    slots = tuple((slot.name, slot.dtype) for slot in crossing.slots)
    return *crossing._replace(slots=()), slots


def _dynamo_config() -> Any:
    """Dynamo's settings, if it was loaded; it takes seconds to load, and nothing was compiled without it."""
    dynamo = sys.modules.get("torch._dynamo")
    return None if dynamo is None else dynamo.config
