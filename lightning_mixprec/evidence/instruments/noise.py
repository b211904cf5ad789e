"""Numbers that are zero but for rounding: how far apart two losses are, and how to have all rounded otherwise."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_mixprec import ranks
from lightning_mixprec.engine.sharding import is_sharded
from lightning_mixprec.evidence.instruments.probe import counted
from lightning_mixprec.numerics.flat_batches import flatten, moved_to, on_device

NO_LOSS = -1.0
"""The loss gap of a step without a loss, among numbers of which the largest counts."""

_OFF_BY, _OTHER_SCALE = 1 + 2.0**-22, 3.0
_SHARE_OF_TERMS = 0.1


@torch.no_grad()
def round_otherwise(weights: Iterable[Tensor]) -> float:
    """Moves weights by their last bits, so that whatever is computed with them in fp32 is rounded otherwise.

    A gradient that means something stays what it was, to six digits. One that is the rounding error of terms which
    cancel each other becomes another.

    Args:
        weights: Stand-ins of weights, which are written to.

    Returns:
        The loss scale with which gradients are rounded otherwise, too: no power of two.
    """
    floating = [weight for weight in weights if weight.is_floating_point() and not weight.is_sparse]
    if floating:
        torch._foreach_mul_(floating, _OFF_BY)
    return _OTHER_SCALE


def size_of_terms(
    owned: Mapping[str, Sequence[str]], weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> Tensor:
    """A tenth of what a loss would change if its weights changed by as much as they are; on the device.

    Where gradients are sharded, all ranks ask together.

    That is ``|g| |w|``, added up over layers: about the size of the terms that a loss is made of, also where these
    cancel (an advantage that is normalized, the difference of two scores).

    Args:
        owned: Names of parameters by layer.
        weights: Weights by name.
        gradients: Gradients by name.
    """
    names = [[name for name in own if name in gradients] for own in owned.values()]
    if not any(names):
        return torch.zeros((), dtype=torch.float64)
    sides = [[flatten(counted(side[name])) for own in names for name in own] for side in (weights, gradients)]
    device = sides[0][0].device
    both = [torch._foreach_norm(each, 2, dtype=torch.float64) for each in sides]
    norms = torch.stack([torch.stack([moved_to(device, norm) for norm in each]) for each in both], -1)
    lengths = on_device(list(map(len, names)), norms.device)
    squares = torch.segment_reduce(norms.square(), "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    if any(map(is_sharded, gradients.values())):
        ranks.add_up([squares])
    return _SHARE_OF_TERMS * squares.sqrt().prod(-1).sum()


def loss_gap(low: Sequence[Tensor], reference: Sequence[Tensor], least: float | Tensor = 0.0) -> Tensor:
    """Largest ``|L_low - L_fp32| / |L_fp32|`` of a step's losses; on the device.

    0 for two losses that are both 0, infinite where one is not finite. ``NO_LOSS`` where the step has no loss in fp32;
    infinite where it has another number of losses than in fp32, so that none belongs to another.

    Args:
        low: The losses in other formats, in the order in which they went backward.
        reference: Those in fp32.
        least: What ``|L_fp32|`` counts for at least.
    """
    if not reference:
        return torch.tensor(NO_LOSS, dtype=torch.float64)
    if len(low) != len(reference):
        return torch.tensor(math.inf, dtype=torch.float64)
    ours, theirs = (torch.stack([loss.double().sum() for loss in losses]) for losses in (low, reference))
    gaps = (ours - theirs).abs() / theirs.abs().clamp(min=least)
    gaps = torch.where((ours == theirs) & ours.isfinite(), 0.0, gaps)
    return gaps.nan_to_num(nan=math.inf, posinf=math.inf).amax()
