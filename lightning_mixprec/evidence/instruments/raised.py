"""Where an exception of a step comes from: the layer that ran, and the numbers that it was about."""

import traceback
from collections.abc import Iterator
from types import FrameType

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_mixprec.evidence.instruments.trace import Origin, Trace
from lightning_mixprec.policy.module_names import walk


def origin_of(error: BaseException, trace: Trace) -> Origin | None:
    """The operation that made the numbers non-finite which the innermost function with such numbers had.

    Args:
        error: What a step raised, with its traceback: its frames hold the tensors.
        trace: What ran until then.

    Returns:
        None if nothing that the exception can be about is out of a format's range; what was handed in so (a mask of
        -inf) is not looked at.
    """
    for tensors in _tensors_by_frame(error):
        found = trace.origin(tensors)
        if found is not None and not found.is_leaf:
            return found
    return None


def layer_of(error: BaseException, model: nn.Module) -> str:
    """The innermost module that ran when the exception was raised, ``""`` for the root and what is outside of it."""
    return next(iter(layers_through(error, model)), "")


def layers_through(error: BaseException, model: nn.Module) -> list[str]:
    """The modules that an exception went through, the innermost first."""
    names = {id(node.module): node.name for node in reversed(list(walk(model)))}
    modules = [id(frame.f_locals.get("self")) for frame in _frames(error)]
    return [names[module] for module in modules if module in names]


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]


def _tensors_by_frame(error: BaseException) -> Iterator[list[Tensor]]:
    """The tensors that the functions of a traceback hold, the innermost function's first."""
    for frame in _frames(error):
        leaves = tree_leaves(list(frame.f_locals.values()))
        yield [leaf for leaf in leaves if isinstance(leaf, Tensor)]
