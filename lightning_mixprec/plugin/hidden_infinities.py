"""Infinite gradients that a hook makes finite before anybody looks for them, so that their step is taken: told once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_mixprec.engine.transfer import Transfer
from lightning_mixprec.numerics.finite import are_finite
from lightning_mixprec.optim.gradients import params_of

_FIRST_LOOKS, _LOOKS_EVERY = 8, 64


@dataclass(frozen=True)
class _Late:
    """What is on its way of a step that was looked at: by parameter if its gradient was finite; if it was skipped."""

    names: list[str]
    told: Transfer
    is_scaled: bool


class HiddenInfinities:
    """Compares gradients as backward made them with the outcome of their step.

    Between the two are hooks of the parameters, ``on_after_backward``, and in manual optimization the training step. A
    gradient that was infinite, and whose step is taken, was replaced by one of them. The first eight steps and every
    64th are looked at; a device is not waited for.

    Args:
        model: The model in training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(param): name for name, param in model.named_parameters()}
        self._params = dict(model.named_parameters())
        self._steps, self._is_told = 0, False
        self._handles: list[RemovableHandle] = []
        self._arrived: dict[str, Tensor] = {}
        self._finite: dict[str, Tensor] = {}
        self._late: list[_Late] = []

    @property
    def is_looking(self) -> bool:
        """True while a step is one of those that are looked at."""
        return not self._is_told and (self._steps < _FIRST_LOOKS or self._steps % _LOOKS_EVERY == 0)

    def begin_backward(self) -> None:
        """A backward is about to run: what arrives at parameters with hooks of their own is looked at before these."""
        self._let_go()
        if not self.is_looking:
            return
        for name, param in self._params.items():
            if param.requires_grad and (param._backward_hooks or param._post_accumulate_grad_hooks):
                self._handles.append(_hook_before_others(param, partial(self._see, name)))

    def _see(self, name: str, gradient: Tensor) -> None:
        self._arrived[name] = are_finite([gradient])[0]

    def end_backward(self) -> None:
        """Backward has run, and none of the hooks that Lightning calls after it."""
        if self.is_looking:
            present = {name: param.grad for name, param in self._params.items() if param.grad is not None}
            flags = are_finite(list(present.values()))
            self._finite = dict(zip(present, flags, strict=True))
            self._finite |= {name: flag & self._finite.get(name, flag) for name, flag in self._arrived.items()}
        self._let_go()

    def end_step(self, optimizer: Optimizer, skipped: bool | Tensor, *, is_scaled: bool) -> None:
        """The step of an optimizer was decided about.

        Args:
            optimizer: The optimizer.
            skipped: Whether it was skipped, or the device's flag of it.
            is_scaled: Whether losses are scaled.
        """
        if self.is_looking and skipped is not True:
            has_gradient = [param for param in params_of(optimizer) if param.grad is not None]
            names = [name for param in has_gradient if (name := self._names.get(id(param))) in self._finite]
            flags = [self._finite[name].reshape(1) for name in names]
            if flags:
                outcome = skipped.reshape(1) > 0 if isinstance(skipped, Tensor) else torch.zeros(1, dtype=torch.bool)
                told = Transfer([torch.cat([flag.to(flags[0].device) for flag in flags]), outcome])
                self._late.append(_Late(names, told, is_scaled))
        self._finite = {}
        self._steps += 1
        while self._late and self._late[0].told.is_ready:
            self._read(self._late.pop(0))

    def finish(self) -> None:
        """Reads what is still on its way, and looks no further."""
        self._let_go()
        while self._late:
            self._read(self._late.pop(0))
        self._is_told = True

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._arrived = [], {}

    def _read(self, late: _Late) -> None:
        is_finite, skipped = late.told.get()
        hidden = [name for name, finite in zip(late.names, is_finite.tolist(), strict=True) if not finite]
        if skipped.item() or not hidden or self._is_told:
            return
        self._is_told = True
        others = f" and of {len(hidden) - 1} more parameters" if len(hidden) > 1 else ""
        falls, smaller = "", ""
        if late.is_scaled:
            falls, smaller = ", and the loss scale never falls for it", ", or scale losses by less (loss_scaling)"
        rank_zero_warn(
            f"The gradient of {hidden[0]!r}{others} is not finite after backward, and finite when the optimizer steps: "
            "a hook (on_after_backward, or one of the parameter), or training_step, replaces what is infinite. No step "
            f"is skipped for it{falls}, so that weights move by made-up gradients. Leave infinite gradients as they "
            f"are, so that their step is skipped{smaller}."
        )


def _hook_before_others(param: Tensor, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Registers a hook of a parameter that is called before those that it has, which stay in their order."""
    handle: RemovableHandle = param.register_hook(see)
    hooks: Any = param._backward_hooks
    others = {key: hook for key, hook in hooks.items() if key != handle.id}
    hooks.clear()
    hooks.update({handle.id: see, **others})
    return handle
