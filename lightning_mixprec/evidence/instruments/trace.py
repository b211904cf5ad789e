"""Where a step went wrong: the operation that first made a finite number infinite or NaN, the layer that raised."""

import contextlib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_mixprec.engine.backends.products import as_operations
from lightning_mixprec.engine.sharding import is_any_sharded, is_sharded
from lightning_mixprec.evidence.instruments.current_layer import CurrentLayer, Direction
from lightning_mixprec.evidence.instruments.origins import find_origin, is_given
from lightning_mixprec.evidence.instruments.recording import CAST, Call, Recorder, Value
from lightning_mixprec.numerics.flat_batches import local_part
from lightning_mixprec.numerics.formats import format_of
from lightning_mixprec.policy.module_names import walk
from lightning_mixprec.records.events import Frame

_FRAMES, _FRAMES_AFTER = 24, 4
"""The operations that an origin shows: those up to and including it, and those that follow."""


@dataclass(frozen=True)
class Origin:
    """The place where non-finite numbers entered a step.

    Attributes:
        layer: the innermost module that ran the operation, ``""`` for the root and what is outside of it.
        direction: in which pass.
        op: the operation's name in ATen.
        format: the format of what it made.
        input_amax: the largest finite magnitude among its inputs; for a cast, the number that did not fit.
        occurrence: how many operations of this layer, direction and name ran before it; casts come and go with the
            format, so this finds the same operation in another format's trace unless it is a cast itself.
        reader: the layer of the first operation that read what it made, None if none did. A gradient that is cast goes
            to the layer whose output was cast in forward: that layer's format is what the gradient has to fit.
        is_of_gradients: whether it ran in backward, or on what backward made: its numbers depend on the loss scale.
        is_leaf: whether the operation is not at fault: a number it was given (a weight, buffer or batch, or an argument
            like ``-inf``) was not finite.
        frames: the last operations up to and including it, and a few that follow.
    """

    layer: str
    direction: Direction
    op: str
    format: str
    input_amax: float
    occurrence: int
    reader: str | None
    is_of_gradients: bool
    is_leaf: bool
    frames: tuple[Frame, ...]


class Trace:
    """Watches every operation of a step, forward and backward, and then says where it went wrong.

    Values and gradients are what they are without it, and it keeps none of the model's tensors. It reads from the
    device only once it is asked. Backward runs in the thread that calls it.

    Args:
        model: the model; modules are named canonically, wrappers are looked through.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1)).half()
    >>> _ = nn.init.constant_(model[0].weight, 400.0)
    >>> with Trace(model) as trace:
    ...     loss = model(torch.full((1, 2), 300.0).half()).sum()
    >>> origin = trace.origin([loss])
    >>> origin.layer, origin.direction, origin.op, origin.format, origin.input_amax
    ('0', 'forward', 'addmm', 'fp16', 400.0)
    """

    def __init__(self, model: nn.Module) -> None:
        self._running = CurrentLayer(model)
        self._recorder = Recorder(self._running, is_sharded=is_any_sharded(model))
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Trace":
        with contextlib.ExitStack() as stack:
            stack.callback(self._running.detach)
            self._running.attach()
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(as_operations())
            stack.enter_context(self._recorder)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def origin(self, targets: Sequence[Tensor]) -> Origin | None:
        """The origin of the non-finite numbers in the results, None if they are all finite.

        Args:
            targets: losses, gradients or any other results of what ran, still alive.
        """
        with self._recorder.paused():
            ends = self._recorder.sources(targets)
        return self._origin(ends)

    def origin_in_gradients(self, gradients: Iterable[Tensor]) -> Origin | None:
        """As :meth:`origin`; of gradients that are sharded, as this rank alone has computed them."""
        own = [each.coalesce().values() if each.is_sparse else each for each in gradients]
        with self._recorder.paused():
            sent = self._recorder.sent
            ends = self._recorder.sources(local_part(each) for each in own if not (sent and is_sharded(each)))
        return self._origin((*ends, *sent))

    def _origin(self, ends: Sequence[int]) -> Origin | None:
        values = self._recorder.settle()
        found = find_origin(values, ends)
        return None if found is None else self._describe(found, values)

    def amax_of(self, layer: str, direction: Direction, op: str, occurrence: int) -> float | None:
        """The largest finite magnitude that an operation of an :class:`Origin` made here, None if it did not run.

        In an fp32 trace of the same step it is the number that overflowed. Casts are not looked up.
        """
        values = self._recorder.settle()
        same = [call for call in self._recorder.calls if _key(call) == (layer, direction, op)]
        if op == CAST or occurrence >= len(same):
            return None
        return max(values[place].amax for place in same[occurrence].outputs)

    def backward_amax(self) -> float:
        """The largest finite magnitude that any operation made in backward, 0 if there was none."""
        values = self._recorder.settle()
        made = (place for call in self._recorder.calls if call.direction == "backward" for place in call.outputs)
        return max((values[place].amax for place in made), default=0.0)

    def _describe(self, found: int, values: Sequence[Value]) -> Origin:
        origin, calls = values[found], self._recorder.calls
        call = origin.call or _first_reader(found, values, calls)
        if call is None:
            return Origin("", "forward", "", _format(origin), origin.amax, 0, None, False, True, ())
        first = max(call.index + 1 - _FRAMES, 0)
        shown = calls[first : call.index + 1 + _FRAMES_AFTER]
        return Origin(
            *_key(call),
            format=_format(origin),
            input_amax=max((values[place].amax for place in call.inputs), default=0.0),
            occurrence=sum(_key(each) == _key(call) for each in calls[: call.index]),
            reader=reader.layer if (reader := _first_reader(found, values, calls)) is not None else None,
            is_of_gradients=_is_of_gradients(found, values),
            is_leaf=is_given(origin),
            frames=tuple(_frame(each, values) for each in shown),
        )


def _key(call: Call) -> tuple[str, Direction, str]:
    return call.layer, call.direction, call.op


def _first_reader(found: int, values: Sequence[Value], calls: Iterable[Call]) -> Call | None:
    """The first operation that read a value, or a part of it."""
    ways = {found, *(place for place, value in enumerate(values) if value.call is None and found in value.inputs)}
    return next((call for call in calls if not ways.isdisjoint(call.inputs)), None)


def _is_of_gradients(found: int, values: Sequence[Value]) -> bool:
    """True if a value was made in backward, or of something that was."""
    waiting, seen = [found], {found}
    while waiting:
        value = values[waiting.pop()]
        if value.call is not None and value.call.direction == "backward":
            return True
        new = set(value.inputs) - seen
        waiting += new
        seen |= new
    return False


def _frame(call: Call, values: Sequence[Value]) -> Frame:
    made = [values[place] for place in call.outputs]
    return Frame(
        *_key(call),
        format=_format(made[0]),
        amin=min(value.amin for value in made),
        amax=max(value.amax for value in made),
        infs=any(value.infs for value in made),
        nans=any(value.nans for value in made),
    )


def _format(value: Value) -> str:
    return format_of(value.dtype) or str(value.dtype).removeprefix("torch.")


def origin_of(error: BaseException, trace: Trace) -> Origin | None:
    """The operation that made the numbers non-finite which the innermost function with such numbers had.

    Args:
        error: What a step raised, with its traceback: its frames hold the tensors.
        trace: What ran until then.

    Returns:
        None if nothing that the exception can be about is out of a format's range; what was handed in so (a mask of
        -inf) is not looked at.
    """
    for tensors in _tensors_by_frame(error):
        found = trace.origin(tensors)
        if found is not None and not found.is_leaf:
            return found
    return None


def layer_of(error: BaseException, model: nn.Module) -> str:
    """The innermost module that ran when the exception was raised, ``""`` for the root and what is outside of it."""
    return next(iter(layers_through(error, model)), "")


def layers_through(error: BaseException, model: nn.Module) -> list[str]:
    """The modules that an exception went through, the innermost first."""
    names = {id(node.module): node.name for node in reversed(list(walk(model)))}
    modules = [id(frame.f_locals.get("self")) for frame in _frames(error)]
    return [names[module] for module in modules if module in names]


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]


def _tensors_by_frame(error: BaseException) -> Iterator[list[Tensor]]:
    """The tensors that the functions of a traceback hold, the innermost function's first."""
    for frame in _frames(error):
        leaves = tree_leaves(list(frame.f_locals.values()))
        yield [leaf for leaf in leaves if isinstance(leaf, Tensor)]
