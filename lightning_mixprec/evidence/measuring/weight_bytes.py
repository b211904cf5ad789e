"""The bytes of weights, of their gradients, and of what an optimizer keeps beside them."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils._pytree import tree_leaves

_MOST = 2**16
"""Elements with which an optimizer is tried; what it keeps of more grows with them."""


class KeptByOptimizer:
    """What an optimizer keeps of each weight: a new one of its class, with its options, takes a step of a like weight.

    Args:
        optimizer: The optimizer; None for torch's AdamW. It is neither stepped nor changed.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self._optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning's wrapper
        self._known: dict[Any, float] = {}

    def bytes_of(self, param: nn.Parameter) -> float:
        """Bytes of moments and compensation of a weight, nothing for one that is not trained."""
        if not param.requires_grad:
            return 0.0
        group = self._group_of(param)
        key = tuple(param.shape), param.dtype, id(group)
        if key not in self._known:
            self._known[key] = self._tried(param, group)
        return self._known[key]

    def _group_of(self, param: nn.Parameter) -> dict[str, Any]:
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        found = next((group for group in groups if any(each is param for each in group["params"])), None)
        return found or (groups[0] if groups else {})

    def _tried(self, param: nn.Parameter, group: dict[str, Any]) -> float:
        shape = param.shape if param.numel() <= _MOST else (_MOST,)
        like = nn.Parameter(torch.ones(shape, dtype=param.dtype))
        options = {name: value for name, value in group.items() if name != "params"}
        options |= {name: False for name in ("capturable", "fused") if options.get(name)}
        kind: Any = AdamW if self._optimizer is None else type(self._optimizer)
        state: Any = None
        with contextlib.suppress(Exception):  # one that wants more of its weights than that they are there
            state = self._state_after_a_step(kind, like, options)
        if state is None:
            state = self._state_after_a_step(AdamW, like, {})
        scale = param.numel() / max(like.numel(), 1)
        return sum(each.nbytes for each in tree_leaves(state) if isinstance(each, Tensor) and each.dim()) * scale

    def _state_after_a_step(self, kind: Any, like: nn.Parameter, options: dict[str, Any]) -> Any:
        like.grad = torch.zeros_like(like)
        with torch.enable_grad():
            optimizer = kind([{"params": [like], **options}])
            optimizer.step()
        return dict(optimizer.state[like])


def gradient_bytes(params: Iterable[nn.Parameter]) -> float:
    """Bytes of the gradients of weights that are trained, in the weight's format or in the one set for them."""
    found = 0.0
    for param in filter(lambda each: each.requires_grad, params):
        wanted = getattr(param, "grad_dtype", None)
        found += param.numel() * (wanted or param.dtype).itemsize
    return found
