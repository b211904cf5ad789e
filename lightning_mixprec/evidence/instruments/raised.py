"""Where an exception of a step comes from: the layer that ran, and the numbers that it was about."""

import traceback
from collections.abc import Iterator

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
    names = {id(node.module): node.name for node in reversed(list(walk(model)))}
    frames = (frame for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))))
    modules = (id(frame.f_locals.get("self")) for frame in frames)
    return next((names[module] for module in modules if module in names), "")


def _tensors_by_frame(error: BaseException) -> Iterator[list[Tensor]]:
    """The tensors that the functions of a traceback hold, the innermost function's first."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        leaves = tree_leaves(list(frame.f_locals.values()))
        yield [leaf for leaf in leaves if isinstance(leaf, Tensor)]
