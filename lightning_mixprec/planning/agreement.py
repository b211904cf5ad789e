"""Agreement of a step in the run's formats with the same step in fp32, and its limits."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.records import advice
from lightning_mixprec.records.words import listed

_LARGEST_NOISE = 2.0**-8
_TINY = 2.0**-12
_MOST_USES = 16
_STEADY_COSINE, _STEADY_RATIO = 0.997, 1.02


class LayerAgreement(NamedTuple):
    """The gradient of a layer's own weights against fp32's.

    Attributes:
        cosine: Of the two.
        ratio: Of their norms; 0 if the layer learns nothing.
        size: Norm of the layer's gradient, as a share of the largest one of the step.
        share: The same of fp32's gradients.
    """

    cosine: float
    ratio: float
    size: float
    share: float = 1.0

    @property
    def is_steady(self) -> bool:
        """True if both are about the same."""
        return self.cosine >= _STEADY_COSINE and 1 / _STEADY_RATIO <= self.ratio <= _STEADY_RATIO

    @property
    def is_small(self) -> bool:
        """True if fp32's is so small that it may be nothing but rounding."""
        return self.share < _TINY

    @property
    def is_doubtful(self) -> bool:
        """True if the two differ, and fp32's may be nothing but rounding."""
        return self.is_small and not self.is_steady

    @property
    def is_noise(self) -> bool:
        """True if there is only rounding to see: fp32 has next to no gradient here (a bias before a normalization).

        Such a gradient is far larger than fp32's and far smaller than the other layers'.
        """
        return self.ratio > 8 and self.size < _LARGEST_NOISE


@dataclass(frozen=True)
class Agreement:
    """The agreement of a step with fp32.

    Attributes:
        is_finite: Whether losses and gradients are finite.
        loss_gap: Largest ``|L_low - L_fp32| / |L_fp32|`` of the step's losses; for the controller, one that is next to
            nothing beside what losses have been is taken as larger than it is. NaN if fp32 has no loss that goes
            backward through Lightning; infinite if there is another number of losses than in fp32.
        layers: The layers whose weights have a gradient in fp32.
        weighed_gap: The gap as a part of no less than a tenth of the terms that the loss is made of: one in which they
            cancel is zero but for rounding. None for the gap itself.
    """

    is_finite: bool
    loss_gap: float
    layers: Mapping[str, LayerAgreement]
    weighed_gap: float | None = None

    @property
    def gap_to_judge(self) -> float:
        """The gap that limits are for."""
        return self.loss_gap if self.weighed_gap is None else self.weighed_gap

    @property
    def is_doubtful(self) -> bool:
        """True if it has to be asked which gradients are rounding noise in fp32, too."""
        return bool(self.doubtful)

    @property
    def doubtful(self) -> list[str]:
        """The layers of which that has to be asked."""
        return [name for name, layer in self.layers.items() if layer.is_doubtful] if self.is_finite else []

    def without_noise(self, in_fp32: "Agreement") -> "Agreement":
        """The same without the layers whose gradient is rounding noise: next to nothing, and not steady in fp32 either.

        Args:
            in_fp32: The agreement of fp32 with itself, when all is rounded otherwise, at this step or one not long ago.
        """
        noise = {name for name, layer in in_fp32.layers.items() if layer.is_doubtful}
        layers = {name: each for name, each in self.layers.items() if not (name in noise and each.is_small)}
        return replace(self, layers=layers)

    @property
    def cosines(self) -> dict[str, float]:
        """By layer, the cosine between its gradient and fp32's; NaN if one of them is not finite."""
        return {name: layer.cosine for name, layer in self.layers.items()}

    def summary(self) -> dict[str, Any]:
        """Plain values: the loss gap and the smallest cosine; None where there is none."""
        if not self.is_finite:
            return {"is_finite": False}
        worst = min((layer.cosine for layer in self.layers.values() if not layer.is_noise), default=math.nan)
        return {"is_finite": True, "loss_gap": _plain(self.loss_gap), "min_grad_cosine": _plain(worst)}


@dataclass
class KnownNoise:
    """Which gradients of a run are rounding noise in fp32, too: measured now and then, as it takes two more replays.

    Attributes:
        in_fp32: The latest agreement of fp32 with itself, when all is rounded otherwise.
        uses: How often it was used since.
    """

    in_fp32: Agreement | None = None
    uses: int = 0

    def taken_out_of(self, agreement: Agreement, measure: Callable[[], Agreement]) -> Agreement:
        """An agreement without such layers. Measured anew for a layer that was not small, and at every 16th use."""
        known = {} if self.in_fp32 is None else self.in_fp32.layers
        is_known = all(name in known and known[name].is_small for name in agreement.doubtful)
        if self.in_fp32 is None or not is_known or self.uses >= _MOST_USES:
            self.in_fp32, self.uses = measure(), 0
        self.uses += 1
        return agreement.without_noise(self.in_fp32)


@dataclass(frozen=True)
class Limits:
    """Limits within which a step agrees with fp32 well enough to go on, and narrower ones to adopt a change.

    They are those of :mod:`lightning_mixprec.records.advice` at which is acted. What is adopted has to agree twice as
    well as what is left alone, so that nothing goes to and fro.

    Attributes:
        min_cosine: Of each layer's gradient with fp32's.
        max_loss_gap: Of the loss to fp32's.
        max_ratio: Of the norms of each layer's gradient in both, either way.
    """

    min_cosine: float = advice.MIN_COSINE_TO_ACT
    max_loss_gap: float = advice.MAX_LOSS_GAP_TO_ACT
    max_ratio: float = 1.25

    def failing(self, agreement: Agreement) -> list[str]:
        """The layers that do not agree, the worst first."""
        bad = {name: layer for name, layer in agreement.layers.items() if self._is_off(layer, 1.0)}
        return sorted(bad, key=lambda name: bad[name].cosine)

    def starved(self, agreement: Agreement) -> list[str]:
        """The layers that lose so much of their gradient that they do not learn."""
        return [name for name in self.failing(agreement) if agreement.layers[name].ratio < 1 - advice.STARVED]

    def poisoned(self, agreement: Agreement) -> list[str]:
        """The layers whose gradient is more than twice as large as it should be.

        A step with such a gradient stays in an optimizer's second moments for a thousand steps.
        """
        return [name for name in self.failing(agreement) if agreement.layers[name].ratio > 2]

    def gap_is_large(self, agreement: Agreement) -> bool:
        """True if the loss differs too much."""
        return agreement.gap_to_judge > self.max_loss_gap

    def reason(self, agreement: Agreement) -> str:
        """What is wrong with a step, in part of a line."""
        if not agreement.is_finite:
            return "overflow"
        if starved := self.starved(agreement):
            return f"gradients of {listed(starved)} vanish"
        if failing := self.failing(agreement):
            return f"gradients of {listed(failing)} differ from fp32's"
        return "loss differs from fp32's"

    def accepts(self, agreement: Agreement, tolerance: float = 0.5) -> bool:
        """True if a step agrees so well that its formats may be adopted.

        Args:
            agreement: The step's agreement.
            tolerance: The part of the limits that may be used up.
        """
        if not agreement.is_finite or agreement.gap_to_judge > self.max_loss_gap / 2:
            return False
        return not any(self._is_off(layer, tolerance) for layer in agreement.layers.values())

    def _is_off(self, layer: LayerAgreement, tolerance: float) -> bool:
        if layer.is_noise:
            return False
        most = self.max_ratio**tolerance
        off_in_size = not 1 / most <= layer.ratio <= most
        return off_in_size or not layer.cosine >= 1 - (1 - self.min_cosine) * tolerance


def limits_for(formats: Iterable[str]) -> Limits:
    """The limits for a step that computes in these formats: coarse ones cannot agree as well."""
    is_coarse = any(get_format(format).is_coarse for format in formats)
    return Limits(min_cosine=advice.min_cosine_to_act(is_coarse=is_coarse))


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
