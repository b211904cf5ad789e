"""Batches of failed steps: what in them is not finite, and files that hold one to replay it by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_mixprec.engine.objects import mapped, named_tensors
from lightning_mixprec.errors import MixPrecError, one_line
from lightning_mixprec.evidence.instruments.sandbox import RandomState
from lightning_mixprec.evidence.step_window import KeptBatch
from lightning_mixprec.numerics.finite import all_finite
from lightning_mixprec.numerics.flat_batches import flatten
from lightning_mixprec.records.events import Event


class Saved(NamedTuple):
    """The content of a file.

    Attributes:
        kept: The batch, its index and torch's random numbers if the step used any.
        loss_scale: The loss scale of the step.
        policy: The policy that was in force, as a mapping or a format's name.
    """

    kept: KeptBatch
    loss_scale: float
    policy: Any


def save_batch(path: Path, kept: KeptBatch, event: Event, policy: Any) -> Path | None:
    """Writes a batch and what else :class:`Saved` tells, and the event; None, and a warning, if that fails."""
    random = None if kept.random is None else kept.random.to_dict()
    content = {"batch": kept.batch, "batch_idx": kept.batch_idx, "random": random, "event": event, "policy": policy}
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        partial.replace(path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        rank_zero_warn(f"the batch could not be saved to {path} ({type(error).__name__}: {error}).")
        return None
    return path


def load_batch(path: str | Path, device: torch.device) -> Saved:
    """Reads :func:`save_batch`.

    Raises:
        MixPrecError: The file is none of these, or its batch holds objects that torch does not load from files.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        saved = content["random"]
        random = None if saved is None else RandomState.from_dict(tree_map(_on_cpu, saved), device)
        kept = KeptBatch(content["batch"], content["batch_idx"], random)
        return Saved(kept, content["event"]["loss_scale"], content["policy"])
    except Exception as error:
        says = f"{str(path)!r} cannot be read as a saved batch ({one_line(error)})"
        raise MixPrecError(
            f"{says}; if it holds a batch class of your own, pass "
            "torch.load(path, weights_only=False)['batch'] instead."
        ) from error


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def nonfinite_in(batch: Any) -> Iterator[str]:
    """The values of a batch that are not finite, in words."""
    for where, tensor in named_tensors(batch):
        if tensor.is_floating_point() and not all_finite([values := flatten(tensor)]):
            bad = (~torch.isfinite(values)).sum().item()
            yield f"{bad} of {tensor.numel()} values in batch{where}"


def repaired(batch: Any) -> Any:
    """A copy of a batch with zeros in place of what is not finite: a mask of -inf in the batch is no broken data."""
    return mapped(batch, _repaired_tensor)


def _repaired_tensor(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().nan_to_num(0.0, 0.0, 0.0).requires_grad_(tensor.requires_grad)
