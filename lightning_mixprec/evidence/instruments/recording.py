"""Records what every operation did to the range of numbers, in integers and 0-dim tensors only."""

import cmath
import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

from lightning_mixprec.evidence.instruments.current_layer import CurrentLayer, Direction

CAST = "_to_copy"

_ALLOCATES = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
_OF_SHARDING = ("fsdp", "c10d", "_c10d_functional")
_BETWEEN_LAYERS, _ARRIVES = "_c10d_functional::", "_c10d_functional::wait_tensor"
_ONLY_WRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "exponential_", "random_"}


@dataclass
class Call:
    """One operation that ran.

    Attributes:
        inputs: the values it read, as indices into the recorder's list.
        outputs: the values it made.
        scalars: the Python numbers among its arguments that are not finite.
    """

    index: int
    op: str
    layer: str
    direction: Direction
    inputs: tuple[int, ...]
    scalars: tuple[complex, ...]
    outputs: list[int] = field(default_factory=list)


@dataclass
class Value:
    """The content of a piece of memory from one write to the next, or a part of it.

    Attributes:
        call: what wrote it; None for a value that was there before (a weight, the batch) and for a part of another.
        inputs: the values it was made from, as indices; after those of its call, what a partial write left standing.
        is_empty: whether it is memory that nothing was written to yet.
        is_partial: whether only a part of the memory was written, or looked at, so that a reader must look for itself.
        infs, nans: whether it holds any.
        amin, amax: the smallest and the largest finite magnitude, 0 if there is none.
    """

    dtype: torch.dtype
    inputs: tuple[int, ...] = ()
    call: Call | None = None
    stats: Tensor | None = None
    is_empty: bool = False
    is_partial: bool = False
    infs: bool = False
    nans: bool = False
    amin: float = 0.0
    amax: float = 0.0

    @property
    def is_finite(self) -> bool:
        """True if it holds neither infinities nor NaNs."""
        return not (self.infs or self.nans)


class Recorder(TorchDispatchMode):
    """Sees every operation below autocast and autograd, forward and backward.

    A value is known by the address of its memory: the latest writer made what is there. No tensor of the model is kept.

    Args:
        running: tells which layer computes.
        is_sharded: whether ranks gather weights and reduce gradients while it runs, which is no layer's operation: what
            is gathered was there before, and what is reduced is of all ranks.

    Attributes:
        calls: what ran, in order; views and operations without floating-point results are left out.
        values: what was read and written, in order.
        sent: this rank's own gradients that were reduced, as indices.
    """

    supports_higher_order_operators = True

    def __init__(self, running: CurrentLayer, *, is_sharded: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: list[int] = []
        self._is_sharded = is_sharded
        self.calls: list[Call] = []
        self.values: list[Value] = []
        self._running = running
        self._writers: dict[int, int] = {}
        self._parts: dict[tuple[Any, ...], int] = {}
        self._settled = 0
        self._is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if self._is_sharded and any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # of spread tensors the operations on a rank's own parts follow
        op, leaves = _name(func), tree_leaves((args, kwargs))
        if self._is_sharded and getattr(func, "namespace", "") in _OF_SHARDING:
            return (self._receive if op == _ARRIVES else self._carry)(op, func, args, kwargs)
        taken = [memory for leaf in leaves if (memory := _memory(leaf)) is not None]
        if getattr(func, "is_view", False):
            self._place(op, taken)
            return func(*args, **kwargs)
        unread = {id(leaf) for leaf in _unread(op, func, args, kwargs)}
        inputs = self.sources(leaf for leaf in leaves if id(leaf) not in unread)
        layer, direction = self._place(op, taken)
        result = func(*args, **kwargs)
        made = _made(taken, _written(func, args, kwargs), tree_leaves(result))
        if op in _ALLOCATES:
            self._writers |= {address: self._add(Value(each.dtype, is_empty=True)) for address, each in made.items()}
        elif made:
            layer = self._layer_of(inputs) if layer is None else layer
            scalars = tuple(leaf for leaf in leaves if isinstance(leaf, float | complex) and not cmath.isfinite(leaf))
            self._record(Call(len(self.calls), op, layer, direction, inputs, scalars), made)
        return result

    def _carry(self, op: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation of those that gather and reduce; what messages bring has yet to arrive when it returns."""
        written = _written(func, args, kwargs)
        is_output = set() if "allreduce" in op else set(map(id, written))
        is_read = "reduce" in op or "chunk_cat" in op or op.startswith(_BETWEEN_LAYERS)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if id(leaf) not in is_output] if is_read else []
        inputs, is_message = self.sources(read), func.namespace != "fsdp"
        if is_message and torch._C._current_graph_task_id() != -1:  # in backward
            self.sent += inputs
        result = func(*args, **kwargs)
        for address, memory in _made([], written, tree_leaves(result)).items():
            stats = None if is_message else _stats(memory)
            self._writers[address] = self._add(Value(memory.dtype, inputs=inputs, stats=stats))
        return result

    def _receive(self, op: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Waits for a message between parts of a layer; what it brings was made of what this rank sent."""
        sent = self.sources(tree_leaves((args, kwargs)))
        inputs = tuple(place for each in sent for place in self.values[each].inputs or (each,))
        layer, direction = self._place(op, [])
        result = func(*args, **kwargs)
        layer = self._layer_of(inputs) if layer is None else layer
        self._record(Call(len(self.calls), op, layer, direction, inputs, ()), _made([], [], tree_leaves(result)))
        return result

    def _place(self, op: str, taken: Sequence[Tensor]) -> tuple[str | None, Direction]:
        """The layer and the direction of an operation that takes these tensors."""
        layer, direction = self._running.now()
        if layer is not None and direction == "forward":
            written = ((self._writers.get(_address(memory)), memory.numel()) for memory in taken)
            self._running.reads(layer, ((writer, size) for writer, size in written if writer is not None))
        elif layer is not None and op == "add" and len({memory.shape for memory in taken}) == 1 and len(taken) == 2:
            layer = self._running.sums(layer, taken[0].numel())
        return layer, direction

    def sources(self, tensors: Iterable[Any]) -> tuple[int, ...]:
        """The values that tensors hold now, as indices; what is no floating-point tensor is left out."""
        memories = (memory for tensor in tensors if (memory := _memory(tensor)) is not None)
        return tuple(dict.fromkeys(self._source(memory) for memory in memories))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Records nothing inside."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def settle(self) -> list[Value]:
        """Reads from the devices what is known of the values so far, all at once."""
        fresh = self.values[self._settled :]
        pending: dict[tuple[torch.device, torch.dtype], list[Value]] = {}
        for value in fresh:
            if value.stats is not None:
                pending.setdefault((value.stats.device, value.stats.dtype), []).append(value)
        for device, _ in pending:
            if device.type == "cuda":
                # Operations may have run on other streams than the current one.
                torch.cuda.synchronize(device)
        with self.paused(), torch._C._DisableAutocast():
            for group in pending.values():
                stacked = torch.stack([value.stats for value in group if value.stats is not None]).tolist()
                for value, (infs, nans, amin, amax) in zip(group, stacked, strict=True):
                    value.infs, value.nans, value.amax, value.stats = bool(infs), bool(nans), amax, None
                    value.amin = amin if math.isfinite(amin) else 0.0
        for value in fresh:
            if value.is_partial and value.call is not None:
                rest = [self.values[place] for place in value.inputs[len(value.call.inputs) :]]
                value.infs |= any(each.infs for each in rest)
                value.nans |= any(each.nans for each in rest)
        self._settled = len(self.values)
        return self.values

    def _record(self, call: Call, made: Mapping[int, Tensor]) -> None:
        self.calls.append(call)
        for address, memory in made.items():
            is_partial = not _covers(memory)
            before = self._writers.get(address) if is_partial else None
            value = Value(
                memory.dtype,
                inputs=call.inputs if before is None else (*call.inputs, before),
                call=call,
                stats=_stats(memory),
                is_partial=is_partial,
            )
            call.outputs.append(len(self.values))
            self._writers[address] = self._add(value)

    def _source(self, memory: Tensor) -> int:
        # A lone number on the CPU may live where another was freed, and no operation that we see wrote it.
        is_number = memory.numel() == 1 and memory.device.type == "cpu"
        address, is_whole = _address(memory), _covers(memory) and not is_number
        if address not in self._writers:
            is_known = is_whole or is_number
            leaf = self._add(Value(memory.dtype, stats=_stats(memory) if is_known else None, is_partial=not is_known))
            if is_number:
                return leaf
            self._writers[address] = leaf
        writer = self._writers[address]
        known = self.values[writer]
        if known.is_empty or (is_whole and not known.is_partial and known.dtype == memory.dtype):
            return writer
        part = (writer, memory.storage_offset(), memory.shape, memory.stride(), memory.dtype)
        if is_number or part not in self._parts:
            self._parts[part] = self._add(Value(memory.dtype, inputs=(writer,), stats=_stats(memory)))
        return self._parts[part]

    def _add(self, value: Value) -> int:
        self.values.append(value)
        return len(self.values) - 1

    def _layer_of(self, inputs: Sequence[int]) -> str:
        """The layer that computed the latest of these values."""
        known = [call for place in inputs if (call := self._written_by(place)) is not None]
        return max(known, key=lambda call: call.index).layer if known else ""

    def _written_by(self, place: int) -> Call | None:
        value = self.values[place]
        return self._written_by(value.inputs[0]) if value.call is None and value.inputs else value.call


def _name(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    return str(func if schema is None else schema.name).removeprefix("aten::").removeprefix("lightning_mixprec::")


@functools.cache
def _written_arguments(func: Any) -> list[tuple[int, str, bool]]:
    """The arguments that an operation writes to: position, name, whether it only receives the result."""
    schema = getattr(func, "_schema", None)
    return [
        (place, argument.name, argument.is_out)
        for place, argument in enumerate(schema.arguments if schema is not None else ())
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _written(func: Any, args: Any, kwargs: Any, only_out: bool = False) -> list[Any]:
    return tree_leaves(
        [
            args[place] if place < len(args) else kwargs.get(name)
            for place, name, is_out in _written_arguments(func)
            if is_out or not only_out
        ]
    )


def _made(taken: Iterable[Tensor], written: Iterable[Any], results: Iterable[Any]) -> dict[int, Tensor]:
    """The tensors that an operation wrote to or made, by address; views of its inputs are neither."""
    made = {_address(memory): memory for leaf in written if (memory := _memory(leaf)) is not None}
    passed_on = {_address(memory) for memory in taken}
    for leaf in results:
        if (memory := _memory(leaf)) is not None and _address(memory) not in passed_on:
            made[_address(memory)] = memory
    return made


def _unread(op: str, func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation writes to without having read them."""
    return _written(func, args, kwargs, only_out=op not in _ONLY_WRITES)


def _memory(leaf: Any) -> Tensor | None:
    """The tensor in whose memory a tensor's floating-point values are, None if there is nothing to look at."""
    if not isinstance(leaf, Tensor):
        return None
    tensor = leaf._values() if leaf.layout == torch.sparse_coo else leaf
    if tensor.layout != torch.strided or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    return tensor if tensor.numel() and tensor.device.type != "meta" and _address(tensor) else None


def _address(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):
        return 0  # a subclass without memory of its own


def _covers(tensor: Tensor) -> bool:
    """True if a tensor is all that its memory holds."""
    distinct = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return distinct * tensor.itemsize >= tensor.untyped_storage().nbytes()


@torch.no_grad()
def _stats(tensor: Tensor) -> Tensor:
    """On the device: are there infinities, are there NaNs, the smallest and the largest finite magnitude."""
    # Autocast refuses to stack what is in its other 16-bit format.
    with torch._C._DisableAutocast():
        tensor = tensor.detach()
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0:
                tensor = tensor.narrow(dim, 0, 1)
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        magnitude = (tensor.float() if tensor.itemsize == 1 else tensor).abs()
        infs, nans = magnitude.isinf().any(), magnitude.isnan().any()
        amin = magnitude.nan_to_num_(nan=math.inf, posinf=math.inf).amin()
        amax = magnitude.nan_to_num_(nan=0.0, posinf=0.0).amax()
        return torch.stack((infs.to(amax.dtype), nans.to(amax.dtype), amin, amax))
