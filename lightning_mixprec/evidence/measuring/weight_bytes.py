"""The bytes of weights, of their gradients, and of what an optimizer keeps beside them."""

import contextlib
from collections.abc import Iterable, Sequence
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
        optimizer: The optimizer, or several; None for torch's AdamW. They are neither stepped nor changed.
    """

    def __init__(self, optimizer: Optimizer | Sequence[Optimizer] | None) -> None:
        given = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        self._optimizers = [getattr(each, "_optimizer", each) for each in given if each is not None]  # unwrapped
        self._known: dict[Any, float] = {}
        self._default: dict[str, Any] = {}

    def bytes_of(self, param: nn.Parameter) -> float:
        """Bytes of moments and compensation of a weight, nothing for one that is not trained."""
        if not param.requires_grad:
            return 0.0
        kind, group = self._group_of(param)
        key = tuple(param.shape), param.dtype, id(group)
        if key not in self._known:
            self._known[key] = self._tried(param, kind, group)
        return self._known[key]

    def _group_of(self, param: nn.Parameter) -> tuple[Any, dict[str, Any]]:
        """The class of a weight's optimizer, and its group there; of one that no optimizer has, the first."""
        groups = [(type(each), group) for each in self._optimizers for group in each.param_groups]
        mine = (each for each in groups if any(other is param for other in each[1]["params"]))
        return next(iter((*mine, *groups, (AdamW, self._default))))

    def _tried(self, param: nn.Parameter, kind: Any, group: dict[str, Any]) -> float:
        shape = param.shape if param.numel() <= _MOST else (_MOST,)
        like = nn.Parameter(torch.ones(shape, dtype=param.dtype))
        options = {name: value for name, value in group.items() if name != "params"}
        options |= {name: False for name in ("capturable", "fused") if options.get(name)}
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
