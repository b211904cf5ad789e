"""Example inputs: what a module's forward is given when it is traced, and when its file is tried."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_mixprec.engine.objects import tensors_in
from lightning_mixprec.errors import ExportError


class Example(NamedTuple):
    """The arguments of a call.

    Attributes:
        args: By position.
        kwargs: By name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors, in the order in which programs take them."""
        return [leaf for leaf in torch.utils._pytree.tree_leaves((self.args, self.kwargs)) if _is_tensor(leaf)]


def read_example(module: nn.Module, inputs: Any) -> Example:
    """The call that example inputs mean: a tensor is the only argument, a tuple all, a mapping those by name.

    Raises:
        ExportError: The module has no forward, or the inputs do not fit it.

    >>> read_example(nn.Linear(2, 2), torch.ones(1, 2)).args
    (tensor([[1., 1.]]),)
    """
    forward = forward_of(module)
    if isinstance(inputs, Mapping):
        example = Example((), {str(name): value for name, value in inputs.items()})
    elif isinstance(inputs, tuple | list):
        example = Example(tuple(inputs), {})
    else:
        example = Example((inputs,), {})
    if not any(True for _ in tensors_in((example.args, example.kwargs))):
        raise ExportError(
            f"example_inputs is a {type(inputs).__name__} without a tensor; give what {type(module).__name__}.forward "
            "takes: a tensor, a tuple of arguments, or a mapping of arguments by name"
        )
    signature = inspect.signature(forward)
    try:
        signature.bind(*example.args, **example.kwargs)
    except TypeError as error:
        raise ExportError(
            f"example_inputs do not fit {type(module).__name__}.forward{_shortened(signature)}: {error}; give a "
            "tensor, a tuple of arguments, or a mapping of arguments by name (one that is a mapping: in a tuple)"
        ) from None
    return example


def forward_of(module: object) -> Any:
    """A module's forward.

    Raises:
        ExportError: It is no module, or has none.
    """
    if not isinstance(module, nn.Module):
        raise ExportError(f"a {type(module).__name__} is to be exported; give a torch.nn.Module, trained or not")
    if "forward" not in vars(module):
        definer = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
        is_missing = definer is nn.Module or definer.__name__ == "LightningModule"
        if is_missing:
            raise ExportError(
                f"{type(module).__name__} has no forward to be exported; define forward(self, ...), or export the part "
                "that has one, as module.model"
            )
    return module.forward


def _shortened(signature: inspect.Signature) -> str:
    text = f"({', '.join(signature.parameters)})"
    return text if len(text) <= 80 else f"{text[:77]}...)"


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
