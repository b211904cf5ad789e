"""The strategies: one row each, with all that the plugins and the callbacks have to know of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.strategies import Strategy

from lightning_mixprec.errors import SupportError
from lightning_mixprec.plugin.lightnings import both

_NAME = "PerLayerPrecision"
_FSDP_NAME = "PerLayerFSDPPrecision"
_DEVICES = ("cpu", "cuda")


def _nothing(strategy: Any) -> Any:
    return None


@dataclass(frozen=True)
class StrategyRow:
    """A strategy, or a family of them.

    Args:
        name: What an error calls it where it lists what is supported.
        classes: Its class in each of Lightning's packages. Subclasses count as it, unless an earlier row has them.
        plugin: Name of the plugin that runs under it; None if none does.
        example: How to ask a Trainer for it.
        why_not: Why :class:`PerLayerPrecision` does not run under it; goes on after its name in an error.
        is_sharding: Whether ranks hold parts of the same weights: they then agree on each step before it is taken.
        why_no_replay: Given the strategy, what about it keeps a rank from replaying a step by itself, and what to do,
            as the end of a sentence; None if a rank can.
        mesh: Given the strategy, the mesh over which ``fully_shard`` shards; None if it has none.
        hook_state: Given the strategy, what its gradient communication keeps from step to step; None for nothing.
    """

    name: str
    classes: tuple[type[Any], ...]
    plugin: str | None = _NAME
    example: str = ""
    why_not: str = ""
    is_sharding: bool = False
    why_no_replay: Callable[[Any], str | None] = _nothing
    mesh: Callable[[Any], Any] = _nothing
    hook_state: Callable[[Any], Any] = _nothing


def _gathering_in_forward(strategy: Any) -> str:
    return (
        f"{type(strategy).__name__} does not allow, because its units gather weights inside the wrapped forward alone; "
        f"use it with {_NAME} and ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1), which shards "
        "data and weights, too (FSDP2)."
    )


STRATEGIES: list[StrategyRow] = [
    StrategyRow(
        "DeepSpeed",
        both("strategies", "DeepSpeedStrategy"),
        plugin=None,
        why_not=", whose engine casts weights and scales the loss by itself, past the policy",
    ),
    StrategyRow(
        "XLA",
        both("strategies", "XLAStrategy") + both("strategies", "SingleDeviceXLAStrategy"),
        plugin=None,
        why_not=", whose compiler decides about formats by itself",
    ),
    StrategyRow(
        "the single-device strategies",
        both("strategies", "SingleDeviceStrategy"),
        example="Trainer(strategy='auto', devices=1)",
    ),
    StrategyRow(
        "DDP",
        both("strategies", "DDPStrategy"),
        example="Trainer(strategy='ddp')",
        hook_state=lambda strategy: getattr(strategy, "_ddp_comm_state", None),
    ),
    StrategyRow(
        "FSDP2",
        both("strategies", "ModelParallelStrategy"),
        example="Trainer(strategy=ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1))",
        is_sharding=True,
        mesh=lambda strategy: strategy.device_mesh["data_parallel"],
    ),
    StrategyRow(
        "FSDPStrategy",
        both("strategies", "FSDPStrategy"),
        plugin=_FSDP_NAME,
        why_not=f", which has a plugin of its own: {_FSDP_NAME}",
        is_sharding=True,
        why_no_replay=_gathering_in_forward,
    ),
]
"""The first row whose class a strategy has is its row; a strategy of no row is refused."""

_UNKNOWN = StrategyRow("", (), plugin=None)


def row_of(strategy: Strategy) -> StrategyRow:
    """The row of a strategy; a strategy of no row gets one without a plugin."""
    return next((row for row in STRATEGIES if isinstance(strategy, row.classes)), _UNKNOWN)


def check_strategy(strategy: Strategy, plugin: str = _NAME) -> None:
    """Raises for strategies and devices on which a plugin of this name could not honour a policy."""
    row = row_of(strategy)
    if row.plugin != plugin and plugin == _FSDP_NAME:
        name = type(strategy).__name__
        raise SupportError(f"{_FSDP_NAME} is for FSDPStrategy alone, and this Trainer has a {name}; use {_NAME}.")
    if row.plugin != plugin:
        raise SupportError(_not_supported(strategy, plugin))
    _check_hook_state(row.hook_state(strategy), plugin)
    _check_device(strategy, plugin)


def check_replay(strategy: Strategy, who: str) -> None:
    """Raises where a step cannot be replayed on one rank, as a callback has to."""
    row = row_of(strategy)
    if row.plugin is None:
        raise SupportError(_not_supported(strategy, who))
    why = row.why_no_replay(strategy)
    if why is not None:
        raise SupportError(f"{who} replays steps on each rank by itself, which {why}")
    _check_hook_state(row.hook_state(strategy), who)
    _check_device(strategy, who)


def data_parallel_mesh(strategy: Strategy) -> Any:
    """The mesh over which weights are sharded.

    Raises:
        SupportError: The strategy has none.
    """
    mesh = row_of(strategy).mesh(strategy)
    if mesh is None:
        raise SupportError(
            "fully_shard needs Trainer(strategy=ModelParallelStrategy(data_parallel_size=N, tensor_parallel_size=1)), "
            f"and this Trainer has a {type(strategy).__name__}."
        )
    return mesh


def forget_communication_errors(strategy: Strategy) -> None:
    """After a skipped step: PowerSGD adds what it left out of a gradient to the next one, and an overflow for ever."""
    state = row_of(strategy).hook_state(strategy)
    if state is None:
        return
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

    if isinstance(state, PowerSGDState):
        for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            memory.clear()


def _not_supported(strategy: Strategy, who: str) -> str:
    rows = [row for row in STRATEGIES if row.plugin == _NAME]
    *names, last = (row.name for row in rows)
    examples = ", ".join(row.example for row in rows if row.example)
    return (
        f"{who} does not support {type(strategy).__name__}{row_of(strategy).why_not}; supported are "
        f"{', '.join(names)} and {last} ({examples})."
    )


def _check_hook_state(state: Any, who: str) -> None:
    """Raises for a hook under which ranks have gradients of their own, so that each would skip steps of its own."""
    if state is None:
        return
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

    if isinstance(state, PostLocalSGDState):
        raise SupportError(
            f"{who} does not support post-local SGD (PostLocalSGDState), where each rank would skip steps of its own; "
            "leave ddp_comm_state out, or use a compression hook."
        )


def _check_device(strategy: Strategy, who: str) -> None:
    if strategy.root_device.type not in _DEVICES:
        raise SupportError(
            f"{who} does not support the device {str(strategy.root_device)!r}; supported are CPU and CUDA "
            "(Trainer(accelerator='cpu') or Trainer(accelerator='cuda'))."
        )
