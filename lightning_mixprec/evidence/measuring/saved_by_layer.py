"""The bytes that each layer keeps for backward while a step runs."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mixprec.evidence.instruments.current_layer import CurrentLayer


class SavedByLayer:
    """Counts while it is open: each memory once, at the layer that keeps it first.

    Args:
        model: The model whose step runs.

    Attributes:
        bytes: By layer, for those that keep anything.
    """

    def __init__(self, model: nn.Module) -> None:
        self._running = CurrentLayer(model)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self._seen: set[int] = set()
        self._alive: list[Tensor] = []
        self.bytes: dict[str, int] = {}

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that are there anyway, as weights and buffers are."""
        self._seen |= {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def __enter__(self) -> "SavedByLayer":
        self._running.attach()
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
        self._running.detach()
        self._alive.clear()

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(tensor.detach())  # so that its address is given to nobody else
            layer, _ = self._running.now()
            self.bytes[layer or ""] = self.bytes.get(layer or "", 0) + storage.nbytes()
        return tensor
