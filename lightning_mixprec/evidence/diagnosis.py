"""Diagnosis of a failed step: the layer that overflowed, in which direction, and if precision is to blame at all."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from lightning_mixprec import ranks
from lightning_mixprec.engine.casting import tensors_in
from lightning_mixprec.evidence.comparison import Comparison, Wanted, is_finite
from lightning_mixprec.evidence.instruments.probe import layers_of, own_parameters, weight_gradients
from lightning_mixprec.evidence.instruments.recording import CAST
from lightning_mixprec.evidence.instruments.sandbox import Sandbox
from lightning_mixprec.evidence.instruments.trace import Frame, Origin, Trace
from lightning_mixprec.evidence.replay import (
    Replayed,
    StepReplay,
    copied,
    halved,
    is_out_of_memory,
    is_shared,
    one_line,
)
from lightning_mixprec.evidence.step_window import KeptBatch
from lightning_mixprec.numerics.finite import all_finite
from lightning_mixprec.numerics.flat_batches import flatten
from lightning_mixprec.numerics.formats import FORMATS, compute_formats, get_format, promoted_for_range
from lightning_mixprec.numerics.rates import underflow_rate

T = TypeVar("T")

Verdict = Literal["precision", "scale", "data", "model"]

_LEAST_POWER = -14
_USUAL_SCALE = 65536.0
_TRIES = 6
_MOST_UNDERFLOW = 0.5
"""The largest share of a layer's weight gradient that a smaller loss scale may lose for that scale to be right."""
_NOT_TOLD = ("frames", "is_search")
LOST_WEIGHTS = "weights that are not finite"
_HALVED = "on half of the batch, as memory ran out"
_NOTHING_ELSE = Wanted()


@dataclass(frozen=True)
class Diagnosis:
    """The reason that a step failed.

    Attributes:
        verdict: ``"precision"``: finite in fp32; ``"scale"``: a smaller loss scale is enough; ``"data"``: the batch is
            not finite; ``"model"``: not finite in fp32 either.
        layer: The layer that made a finite number non-finite, ``""`` for the LightningModule's own operations; None for
            ``"scale"`` and ``"data"``.
        direction: In which pass that was; None where there is no layer.
        op: The operation's name in ATen.
        format: The format in which it computed.
        value: The largest magnitude in fp32 of what overflowed, times the loss scale in backward.
        fits: The narrowest format that holds it.
        loss_scale: The loss scale of the step.
        smaller_scale: A loss scale at which the step is finite.
        is_search: Whether the run searches for its loss scale.
        detail: What else is known.
        frames: The operations around it, with their smallest and largest magnitudes.
    """

    verdict: Verdict
    loss_scale: float
    layer: str | None = None
    direction: Literal["forward", "backward"] | None = None
    op: str | None = None
    format: str | None = None
    value: float | None = None
    fits: str | None = None
    smaller_scale: float | None = None
    is_search: bool = True
    detail: str = ""
    frames: tuple[Frame, ...] = ()

    @property
    def message(self) -> str:
        """One line for a person."""
        if self.verdict == "data":
            return f"the batch itself is not finite ({self.detail})"
        if self.verdict == "scale":
            says = f"the gradients overflow at a loss scale of {self.loss_scale:g} and fit at {self.smaller_scale:g}: "
            if self.is_search:
                return f"{says}the search for the scale, which accuses no layer"
            return f"{says}lower the loss scale, which is fixed"
        where = f"the {self.direction} of {named(self.layer)} ({self.op})"
        if self.verdict == "model":
            detail = f" ({self.detail})" if self.detail else ""
            return f"{where} is not finite in fp32 either{detail}: not a matter of precision"
        value = "" if self.value is None else f", where fp32 has {self.value:.3g}"
        advice = f"; {self.fits} holds it: compute {self.pattern}, and where it goes, in {self.fits}"
        return f"{where} overflows in {self.format}{value}{advice if self.fits else ''}"

    @property
    def pattern(self) -> str:
        """The layer as a policy would name it."""
        return repr(self.layer) if self.layer else "the LightningModule's own operations (layers: '', recurse: false)"

    def to_dict(self) -> dict[str, Any]:
        """Plain types, without the frames."""
        return {**{key: value for key, value in asdict(self).items() if key not in _NOT_TOLD}, "message": self.message}


def named(layer: str | None) -> str:
    """A layer in a sentence."""
    return f"layer {layer!r}" if layer else "the LightningModule itself"


@dataclass(frozen=True)
class _Traced:
    replayed: Replayed
    trace: Trace | None
    origin: Origin | None
    is_finite: bool
    scale: float = 1.0


class Judge:
    """Replays a failed step to find out why it failed: up to three replays that are traced, and up to six that are not.

    All ranks have to judge together: each replays its own batch, and what is decided in between they decide together.

    Args:
        replay: How to replay the step.
        kept: The batch, on the device.
        scale: The loss scale of the step.
        wanted: What else is to be asked of the step in fp32.

    Attributes:
        problem: What went wrong on this rank, if something did.
        comparison: The batch with its step in fp32, once it was run; None where that took half of the batch.
    """

    def __init__(self, replay: StepReplay, kept: KeptBatch, scale: float, wanted: Wanted = _NOTHING_ELSE) -> None:
        self._replay, self._scale, self._wanted = replay, scale, wanted
        self._batch, self._batch_idx, self._random = kept
        self._is_halved = False
        self.problem: str | None = None
        self.comparison: Comparison | None = None

    def judge(self) -> Diagnosis | None:
        """The diagnosis of this rank's batch; None if its replay is finite."""
        low = self._traced(reference=False, scale=self._scale)
        if not self._on_any_rank(not low.is_finite):
            self.problem = self.problem or (
                "memory ran out, and half of the batch is finite" if self._is_halved else None
            )
            return None
        wide = self._traced(reference=True, scale=1.0)
        broken = self._broken_data(wide)
        if self._on_any_rank(bool(broken)):
            # Through the gradients, or the step's own messages, it spoils the other ranks' steps as well.
            return self._marked(Diagnosis("data", self._scale, detail=", ".join(broken[:3]))) if broken else None
        is_backward, smaller, stubborn = wide.is_finite and _is_backward(low.origin), None, self._scale
        if self._is_scaled and self._on_any_rank(is_backward):
            smaller, stubborn = self._smaller_scale(wide)
        if smaller is None and stubborn < self._scale:
            # What overflows at the step's scale alone, here or on another rank, hides what overflows at every scale.
            stubbornly = self._traced(reference=False, scale=stubborn)
            low = stubbornly if is_backward else low
        if low.is_finite or self.problem is not None:
            return None
        return self._marked(self._tried(partial(self._judged, low, wide, smaller)))

    def _marked(self, found: Diagnosis | None) -> Diagnosis | None:
        if found is None or not self._is_halved:
            return found
        return replace(found, detail=f"{found.detail}; {_HALVED}" if found.detail else _HALVED)

    def _judged(self, low: _Traced, wide: _Traced, smaller: float | None) -> Diagnosis | None:
        if not wide.is_finite:
            return self._model(wide)
        if smaller is not None:
            is_search = self._replay.formats.searches_scale
            return Diagnosis("scale", self._scale, smaller_scale=smaller, is_search=is_search)
        if low.origin is None or wide.trace is None:
            return None
        return self._precision(low.origin, low.scale, wide.trace)

    @property
    def _is_scaled(self) -> bool:
        """True where losses are scaled: a scale that is searched for may happen to be 1."""
        return self._scale != 1 or isinstance(self._replay.formats.scale, Tensor)

    def _traced(self, *, reference: bool, scale: float) -> _Traced:
        replay, seen = self._replay, list[_Traced]()

        def traced(stand_ins: Sandbox) -> Replayed:
            batch = replay.own_batch(stand_ins, self._batch)
            with Trace(replay.module) as trace:
                replayed = replay.run_on_own(stand_ins, batch, self._batch_idx, scale=scale, random=self._random)
                gradients = [_values(gradient) for gradient in replayed.gradients.values()]
                origin = trace.origin(replayed.losses) or trace.origin(gradients)
            seen.append(_Traced(replayed, trace, origin, bool(is_finite(replayed)), scale))
            return replayed

        def run() -> None:
            if reference:
                kept = KeptBatch(self._batch, self._batch_idx, self._random)
                comparison = Comparison(replay.module, replay.formats, kept, self._wanted)
                comparison.run_reference(run=traced)
                self.comparison = None if self._is_halved else comparison
            else:
                with replay.opened() as stand_ins:
                    traced(stand_ins)

        self._tried(run)
        return seen[-1] if seen else _Traced(Replayed(), None, None, True)

    def _tried(self, run: Callable[[], T]) -> T | None:
        """Runs a replay; if memory runs out, once more on half of the batch, and so from then on.

        Its errors are kept, not raised: a monitor ends no run, and the other ranks wait.
        """
        try:
            return run()
        except Exception as error:
            if self._is_halved or is_shared(self._replay.module) or not is_out_of_memory(error):
                self.problem = one_line(error)
                return None
        self._batch, self._is_halved = halved(self._batch), True
        if self._replay.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._tried(run)

    def is_finite_at(self, scale: float) -> bool:
        """True if the step is finite at another loss scale, on all ranks."""
        return not self._on_any_rank(self._tried(partial(self._is_finite_at, scale)) is not True)

    def _is_finite_at(self, scale: float) -> bool:
        with self._replay.opened() as stand_ins:
            replayed = self._replay.run(stand_ins, self._batch, self._batch_idx, scale=scale, random=self._random)
        return bool(is_finite(replayed))

    def _is_finite_repaired(self) -> bool:
        """True if the step is finite in fp32 with a repaired batch; one that cannot be run with it is not."""
        try:
            batch = _repaired(self._batch)
            with self._replay.opened(reference=True) as stand_ins:
                replayed = self._replay.run(stand_ins, batch, self._batch_idx, random=self._random)
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
            if self._on_any_rank(self._tried(partial(self._is_finite_at, 2.0**power)) is False):
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
            format = self._replay.formats.of(layer)
            if not get_format(format).use.needs_scaling:
                continue
            lost, before = (
                underflow_rate(rows.select(row), format, each, direction="backward").middle
                for each in (scale, max(self._scale, _USUAL_SCALE))
            )
            if lost - before > _MOST_UNDERFLOW:
                return False
        return True

    def _broken_data(self, wide: _Traced) -> list[str]:
        """Lists the values of this rank's batch that are not finite, if they are the reason that its step is not.

        If one rank replays all do: a step may send messages of its own (SyncBatchNorm, ``all_gather``).
        """
        found = [] if wide.is_finite else self._tried(lambda: list(_nonfinite_in(self._batch))) or []
        if not self._on_any_rank(bool(found)):
            return []
        # Where steps are not guarded, a step on such a batch has spoiled the weights before it is replayed.
        return found if self._is_finite_repaired() or self._nonfinite_weights() else []

    def _nonfinite_weights(self) -> list[str]:
        return [
            f"{layer}.{name}" if layer else name
            for layer, module in layers_of(self._replay.module).items()
            for name, param in module._parameters.items()
            if param is not None and not all_finite([param])
        ]

    def _model(self, wide: _Traced) -> Diagnosis:
        weights = self._nonfinite_weights()
        detail = f"{LOST_WEIGHTS}: {', '.join(weights[:3])}" if weights else ""
        origin = wide.origin
        if origin is None:
            return Diagnosis("model", self._scale, layer="", direction="forward", op="unknown", detail=detail)
        where = (origin.layer, origin.direction, origin.op, origin.format)
        return Diagnosis("model", self._scale, *where, detail=detail, frames=origin.frames)

    def _precision(self, origin: Origin, scale: float, wide: Trace) -> Diagnosis:
        layer, value = origin.layer, wide.amax_of(origin.layer, origin.direction, origin.op, origin.occurrence)
        times = self._scale if origin.direction == "backward" else 1.0
        if value is None or not math.isfinite(value):
            # A cast: what it was given is known at the loss scale that was traced.
            value = origin.input_amax if origin.op == CAST else None
            times /= scale if origin.direction == "backward" else 1.0
        if origin.op == CAST and origin.direction == "backward" and origin.reader is not None:
            layer = origin.reader
        # A logarithm of a 16-bit zero is taken in fp32, and still it is the 16 bits that failed.
        format = min(origin.format, self._replay.formats.of(layer), key=_bits)
        value = None if value is None else value * times
        where, wider = (layer, origin.direction, origin.op, format), promoted_for_range(format, value)
        return Diagnosis("precision", self._scale, *where, value, wider, frames=origin.frames)

    def _on_any_rank(self, claim: bool) -> bool:
        return ranks.is_any(claim, self._replay.device)


def _is_backward(origin: Origin | None) -> bool:
    return origin is not None and origin.direction == "backward"


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _bits(format: str) -> int:
    return get_format(format).bits if format in FORMATS else 64


def _nonfinite_in(batch: Any) -> Iterator[str]:
    for path, leaf in tree_flatten_with_path(batch)[0]:
        for tensor in tensors_in(leaf):
            if tensor.is_floating_point() and not all_finite([values := flatten(tensor)]):
                bad = (~torch.isfinite(values)).sum().item()
                yield f"{bad} of {tensor.numel()} values in batch{keystr(path)}"


def _repaired(batch: Any) -> Any:
    """A copy of a batch with zeros in place of what is not finite: a mask of -inf in the batch is no broken data."""
    repaired, mine = copied(batch), {id(tensor) for tensor in tensors_in(batch)}
    for tensor in tensors_in(repaired):
        if tensor.is_floating_point() and id(tensor) not in mine:
            tensor.nan_to_num_(0.0, 0.0, 0.0)
    return repaired
