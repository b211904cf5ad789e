"""The distance of a file's outputs from the module's own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mixprec.errors import ExportError

CLOSE = 1e-3
"""How far, of the largest magnitude in an output, a file may be that rounds at other places than torch does."""

ROOM = 4.0
"""How many times farther from the module than the module is, under its policy, from itself in fp32."""


def check_same_outputs(found: Sequence[Tensor], expected: Sequence[Tensor], file: str) -> None:
    """Checks that a file returns as many tensors, of the same shapes.

    Raises:
        ExportError: It does not.
    """
    shapes = [[tuple(each.shape) for each in outputs] for outputs in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ExportError(
            f"the {file} file returns tensors of shapes {shapes[0]}, and the module {shapes[1]}; it was not kept: "
            "let forward return tensors whose number and shapes the inputs alone decide"
        )


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference between elements; 0 where both are NaN or infinite alike.

    >>> largest_difference([torch.tensor([1.0, torch.nan])], [torch.tensor([1.5, torch.nan])])
    0.5
    """
    return max((_distances(*pair)[0] for pair in zip(found, expected, strict=True)), default=0.0)


def relative_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest magnitude in its output; infinite if some are not finite alike."""
    return max((_distances(*pair)[1] for pair in zip(found, expected, strict=True)), default=0.0)


def are_identical(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """True if all are of the same dtypes, and equal to the last bit."""
    return all(one.dtype == two.dtype for one, two in zip(found, expected, strict=True)) and all(
        _distances(*pair)[0] == 0 for pair in zip(found, expected, strict=True)
    )


def last_place(outputs: Sequence[Tensor]) -> float:
    """One unit in the last place of the coarsest output, relative to it: what a tie that falls otherwise changes."""
    return max((torch.finfo(each.dtype).eps for each in outputs if each.is_floating_point()), default=0.0)


def _distances(found: Tensor, expected: Tensor) -> tuple[float, float]:
    one, two = (each.detach().cpu().to(torch.float64) for each in (found, expected))
    if not one.numel():
        return 0.0, 0.0
    alike = (one == two) | (one.isnan() & two.isnan())
    distance = torch.where(alike, 0.0, (one - two).abs()).nan_to_num(math.inf).max().item()
    magnitude = two[two.isfinite()].abs().max().item() if two.isfinite().any() else 0.0
    return distance, distance / magnitude if magnitude else (math.inf if distance else 0.0)


def tensors_of(result: object) -> list[Tensor]:
    """The tensors of a plain result, in the order in which programs return them."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
