"""Loss scaling.

Gradients in fp16 vanish below 2**-24. The loss is therefore multiplied by a scale S before backward and the gradients
by 1/S before the optimizer sees them; S is searched for while training runs [1]_::

    every backward:      loss * S
    every optimizer:     g = g / S;  found_inf = any(not finite g);  step unless found_inf
    end of the batch:    if any found_inf:  overflows += 1;  S = S * backoff_factor  once overflows >= hysteresis
                         elif growth_interval batches without one:  S = S * growth_factor;  overflows = 0
                         S = clamp(S, min_scale, max_scale);  gradients that still wait for their step *= S_new / S_old

.. [1] Micikevicius et al., Mixed Precision Training, ICLR 2018, section 3.2.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mixprec.errors import ScalingError
from lightning_mixprec.numerics.flat_batches import moved_to
from lightning_mixprec.optim.gradients import (
    GradMark,
    check_and_unscale,
    grads_of,
    multiply_,
    obeys_found_inf,
    params_of,
    scalar,
    spent_params,
    tell_found_inf,
    untell_found_inf,
)
from lightning_mixprec.optim.loss_scaling_options import LossScaling
from lightning_mixprec.records.schema import Tally, matches


class LossScaler:
    """Scales losses, unscales gradients, finds non-finite ones, skips their step, and adapts the scale.

    Unlike ``torch.amp.GradScaler`` it serves several optimizers that step at different times: the scale changes in
    :meth:`update` alone, and gradients that wait for a later step change with it. Without ``options`` it scales by 1,
    so that no caller asks whether there is a scaler; it then still guards steps if ``guards`` is true.

    Args:
        options: How to scale; None for not at all.
        guards: Whether steps with non-finite gradients are skipped when nothing is scaled.

    Attributes:
        shared_on: The device on which ranks tell each other what they found, because each holds a part of the same
            gradients (FSDP); None where gradients are whole.
    """

    def __init__(self, options: LossScaling | None = None, guards: bool = True) -> None:
        self.options = options
        self.guards = guards
        self.shared_on: torch.device | None = None
        self._start_at(options.init_scale if options else 1.0)
        self._unscaled: dict[Optimizer, Tensor | None] = {}  # since the last backward; None once it stepped
        self._found_before: dict[Optimizer, Tensor] = {}
        self._flags: list[Tensor] = []
        self._stepped: list[Optimizer] = []
        self._marks: dict[int, GradMark] = {}

    @property
    def is_active(self) -> bool:
        """True if losses are scaled."""
        return self.options is not None

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the scale; the same tensor if nothing is scaled."""
        self._scale_waiting()
        if self.options is None:
            return loss
        return loss * moved_to(loss.device, self._on(loss.device)[0])

    def unscale_(self, optimizer: Optimizer) -> Tensor | None:
        """Divides the optimizer's gradients by the scale, once per step, and looks for non-finite ones.

        No host synchronisation. Returns the flag that :meth:`step` obeys (fp32 scalar, 1 if any gradient is not
        finite), or None if this scaler neither scales nor guards.
        """
        if self.found_inf(optimizer) is not None or not (self.is_active or self.guards):
            return self.found_inf(optimizer)
        fresh, done = self._gradients(optimizer)
        device = (
            self._tensors[0].device if self._tensors is not None else next(iter(fresh + done), torch.zeros(())).device
        )
        found_inf = scalar(0.0, device)
        if fresh:
            divisor = self._on(device)[0].double().reciprocal().float() if self.is_active else None
            found_inf = check_and_unscale(fresh, divisor, found_inf)
        if done:
            found_inf = check_and_unscale(done, None, found_inf)
        if optimizer in self._found_before:
            found_inf = torch.maximum(found_inf, moved_to(device, self._found_before.pop(optimizer)))
        if self.shared_on is not None:
            found_inf = moved_to(self.shared_on, found_inf)
            torch.distributed.all_reduce(found_inf, torch.distributed.ReduceOp.MAX)
        self._unscaled[optimizer] = found_inf
        if fresh or done or self.shared_on is not None:
            self._flags.append(found_inf)
        return found_inf

    def step(self, optimizer: Optimizer, **kwargs: Any) -> bool | Tensor:
        """Steps the optimizer unless a gradient is not finite; unscales them first if that was not done.

        A fused optimizer on an accelerator obeys the flag on the device; otherwise the flag is read, as
        ``torch.amp.GradScaler`` reads it.

        Returns:
            Whether the step was skipped; the flag itself if it was not read.
        """
        skipped = self._decide(optimizer)
        if skipped is not True:
            try:
                tell_found_inf(optimizer, skipped)
                optimizer.step(**kwargs)
            finally:
                untell_found_inf(optimizer)
        return skipped

    def step_by_closure(
        self, optimizer: Optimizer, closure: Callable[[], Any], prepare: Callable[[], None], **kwargs: Any
    ) -> tuple[Any, bool | Tensor]:
        """Steps an optimizer that evaluates the loss itself, as any may while nothing is scaled.

        The step is decided about at the first evaluation, before anything has moved. Later ones (LBFGS, SAM) are not
        guarded: the optimizer has moved the weights to where it evaluates.

        Args:
            optimizer: The optimizer.
            closure: Computes the loss and its gradients.
            prepare: Called after each evaluation, with the gradients checked: hooks, clipping.
            kwargs: Passed to ``optimizer.step``.

        Returns:
            What the optimizer returned (its closure, if the step was skipped), and the outcome as in :meth:`step`.
        """
        skipped: bool | Tensor | None = None

        def evaluate() -> Any:
            nonlocal skipped
            result = closure()
            if skipped is not None:
                prepare()
                return result
            self.unscale_(optimizer)
            prepare()
            skipped = self._decide(optimizer)
            if skipped is True:
                raise _SparedError(result)
            tell_found_inf(optimizer, skipped)
            return result

        try:
            result = optimizer.step(closure=evaluate, **kwargs)
        except _SparedError as spared:
            (result,) = spared.args
        finally:
            untell_found_inf(optimizer)
        return result, False if skipped is None else skipped

    def _decide(self, optimizer: Optimizer) -> bool | Tensor:
        found_inf = self.unscale_(optimizer)
        if optimizer in self._unscaled:
            self._unscaled[optimizer] = None
        self._stepped.append(optimizer)
        for param in params_of(optimizer) if self._marks else ():
            self._marks.pop(id(param), None)
        if found_inf is None:
            return False
        return bool(found_inf.item()) if _is_read(optimizer, found_inf) else found_inf

    def update(self, waiting: Iterable[Optimizer] = ()) -> None:
        """Adapts the scale to what the steps since the last update found. No host synchronisation.

        Args:
            waiting: Optimizers that may hold gradients which were scaled by the present scale and not stepped yet.
        """
        flags, self._flags = self._flags, []
        stepped, self._stepped = self._stepped, []
        marks, self._marks = self._marks, {}
        if self.options is None or not flags or self.options.is_static:
            return
        scale = self._on(flags[0].device)[0]
        found_inf = flags[0] if len(flags) == 1 else torch.stack([flag.to(scale.device) for flag in flags]).amax()
        waiting = [optimizer for optimizer in waiting if self.found_inf(optimizer) is None]
        if not marks:
            waiting = [optimizer for optimizer in waiting if optimizer not in stepped]
        before = scale.clone() if waiting else scale
        self._adapt(self.options, found_inf.to(scale.device))
        if waiting:
            self._rescale(waiting, scale / before, spent_params(stepped, marks))

    def configure(self, options: LossScaling | None, waiting: Iterable[Optimizer] = ()) -> None:
        """Starts, ends or changes scaling between two steps; gradients that wait for their step follow.

        A scale that is already being searched for goes on within the new bounds; scaling that starts anew starts at
        ``init_scale``.
        """
        if options == self.options:
            return
        before, was_active = self.get_scale(), self.is_active
        self.options = options
        after = 1.0 if options is None else options.bounded(before) if was_active else options.init_scale
        self._start_at(after)
        if after != before:
            self._rescale(waiting, after / before)

    def move_to(self, scale: float, waiting: Iterable[Optimizer] = ()) -> None:
        """Moves the scale between two steps, within the bounds, and counts anew. No host synchronisation.

        Args:
            scale: Where the search goes on.
            waiting: Optimizers whose gradients wait for their step; the gradients follow.

        Raises:
            ScalingError: Nothing searches for a scale, or this is none.
        """
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 0 < scale < math.inf:
            raise ScalingError(f"The loss scale was to become {scale!r}; it has to be a positive finite number.")
        if self.options is None or self.options.is_static:
            why = "nothing is scaled" if self.options is None else f"the loss scale is static ({self.get_scale():g})"
            raise ScalingError(
                f"The loss scale was to become {scale:g}, but {why}; only a dynamic one moves, such as loss_scaling="
                "'auto' has where a layer computes in fp16."
            )
        after = self.options.bounded(float(scale))
        ratio = after / self.present_scale
        if self._tensors is None:
            self._start_at(after)
        else:
            for tensor, value in zip(self._tensors, (after, 0, 0), strict=True):
                tensor.fill_(value)
        self._rescale(waiting, ratio)

    def forget_steps(self) -> None:
        """Drops what is left of a step that an exception cut short."""
        for steps in (self._unscaled, self._found_before, self._flags, self._stepped, self._marks):
            steps.clear()

    @property
    def present_scale(self) -> float | Tensor:
        """The present scale, as the device's own tensor once it is there: never waits, changes with the next update."""
        return (self._tensors or self._start)[0]

    def found_inf(self, optimizer: Optimizer) -> Tensor | None:
        """The device's flag of non-finite gradients while the optimizer's step is being prepared."""
        return self._unscaled.get(optimizer)

    def get_scale(self) -> float:
        """The present scale. Waits for the device."""
        return float(self.present_scale)

    def is_at_minimum(self) -> bool | Tensor:
        """True if the scale can fall no further; on the device, once the scale is there."""
        if self.options is None or self.options.is_static:
            return False
        return self.present_scale <= self.options.min_scale

    def state_dict(self) -> dict[str, float | int]:
        """The scale and its counters as plain numbers. Waits for the device."""
        scale, growth_tracker, overflows = self._tensors or self._start
        return {"scale": float(scale), "growth_tracker": int(growth_tracker), "overflows": int(overflows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`, or that of a ``torch.amp.GradScaler``; the options stay the configured ones.

        A scale outside the configured bounds is moved to the nearer bound. A scale that no training can go on with
        (0, NaN, infinite) is replaced by ``init_scale``, with a warning.

        Raises:
            ScalingError: The state holds something else than numbers.
        """
        if self.options is None or "scale" not in state:
            return
        growth_tracker = state.get("growth_tracker", state.get("_growth_tracker", 0))
        scale, overflows = state["scale"], state.get("overflows", 0)
        if not matches([scale, growth_tracker, overflows], tuple[float, Tally, Tally]):
            raise ScalingError(
                f"The checkpoint's loss scaler is damaged: its scale and counters are {scale!r}, {growth_tracker!r} "
                f"and {overflows!r}. Resume from another checkpoint, or load the weights alone."
            )
        if not math.isfinite(scale) or scale <= 0:
            warnings.warn(
                f"The checkpoint's loss scale is {scale:g}: the run that wrote it had collapsed. Starting again at "
                f"init_scale={self.options.init_scale:g}.",
                stacklevel=2,
            )
            scale = self.options.init_scale
        self._start_at(self.options.bounded(scale), growth_tracker, overflows)

    def _start_at(self, scale: float, growth_tracker: int = 0, overflows: int = 0) -> None:
        self._start = scale, growth_tracker, overflows
        self._tensors: tuple[Tensor, Tensor, Tensor] | None = None

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The scale, the batches since it changed, and the overflows, on the device that asks for them first."""
        if self._tensors is None:
            scale, *counts = self._start
            tracker, overflows = (torch.full((), count, dtype=torch.int32, device=device) for count in counts)
            self._tensors = scalar(scale, device), tracker, overflows
        return self._tensors

    def _adapt(self, options: LossScaling, found_inf: Tensor) -> None:
        scale, tracker, overflows = self._on(found_inf.device)
        backs_off = found_inf
        if options.hysteresis > 1:
            overflows.add_(found_inf > 0)
            backs_off = found_inf * (overflows >= options.hysteresis)
            tracker.masked_fill_(found_inf > 0, -1)
        torch._amp_update_scale_(
            scale, tracker, backs_off, options.growth_factor, options.backoff_factor, options.growth_interval
        )
        if options.hysteresis > 1:
            overflows.masked_fill_((found_inf == 0) & (tracker == 0), 0)
        scale.clamp_(options.min_scale, options.max_scale)

    def _scale_waiting(self) -> None:
        """Scales anew what was unscaled, to be clipped, and not stepped yet: the coming backward may add to it."""
        prepared = {optimizer: flag for optimizer, flag in self._unscaled.items() if flag is not None}
        self._unscaled.clear()
        for param in (param for optimizer in self._stepped if self.is_active for param in params_of(optimizer)):
            self._marks.setdefault(id(param), GradMark(param.grad))
        if prepared or self._found_before:
            found = self._found_before | prepared
            self._found_before = {
                optimizer: flag for optimizer, flag in found.items() if grads_of(params_of(optimizer))
            }
            if self.is_active:
                waiting = [optimizer for optimizer in prepared if optimizer in self._found_before]
                self._rescale(waiting, self.present_scale)

    def _gradients(self, optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
        """Those to unscale, and those of parameters that another optimizer shares and has unscaled."""
        params = params_of(optimizer)
        if not self._unscaled:
            return grads_of(params), []
        unscaled = self._unscaled_params()
        fresh = [param for param in params if id(param) not in unscaled]
        return grads_of(fresh), grads_of([param for param in params if id(param) in unscaled])

    def _unscaled_params(self) -> set[int]:
        return {id(param) for optimizer in self._unscaled for param in params_of(optimizer)}

    def _rescale(self, optimizers: Iterable[Optimizer], ratio: Tensor | float, spent: Set[int] = frozenset()) -> None:
        done = self._unscaled_params() | spent
        params = (param for optimizer in optimizers for param in params_of(optimizer))
        waiting = {id(param): param for param in params if id(param) not in done}
        multiply_(grads_of(list(waiting.values())), ratio)


class _SparedError(Exception):
    """Leaves an optimizer's step before it has moved anything; carries what its closure returned."""


def _is_read(optimizer: Optimizer, found_inf: Tensor) -> bool:
    return found_inf.device.type == "cpu" or not obeys_found_inf(optimizer)
