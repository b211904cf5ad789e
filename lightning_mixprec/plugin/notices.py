"""Notices as a run begins: one warning of each cost in speed or accuracy that is allowed, with what to do instead.

What is emulated is said in a line that is no warning. And to Lightning's ``ThroughputMonitor``, which takes an unknown
plugin for fp32, the formats.
"""

from collections.abc import Collection, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import throughput_monitor
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_mixprec.engine.backends import Backends, Emulated
from lightning_mixprec.engine.backends.scaled_products import TILE
from lightning_mixprec.engine.sharding import is_sharded
from lightning_mixprec.numerics.formats import get_format, half_dtypes
from lightning_mixprec.plugin.arguments import choose_format, device_name
from lightning_mixprec.plugin.lightnings import both
from lightning_mixprec.policy.assignment import Assignment
from lightning_mixprec.policy.module_names import walk

_MONITORS = both("callbacks", "ThroughputMonitor")


def warn_of_costs(
    model: pl.LightningModule, training: Assignment, evaluation: Assignment | None, backends: Backends
) -> None:
    """Warns of what the assignments of a run that is about to start cost."""
    assignments = [*filter(None, (training, evaluation))]
    tell_of_emulation({name for each in assignments for name in each.compute_formats}, model, backends)
    for assignment in assignments:
        warn_of_narrow_products(model, assignment, model.trainer.strategy.root_device.type, backends)


def tell_of_emulation(formats: Collection[str], model: pl.LightningModule, backends: Backends) -> None:
    """One line per format that is emulated, and one warning per format that is slow because it is not.

    Args:
        formats: Those that a policy computes in and nobody was told of yet.
        model: The model that is about to run.
        backends: What computes.
    """
    device = model.trainer.strategy.root_device
    for name in sorted(formats):
        backend = backends.backend_for(name)
        if backends.narrow_for(name) is not None:
            _warn_of_emulated_products(name, device, backends)
        elif isinstance(backend, Emulated):
            _tell_of_emulated_products(name, device, backend)
        elif backend is not None and not (support := backend.support(name, device)).native:
            rank_zero_warn(
                f"The policy computes in {name}, which {device_name(device)} does not compute natively "
                f"({support.reason}): torch emulates it, right but slow. Use {choose_format(device)[0]}, or "
                "policy='auto', or emulate='auto', which is a hundred times as fast on some machines."
            )


def _tell_of_emulated_products(format: str, device: torch.device, backend: Emulated) -> None:
    support = backend.support(format, device)
    reason = "emulate=True" if support.native else f"{device_name(device)} has no such arithmetic: {support.reason}"
    rank_zero_info(
        f"{format} is emulated ({reason}): products of operands rounded to {format} are summed in fp32 and rounded. A "
        f"product takes {backend.cost(format, device):.1f} times as long as in fp32."
    )


def _warn_of_emulated_products(format: str, device: torch.device, backends: Backends) -> None:
    narrow = backends.narrow_for(format)
    if narrow is not None and narrow.is_emulated and backends.emulate == "auto":
        reason = narrow.support(format, device).reason
        rank_zero_warn(
            f"Products in {format} are emulated on {device_name(device)} ({reason}): right, but not faster than fp32. "
            f"For speed use {choose_format(device)[0]}."
        )


def warn_of_narrow_products(model: nn.Module, assignment: Assignment, device_type: str, backends: Backends) -> None:
    """One warning per format of the layers on a GPU that gain nothing by it, and one of those that are filled up."""
    if device_type != "cuda":
        return
    for format in sorted(assignment.compute_formats):
        narrow = backends.narrow_for(format)
        shapes = _weight_shapes(model, assignment, format) if narrow is not None else {}
        small = [
            name
            for name, shape in shapes.items()
            if narrow is not None and not narrow.is_worthwhile(shape, assignment[name].eight_bits.scaling)
        ]
        if small:
            rank_zero_warn(
                f"{len(small)} layers ({small[0]} first) compute in {format} and are too small to gain by it: casts "
                "take longer than products save (as measured on an H100). Compute them in bf16."
            )
        odd = [name for name, shape in shapes.items() if any(size % TILE for size in shape)]
        if odd:
            rank_zero_warn(
                f"{len(odd)} layers ({', '.join(odd)}) compute in {format} and have sizes that are no multiples of "
                f"{TILE}: their products are filled up with zeros at each step. Choose other sizes, or compute them in "
                "bf16."
            )


def _weight_shapes(model: nn.Module, assignment: Assignment, format: str) -> dict[str, torch.Size]:
    """The shapes of the weights of layers that compute in a format, as far as they are known."""
    return {
        name: weight.shape
        for name, module, _ in walk(model)
        if assignment[name].compute == format and assignment.facts[name].first_name == name
        if (weight := module._parameters.get("weight")) is not None
        if not is_lazy(weight) and weight.dim() == 2
    }


def warn_of_narrow_weights(
    model: nn.Module, assignment: Assignment, optimizers: Iterable[Optimizer], added: Collection[Tensor]
) -> None:
    """One warning for each optimizer that loses what is too small for weights stored in 16 bits.

    Args:
        model: The model that they train.
        assignment: The formats of its layers.
        optimizers: The optimizers.
        added: Weights of which nobody was told yet.
    """
    for optimizer in optimizers:
        losing = {
            param
            for group in optimizer.param_groups
            if group.get("weights", "nearest") == "nearest"
            for param in group["params"]
            if param.requires_grad and param.dtype in half_dtypes() and param in added
        }
        if names := _layers_with(losing, model, assignment):
            rank_zero_warn(
                f"{len(names)} layers ({names[0]} first) store their weights in 16 bits and are trained by "
                f"{type(optimizer).__name__}: updates smaller than the weights' last bit are lost. Train them with "
                "lightning_mixprec.optim.AdamW or SGD, which keep them (weights='exact'), or store them in fp32 "
                "(model.float()); the policy makes them compute in 16 bits."
            )


def _layers_with(params: Collection[Tensor], model: nn.Module, assignment: Assignment) -> list[str]:
    """The layers that have any of these weights, and compute in 16 bits or are stored so by a rule."""
    return [
        name
        for name, module, _ in walk(model)
        if assignment.facts[name].first_name == name
        and (get_format(assignment[name].region).is_half or assignment[name].is_stored_by_rule)
        and any(param in params for param in module._parameters.values() if param is not None)
    ]


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


def tell_of_formats(model: pl.LightningModule, training: Assignment, defaults: tuple[str, str], chosen: str) -> None:
    """Shows the table of training's formats where a fit begins, and tells throughput monitors of the default ones.

    Args:
        model: The model that is about to run.
        training: The assignment of training.
        defaults: The default formats of training and of evaluation.
        chosen: What ``"auto"`` has chosen and why, if it was asked to.
    """
    trainer = model.trainer
    if trainer.state.fn == TrainerFn.FITTING and trainer.strategy.is_global_zero and not trainer.barebones:
        training.table.show(title=f"policy 'auto': {chosen}" if chosen else None)
    tell_throughput_monitors(trainer, *defaults)


def tell_throughput_monitors(trainer: pl.Trainer, training: str, evaluation: str) -> None:
    """Has the monitors compare with the device's peak in the default formats, once they and the device are set up.

    Args:
        trainer: The Trainer, whose callbacks are set up.
        training: The default format of training.
        evaluation: That of validate, test and predict.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for monitor in callbacks:
        if not isinstance(monitor, _MONITORS):
            continue
        for stage, measured in monitor._throughputs.items():
            format = training if stage == RunningStage.TRAINING else evaluation
            measured.available_flops = _peak(trainer.strategy.root_device, format)
        monitor.available_flops = _peak(trainer.strategy.root_device, training if trainer.training else evaluation)


def _peak(device: torch.device, format: str) -> int | None:
    return throughput_monitor.get_available_flops(device, get_format(format).dtype)
