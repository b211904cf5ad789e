"""The names of a model's modules as its author wrote them.

Wrappers (``torch.compile``, DDP, FSDP, activation checkpointing, weight averaging) put a module of their own around the
one that computes and a segment of their own into its name. Here they are transparent: the wrapped module appears under
the wrapper's name, the wrapper itself does not appear.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

_WRAPPED_AS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "AveragedModel": "module",
}


class Node(NamedTuple):
    """One name of one module, and the module that holds it (``None`` at the root)."""

    name: str
    module: nn.Module
    parent: nn.Module | None


def unwrap(module: nn.Module) -> nn.Module:
    """The module that computes, inside any number of wrappers."""
    while (inner := _wrapped(module)) is not None:
        module = inner
    return module


def walk(model: nn.Module) -> Iterator[Node]:
    """Every module below ``model`` under each of its names, parents first.

    A module that is registered in several places is yielded once per place. A module that contains itself is entered
    once.

    >>> shared = nn.Linear(2, 2)
    >>> [node.name for node in walk(nn.Sequential(shared, nn.ReLU(), shared))]
    ['', '0', '1', '2']
    """
    yield from _walk(unwrap(model), "", None, set())


def is_scripted(module: nn.Module) -> bool:
    """True of what torch.jit.script or torch.jit.trace made: it takes no hooks, and calls no part of it by itself."""
    return isinstance(module, torch.jit.ScriptModule)


def _walk(module: nn.Module, name: str, parent: nn.Module | None, path: set[int]) -> Iterator[Node]:
    if id(module) in path:
        return
    yield Node(name, module, parent)
    path.add(id(module))
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _walk(unwrap(child), f"{name}.{child_name}" if name else child_name, module, path)
    path.discard(id(module))


def _wrapped(module: nn.Module) -> nn.Module | None:
    for cls in type(module).__mro__:
        if cls.__name__ in _WRAPPED_AS:
            inner = getattr(module, _WRAPPED_AS[cls.__name__], None)
            return inner if isinstance(inner, nn.Module) else None
    return None
