"""Arguments, of a new run or of a change to a running one: their meaning, or one line that says what is allowed."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from lightning_mixprec.errors import MixPrecError, PolicyError, ScalingError, SupportError
from lightning_mixprec.numerics.devices import native_support
from lightning_mixprec.numerics.formats import REFERENCE, get_format, is_scaling_needed
from lightning_mixprec.optim.gradients import needs_closure
from lightning_mixprec.optim.loss_scaling_options import LossScaling
from lightning_mixprec.plugin.lightnings import both
from lightning_mixprec.policy.assignment import Assignment
from lightning_mixprec.policy.policy import as_policy

_AVERAGING = both("callbacks", "WeightAveraging") + both("callbacks", "StochasticWeightAveraging")
_BEFORE_BACKWARD = ("on_before_zero_grad", "optimizer_zero_grad")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise MixPrecError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}.")


def as_loss_scaling(value: Any) -> LossScaling | Literal["auto"] | None:
    """Meaning of the argument ``loss_scaling``: options, ``"auto"``, or None for never."""
    if value is True:
        raise ScalingError("loss_scaling is True; write 'auto' (on when some layer computes in fp16) or a number.")
    if isinstance(value, str) and value == "auto":
        return "auto"
    return None if value is False else LossScaling.from_value(value)


def scaling_for(asked: LossScaling | Literal["auto"] | None, assignment: Assignment) -> LossScaling | None:
    """Options of loss scaling under an assignment; None if the loss is not scaled."""
    if asked != "auto":
        return asked
    return LossScaling() if is_scaling_needed(assignment.compute_formats) else None


def configured_form(policy: object) -> str | dict[str, Any]:
    """The policy that the user configured, in the form that a checkpoint keeps."""
    return "auto" if isinstance(policy, str) and policy == "auto" else as_policy(policy).to_dict()


def choose_format(device: torch.device) -> tuple[str, str]:
    """The format that ``policy="auto"`` stands for on a device, and the reason."""
    bf16, fp16, name = native_support("bf16", device), native_support("fp16", device), device_name(device)
    if bf16.native:
        return "bf16", f"bf16, which {name} computes natively ({bf16.reason})"
    if fp16.native:
        return "fp16", f"fp16 with loss scaling, because {name} does not compute bf16 natively ({bf16.reason})"
    return REFERENCE, f"fp32, because {name} computes neither bf16 ({bf16.reason}) nor fp16 ({fp16.reason}) natively"


def check_running(model: pl.LightningModule | None, in_step: bool, what: str) -> pl.LightningModule:
    """The model, if one is running and no step of it is.

    Args:
        model: The running model.
        in_step: Whether a forward or backward is under way.
        what: What was to happen, to begin an error with.
    """
    if model is None:
        raise PolicyError(
            f"{what} of a running model was to change, but none is running; pass it to PerLayerPrecision, or change it "
            "from a callback during fit."
        )
    if in_step or model._current_fx_name in _BEFORE_BACKWARD:
        raise PolicyError(
            f"{what} was to change in the middle of a step, where backward would recompute in other formats; change it "
            "between steps, for example in on_train_batch_start or on_train_batch_end."
        )
    return model


def check_storage_unchanged(before: Assignment, after: Assignment) -> None:
    """Raises if a rule of the new policy stores weights otherwise than they are stored now."""
    for name, layer in after.items():
        if layer.is_stored_by_rule and layer.param != before[name].param:
            raise PolicyError(
                f"A policy for a running model stores {name or 'the LightningModule'} in {layer.param}, but it is "
                f"stored in {before[name].param}; param can only be chosen before training (leave it out here)."
            )


def check_change(
    before: Assignment, after: Assignment, asked: LossScaling | Literal["auto"] | None, optimizers: Iterable[Optimizer]
) -> LossScaling | None:
    """Options of loss scaling once another assignment holds for a running model; None if the loss is not scaled.

    Args:
        before: The assignment in force.
        after: The other one.
        asked: What is asked for by ``loss_scaling``.
        optimizers: Those of the run.

    Raises:
        PolicyError: It stores weights otherwise.
        SupportError: It needs loss scaling, which an optimizer does not allow.
    """
    check_storage_unchanged(before, after)
    options = scaling_for(asked, after)
    check_optimizers(optimizers, options)
    return options


def check_optimizers(optimizers: Iterable[Optimizer], options: LossScaling | None) -> None:
    """Raises for optimizers that evaluate the loss themselves, where the loss would be scaled."""
    for optimizer in optimizers:
        if needs_closure(optimizer) and options is not None:
            raise SupportError(
                f"{type(optimizer).__name__} evaluates the loss several times per step, which loss scaling does not "
                "allow; use bf16 or fp32 instead of fp16, or another optimizer."
            )


def check_averages(model: pl.LightningModule, assignment: Assignment) -> None:
    """Raises where a callback of Lightning's averages weights that a rule stores in 16 bits.

    It would average what they are rounded to, without the bits that the optimizer keeps, and round what it gives back.
    """
    callbacks: list[pl.Callback] = model.trainer.callbacks  # type: ignore[attr-defined]
    # Ours say so themselves: a door above this one.
    averaging = [
        each for each in callbacks if isinstance(each, _AVERAGING) and not getattr(each, "averages_full_weights", False)
    ]
    narrow = [name for name, layer in assignment.items() if layer.is_stored_by_rule and get_format(layer.param).is_half]
    if averaging and narrow:
        raise SupportError(
            f"{type(averaging[0]).__name__} averages weights as they are stored, and {len(narrow)} layers "
            f"({narrow[0]!r} first) store theirs in 16 bits, so that the average would be of rounded weights; take the "
            f"callback of that name in lightning_mixprec.callbacks.averaging, or leave param out of the policy."
        )


def device_name(device: torch.device) -> str:
    """A device as a user knows it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"
