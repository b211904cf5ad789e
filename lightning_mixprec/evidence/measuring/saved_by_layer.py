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
        shared: By the names of two layers, the elements of floating tensors that the first one keeps first, and the
            second one, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._running = CurrentLayer(model)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self._apart: set[int] = set()
        self._keepers: dict[int, list[str]] = {}
        self._alive: list[Tensor] = []
        self.bytes: dict[str, int] = {}
        self.shared: dict[tuple[str, str], int] = {}

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that are there anyway, as weights and buffers are."""
        self._apart |= set(map(_key, tensors))

    def __enter__(self) -> "SavedByLayer":
        self._running.attach()
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
        self._running.detach()
        self._alive.clear()

    def _count(self, tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided or (key := _key(tensor)) in self._apart:
            return tensor
        keepers, layer = self._keepers.setdefault(key, []), self._running.now()[0] or ""
        if not keepers:
            self._alive.append(tensor.detach())  # so that its address is given to nobody else
            self.bytes[layer] = self.bytes.get(layer, 0) + tensor.untyped_storage().nbytes()
        elif layer not in keepers and tensor.is_floating_point():
            pair = keepers[0], layer
            elements = tensor.untyped_storage().nbytes() // tensor.element_size()
            self.shared[pair] = self.shared.get(pair, 0) + elements
        if layer not in keepers:
            keepers.append(layer)
        return tensor


def _key(tensor: Tensor) -> int:
    """The memory of a tensor; of a fake one, too, which has no address."""
    return int(tensor.untyped_storage()._cdata)
