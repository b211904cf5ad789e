"""What a run goes on with after a replay, recorded before it, put back and checked after it.

Weights, buffers, gradients, the states of optimizers and hooks. A write to a tensor is known by its version, so that
nothing is read and the device is not waited for.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mixprec.engine.sharding import is_sharded, may_be_sharded
from lightning_mixprec.evidence.instruments.restoring import containers
from lightning_mixprec.evidence.instruments.restoring.containers import Kind
from lightning_mixprec.evidence.instruments.restoring.contents import PutBack, is_in_place, reshape, versions_of
from lightning_mixprec.numerics.flat_batches import local_part

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Versions:
    """Tensors, and how often each was written to so far."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self._before = versions_of(self.tensors)

    def written(self) -> list[Tensor]:
        """Those that were written to since."""
        now = versions_of(self.tensors)
        if now == self._before:
            return []
        triples = zip(self.tensors, now, self._before, strict=True)
        return [tensor for tensor, version, before in triples if version != before]


class Guard:
    """The tensors that a run goes on with, and the tables around them.

    Args:
        modules: All modules of the model.
        leaves: Further tensors that require a gradient.
        optimizers: The optimizers of the run.

    Attributes:
        own: The model's parameters and buffers, each one once.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        leaves: Iterable[Tensor],
        optimizers: Iterable[Optimizer],
    ) -> None:
        tables = [table for module in modules for table in (module._parameters, module._buffers)]
        tensors = {id(tensor): tensor for table in tables for tensor in table.values() if tensor is not None}
        self.own = list(tensors.values())
        self._own_versions = Versions(self.own)
        locals_ = self.own if not may_be_sharded() else [getattr(each, "_local_tensor", each) for each in self.own]
        self._aliases = [(local, local.detach()) for local in locals_]
        self._params = [each for each in self.own if type(each) is nn.Parameter or isinstance(each, nn.Parameter)]
        trained = [*self._params, *leaves]
        self._grads = [(each, each.grad, each.requires_grad) for each in trained]
        self._grad_versions = Versions(grad for _, grad, _ in self._grads if grad is not None)
        self._states: list[tuple[str, Versions]] = []
        self._held: list[tuple[Kind, Any, Any]] = []
        self._empty: list[Any] = []
        self._hold(*_global_hooks())
        self._without_hooks = []
        for param in self._params:
            for name in _HOOKS:
                hooks = getattr(param, name)
                if hooks is None:
                    self._without_hooks.append((param, name))
                else:
                    self._hold(hooks)
        for optimizer in optimizers:
            self._take(optimizer)

    def open(self) -> None:
        """Takes gradients away, and makes constants of the parameters themselves, so that no hook on one fires."""
        for tensor, _, _ in self._grads:
            tensor.grad = None
        for param in self._params:
            param.requires_grad_(False)

    def put_back(self) -> Iterator[PutBack]:
        """The steps that put gradients, hooks, and the tables of optimizers back."""
        for local, alias in self._aliases:
            if not is_in_place(local, alias):
                yield partial(reshape, local, alias)
        for tensor, grad, requires_grad in self._grads:
            yield partial(tensor.requires_grad_, requires_grad)
            yield partial(setattr, tensor, "grad", grad)
        for kind, container, before in self._held:
            yield partial(containers.put_back, kind, container, before)
        yield partial(containers.clear, self._empty)
        for param, name in self._without_hooks:
            if getattr(param, name) is not None:
                yield getattr(param, name).clear

    def check(
        self,
        model: nn.Module,
        copy_of: Callable[[Tensor], Tensor | None],
        was_written_back: Callable[[Tensor], bool] = lambda local: False,
    ) -> tuple[list[str], list[str]]:
        """Looks for tensors that were written to.

        Args:
            model: The model, for the names.
            copy_of: Gives a copy of one of the model's own tensors that is as the tensor was, where there is one.
            was_written_back: Whether a rank's own part of a sharded tensor was.

        Returns:
            The names of those that were written back, and of those that could not be.
        """
        written: list[str] = []
        lost = ["a gradient" for _ in self._grad_versions.written()]
        lost += [name for name, versions in self._states for _ in versions.written()]
        changed = self._own_versions.written()
        named = (*model.named_parameters(), *model.named_buffers()) if changed else ()
        names = {id(each): name for name, each in named}
        for each in changed:
            if is_sharded(each):
                is_back = was_written_back(local_part(each))
            elif is_back := (copy := copy_of(each)) is not None:
                each.data.copy_(copy)
            (written if is_back else lost).append(names.get(id(each), "a tensor"))
        return written, lost

    def _take(self, optimizer: Optimizer) -> None:
        groups, state = optimizer.param_groups, optimizer.state
        self._hold(groups, *groups, *(group["params"] for group in groups), state, *state.values())
        kept: dict[str, list[Tensor]] = {}
        for values in state.values():
            for name, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, Tensor):
                    kept.setdefault(name, []).append(value)
        owner = type(optimizer).__name__
        self._states += [(f"{name!r} of {owner}", Versions(tensors)) for name, tensors in kept.items()]

    def _hold(self, *held: Any) -> None:
        for each in held:
            kind = containers.kind_of(type(each))  # type: ignore[arg-type]
            if type(each) in containers.BUILTIN and not each:
                self._empty.append(each)
            elif kind is not None:
                self._held.append((kind, each, kind.read(each)))


@cache
def _global_hooks() -> list[Any]:
    """Torch's tables of hooks on all modules."""
    tables = vars(torch.nn.modules.module).items()
    return [table for name, table in tables if name.startswith("_global_") and isinstance(table, dict)]
