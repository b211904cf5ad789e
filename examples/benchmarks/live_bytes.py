"""The bytes that live tensors hold, counted, whatever the allocator makes of them; storages may be resized."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations have taken or made and that are still there.

    Attributes:
        peak: The most bytes that were there at once; may be set back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(each, "full_tensor") for each in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                self._storages.setdefault(storage._cdata, StorageWeakRef(storage))
        self.peak = max(self.peak, self._count())
        return result

    def _count(self) -> int:
        total = 0
        for key, ref in list(self._storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
            if storage is None:
                del self._storages[key]
            else:
                total += storage.nbytes()
        return total
