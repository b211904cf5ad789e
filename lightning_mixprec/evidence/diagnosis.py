"""Diagnosis of a failed step: the layer that overflowed, in which direction, and if precision is to blame at all."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_mixprec import ranks
from lightning_mixprec.engine.sharding import is_any_sharded
from lightning_mixprec.errors import OtherRankError, TraceLeftError, one_line
from lightning_mixprec.evidence.comparison import Comparison, Wanted, is_finite
from lightning_mixprec.evidence.instruments.memory import is_out_of_memory
from lightning_mixprec.evidence.instruments.probe import layers_of, own_parameters, weight_gradients
from lightning_mixprec.evidence.instruments.recording import CAST
from lightning_mixprec.evidence.instruments.sandbox import Sandbox
from lightning_mixprec.evidence.instruments.trace import Origin, Trace, layer_of, origin_of
from lightning_mixprec.evidence.replay import Halving, Replayed, StepReplay
from lightning_mixprec.evidence.run_formats import Formats, with_layer_in
from lightning_mixprec.evidence.saved_batches import nonfinite_in, repaired
from lightning_mixprec.evidence.step_window import KeptBatch
from lightning_mixprec.numerics.finite import all_finite
from lightning_mixprec.numerics.formats import FORMATS, compute_formats, get_format, promoted_for_range
from lightning_mixprec.numerics.rates import underflow_rate
from lightning_mixprec.records.advice import STARVED, overflow
from lightning_mixprec.records.events import Cause, Direction, Frame, Verdict

T = TypeVar("T")

USUAL_SCALE = 65536.0
"""The loss scale that runs begin with."""

_LEAST_POWER = -14
_TRIES = 6
_MOST_CHARACTERS = 100
_HALVED = "on half of the batch, as memory ran out"


@dataclass(frozen=True)
class Diagnosis:
    """The reason that a step failed.

    Attributes:
        cause: The record of it.
        frames: The operations around the one that failed, with their smallest and largest magnitudes.
        is_search: Whether the run searches for its loss scale.
        has_lost_weights: Whether weights are not finite.
    """

    cause: Cause
    frames: tuple[Frame, ...] = ()
    is_search: bool = True
    has_lost_weights: bool = False

    @classmethod
    def of(
        cls,
        verdict: Verdict,
        loss_scale: float,
        where: tuple[str, Direction, str | None, str | None] | None = None,
        *,
        value: float | None = None,
        fits: str | None = None,
        smaller_scale: float | None = None,
        is_search: bool = True,
        lost_weights: Sequence[str] = (),
        detail: str = "",
        raised: str | None = None,
        frames: tuple[Frame, ...] = (),
    ) -> "Diagnosis":
        """A diagnosis with its record; what failed first is in ``where``: layer, direction, operation and format."""
        layer, direction, op, format = where or (None, None, None, None)
        cause: Cause = {
            "verdict": verdict,
            "loss_scale": loss_scale,
            "layer": layer,
            "direction": direction,
            "op": op,
            "format": format,
            "value": value,
            "fits": fits,
            "smaller_scale": smaller_scale,
            "detail": f"weights that are not finite: {', '.join(lost_weights[:3])}" if lost_weights else detail,
        }
        if raised is not None:
            cause["raised"] = raised
        return cls(cause, frames, is_search, bool(lost_weights))._in_words()

    def on_half_of_the_batch(self) -> "Diagnosis":
        """The same diagnosis, with a word that it is of half of the batch."""
        detail = self.cause["detail"]
        return replace(self, cause={**self.cause, "detail": f"{detail}; {_HALVED}" if detail else _HALVED})._in_words()

    def _in_words(self) -> "Diagnosis":
        return replace(self, cause={**self.cause, "message": str(overflow(self.cause, is_search=self.is_search))})


@dataclass(frozen=True)
class _Traced:
    replayed: Replayed
    trace: Trace | None
    origin: Origin | None
    is_finite: bool
    scale: float = 1.0
    raised: str | None = None
    raised_in: str = ""


class Judge:
    """Replays a failed step to find out why it failed: up to three replays that are traced, and up to six that are not.

    All ranks have to judge together: each replays its own batch, and what is decided in between they decide together.

    Args:
        replay: How to replay the step.
        kept: The batch, on the device.
        scale: The loss scale of the step.
        wanted: What else is to be asked of the step in fp32; None for nothing.
        may_raise: Whether the step may have raised; what the replay of another raises is a problem.

    Attributes:
        problem: What went wrong on this rank, if something did.
        comparison: The batch with its step in fp32, once it was run; None where that took half of the batch.
    """

    def __init__(
        self, replay: StepReplay, kept: KeptBatch, scale: float, wanted: Wanted | None = None, may_raise: bool = False
    ) -> None:
        self._replay, self._scale, self._wanted, self._may_raise = replay, scale, wanted or Wanted(), may_raise
        _, self._batch_idx, self._random = kept
        self._halving = Halving(replay.module, kept.batch)
        self.problem: str | None = None
        self.comparison: Comparison | None = None

    def judge(self) -> Diagnosis | None:
        """The diagnosis of this rank's batch; None if its replay is finite."""
        low = self._traced(reference=False, scale=self._scale)
        if not self._on_any_rank(not low.is_finite):
            if self._is_halved:
                self.problem = self.problem or "memory ran out, and half of the batch is finite"
            return None
        wide = self._traced(reference=True, scale=1.0)
        broken = self._broken_data(wide)
        if self._on_any_rank(bool(broken)):
            # Through the gradients, or the step's own messages, it spoils the other ranks' steps as well.
            return self.marked(Diagnosis.of("data", self._scale, detail=", ".join(broken[:3]))) if broken else None
        is_of_gradients = wide.is_finite and low.origin is not None and low.origin.is_of_gradients
        smaller, stubborn = None, self._scale
        if self._is_scaled and self._on_any_rank(is_of_gradients):
            smaller, stubborn = self._smaller_scale(wide)
        if smaller is None and stubborn < self._scale:
            # What overflows at the step's scale alone, here or on another rank, hides what overflows at every scale.
            stubbornly = self._traced(reference=False, scale=stubborn)
            low = stubbornly if is_of_gradients else low
        found = None if low.is_finite or self.problem else self._tried(partial(self._judged, low, wide, smaller))
        return self.marked(self._confirmed(found))

    def _confirmed(self, found: Diagnosis | None) -> Diagnosis | None:
        """The diagnosis with a format that was tried, if what failed is a number that the failing one holds, too."""
        cause = None if found is None else found.cause
        is_doubtful = cause is not None and bool(cause["fits"]) and _holds(cause["format"], cause["value"])
        if not self._on_any_rank(is_doubtful):
            return found
        replay, is_sharded = self._replay, is_any_sharded(self._replay.module)
        tried = (cause["layer"] or "", cause["fits"]) if cause is not None and is_doubtful else None
        tried = ranks.first_found(tried)[1] if is_sharded else tried  # where gradients are those of all ranks
        formats = replay.formats if tried is None else with_layer_in(replay.formats, replay.module, *tried)
        is_enough = formats is not None
        if is_enough or ranks.are_many():  # if one rank replays all do
            is_enough &= bool(self._replayed(partial(self._is_finite_at, self._scale, formats or replay.formats)))
        is_enough = not self._on_any_rank(not is_enough) if is_sharded else is_enough
        if found is None or not is_doubtful or is_enough:
            return found
        return replace(found, cause={**found.cause, "fits": None if formats is None else "fp32"})._in_words()

    def marked(self, found: Diagnosis | None) -> Diagnosis | None:
        """A diagnosis, with a word that it is of half of the batch if it is."""
        return found.on_half_of_the_batch() if found is not None and self._is_halved else found

    def _judged(self, low: _Traced, wide: _Traced, smaller: float | None) -> Diagnosis | None:
        if not wide.is_finite:
            return self._model(wide)
        if smaller is not None:
            is_search = self._replay.formats.searches_scale
            return Diagnosis.of("scale", self._scale, smaller_scale=smaller, is_search=is_search, raised=low.raised)
        if wide.trace is None:
            return None
        if low.origin is None:
            return None if low.raised is None else self._raising(low.raised, low.raised_in)
        return self._precision(low.origin, low.scale, wide.trace, low.raised)

    @property
    def _batch(self) -> Any:
        return self._halving.batch

    @property
    def _is_halved(self) -> bool:
        return self._halving.shortage is not None

    @property
    def _is_scaled(self) -> bool:
        """True where losses are scaled: a scale that is searched for may happen to be 1."""
        return self._scale != 1 or isinstance(self._replay.formats.scale, Tensor)

    def _traced(self, *, reference: bool, scale: float) -> _Traced:
        replay, seen = self._replay, list[_Traced]()

        def traced(stand_ins: Sandbox) -> Replayed:
            batch = replay.own_batch(stand_ins, self._batch)
            try:
                with Trace(replay.module) as trace:
                    replayed = replay.run_on_own(stand_ins, batch, self._batch_idx, scale=scale, random=self._random)
                    gradients = replayed.gradients.values()
                    origin = trace.origin(replayed.losses) or trace.origin_in_gradients(gradients)
            except Exception as error:
                if reference or not self._tells(error):
                    raise
                where = origin_of(error, trace), layer_of(error, replay.module)
                seen.append(_Traced(Replayed(), trace, where[0], False, scale, _shortened(one_line(error)), where[1]))
                return Replayed()
            is_own_finite = origin is None if is_any_sharded(replay.module) else bool(is_finite(replayed))
            seen.append(_Traced(replayed, trace, origin, is_own_finite, scale))
            return replayed

        def run() -> None:
            if reference:
                kept = KeptBatch(self._batch, self._batch_idx, self._random)
                comparison = Comparison(replay.module, replay.formats, kept, self._wanted, replay=replay)
                comparison.run_reference(run=traced)
                self.comparison = None if self._is_halved else comparison
            else:
                with replay.opened(as_stored=True) as stand_ins:  # so that each layer casts its own weights
                    traced(stand_ins)

        self._replayed(run)
        return seen[-1] if seen else _Traced(Replayed(), None, None, True)

    def _tells(self, error: Exception) -> bool:
        """True for an exception that may be how the step failed."""
        return self._may_raise and not is_out_of_memory(error) and not isinstance(error, OtherRankError)

    def _replayed(self, run: Callable[[], T]) -> T | None:
        """Runs a replay, which all ranks do; its errors are kept, as those of all that is tried."""
        return self._tried(lambda: self._halving.run(lambda batch: run()))

    def _tried(self, run: Callable[[], T]) -> T | None:
        """Runs something on this rank; its errors are kept, not raised: a monitor ends no run, and others wait."""
        try:
            return run()
        except TraceLeftError:
            raise
        except Exception as error:
            self.problem = one_line(error)
            return None

    def is_finite_at(self, scale: float) -> bool:
        """True if the step is finite at another loss scale, on all ranks."""
        return not self._on_any_rank(self._replayed(partial(self._is_finite_at, scale)) is not True)

    def fails_at(self, scale: float) -> bool:
        """True if the step is not finite at a loss scale, on this rank."""
        return self._replayed(partial(self._is_finite_at, scale)) is False

    def _is_finite_at(self, scale: float, formats: Formats | None = None) -> bool:
        """True if the step is finite at another loss scale, or in other formats; one that raises is not."""
        replay = self._replay if formats is None else self._replay.in_formats(formats)
        with replay.opened() as stand_ins:
            try:
                replayed = replay.run(stand_ins, self._batch, self._batch_idx, scale=scale, random=self._random)
            except Exception as error:
                if not self._tells(error):
                    raise
                return False
        return bool(is_finite(replayed))

    def _is_finite_repaired(self) -> bool:
        """True if the step is finite in fp32 with a repaired batch; one that cannot be run with it is not."""
        try:
            batch = repaired(self._batch)
            with self._halving.lockstep.attempt("repaired"), self._replay.opened(reference=True) as stand_ins:
                replayed = self._replay.run(stand_ins, batch, self._batch_idx, random=self._random)
        except TraceLeftError:
            raise
        except Exception:
            return False
        return bool(is_finite(replayed))

    def _smaller_scale(self, wide: _Traced) -> tuple[float | None, float]:
        """Looks for a loss scale at which the step is finite and keeps its gradients, in a few tries.

        Returns:
            The scale, None if there is none, and the smallest scale tried at which the step is not finite.
        """
        bad, good, smallest = math.ceil(math.log2(self._scale)), None, self._scale
        power = self._guess(wide, bad - 1)
        for _ in range(_TRIES):
            if self._on_any_rank(self._replayed(partial(self._is_finite_at, 2.0**power)) is False):
                bad, smallest = power, 2.0**power
            elif not self._on_any_rank(self._tried(partial(self._keeps_gradients, wide.replayed, 2.0**power)) is False):
                return 2.0**power, smallest
            else:
                good = power
            power = max(bad - 2, _LEAST_POWER) if good is None else (good + bad) // 2
            if power in (good, bad):
                break
        return None, smallest

    def _guess(self, wide: _Traced, most: int) -> int:
        """The power of two at which the largest gradient of all ranks fits; too small if autocast keeps it in fp32."""
        largest = wide.trace.backward_amax() if wide.trace is not None else 0.0
        narrowest = min(each.backward.max for each in map(get_format, compute_formats()) if each.use.needs_scaling)
        fitting = math.floor(math.log2(narrowest / largest)) if largest else most
        power = torch.tensor(max(min(most, fitting), _LEAST_POWER), device=self._replay.device)
        ranks.take_largest([power.neg_()])
        return -int(power)

    def _keeps_gradients(self, wide: Replayed, scale: float) -> bool:
        """True unless a weight gradient that the step's scale or the usual one keeps vanishes at a smaller one."""
        module = self._replay.module
        owned = own_parameters(module, layers_of(module))
        rows = weight_gradients(owned, wide.gradients, max_elements=2**16).to("cpu")
        for row, layer in enumerate(owned):
            format = self._replay.formats.precision_of(layer).region
            if not get_format(format).use.needs_scaling:
                continue
            lost, before = (
                underflow_rate(rows.select(row), format, each, direction="backward").middle
                for each in (scale, max(self._scale, USUAL_SCALE))
            )
            if lost - before > STARVED:
                return False
        return True

    def _broken_data(self, wide: _Traced) -> list[str]:
        """Lists the values of this rank's batch that are not finite, if they are the reason that its step is not.

        If one rank replays all do: a step may send messages of its own (SyncBatchNorm, ``all_gather``).
        """
        found = [] if wide.is_finite else self._tried(lambda: list(nonfinite_in(self._batch))) or []
        if not self._on_any_rank(bool(found)):
            return []
        # Where steps are not guarded, a step on such a batch has spoiled the weights before it is replayed.
        return found if self._is_finite_repaired() or self._nonfinite_weights() else []

    def _nonfinite_weights(self) -> list[str]:
        """The trained weights that are not finite; frozen ones no step has spoiled."""
        return [
            f"{layer}.{name}" if layer else name
            for layer, module in layers_of(self._replay.module).items()
            for name, param in module._parameters.items()
            if param is not None and param.requires_grad and not all_finite([param])
        ]

    def _model(self, wide: _Traced) -> Diagnosis:
        weights, origin = self._nonfinite_weights(), wide.origin
        if origin is None:
            return Diagnosis.of("model", self._scale, ("", "forward", "unknown", None), lost_weights=weights)
        where = (origin.layer, origin.direction, origin.op, origin.format)
        return Diagnosis.of("model", self._scale, where, lost_weights=weights, frames=origin.frames)

    def _raising(self, raised: str, layer: str) -> Diagnosis:
        """What a step raises although all is finite: numbers that a format has rounded too far, or does not hold."""
        where: tuple[str, Direction, None, str] = (layer, "forward", None, self._replay.formats.of(layer))
        return Diagnosis.of("precision", self._scale, where, raised=raised)

    def _precision(self, origin: Origin, scale: float, wide: Trace, raised: str | None) -> Diagnosis:
        layer, value = origin.layer, wide.amax_of(origin.layer, origin.direction, origin.op, origin.occurrence)
        times = self._scale if origin.direction == "backward" else 1.0
        if value is None or not math.isfinite(value):
            # A cast: what it was given is known at the loss scale that was traced.
            value = origin.input_amax if origin.op == CAST else None
            times /= scale if origin.direction == "backward" else 1.0
        if origin.op == CAST and origin.direction == "backward" and origin.reader is not None:
            layer = origin.reader
        # A logarithm of a 16-bit zero is taken in fp32, and still it is the 16 bits that failed.
        format = min(origin.format, self._replay.formats.precision_of(layer).region, key=_bits)
        value = None if value is None else value * times
        where, wider = (layer, origin.direction, origin.op, format), promoted_for_range(format, value)
        return Diagnosis.of(
            "precision", self._scale, where, value=value, fits=wider, raised=raised, frames=origin.frames
        )

    def _on_any_rank(self, claim: bool) -> bool:
        return ranks.is_any(claim, self._replay.device)


def _shortened(message: str) -> str:
    message = message.rstrip(" :;,.")
    return message if len(message) <= _MOST_CHARACTERS else f"{message[:_MOST_CHARACTERS]}..."


def _holds(format: str | None, value: float | None) -> bool:
    return format in FORMATS and value is not None and abs(value) <= get_format(format).forward.max


def _bits(format: str) -> int:
    return get_format(format).bits if format in FORMATS else 64
