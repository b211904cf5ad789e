"""Copies of optimizers, learning-rate schedules and what belongs to them, on a sandbox's stand-ins for the weights.

A copy is of the original's own class, so that all of its methods are there and run on the copy: gradient surgery walks
its groups, ``first_step`` moves the stand-ins, a schedule sets its learning rate. What an object holds is copied when
it is first asked for: an optimizer that is only stepped costs no copy of its state.

``step`` of a copied optimizer moves nothing: what would be stepped with is told instead. So it is for optimizers inside
others, too.
"""

import copy
import enum
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mixprec.errors import SupportError
from lightning_mixprec.evidence.instruments.sandbox import Sandbox
from lightning_mixprec.numerics.formats import half_dtypes

Told = Callable[[Any], None]
"""Is given the copy of an optimizer."""

_PLAIN = (str, bytes, bool, int, float, complex, type(None), enum.Enum, torch.dtype, torch.device, torch.Size)
_CODE = (type, FunctionType, BuiltinFunctionType, ModuleType)
_SHARED = (*_PLAIN, *_CODE, nn.Module, weakref.ref)
_ORIGIN = "_origin_of_the_copy"


class Copies:
    """Copies of objects that compute with a model's weights; one for each object, whoever asks.

    Args:
        stand_ins: The sandbox.
        steps: The classes whose ``step`` moves nothing, beside torch's optimizers.
        on_step: Told when an optimizer would step.
        on_zero: Told when an optimizer is about to zero gradients.
    """

    def __init__(self, stand_ins: Sandbox, steps: Sequence[type], on_step: Told, on_zero: Told) -> None:
        self._stand_ins, self._steps = stand_ins, (Optimizer, *steps)
        self.on_step, self.on_zero = on_step, on_zero
        self._own = {id(stand_in) for stand_in in stand_ins.parameters.values()}
        self._known: dict[int, tuple[Any, Any]] = {}  # with the original, so that its id stays its own

    def of(self, value: Any) -> Any:
        """The copy of anything that an optimizer may hold; modules hold stand-ins already, and are handed back.

        Raises:
            SupportError: It cannot be copied.
        """
        if type(value) in weakref.ProxyTypes or isinstance(value, _SHARED) or id(value) in self._own:
            return value
        if id(value) not in self._known:
            self._known[id(value)] = value, self._empty(value)
            self._fill(value, self._known[id(value)][1])
        return self._known[id(value)][1]

    def _empty(self, value: Any) -> Any:
        """A copy of a value that may lack what the value holds."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, MethodType):
            owner = self.of(value.__self__)
            return getattr(owner, value.__name__, MethodType(value.__func__, owner))
        if isinstance(value, functools.partial):
            return functools.partial(self.of(value.func), *map(self.of, value.args), **self.of(value.keywords))
        if isinstance(value, tuple):
            items = map(self.of, value)
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, torch.Generator):
            return torch.Generator(value.device).set_state(value.get_state())
        try:
            if isinstance(value, (dict, list, set, deque)):
                return copy.copy(value)
            kind: Any = type(value)
            if hasattr(value, "__dict__") and kind.__new__ is object.__new__:
                return object.__new__(_copied_class(kind, isinstance(value, self._steps)))
            return copy.deepcopy(value)
        except Exception as error:
            raise SupportError(
                f"a step cannot be replayed with a {type(value).__name__}, which an optimizer holds and which cannot "
                f"be copied ({type(error).__name__}: {error})"
            ) from error

    def _fill(self, value: Any, new: Any) -> None:
        if isinstance(value, dict):
            new.clear()
            new.update({self.of(key): self.of(item) for key, item in value.items()})
        elif isinstance(value, (list, deque)):
            items = [self.of(item) for item in value]
            new.clear()
            new.extend(items)
        elif isinstance(value, set):
            items = [self.of(item) for item in value]
            new.clear()
            new.update(items)
        elif isinstance(new, _Copied):
            vars(new)[_ORIGIN] = vars(value), self
            for name in vars(value):  # an attribute that hides one of the class would not be missed
                if hasattr(type(value), name) and not (name == "step" and isinstance(new, _CopiedOptimizer)):
                    vars(new)[name] = self.of(vars(value)[name])

    def _tensor(self, tensor: Tensor) -> Tensor:
        if (stand_in := self._stand_ins.of(tensor)) is not None:
            return stand_in
        copied = tensor.detach().clone()
        if self._stand_ins.is_wide and copied.dtype in half_dtypes():
            copied = copied.float()
        return copied.requires_grad_(tensor.requires_grad)


class _Copied:
    """Mixed into the class of an object: what the copy lacks is copied from the original."""

    def __getattr__(self, name: str) -> Any:
        attributes, copies = vars(self)[_ORIGIN]
        if name in attributes:
            vars(self)[name] = copied = copies.of(attributes[name])
            return copied
        otherwise = getattr(super(), "__getattr__", None)
        if otherwise is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return otherwise(name)


class _CopiedOptimizer(_Copied):
    """The same for an optimizer."""

    param_groups: list[dict[str, Any]]

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        vars(self)[_ORIGIN][1].on_step(self)
        return result

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        vars(self)[_ORIGIN][1].on_zero(self)
        super().zero_grad(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def _copied_class(kind: type, steps: bool) -> type:
    return types.new_class(kind.__name__, (_CopiedOptimizer if steps else _Copied, kind))
