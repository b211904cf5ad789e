"""What is compared: policies by name, each with the weights that it computes with, and the batches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_mixprec.deploy.prepared import GivenBatch, give_weights, read_weights
from lightning_mixprec.errors import MixPrecError, PolicyError
from lightning_mixprec.numerics.formats import REFERENCE
from lightning_mixprec.policy.policy import PrecisionPolicy, as_policy

REFERENCE_WEIGHTS = "reference"
"""The name of the reference among weights."""

_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@dataclass(frozen=True)
class Candidate:
    """A policy to run a module under.

    Attributes:
        name: What it is called.
        policy: The policy.
        weights: The state_dict that it computes with; None for the module's own.
        whose: Where these are from, for errors.
    """

    name: str
    policy: PrecisionPolicy
    weights: Mapping[str, Any] | None = None
    whose: str = ""

    def give_weights(self, module: pl.LightningModule) -> None:
        """Loads its weights into a module, if it has any."""
        if self.weights is not None:
            give_weights(module, self.weights, self.whose)

    def is_exact(self, module: pl.LightningModule) -> bool:
        """Whether everything is computed in fp32 or wider."""
        return self.policy.resolve(module).compute_formats <= {REFERENCE, "fp64"}


def candidates_of(policies: Any, reference: Any, weights: Any) -> tuple[Candidate, list[Candidate]]:
    """The reference, and the policies that are compared with it.

    Raises:
        MixPrecError: Something is not what :func:`~lightning_mixprec.deploy.compare.compare` takes.
    """
    if not isinstance(policies, Mapping) or not policies:
        raise MixPrecError(
            f"policies is {policies!r}; write a mapping from a name of yours to a policy, as {{'bf16': 'bf16'}}."
        )
    if "default" in policies:
        raise MixPrecError(
            "policies has the name 'default', so it looks like one policy; give that a name: "
            f"{{'mixed': {dict(policies)!r}}}."
        )
    for name in policies:
        if not isinstance(name, str) or name == REFERENCE_WEIGHTS:
            raise MixPrecError(f"policies has the name {name!r}; give it a string other than 'reference'.")
    given = _weights_by_name(weights, policies)
    found = [_candidate(name, policy, given.get(name)) for name, policy in policies.items()]
    name = reference if isinstance(reference, str) else REFERENCE_WEIGHTS
    return _candidate(name, reference, given.get(REFERENCE_WEIGHTS)), found


def _weights_by_name(weights: Any, policies: Mapping[str, Any]) -> Mapping[str, Any]:
    if weights is None:
        return {}
    known = [*policies, REFERENCE_WEIGHTS]
    if not isinstance(weights, Mapping) or any(name not in known for name in weights):
        odd = next(name for name in weights if name not in known) if isinstance(weights, Mapping) else weights
        raise MixPrecError(
            f"weights has {str(odd)!r}; write a mapping from names, which are {', '.join(map(repr, known))}, to "
            "checkpoints or state_dicts."
        )
    return weights


def _candidate(name: str, policy: Any, weights: Any) -> Candidate:
    try:
        resolved = as_policy(policy)
    except PolicyError as error:
        raise PolicyError(f"policy {name!r}: {error}") from None
    if weights is None or isinstance(weights, Mapping):
        return Candidate(name, resolved, weights, repr(name))
    if not isinstance(weights, (str, Path)):
        raise MixPrecError(f"the weights of {name!r} are a {type(weights).__name__}; give a path or a state_dict.")
    return Candidate(name, resolved, read_weights(weights), repr(str(weights)))


def batches_of(module: pl.LightningModule, batches: Any, most: int | None) -> list[GivenBatch]:
    """Batches that are there without a Trainer, on the module's device.

    Args:
        module: The module, whose hooks move them: those of a DataLoader through all three, others to the device alone.
        batches: An iterable of batches, or a DataLoader.
        most: How many; None for all.

    Raises:
        MixPrecError: There are none.
    """
    if batches is None:
        raise MixPrecError("there are no batches; give batches, or a trainer whose validation data are to be taken.")
    if isinstance(batches, (str, bytes, Mapping, torch.Tensor)) or not isinstance(batches, Iterable):
        raise MixPrecError(
            f"batches is a {type(batches).__name__}; give an iterable of batches ([batch] for a single one), a "
            "DataLoader or a datamodule."
        )
    hooks = _TRANSFERS if isinstance(batches, DataLoader) else _TRANSFERS[1:2]
    with torch.no_grad():
        found = [_given(each, index, module, hooks) for index, each in enumerate(islice(batches, most))]
    if not found:
        raise MixPrecError("there are no batches to compare on; give at least one, and better twenty.")
    return found


def _given(batch: Any, index: int, module: pl.LightningModule, hooks: Sequence[str]) -> GivenBatch:
    if isinstance(batch, GivenBatch):
        return batch
    for hook in hooks:
        on_device = (module.device,) if hook == "transfer_batch_to_device" else ()
        batch = getattr(module, hook)(batch, *on_device, 0)
    return GivenBatch(batch, index)
