"""Loss scaling: its options, and the scaler that applies them.

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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mixprec.errors import ScalingError
from lightning_mixprec.numerics.gradients import (
    check_and_unscale,
    grads_of,
    obeys_found_inf,
    params_of,
    scalar,
    step_fused,
)

_FP32 = torch.finfo(torch.float32)
_INTEGERS = ("growth_interval", "hysteresis", "max_consecutive_skips")


@dataclass(frozen=True)
class LossScaling:
    """Options of dynamic loss scaling; the defaults are those of ``torch.amp.GradScaler`` where it has the option.

    Args:
        init_scale: First scale.
        growth_factor: What the scale is multiplied by after ``growth_interval`` batches without overflow; above 1.
        backoff_factor: What the scale is multiplied by after an overflow; between 0 and 1.
        growth_interval: Batches without overflow until the scale grows.
        min_scale: The scale never falls below this; an overflow at this scale is handled by ``at_min``.
        max_scale: The scale never grows above this.
        hysteresis: Overflows until the scale backs off (each later one backs off at once, until the scale has grown).
        at_min: ``"raise"`` an error or ``"warn"`` once when a step overflows at ``min_scale``.
        max_consecutive_skips: Steps of one optimizer skipped in a row after which an error is raised, in any format.

    Raises:
        ScalingError: An option is not a finite positive number, or the options contradict each other.

    >>> LossScaling(init_scale=1024).growth_interval
    2000
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = 2.0**-14
    max_scale: float = 2.0**24
    hysteresis: int = 1
    at_min: Literal["raise", "warn"] = "raise"
    max_consecutive_skips: int = 100

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "at_min":
                _check_number(field.name, getattr(self, field.name))
        if self.at_min not in ("raise", "warn"):
            raise ScalingError(f"loss_scaling: at_min is {self.at_min!r}; allowed are 'raise' and 'warn'.")
        if self.growth_factor <= 1:
            raise ScalingError(f"loss_scaling: growth_factor is {self.growth_factor}; it has to be above 1.")
        if self.backoff_factor >= 1:
            raise ScalingError(f"loss_scaling: backoff_factor is {self.backoff_factor}; it has to be below 1.")
        if not self.min_scale <= self.init_scale <= self.max_scale:
            raise ScalingError(
                f"loss_scaling: init_scale {self.init_scale:g} is not between min_scale {self.min_scale:g} "
                f"and max_scale {self.max_scale:g}; widen the bounds or move init_scale."
            )

    @property
    def is_static(self) -> bool:
        """Whether the scale can never change."""
        return self.min_scale == self.max_scale

    @classmethod
    def static(cls, scale: float) -> "LossScaling":
        """A scale that never changes."""
        _check_number("a static scale", scale)
        return cls(init_scale=scale, min_scale=scale, max_scale=scale)

    @classmethod
    def from_value(cls, value: "float | Mapping[str, Any] | LossScaling") -> "LossScaling":
        """Options from what a user may write: a number (static scale), a mapping of options, or the options.

        Raises:
            ScalingError: Anything else, an unknown option or an invalid value.
        """
        if isinstance(value, LossScaling):
            return value
        if isinstance(value, Mapping):
            known = [field.name for field in fields(cls)]
            for key in value:
                if key not in known:
                    raise ScalingError(f"loss_scaling: unknown option {key!r}; allowed are {', '.join(known)}.")
            return cls(**value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return cls.static(value)
        raise ScalingError(
            f"loss_scaling is {value!r}; allowed are 'auto', False, a positive number (a static scale), "
            "a mapping of options, or a LossScaling."
        )


def _check_number(name: str, value: object) -> None:
    allowed = int if name in _INTEGERS else (int, float)
    kind = "a positive integer" if name in _INTEGERS else "a positive finite number"
    is_number = isinstance(value, allowed) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not _FP32.tiny <= value <= _FP32.max:  # type: ignore[arg-type,operator]
        raise ScalingError(
            f"loss_scaling: {name} is {value!r}; it has to be {kind} that fp32 holds as a normal number."
        )


class LossScaler:
    """Scales losses, unscales gradients, finds non-finite ones, skips their step, and adapts the scale.

    Unlike ``torch.amp.GradScaler`` it serves several optimizers that step at different times: the scale changes in
    :meth:`update` alone, and gradients that wait for a later step change with it. Without ``options`` it scales by 1,
    so that no caller asks whether there is a scaler; it then still guards steps if ``guards`` is true.

    Args:
        options: How to scale; None for not at all.
        guards: Whether steps with non-finite gradients are skipped when nothing is scaled.
    """

    def __init__(self, options: LossScaling | None = None, guards: bool = True) -> None:
        self.options = options
        self.guards = guards
        self._start = {"scale": options.init_scale if options else 1.0, "growth_tracker": 0, "overflows": 0}
        self._scale: Tensor | None = None
        self._growth_tracker: Tensor | None = None
        self._overflows: Tensor | None = None
        self._unscaled: dict[Optimizer, Tensor] = {}
        self._found_before: dict[Optimizer, Tensor] = {}
        self._flags: list[Tensor] = []
        self._stepped: list[Optimizer] = []
        self._unscaled_since_backward: dict[Optimizer, None] = {}

    @property
    def is_active(self) -> bool:
        """Whether losses are scaled."""
        return self.options is not None

    def scale(self, loss: Tensor) -> Tensor:
        """``loss`` times the scale; the same tensor if nothing is scaled."""
        self._scale_waiting()
        if self.options is None:
            return loss
        return loss * self._tensors(loss.device)[0].to(loss.device, non_blocking=True)

    def unscale_(self, optimizer: Optimizer) -> Tensor | None:
        """Divides the optimizer's gradients by the scale, once per step, and looks for non-finite ones.

        No host synchronisation. Returns the flag that :meth:`step` obeys (fp32 scalar, 1 if any gradient is not
        finite), or None if this scaler neither scales nor guards.
        """
        if optimizer in self._unscaled or not (self.is_active or self.guards):
            return self._unscaled.get(optimizer)
        fresh, done = self._gradients(optimizer)
        device = self._scale.device if self._scale is not None else next(iter(fresh + done), torch.zeros(())).device
        found_inf = scalar(0.0, device)
        if fresh:
            divisor = self._tensors(device)[0].double().reciprocal().float() if self.is_active else scalar(1.0, device)
            found_inf = check_and_unscale(fresh, divisor, found_inf)
        if done:
            found_inf = check_and_unscale(done, scalar(1.0, device), found_inf)
        if optimizer in self._found_before:
            found_inf = torch.maximum(found_inf, self._found_before.pop(optimizer).to(device, non_blocking=True))
        self._unscaled[optimizer] = found_inf
        self._unscaled_since_backward[optimizer] = None
        if fresh or done:
            self._flags.append(found_inf)
        return found_inf

    def step(self, optimizer: Optimizer, **kwargs: Any) -> bool | Tensor:
        """Steps the optimizer unless a gradient is not finite; unscales them first if that was not done.

        A fused optimizer on an accelerator obeys the flag on the device; otherwise the flag is read, as
        ``torch.amp.GradScaler`` reads it.

        Returns:
            Whether the step was skipped; the flag itself if it was not read.
        """
        found_inf = self.unscale_(optimizer)
        self._unscaled.pop(optimizer, None)
        self._stepped.append(optimizer)
        if found_inf is not None and not _is_read(optimizer, found_inf):
            step_fused(optimizer, found_inf, kwargs)
            return found_inf
        skipped = found_inf is not None and bool(found_inf.item())
        if not skipped:
            optimizer.step(**kwargs)
        return skipped

    def update(self, waiting: Iterable[Optimizer] = ()) -> None:
        """Adapts the scale to what the steps since the last update found. No host synchronisation.

        Args:
            waiting: Optimizers that may hold gradients which were scaled by the present scale and not stepped yet.
        """
        flags, self._flags = self._flags, []
        stepped, self._stepped = self._stepped, []
        if self.options is None or not flags or self.options.is_static:
            return
        scale = self._tensors(flags[0].device)[0]
        found_inf = flags[0] if len(flags) == 1 else torch.stack([flag.to(scale.device) for flag in flags]).amax()
        waiting = [optimizer for optimizer in waiting if optimizer not in stepped and optimizer not in self._unscaled]
        before = scale.clone() if waiting else scale
        self._adapt(self.options, found_inf.to(scale.device))
        if waiting:
            self._rescale(waiting, scale / before, stepped)

    def configure(self, options: LossScaling | None, waiting: Iterable[Optimizer] = ()) -> None:
        """Starts, ends or changes scaling between two steps; gradients that wait for their step follow.

        A scale that is already being searched for goes on within the new bounds; scaling that starts anew starts at
        ``init_scale``.
        """
        if options == self.options:
            return
        before, was_active = self.get_scale(), self.is_active
        self.options = options
        after = min(max(before, options.min_scale), options.max_scale) if options and was_active else None
        self._start_at(after if after is not None else options.init_scale if options else 1.0)
        ratio = self._start["scale"] / before
        if ratio != 1:
            self._rescale([optimizer for optimizer in waiting if optimizer not in self._unscaled], ratio, [])

    def forget_steps(self) -> None:
        """Drops what is left of a step that an exception cut short."""
        for steps in (self._unscaled, self._found_before, self._flags, self._stepped, self._unscaled_since_backward):
            steps.clear()

    def get_scale(self) -> float:
        """The present scale. Waits for the device."""
        return float(self._state("scale", self._scale))

    def is_at_minimum(self) -> bool | Tensor:
        """Whether the scale can fall no further; on the device, once the scale is there."""
        if self.options is None or self.options.is_static:
            return False
        return (self._start["scale"] if self._scale is None else self._scale) <= self.options.min_scale

    def state_dict(self) -> dict[str, float | int]:
        """The scale and its counters as plain numbers. Waits for the device."""
        return {
            "scale": self.get_scale(),
            "growth_tracker": int(self._state("growth_tracker", self._growth_tracker)),
            "overflows": int(self._state("overflows", self._overflows)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`, or that of a ``torch.amp.GradScaler``; the options stay the configured ones.

        A scale outside the configured bounds is moved to the nearer bound. A scale that no training can go on with
        (0, NaN, infinite) is replaced by ``init_scale``, with a warning.
        """
        if self.options is None or "scale" not in state:
            return
        scale = float(state["scale"])
        if not math.isfinite(scale) or scale <= 0:
            warnings.warn(
                f"The checkpoint's loss scale is {scale:g}: the run that wrote it had collapsed. Starting again at "
                f"init_scale={self.options.init_scale:g}.",
                stacklevel=2,
            )
            scale = self.options.init_scale
        self._start_at(min(max(scale, self.options.min_scale), self.options.max_scale))
        self._start["growth_tracker"] = int(state.get("growth_tracker", state.get("_growth_tracker", 0)))
        self._start["overflows"] = int(state.get("overflows", 0))

    def _start_at(self, scale: float) -> None:
        self._start = {"scale": scale, "growth_tracker": 0, "overflows": 0}
        self._scale = self._growth_tracker = self._overflows = None

    def _state(self, name: str, tensor: Tensor | None) -> float:
        return self._start[name] if tensor is None else tensor.item()

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if self._scale is None or self._growth_tracker is None or self._overflows is None:
            self._scale = scalar(self._start["scale"], device)
            self._growth_tracker = torch.full((), int(self._start["growth_tracker"]), dtype=torch.int32, device=device)
            self._overflows = torch.full((), int(self._start["overflows"]), dtype=torch.int32, device=device)
        return self._scale, self._growth_tracker, self._overflows

    def _adapt(self, options: LossScaling, found_inf: Tensor) -> None:
        scale, tracker, overflows = self._tensors(found_inf.device)
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
        self._unscaled_since_backward.clear()
        if self._unscaled or self._found_before:
            found = self._found_before | self._unscaled
            self._found_before = {
                optimizer: flag for optimizer, flag in found.items() if grads_of(params_of(optimizer))
            }
            waiting, self._unscaled = [optimizer for optimizer in self._unscaled if optimizer in self._found_before], {}
            if self._scale is not None:
                self._rescale(waiting, self._scale, [])

    def _gradients(self, optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
        """Those to unscale, and those of parameters that another optimizer shares and has unscaled."""
        params = params_of(optimizer)
        if not self._unscaled_since_backward:
            return grads_of(params), []
        unscaled = self._unscaled_params()
        fresh = [param for param in params if id(param) not in unscaled]
        return grads_of(fresh), grads_of([param for param in params if id(param) in unscaled])

    def _unscaled_params(self) -> set[int]:
        return {id(param) for optimizer in self._unscaled_since_backward for param in params_of(optimizer)}

    def _rescale(self, optimizers: Iterable[Optimizer], ratio: Tensor | float, stepped: list[Optimizer]) -> None:
        done = self._unscaled_params() | {id(param) for optimizer in stepped for param in params_of(optimizer)}
        params = (param for optimizer in optimizers for param in params_of(optimizer))
        waiting = {id(param): param for param in params if id(param) not in done}
        if grads := grads_of(list(waiting.values())):
            torch._foreach_mul_(grads, ratio)


def _is_read(optimizer: Optimizer, found_inf: Tensor) -> bool:
    return found_inf.device.type == "cpu" or not obeys_found_inf(optimizer)
