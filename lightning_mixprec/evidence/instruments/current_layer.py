"""The module of a model that is running, and the one that made a node of the autograd graph."""

import os.path
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_mixprec.evidence.instruments.own_dtypes import HookOf
from lightning_mixprec.policy.module_names import is_scripted, walk

Direction = Literal["forward", "backward"]

_NO_TASK = -1


@dataclass
class _Span:
    """One run of a module's forward, as the range of sequence numbers that autograd gave to nodes meanwhile."""

    layer: str
    task: int
    outer: int
    begin: int
    end: int | None = None

    def holds(self, number: int) -> bool:
        return self.begin <= number and (self.end is None or number < self.end)


class CurrentLayer:
    """Follows the modules of a model through hooks, and tells the layer of whatever is computed.

    Autograd numbers the nodes that a thread makes. The numbers that were given between the begin and the end of a
    module's forward belong to that module, and so does what their nodes compute in backward. A forward that runs inside
    backward (activation checkpointing) is a forward like any other: it makes nodes of its own.

    Nothing here may run in several threads: backward must stay in the thread of the forward, as it does under
    ``torch.autograd.set_multithreading_enabled(False)``.

    Args:
        model: the model; modules appear under their canonical names, a shared one under its first. Script modules are
            a part of what contains them.
    """

    def __init__(self, model: nn.Module) -> None:
        nodes = [node for node in walk(model) if not is_scripted(node.module)]
        self._modules = {id(node.module): node.module for node in nodes}
        self._names = {id(node.module): node.name for node in reversed(nodes)}
        self._handles: list[RemovableHandle] = []
        self._spans: list[_Span] = []
        self._begins: list[int] = []
        self._stack: list[int] = []
        self._in_backward: dict[int, str] = {}
        self._forward_count = 0
        self._count_before = 0
        self._readers: dict[tuple[int, int], set[str]] = {}
        self._read_by: dict[int, set[tuple[int, int]]] = {}

    def attach(self) -> None:
        """Puts the hooks on."""
        for module in self._modules.values():
            self._handles += [
                module.register_forward_pre_hook(HookOf(module, self._begin), prepend=True),
                module.register_forward_hook(HookOf(module, self._end), always_call=True),
            ]

    def detach(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()

    def now(self) -> tuple[str | None, Direction]:
        """The layer and direction of the operation that is just being computed.

        The layer is ``None`` where a gradient is added to what a leaf has accumulated, which no module does.
        """
        task, count = torch._C._current_graph_task_id(), _count()
        if task == _NO_TASK:
            self._forward_count = count
        if self._stack and self._spans[self._stack[-1]].task == task:
            return self._spans[self._stack[-1]].layer, "forward"
        if task == _NO_TASK:
            return "", "forward"
        node = torch._C._current_autograd_node()
        number = count if node is None else node._sequence_nr()
        if number >= count:
            return None, "backward"
        layer = self._maker(number)
        if count > self._forward_count:
            self._in_backward.setdefault(count - 1, layer)
        return layer, "backward"

    def reads(self, layer: str, tensors: Iterable[tuple[int, int]]) -> None:
        """Notes that an operation of a layer's forward reads tensors, each told by an identity and its size."""
        before, self._count_before = self._count_before, _count()
        if self._count_before == before:
            return  # an operation without a node in the graph
        for tensor in tensors:
            self._readers.setdefault(tensor, set()).add(layer)
            self._read_by.setdefault(self._count_before - 1, set()).add(tensor)

    def sums(self, layer: str, size: int) -> str:
        """The layer to which a sum of gradients belongs.

        Where a tensor is used several times, autograd adds up the gradients as if that were a part of the node that
        has handed in the latest. It is the doing of the smallest module that contains all uses.

        Args:
            layer: the layer of that node.
            size: how many elements the sum has.
        """
        node = torch._C._current_autograd_node()
        read = self._read_by.get(node._sequence_nr(), set()) if node is not None else set()
        uses = {layer}.union(*(self._readers[tensor] for tensor in read if tensor[1] == size))
        common = os.path.commonprefix([[part for part in use.split(".") if part] for use in uses])
        ran = {span.layer for span in self._spans}
        while common and ".".join(common) not in ran:
            common = common[:-1]
        return ".".join(common)

    def _maker(self, number: int) -> str:
        """The layer that made a node: in its forward, or in its backward for a second one (``create_graph``)."""
        if number in self._in_backward:
            return self._in_backward[number]
        place = bisect_right(self._begins, number) - 1
        while place >= 0 and not self._spans[place].holds(number):
            place = self._spans[place].outer
        return self._spans[place].layer if place >= 0 else ""

    def _begin(self, module: nn.Module, args: Any) -> None:
        outer = self._stack[-1] if self._stack else -1
        span = _Span(self._names[id(module)], torch._C._current_graph_task_id(), outer, _count())
        self._stack.append(len(self._spans))
        self._spans.append(span)
        self._begins.append(span.begin)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        layer = self._names[id(module)]
        if all(self._spans[place].layer != layer for place in self._stack):
            return
        while (ended := self._spans[self._stack.pop()]).layer != layer:
            ended.end = _count()
        ended.end = _count()


def _count() -> int:
    """The number of nodes that autograd has numbered in this thread."""
    return int(torch._C._autograd._get_sequence_nr())
