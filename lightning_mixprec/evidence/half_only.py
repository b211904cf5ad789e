"""Layers that cannot compute in fp32, such as those whose kernels take 16 bits alone: found when they fail."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_mixprec import ranks
from lightning_mixprec.engine.sharding import is_any_sharded
from lightning_mixprec.errors import OtherRankError, ReplayError, TraceLeftError, one_line
from lightning_mixprec.evidence.instruments.memory import is_out_of_memory
from lightning_mixprec.evidence.instruments.probe import layers_of
from lightning_mixprec.evidence.instruments.sandbox import Sandbox
from lightning_mixprec.evidence.instruments.trace import layers_through
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.numerics.formats import get_format
from lightning_mixprec.records.words import also, named

T = TypeVar("T")

_IN_VAIN: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()
"""By model the layers, with their formats, whose being left out did not help: they are not left out again."""


def in_fp32(replay: StepReplay, run: Callable[[Sandbox], T], tries: int = 3) -> T:
    """Runs something in fp32. If a layer fails, it is run again with that layer's own operations as the run has them.

    Where that is enough, the layer is one of ``replay.formats.not_in_fp32`` from then on, and is told of once. Where it
    is not, that is remembered: the next step that fails at the same layer is run once.

    Args:
        replay: How to replay steps.
        run: Runs inside a sandbox; it may be called several times.
        tries: How often it may be called again.

    Raises:
        Exception: The error in fp32, if there is one all the same.
    """
    error: Exception | None = None
    found: tuple[list[str], str] | None = None
    try:
        with replay.opened(reference=True) as stand_ins:
            result = run(stand_ins)
    except Exception as raised:
        error = raised
        is_no_layers = isinstance(raised, (ReplayError, TraceLeftError, OtherRankError)) or is_out_of_memory(raised)
        found = (_failing(replay, raised), one_line(raised)) if tries and not is_no_layers else None
        if found is not None and _attempt(found[0], replay) in _IN_VAIN.get(replay.module, ()):
            found = None
    if is_any_sharded(replay.module):
        _, found = ranks.first_found(found)
    if found is None or not found[0]:
        if error is not None:
            raise error
        return result
    return _without(*found, replay, error, lambda: in_fp32(replay, run, tries - 1))


def _without(failing: list[str], reason: str, replay: StepReplay, error: Exception | None, run: Callable[[], T]) -> T:
    """Runs something with failing layers in the run's formats, which is undone if that does not help."""
    left_out = replay.formats.not_in_fp32
    if error is not None:
        error.with_traceback(None)  # it holds what the step had in memory
    left_out.update(dict.fromkeys(failing, reason))
    try:
        result = run()
    except Exception as later:
        for layer in failing:
            del left_out[layer]
        if not isinstance(later, (ReplayError, TraceLeftError, OtherRankError)) and not is_out_of_memory(later):
            _IN_VAIN.setdefault(replay.module, set()).add(_attempt(failing, replay))
        raise (later if isinstance(later, TraceLeftError) else error or later) from None
    rank_zero_warn(
        f"{named(failing[0])}{also(failing[1:])} cannot compute in fp32 ({reason}): its own operations stay in the "
        "run's format where steps are compared with fp32."
    )
    return result


def _attempt(failing: list[str], replay: StepReplay) -> Any:
    """Layers to be left out, with what decides whether that helps: their formats, and who is left out already."""
    formats = replay.formats
    return frozenset(formats.not_in_fp32), tuple((name, formats.precision_of(name).region) for name in failing)


def _failing(replay: StepReplay, error: Exception) -> list[str]:
    """The innermost layer that an error went through and that can still be left out, and all layers of its class.

    One that fails although it is left out is given in fp32 what it does not take, by the layer around it.
    """
    layers, formats = layers_of(replay.module), replay.formats
    through = layers_through(error, replay.module)
    candidates = [name for name in through if name and name not in formats.not_in_fp32]
    innermost = next((name for name in candidates if get_format(formats.precision_of(name).region).is_half), None)
    if innermost is None:
        return []
    kind = type(layers[innermost])
    others = [] if kind.__module__.startswith("torch.") else [name for name in layers if type(layers[name]) is kind]
    return [innermost, *(name for name in others if name != innermost and name not in formats.not_in_fp32)]
