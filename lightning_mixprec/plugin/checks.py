"""What the plugin checks before training starts, each with one line that says what to do."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    Strategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_mixprec.engine.sharding import is_sharded
from lightning_mixprec.errors import MixPrecError, PolicyError, ScalingError, SupportError
from lightning_mixprec.numerics.devices import native_support
from lightning_mixprec.numerics.formats import format_of
from lightning_mixprec.optim.gradients import needs_closure
from lightning_mixprec.optim.options import LossScaling
from lightning_mixprec.plugin.communication_hooks import check_hook_state
from lightning_mixprec.policy.assignment import Assignment
from lightning_mixprec.policy.module_names import walk
from lightning_mixprec.policy.policy import as_policy

_WHY_NOT: dict[type[Strategy], str] = {
    DeepSpeedStrategy: ", whose engine casts weights and scales the loss by itself, past the policy",
    FSDPStrategy: ", which has a plugin of its own: PerLayerFSDPPrecision",
    XLAStrategy: ", whose compiler decides about formats by itself",
    SingleDeviceXLAStrategy: ", whose compiler decides about formats by itself",
}
_BEFORE_BACKWARD = ("on_before_zero_grad", "optimizer_zero_grad")
_STOCK_STATES = ("MixedPrecision", "FSDPPrecision", "native_amp_scaling_state")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise MixPrecError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}.")


def as_loss_scaling(value: Any) -> LossScaling | Literal["auto"] | None:
    """What the argument ``loss_scaling`` means: options, ``"auto"``, or None for never."""
    if value is True:
        raise ScalingError("loss_scaling is True; write 'auto' (on when some layer computes in fp16) or a number.")
    if isinstance(value, str) and value == "auto":
        return "auto"
    return None if value is False else LossScaling.from_value(value)


def scaling_for(asked: LossScaling | Literal["auto"] | None, assignment: Assignment) -> LossScaling | None:
    """How the loss is scaled under an assignment; None for not at all."""
    if asked != "auto":
        return asked
    return LossScaling() if "fp16" in assignment.compute_formats else None


def configured_form(policy: object) -> str | dict[str, Any]:
    """What is kept in a checkpoint of the policy that the user configured."""
    return "auto" if isinstance(policy, str) and policy == "auto" else as_policy(policy).to_dict()


def raw(optimizer: Any) -> Optimizer:
    """The user's optimizer inside Lightning's wrapper."""
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def check_lightning_module(module: nn.Module) -> pl.LightningModule:
    """The module, if a Trainer runs it."""
    if not isinstance(module, pl.LightningModule) or module._trainer is None:
        raise SupportError(
            f"PerLayerPrecision got a {type(module).__name__} that no lightning.pytorch Trainer runs; pass the plugin "
            "to Trainer(plugins=...). Fabric is not supported."
        )
    return module


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


def check_strategy(strategy: Strategy, who: str = "PerLayerPrecision") -> None:
    """Raises for strategies and devices on which a policy could not be honoured."""
    is_supported = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)) and not isinstance(
        strategy, (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)
    )
    if not is_supported:
        why = next((why for kind, why in _WHY_NOT.items() if isinstance(strategy, kind)), "")
        raise SupportError(
            f"{who} does not support {type(strategy).__name__}{why}; supported are the single-device strategies, DDP "
            "and FSDP2 (Trainer(strategy='auto', devices=1), Trainer(strategy='ddp'), "
            "Trainer(strategy=ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1)))."
        )
    check_hook_state(strategy, who)
    if strategy.root_device.type not in ("cpu", "cuda"):
        raise SupportError(
            f"{who} does not support the device {str(strategy.root_device)!r}; supported are CPU and CUDA "
            "(Trainer(accelerator='cpu') or Trainer(accelerator='cuda'))."
        )


def check_replay(strategy: Strategy, who: str) -> None:
    """Raises where a step cannot be replayed on one rank, as a callback has to."""
    check_strategy(strategy, who)
    if isinstance(strategy, ModelParallelStrategy) and strategy._tensor_parallel_size not in (1, "auto"):
        raise SupportError(
            f"{who} replays steps on each rank by itself, which tensor parallelism does not allow; use it with "
            "ModelParallelStrategy(tensor_parallel_size=1), which shards data and weights (FSDP2)."
        )


def data_parallel_mesh(strategy: Strategy) -> Any:
    """The mesh over which weights are sharded.

    Raises:
        SupportError: The strategy has none.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        raise SupportError(
            "fully_shard needs Trainer(strategy=ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1)), "
            f"and this Trainer has a {type(strategy).__name__}."
        )
    return strategy.device_mesh["data_parallel"]


def warn_of_whole_copies(model: nn.Module, mesh: Any, ranks: int) -> None:
    """One warning if weights are to be sharded over a mesh of one rank, and nothing else spreads them over the ranks.

    Args:
        model: The model, before it is sharded.
        mesh: What it is to be sharded over.
        ranks: How many take part in the run.
    """
    if mesh.size() == 1 and ranks > 1 and not any(map(is_sharded, model.parameters())):
        rank_zero_warn(
            f"fully_shard shards nothing: its mesh has size 1, in a run of {ranks} ranks, and no weights are split by "
            "tensor parallelism, so that each rank trains a whole model by itself. Set "
            f"ModelParallelStrategy(data_parallel_size={ranks}, tensor_parallel_size=1), or call parallelize_module "
            "before fully_shard."
        )


def is_sharding(strategy: Strategy) -> bool:
    """Whether ranks hold parts of the same weights."""
    return isinstance(strategy, (ModelParallelStrategy, FSDPStrategy))


def choose_format(device: torch.device) -> tuple[str, str]:
    """What ``policy="auto"`` means on a device, and why."""
    bf16 = native_support("bf16", device)
    if bf16.native:
        return "bf16", f"bf16, which {_device_name(device)} computes natively ({bf16.reason})"
    return "fp16", f"fp16 with loss scaling, because {_device_name(device)} does not compute bf16 ({bf16.reason})"


def check_assignments(model: pl.LightningModule, training: Assignment, evaluation: Assignment | None) -> None:
    """Raises if evaluation would store weights otherwise, and warns of what costs speed or accuracy."""
    for assignment in filter(None, (training, evaluation)):
        warn_of_emulation(assignment, model.trainer.strategy.root_device)
    if evaluation is not None:
        check_storage_unchanged(training, evaluation)
    warn_of_narrow_weights(model, training)


def warn_of_emulation(assignment: Assignment, device: torch.device) -> None:
    """One warning per compute format that the device does not compute natively."""
    for name in sorted(assignment.compute_formats):
        support = native_support(name, device)
        if not support.native:
            rank_zero_warn(
                f"The policy computes in {name}, which {_device_name(device)} does not compute natively "
                f"({support.reason}): torch emulates it, right but slow. Use {choose_format(device)[0]}, or "
                "policy='auto'."
            )


def warn_of_narrow_weights(model: nn.Module, assignment: Assignment) -> None:
    """One warning if weights stored in 16 bits are trained by layers that compute in 16 bits."""
    names = [
        name
        for name, module, _ in walk(model)
        if assignment.facts[name].first_name == name
        and assignment[name].compute in ("fp16", "bf16")
        and any(
            format_of(param.dtype) in ("fp16", "bf16") for param in module._parameters.values() if param is not None
        )
    ]
    if names:
        rank_zero_warn(
            f"{len(names)} layers ({names[0]} first) store their weights in 16 bits and compute in 16 bits: updates "
            "smaller than the weights' last bit are lost. Store them in fp32 (model.float()), the policy makes them "
            "compute in 16 bits."
        )


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
    """How the loss is scaled once another assignment holds for a running model.

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


def stock_scaler_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The loss scaler's state in a checkpoint of Lightning's own plugins; empty if there is none."""
    states = (checkpoint.get(name) for name in _STOCK_STATES)
    return next((state for state in states if isinstance(state, Mapping) and "scale" in state), {})


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"
