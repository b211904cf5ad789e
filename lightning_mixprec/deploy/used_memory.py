"""The memory that a step takes: what is alive at its peak, and what it keeps for a backward."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak:
    """The most bytes that a step had in use beside what was there before it; after :func:`peak_of` knows."""

    def __init__(self) -> None:
        self.bytes = 0


@contextmanager
def peak_of(device: torch.device, found: Peak) -> Iterator[None]:
    """Measures the peak of what is run within: CUDA's allocator says it, on the CPU tensors are counted.

    On the CPU these are the tensors that torch's operations return, for as long as something holds them, sparse ones
    apart, and without the fused attention of inference. What a kernel takes for itself while it runs is not seen there.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    was_on = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # within a count, fused attention knows nothing of autocast
    try:
        with LiveBytes() as live:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_on)
    found.bytes = live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the memories that operations make, from when they are made until nothing holds them.

    Attributes:
        peak: The most there were at once.

    >>> with LiveBytes() as live:
    ...     x = torch.ones(256)  # 1 KiB
    ...     y = (x + 1).relu()  # the sum is gone when the line ends
    >>> live.peak
    3072
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts the memories that are new in its results."""
        taken = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                key = _key(leaf)
                if key not in taken and key not in self._known:
                    self._count(leaf, key)
        return result

    def _count(self, tensor: Tensor, key: int) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


class SavedBytes:
    """Counts the bytes that a step keeps for its backward, each memory once; weights and buffers apart.

    Args:
        apart: Tensors whose memories do not count: they are there anyway.

    Attributes:
        bytes: So many.
    """

    def __init__(self, apart: Iterable[Tensor]) -> None:
        self.bytes = 0
        self._apart = {_key(tensor) for tensor in apart}
        self._kept: dict[int, Tensor] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within, what is saved is counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda saved: saved):
            yield
        self.bytes = sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())
        self._kept.clear()

    def _save(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided and (key := _key(tensor)) not in self._apart:
            self._kept[key] = tensor.detach()  # held, so that no other memory gets its address
        return tensor


def bytes_held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memories of tensors, each memory once.

    >>> weight = torch.ones(4)
    >>> bytes_held([weight, weight[:2], torch.ones(2, dtype=torch.bfloat16)])
    20
    """
    memories = {_key(each): each.untyped_storage().nbytes() for each in tensors if each.layout == torch.strided}
    return sum(memories.values())


def _key(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return id(tensor)  # a subclass without memory of its own
