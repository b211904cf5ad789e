"""Border modules: what is cast, and which autocast state holds, where one format meets another."""

import contextlib
import inspect
from types import FunctionType, MethodType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, get_autocast_dtype, is_autocast_enabled, nn
from torch.compiler import is_compiling
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_mixprec.engine.backends import Backends, Manner, WithoutNarrow
from lightning_mixprec.engine.casting import FLOATING, Casts, all_to, cast, first_floating, holds_dtype
from lightning_mixprec.engine.fastpath import arrive_cast
from lightning_mixprec.engine.loans import lend
from lightning_mixprec.engine.weights import Gate, Slot, with_seen
from lightning_mixprec.errors import PolicyError
from lightning_mixprec.numerics.formats import REFERENCE, get_format

_COMPUTED = tuple(dtype for dtype in FLOATING if dtype.itemsize > 1)
_ALL_TO = {dtype: all_to(dtype) for dtype in _COMPUTED}

_REPARAMETRIZATIONS = (WeightNorm, SpectralNorm)
"""Hooks that compute a module's weight before its forward: own operations, although torch runs them outside.

Pruning is no such hook: who prunes further looks for the one that is there, and a mask times a weight is the same in
any region, unless the region sees casts of both.
"""


def _into(dtype: torch.dtype, comes_from: torch.dtype) -> Casts:
    """The casts on the way into own operations, from surroundings of another format.

    fp32 is left to autocast in a 16-bit region, but autocast leaves fp64 alone.
    """
    if dtype.itemsize > 2:
        return _ALL_TO[dtype]
    casts = {other: dtype for other in _COMPUTED if other.itemsize == 2 and other != dtype}
    return casts | {torch.float64: torch.float32} if comes_from == torch.float64 else casts


_CASTS = {
    own: {caller: (_into(own, caller), _into(caller, own), _into(caller, torch.float64)) for caller in _COMPUTED}
    for own in _COMPUTED
}
"""By a border's own and its caller's dtype: the casts of its inputs, of its results, and of results turned to fp64."""


class Crossing(NamedTuple):
    """The work of one border.

    Attributes:
        format: in what the module's own operations compute.
        wide: what a caller computes in if autocast is off: fp32, fp64, or ``None`` if the callers differ in this.
        output: in what the result is handed on, ``"input"`` for what came in, ``None`` for as computed.
        lifts: whether inputs alone are cast, to the format, and results stay as computed: a layer that is left alone in
            a wider format than its callers' works on whatever the borders around it hand on.
        slots: the weights that the module's region cannot use as they are stored.
        only_enters: whether the region is entered, where it is not yet, and nothing else is done: for a module whose
            callers compute in the same region, which checkpointing recomputes without them.
        narrow: how the module's products compute, if that is in 8 bits.
        leaves: whether those of a caller do, and its own do not.
    """

    format: str
    wide: torch.dtype | None = torch.float32
    output: torch.dtype | Literal["input"] | None = None
    lifts: bool = False
    slots: tuple[Slot, ...] = ()
    only_enters: bool = False
    narrow: Manner | None = None
    leaves: bool = False


class Border:
    """A module's forward, called in the module's own format.

    Its call is set as the instance attribute ``forward``. It finds the class's forward at each call, because lazy
    modules change their class, and holds nothing but the module, so that copies compute with their own weights.

    Args:
        module: the module whose forward this is.
        backends: those of the device whose autocast state counts.
        gate: shared by all borders that swap weights of one model.
    """

    def __init__(self, module: nn.Module, backends: Backends, gate: Gate) -> None:
        self.module = module
        self.backends = backends
        self.device = backends.device
        self.gate = gate
        self.inner = module.__dict__.get("forward")
        self.hooks: dict[int, Any] = {}
        self.order: list[int] = []
        self.entered = False
        # Dynamo compares a bound method's code, and the identity of any other callable: with that, blocks that compute
        # alike would each be compiled for themselves.
        self.method = MethodType(_with_signature_of(self.inner or type(module).forward, self.inner is None), self)
        self.become(Crossing(REFERENCE))

    def become(self, crossing: Crossing) -> None:
        """Takes over another crossing; the object stays, so that compiled code finds it again."""
        format, self.wide, self.output, lifts, self.slots, self.only_enters, narrow, self.leaves = crossing
        region = self.backends.region(format, narrow)
        self.region = WithoutNarrow(region) if self.leaves else region
        self.mode = self.region.mode
        self.dtype = self.region.dtype
        self.casts = dict.fromkeys(_COMPUTED, (_ALL_TO[self.dtype], {}, {})) if lifts else _CASTS[self.dtype]
        self.attends = get_format(format).is_half and isinstance(self.module, nn.MultiheadAttention)

    def install(self) -> None:
        """Puts the border in place, and the hooks that make the module's weight behind it."""
        module = self.module
        if border_of(module) is self:
            return
        self.inner = module.__dict__.get("forward")
        module.__dict__["forward"] = self.method
        module.__dict__["__prepare_scriptable__"] = refuse_scripting
        hooks = module._forward_pre_hooks
        self.order = list(hooks)
        self.hooks = {key: hook for key, hook in hooks.items() if isinstance(hook, _REPARAMETRIZATIONS)}
        for key in self.hooks:
            del hooks[key]

    def remove(self) -> None:
        """Gives the module its own forward and hooks back."""
        module = self.module
        if border_of(module) is self:
            del module.__dict__["__prepare_scriptable__"]
            if self.inner is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = self.inner
        if self.hooks:
            hooks = module._forward_pre_hooks
            hooks.update(self.hooks)
            for key in [*self.order, *(key for key in hooks if key not in self.order)]:
                if key in hooks:
                    hooks.move_to_end(key)  # type: ignore[attr-defined]
            self.hooks = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward. Written out flat: this is what a border costs."""
        if is_compiling():
            return self._traced(args, kwargs)
        self.entered = True
        if self.only_enters:
            return self._entered(args, kwargs)
        device, own, output = self.device, self.dtype, self.output
        was_on, was = is_autocast_enabled(device), get_autocast_dtype(device)
        caller = was if was_on else self.wide or _wide_caller(args, kwargs)
        into, back, back_from_fp64 = self.casts[caller]
        loan = None
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
            arrived = args[0].dtype
            if output == "input":
                output = arrived if arrived in _ALL_TO else None
            if (target := into.get(arrived)) is not None:
                args = (args[0].to(target),)
        else:
            if output == "input":
                output = _arrived(args, kwargs)
            args, kwargs, loan = lend(args, kwargs, into)
        compute = self._compute if self.slots else self._forward
        is_inside = own is caller and not self.leaves and (self.mode is None or self.mode.is_entered())
        result = compute(args, kwargs) if is_inside else self.region.call(was_on, was, compute, args, kwargs)
        if output is torch.float64:
            back = back_from_fp64
        if loan is not None:
            result = loan.end(result, back)
        if type(result) is not Tensor:
            return _handed_on(result, output, back)
        if output is not None and result.dtype in _ALL_TO[output]:
            result = result.to(output)
        target = back.get(result.dtype)
        return result if target is None else result.to(target)

    def _entered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.mode is None or self.mode.is_entered():
            return self._forward(args, kwargs)
        with self.mode:
            return self._forward(args, kwargs)

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.slots:
            return with_seen(self.slots, self.gate, lambda: self._forward(args, kwargs))
        return self._forward(args, kwargs)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.module
        if self.hooks:
            for hook in self.hooks.values():
                hook(module, args)
        if self.slots:
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, BasePruningMethod):
                    hook(module, args)
        if self.attends and (changed := arrive_cast(module, args, kwargs)) is not None:
            args, kwargs = changed
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.only_enters:
            return self._entered(args, kwargs)
        was_on, was = is_autocast_enabled(self.device), get_autocast_dtype(self.device)
        caller = was if was_on else self.wide or _wide_caller(args, kwargs)
        into, back, back_from_fp64 = self.casts[caller]
        output = _arrived(args, kwargs) if self.output == "input" else self.output
        if output is torch.float64:
            back = back_from_fp64
        args, kwargs, loan = lend(args, kwargs, into)
        with self.region.context():
            result = self._compute(args, kwargs)
        return _handed_on(result if loan is None else loan.end(result, back), output, back)


def refuse_scripting() -> None:
    """An error that torch.jit.script is given before it compiles a module that has a border.

    Raises:
        PolicyError: always.
    """
    raise PolicyError(
        "a model is to be scripted while its layers compute in formats of their own, which TorchScript cannot express; "
        "script it after the run (or Attachment.detach), when it has its own forwards back, or use torch.jit.trace"
    )


def border_of(module: nn.Module) -> Border | None:
    """The border that is in place on a module."""
    border = getattr(module.__dict__.get("forward"), "__self__", None)
    return border if isinstance(border, Border) else None


def _with_signature_of(forward: Any, has_self: bool) -> FunctionType:
    """The call of a border, for code that asks what the module's own forward takes."""
    call = FunctionType(Border.__call__.__code__, globals(), "__call__")
    itself = [] if has_self else [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    with contextlib.suppress(ValueError, TypeError):  # of code that has none
        signature = inspect.signature(forward)
        signature = signature.replace(parameters=[*itself, *signature.parameters.values()])
        call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _handed_on(result: Any, output: torch.dtype | None, back: Casts) -> Any:
    return cast(result if output is None else cast(result, _ALL_TO[output]), back)


def _arrived(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype of the first floating input."""
    first = first_floating((args, kwargs))
    return None if first is None or first.dtype not in _ALL_TO else first.dtype


def _wide_caller(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype:
    """The dtype of the caller if some callers compute in fp64: the tensors it passes tell which one it is."""
    return torch.float64 if holds_dtype((args, kwargs), torch.float64) else torch.float32
