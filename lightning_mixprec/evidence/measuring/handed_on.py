"""Which layer takes whose output, and how many numbers go through each layer, while a step runs."""

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mixprec.engine.objects import tensors_in
from lightning_mixprec.evidence.instruments.own_dtypes import HookOf, hookable


class HandedOn:
    """Watches what layers take and give while it is open.

    A tensor is its maker's: the innermost layer that gave it. What several layers call each other with in between, as
    the sum of a residual connection, is the work of the module around them.

    Args:
        layers: The modules by name.

    Attributes:
        handovers: By the names of two layers, of which the second took what the first gave, how many elements.
        elements: By layer how many elements it took and gave.
        order: The layers that were called, in the order in which their last calls ended.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._handles: list[RemovableHandle] = []
        self._makers: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._inside: list[str] = [""]
        self.handovers: dict[tuple[str, str], int] = {}
        self.elements: dict[str, int] = dict.fromkeys(layers, 0)
        self.order: dict[str, None] = {}

    def __enter__(self) -> "HandedOn":
        for name, module in hookable(self._layers).items():
            self._handles.append(
                module.register_forward_pre_hook(HookOf(module, partial(self._take, name)), with_kwargs=True)
            )
            self._handles.append(module.register_forward_hook(HookOf(module, partial(self._give, name))))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _take(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        for tensor in tensors_in((args, kwargs)):
            if tensor.is_floating_point():
                self.elements[name] += tensor.numel()
                self._hand(self._maker(tensor), name, tensor)
        self._inside.append(name)

    def _give(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()
        self.order.pop(name, None)
        self.order[name] = None
        for tensor in tensors_in(output):
            if not tensor.is_floating_point():
                continue
            self.elements[name] += tensor.numel()
            if self._known(tensor) is None:
                self._makers[id(tensor)] = weakref.ref(tensor), name

    def _hand(self, maker: str, taker: str, tensor: Tensor) -> None:
        if maker != taker:
            self.handovers[maker, taker] = self.handovers.get((maker, taker), 0) + tensor.numel()

    def _maker(self, tensor: Tensor) -> str:
        """Who gave a tensor; the module that is running, if nobody did."""
        return self._known(tensor) or self._inside[-1]

    def _known(self, tensor: Tensor) -> str | None:
        found = self._makers.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None
