"""The weights in a checkpoint with all the bits that its optimizers kept, from the file alone."""

import os
from collections.abc import Mapping, Sequence
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from lightning_mixprec.errors import MixPrecError
from lightning_mixprec.optim.kept_weights import is_narrow, keeping_in
from lightning_mixprec.optim.loaded_states import widened

WEIGHT_NAMES = "weight_names"
"""The key in an optimizer's state_dict under which the names of its weights stand, in the order of its groups."""


def full_weights(checkpoint: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint in fp32, with all the bits that its optimizers kept of those stored in 16 bits.

    Needs neither the model nor its optimizers: under :class:`~lightning_mixprec.PerLayerPrecision`, or if it was given
    ``model.named_parameters()``, an optimizer of this package says in its state which weights are whose.

    Args:
        checkpoint: The path of a checkpoint that a Trainer saved in one file, or what ``torch.load`` gave of it.

    Returns:
        What ``load_state_dict`` of the module takes: its ``state_dict``, 16-bit tensors in fp32.

    Raises:
        MixPrecError: It is no checkpoint of a Trainer; or an optimizer has kept bits and does not say of which weights.
    """
    read = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    read = read if isinstance(read, Mapping) else {}
    weights, states = read.get("state_dict"), read.get("optimizer_states", [])
    if not isinstance(weights, Mapping):
        raise MixPrecError("the checkpoint has no state_dict; give one that a Trainer saved (trainer.save_checkpoint).")
    kept: dict[int, Mapping[str, Any]] = {}
    for state in states:
        kept |= _kept_by_place(state, weights)
    return {name: _full(weight, kept.get(_place(weight), {})) for name, weight in weights.items()}


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What a file holds that torch has saved, on the CPU.

    Raises:
        MixPrecError: It cannot be read, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise MixPrecError(f"{str(path)!r} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error


def _kept_by_place(state: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """What an optimizer kept of each weight, by the weight's place in memory, which tied names share."""
    keys = [key for group in state["param_groups"] for key in group["params"]]
    names = state.get(WEIGHT_NAMES) or _names_in_groups(state["param_groups"])
    with_bits = [key for key in keys if keeping_in(state["state"].get(key, {})) is not None]
    if with_bits and len(names) != len(keys):
        raise MixPrecError(
            f"an optimizer of the checkpoint keeps bits of {len(with_bits)} weights and does not say of which; train "
            "under PerLayerPrecision, or give the optimizer model.named_parameters()."
        )
    named = zip(keys, names, strict=False)
    return {_place(weights[name]): state["state"][key] for key, name in named if key in with_bits and name in weights}


def _names_in_groups(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """What torch writes if an optimizer was given names with its parameters."""
    return [name for group in groups for name in group.get("param_names", ())]


def _full(weight: Any, kept: Mapping[str, Any]) -> Any:
    if not isinstance(weight, Tensor):
        return weight
    return widened(weight, kept) if is_narrow(weight) else weight.clone()


def _place(weight: Any) -> int:
    return weight.data_ptr() if isinstance(weight, Tensor) else 0
