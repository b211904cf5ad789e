"""The options of loss scaling."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from lightning_mixprec.errors import ScalingError

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
        """True if the scale can never change."""
        return self.min_scale == self.max_scale

    def bounded(self, scale: float) -> float:
        """The nearest scale within the bounds."""
        return min(max(scale, self.min_scale), self.max_scale)

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
