"""DDP's communication hooks, where they keep something from step to step."""

from typing import Any

from lightning.pytorch.strategies import Strategy

from lightning_mixprec.errors import SupportError


def check_hook_state(strategy: Strategy, who: str) -> None:
    """Raises for a hook under which ranks have gradients of their own, so that each would skip steps of its own."""
    state = _state(strategy)
    if state is None:
        return
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

    if isinstance(state, PostLocalSGDState):
        raise SupportError(
            f"{who} does not support post-local SGD (PostLocalSGDState), where each rank would skip steps of its own; "
            "leave ddp_comm_state out, or use a compression hook."
        )


def forget_errors(strategy: Strategy) -> None:
    """After a skipped step: PowerSGD adds what it left out of a gradient to the next one, and an overflow for ever."""
    state = _state(strategy)
    if state is None:
        return
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

    if isinstance(state, PowerSGDState):
        for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            memory.clear()


def _state(strategy: Strategy) -> Any:
    return getattr(strategy, "_ddp_comm_state", None)
