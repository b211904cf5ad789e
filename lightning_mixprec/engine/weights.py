"""Weights stored in one format and used in another.

What a policy's ``param`` asks for is converted in place, once: the Parameter objects stay, so optimizers, names and
state_dict keys do. Where a region cannot compute with what is stored (fp64 weights under fp32 operations, 16-bit
weights under fp32 operations), its modules see differentiable casts of their weights for as long as their forward runs,
and the gradients arrive on what is stored. What the model has in fp64 itself is left alone, as by autocast, unless a
rule says how its layer computes or is stored.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_mixprec.numerics.flat_batches import local_part
from lightning_mixprec.numerics.formats import compute_dtypes, half_dtypes
from lightning_mixprec.policy.layers import is_wide_by_nature, stored_by_rule

_LAZY = (UninitializedParameter, UninitializedBuffer)
_CONVERTIBLE = (torch.strided, torch.sparse_coo)  # torch cannot give a compressed tensor data of another dtype


class Slot(NamedTuple):
    """A parameter or buffer of a module, and the dtype in which a region's operations see it."""

    module: nn.Module
    name: str
    is_buffer: bool
    dtype: torch.dtype

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """The module's own mapping that holds it."""
        return self.module._buffers if self.is_buffer else self.module._parameters  # type: ignore[return-value]


class Gate:
    """A reentrant lock whose copies and pickles are locks of their own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __reduce__(self) -> tuple[type["Gate"], tuple[()]]:
        return Gate, ()


def seen_as(stored: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """The dtype in which operations in ``compute`` see a weight stored in ``stored``.

    >>> seen_as(torch.float64, torch.bfloat16), seen_as(torch.float32, torch.bfloat16)
    (torch.float32, torch.float32)
    """
    if stored not in compute_dtypes():
        return stored
    if compute not in half_dtypes():
        return compute
    return stored if stored in (torch.float32, compute) else torch.float32


def unusable_in(compute: torch.dtype) -> dict[torch.dtype, torch.dtype]:
    """By the dtypes of stored weights that operations in ``compute`` cannot use, the dtype that they see instead."""
    return {stored: seen for stored in compute_dtypes() if (seen := seen_as(stored, compute)) != stored}


def mismatches(module: nn.Module, unusable: Mapping[torch.dtype, torch.dtype], leaves_wide: bool) -> list[Slot]:
    """The module's own parameters and buffers that are not used as they are stored.

    Args:
        module: the module.
        unusable: what its operations cannot use as it is stored (see :func:`unusable_in`).
        leaves_wide: whether what is in fp64 by nature is used as it is nevertheless, as under autocast.
    """
    found = []
    for is_buffer, tensors in ((False, module._parameters), (True, module._buffers)):
        for name, tensor in tensors.items():
            if tensor is None or (dtype := unusable.get(tensor.dtype)) is None:
                continue
            if not (leaves_wide and is_wide_by_nature(tensor)):
                found.append(Slot(module, name, is_buffer, dtype))
    return found


class _Swap(NamedTuple):
    slot: Slot
    stored: Tensor
    seen: Tensor
    version: int


def with_seen(slots: Iterable[Slot], gate: Gate, call: Callable[[], Any]) -> Any:
    """Calls with the slots' modules seeing casts of what they store, and puts what they store back.

    One thread at a time: another one would find the casts of the first, or lose them halfway.
    """
    # A recomputation in backward may be what the thread in here is waiting for, and then it finds that one's casts.
    locked = not is_compiling() and gate.acquire(blocking=torch._C._current_graph_task_id() == -1)
    swaps: list[_Swap] = []
    flat_weights: list[tuple[nn.RNNBase, list[Any], list[Any]]] = []
    try:
        for slot in slots:
            _swap_in(slot, swaps)
        for module in [slot.module for slot, *_ in swaps]:
            # Dynamo would compile anew for each module whose id() it is asked for.
            if isinstance(module, nn.RNNBase) and all(module is not known for known, *_ in flat_weights):
                flat_weights.append((module, module._flat_weights, module._flat_weight_refs))
                module._flat_weights = _seen_by_rnn(module, swaps)
        return call()
    finally:
        for module, flat, refs in flat_weights:
            module._flat_weights, module._flat_weight_refs = flat, refs
        for swap in swaps:
            _swap_out(swap)
        if locked:
            gate.release()


def _swap_in(slot: Slot, swaps: list[_Swap]) -> None:
    tensors = slot.tensors
    if slot.name not in tensors and (original := f"{slot.name}_orig") in tensors:  # pruned since
        slot = slot._replace(name=original)
    stored = tensors.get(slot.name)
    # A weight that an enclosing call has swapped already, or that a lazy module has not made yet, is left.
    if stored is None or stored.dtype == slot.dtype or isinstance(stored, _LAZY):
        return
    seen = stored.to(slot.dtype)
    # Versions tell of sparse buffers alone, and Dynamo is not to see one.
    swaps.append(_Swap(slot, stored, seen, 0 if stored.layout == torch.strided else seen._version))
    tensors[slot.name] = seen


def _swap_out(swap: _Swap) -> None:
    slot, stored, seen, _ = swap
    tensors = slot.tensors
    now = tensors.get(slot.name)
    tensors[slot.name] = stored
    if not slot.is_buffer:
        return
    if now is not seen:
        tensors[slot.name] = now if now is None else now.to(stored.dtype)
    elif stored.layout != torch.strided:
        tensors[slot.name] = stored if seen._version == swap.version else seen.to(stored.dtype)
    else:
        # BatchNorm's statistics change without a count in their version, so each forward may have changed them. What it
        # did not change keeps all its bits.
        with torch.no_grad():
            stored.copy_(torch.where(seen == stored.to(seen.dtype), stored, seen.to(stored.dtype)))


def _seen_by_rnn(module: nn.RNNBase, swaps: list[_Swap]) -> list[Any]:
    seen = {id(swap.stored): swap.seen for swap in swaps if swap.slot.module is module}
    return [seen.get(id(weight), weight) for weight in module._flat_weights]


class Storage:
    """Tensors that were converted in place, and the dtypes they were stored in before.

    Tensors are listed once however many modules share them. The bits that a narrower dtype loses are kept here until
    somebody takes them, who is then the one to keep them.
    """

    def __init__(self) -> None:
        self._before: dict[int, tuple[Tensor, torch.dtype, torch.dtype]] = {}
        self._wide: dict[int, Tensor] = {}

    def convert(self, tensors: Iterable[Tensor], dtype: torch.dtype) -> bool:
        """Stores tensors in another dtype, their gradients too; whether there was anything to do."""
        any_changed, storable = False, compute_dtypes()
        for tensor in tensors:
            if tensor.dtype not in storable or tensor.dtype == dtype or tensor.layout not in _CONVERTIBLE:
                continue
            before = self._before[id(tensor)][1] if id(tensor) in self._before else tensor.dtype
            self._before[id(tensor)] = (tensor, before, dtype)
            if dtype.itemsize < tensor.dtype.itemsize:
                self._wide[id(tensor)] = local_part(tensor.detach())
            _store(tensor, dtype)
            if dtype == torch.float64:  # alone asked for; and torch moves no DTensor that has weak references
                stored_by_rule[tensor] = True
            any_changed = True
        return any_changed

    def lossy(self) -> list[tuple[Tensor, Tensor]]:
        """Tensors that are stored in fewer bits than before, and what they were, as far as nobody has taken it.

        Of a tensor that ranks share, what this rank has of it.
        """
        return [(self._before[key][0], wide) for key, wide in self._wide.items()]

    def narrowed(self) -> list[Tensor]:
        """Tensors that are stored in 16 bits now and were wider."""
        return [tensor for tensor, before, now in self._before.values() if now.itemsize == 2 < before.itemsize]

    def wide_of(self, tensor: Tensor) -> Tensor | None:
        """What a tensor was before it was stored in fewer bits, if that is kept here."""
        return self._wide.get(id(tensor))

    def keep_wide(self, tensor: Tensor, wide: Tensor) -> None:
        """Keeps what a tensor is to be when it is put back, as far as it has not changed until then."""
        self._wide[id(tensor)] = wide

    def forget_wide(self, tensor: Tensor) -> None:
        """Keeps the bits no longer that a tensor has lost, because somebody else does, or because it is trained."""
        self._wide.pop(id(tensor), None)

    def keep_only(self, tensors: Iterable[Tensor]) -> bool:
        """Puts back what is not among these tensors; whether there was anything to do."""
        kept = {id(tensor) for tensor in tensors}
        dropped = [key for key in self._before if key not in kept]
        for key in dropped:
            tensor, before, converted = self._before.pop(key)
            stored_by_rule.pop(tensor, None)
            # What somebody else has converted since is no longer ours.
            wide = self._wide.pop(key, None)
            if tensor.dtype == converted:
                _store(tensor, before)
                local = local_part(tensor.detach())
                if wide is not None and torch.equal(wide.to(converted).to(local), local):
                    local.copy_(wide)
        return bool(dropped)

    def restore_precise(self, named: Mapping[str, Tensor], checkpoint: Mapping[str, Any]) -> None:
        """Takes from a checkpoint the bits that were lost when it was loaded before the conversion.

        A tensor is taken only where loading it is how the present value came about: rounded to what was stored before,
        it is that value.
        """
        for name, tensor in named.items():
            wide = checkpoint.get(name)
            if id(tensor) not in self._before or not isinstance(wide, Tensor) or wide.shape != tensor.shape:
                continue
            before = self._before[id(tensor)][1]
            if wide.is_floating_point() and wide.element_size() > before.itemsize:
                with torch.no_grad():
                    wide = wide.detach().to(tensor.device)
                    if torch.equal(wide.to(before), tensor.to(before)):
                        tensor.copy_(wide)


def reflatten(modules: Iterable[nn.Module]) -> None:
    """Lets recurrent modules lay their weights out again after a conversion."""
    for module in modules:
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()


def _store(tensor: Tensor, dtype: torch.dtype) -> None:
    if local_part(tensor) is not tensor:  # a DTensor, whose dtype is fixed; so another takes its object's place
        other = nn.Parameter(tensor.detach().to(dtype), tensor.requires_grad)
        other.grad = None if tensor.grad is None else tensor.grad.to(dtype)
        torch.utils.swap_tensors(tensor, other)
        return
    tensor.data = tensor.data.to(dtype)
    if tensor.grad is not None:
        tensor.grad.data = tensor.grad.data.to(dtype)
