"""Functions of torch replaced by others, in a part of a model and nowhere else."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]
"""A function or method of torch, as code calls it: ``torch.nn.functional.linear``, ``torch.Tensor.matmul``."""

Replacement = Callable[[Function, tuple[Any, ...], dict[str, Any]], Any]
"""What is called instead: with the function that was called, its arguments, and its arguments by name."""


class Replacing(TorchFunctionMode):
    """Calls replacements instead of functions of torch within; torch has nothing patched.

    A replacement runs with this mode left and those around it entered: what it calls is torch's own, or replaced by
    an outer mode.

    Args:
        replacements: By function, what is called instead.

    >>> def negated(function, args, kwargs):
    ...     return -function(*args, **kwargs)
    >>> with Replacing({torch.neg: negated}):
    ...     torch.neg(torch.ones(1)), torch.abs(torch.ones(1))
    (tensor([1.]), tensor([1.]))
    """

    def __init__(self, replacements: Mapping[Function, Replacement]) -> None:
        super().__init__()
        self.replacements = dict(replacements)

    def __torch_function__(
        self, function: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls a function of torch, or what replaces it."""
        replacement = self.replacements.get(function)
        if replacement is None:
            return function(*args, **(kwargs or {}))
        return replacement(function, args, kwargs or {})

    def is_entered(self) -> bool:
        """True within, in this thread; Dynamo knows, too."""
        c: Any = torch._C
        return any(c._get_function_stack_at(place) is self for place in range(c._len_torch_function_stack()))
