"""Remedies that make a step agree with fp32 again: a larger loss scale, or the smallest set of promotions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lightning_mixprec.numerics.formats import is_wider, promoted_for_range
from lightning_mixprec.planning.agreement import Agreement, Limits
from lightning_mixprec.planning.controller_state import Options
from lightning_mixprec.planning.promotions import Promotion, Promotions
from lightning_mixprec.planning.smallest_set import smallest

Try = Callable[[Promotions, float], Agreement]
"""Runs a step on a captured batch with layers promoted, at a loss scale."""

_LARGER, _SMALLER = (4, 8, 12, 16), (-4, -8)
"""Powers of two by which other loss scales are away."""


@dataclass(frozen=True)
class Candidate:
    """A layer that may be promoted.

    Attributes:
        name: Its name.
        format: The format that it computes in.
        flops: Multiplications and additions of its own matrix products in a step.
        is_pinned: Whether it is to be left alone.
        is_plain: Whether it only hands data on between the layers inside it.
        height: The number of layers below it on its longest side; 0 for a layer without layers inside.
    """

    name: str
    format: str
    flops: int = 0
    is_pinned: bool = False
    is_plain: bool = False
    height: int = 0


class Remedy(NamedTuple):
    """Promotions that help, and the loss scale to go with them; None for the present one."""

    promotions: dict[str, Promotion]
    scale: float | None = None


class Manner(NamedTuple):
    """A manner of promoting layers: to fp32, and to bf16."""

    fp32: Promotion
    bf16: Promotion


TIGHT = Manner(Promotion("fp32", "input"), Promotion("bf16", "input"))
"""Outputs have the format of the inputs, so no other layer computes in another format than before."""

WIDE = Manner(Promotion("fp32"), Promotion("bf16", "fp32"))
"""Outputs are handed on in fp32: they may be out of the range of fp16, or lose there what was gained."""


class Remedies:
    """Looks for remedies by trying them on a captured batch.

    Args:
        layers: The layers by name, each with the format that it computes in at present.
        limits: The limits within which a trial is good enough.
        options: The controller's options; of them the device, the loss scales and the number of trials.
        attempt: Tries promotions on top of those in force, and a loss scale.

    Attributes:
        bf16_tolerance: Distance from agreement that a promotion to bf16 may have, as a part of the limits.
    """

    def __init__(self, layers: Mapping[str, Candidate], limits: Limits, options: Options, attempt: Try) -> None:
        self._layers, self._limits, self._options, self._attempt = layers, limits, options, attempt
        self._trials_left = options.max_trials
        self.bf16_tolerance = 0.5

    def larger_scale(self, scale: float) -> Remedy | None:
        """A larger loss scale that is enough by itself."""
        for larger in self._scales(scale, _LARGER):
            if not self._trials_left:
                return None
            tried = self.attempt({}, larger)
            if not tried.is_finite:
                return None
            if self._limits.accepts(tried):
                return Remedy({}, larger)
        return None

    def promotions(self, scale: float, spared: Iterable[str] = (), culprits: Sequence[str] = ()) -> Remedy | None:
        """The smallest set of promotions that is enough: in bf16 where that will do, else in fp32.

        Args:
            scale: The loss scale.
            spared: Layers that are not to be promoted.
            culprits: Layers that are suspected, the likeliest first.
        """
        chosen, manner = self._smallest(scale, spared, culprits)
        return Remedy(self._narrowed(chosen, manner, scale)) if chosen else None

    def promotions_or_less(self, scale: float, culprits: Sequence[str] = ()) -> Remedy | None:
        """As :meth:`promotions`, with a smaller loss scale where that spares layers whose gradients only overflow."""
        chosen, lower = self._parts_of(culprits, scale)
        manner = TIGHT
        if not chosen:
            chosen, manner = self._smallest(scale, (), culprits)
            lower = scale
        for smaller in self._scales(scale, _SMALLER) if len(chosen) > 1 else ():
            fewer = self._within(chosen, manner, smaller)
            if len(fewer) < len(chosen):
                chosen, lower = fewer, smaller
        if not chosen:
            return None
        return Remedy(self._narrowed(chosen, manner, lower), lower if lower < scale else None)

    def unpinned(self, starved: Sequence[str], scale: float) -> Remedy | None:
        """A larger loss scale for starved layers, and promotions for the layers that hold it down."""
        others = [name for name in self._movable() if name not in starved]
        for larger in self._scales(scale, _LARGER):
            if self._agrees(dict.fromkeys(others, WIDE.fp32), larger):
                found = self.promotions(larger, spared=starved)
                return found._replace(scale=larger) if found is not None else None
        return None

    def attempt(self, promotions: Promotions, scale: float) -> Agreement:
        """Tries promotions on top of what is promoted already."""
        self._trials_left -= 1
        return self._attempt(promotions, scale)

    def _smallest(self, scale: float, spared: Iterable[str], culprits: Sequence[str]) -> tuple[list[str], Manner]:
        movable = [name for name in self._movable() if name not in set(spared)]
        suspects = [name for name in culprits if name in movable]
        free = [name for name in movable if name not in suspects and self._is_free(name)]
        rest = [name for name in movable if name not in suspects and not self._is_free(name)]
        leaves = [name for name in free if not self._layers[name].height]
        cheap, every = [*suspects, *free], [*suspects, *free, *rest]
        stages = [(part, manner) for part in (suspects[:1], suspects, cheap) for manner in (TIGHT, WIDE)]
        if suspects:
            stages.insert(2, ([suspects[0], *leaves], TIGHT))  # before what is around the suspect
        for candidates, manner in dict.fromkeys((tuple(part), manner) for part, manner in [*stages, (every, WIDE)]):
            if candidates and self._agrees(dict.fromkeys(candidates, manner.fp32), scale):
                return self._within(candidates, manner, scale), manner
        return [], WIDE

    def _parts_of(self, culprits: Sequence[str], scale: float) -> tuple[list[str], float]:
        """The parts that are to blame where a whole is accused, and the loss scale that goes with them.

        A container that computes wider also feeds its parts wider, so it helps where one of them alone would.
        """
        accused = self._layers.get(culprits[0]) if culprits else None
        if accused is None or not accused.height:
            return [], scale
        parts = [name for name in self._movable() if self._is_free(name) and not self._layers[name].height]
        for tried in (scale, *self._scales(scale, _SMALLER)) if parts else ():
            if self._agrees(dict.fromkeys(parts, TIGHT.fp32), tried):
                return self._within(parts, TIGHT, tried), tried
        return [], scale

    def _within(self, candidates: Sequence[str], manner: Manner, scale: float) -> list[str]:
        if len(candidates) == 1:
            return list(candidates)

        def works(names: Sequence[str]) -> bool:
            return self._agrees(dict.fromkeys(names, manner.fp32), scale)

        return smallest(candidates, works, self._trials_left) or list(candidates)

    def _narrowed(self, names: Sequence[str], manner: Manner, scale: float) -> dict[str, Promotion]:
        """Promotions to bf16 where the step agrees with that, too, and to fp32 elsewhere."""
        chosen = dict.fromkeys(names, manner.fp32)
        able = [name for name in names if promoted_for_range(self._layers[name].format) == "bf16"]
        able = able if self._options.has_bf16 else []
        together = {**chosen, **dict.fromkeys(able, manner.bf16)}
        if not able or self._agrees(together, scale, self.bf16_tolerance):
            return together
        if len(able) > 1:
            for name in able:
                narrower = {**chosen, name: manner.bf16}
                chosen = narrower if self._agrees(narrower, scale, self.bf16_tolerance) else chosen
        return chosen

    def _agrees(self, promotions: Promotions, scale: float, tolerance: float = 0.5) -> bool:
        return self._trials_left > 0 and self._limits.accepts(self.attempt(promotions, scale), tolerance)

    def _scales(self, scale: float, powers: Sequence[int]) -> list[float]:
        """Other loss scales, powers of two larger or smaller and within bounds, the nearest first."""
        if self._options.scales is None:
            return []
        smallest_scale, largest_scale = self._options.scales
        others = dict.fromkeys(min(max(scale * 2.0**power, smallest_scale), largest_scale) for power in powers)
        return [other for other in others if other != scale and (other > scale) == (powers[0] > 0)]

    def _movable(self) -> list[str]:
        """The layers that may be promoted: those without matrix products, then the cheapest, parts before wholes."""
        movable = [layer for layer in self._layers.values() if not layer.is_pinned and is_wider("fp32", layer.format)]
        movable.sort(key=lambda layer: (layer.is_plain, layer.flops, layer.height))
        return [layer.name for layer in movable]

    def _is_free(self, name: str) -> bool:
        return not self._layers[name].flops and not self._layers[name].is_plain
