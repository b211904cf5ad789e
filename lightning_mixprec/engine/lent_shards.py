"""FSDP2 lent to a replay: it gathers stand-ins group by group and reduces their gradients, and forgets it afterwards.

Stand-ins share the memory of a rank's own parts of the weights. Everything that FSDP2 keeps from step to step (gathered
weights, gradients that wait to be reduced, the order of groups) is put aside as it is and comes back as it was.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mixprec.engine.sharding import leaders_of, may_be_sharded, param_groups, without_hooks
from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.flat_batches import local_part

_CONTAINERS = (list, dict, set)


class LentShards:
    """What FSDP2 keeps of a model, lent between :meth:`open` and :meth:`put_back`.

    Args:
        model: The model, between steps; weights that are still gathered stay so, and are not in the modules meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self._states = [each._get_fsdp_state() for each in _leader_of_each_state(model)]
        self._groups = [group for state in self._states for group in param_groups(state)]
        params = [param for group in self._groups for param in group.fsdp_params]
        shared = [each for state in self._states for each in (state._state_ctx, state._comm_ctx)]
        own = {id(each): each for each in (*self._states, *shared, *self._groups, *(g.comm_ctx for g in self._groups))}
        self._held = [(vars(each), dict(vars(each))) for each in (*own.values(), *params)]
        inner = (value for _, before in self._held for value in before.values() if type(value) in _CONTAINERS)
        self._inner = [(value, value.copy()) for value in inner]
        self._params = params
        self._gathered = [group for group in self._groups if not group.is_sharded]
        for group in self._gathered:
            group._sharded_state = type(group._sharded_state).SHARDED
            for param in group.fsdp_params:
                param.sharded_state = group._sharded_state
                param._setattr_on_modules(param.sharded_param)

    def open(self, stand_ins: Mapping[int, Tensor], *, as_stored: bool) -> None:
        """Has FSDP2 work on stand-ins, which the modules hold already.

        Args:
            stand_ins: Stand-ins of sharded weights by the ``id`` of the weight.
            as_stored: Whether groups are gathered as their stand-ins are stored, in place of the run's formats.
        """
        for state in self._states:
            if as_stored:
                state._mp_policy = _as_stored(state._mp_policy)
                _gather_nothing_ahead(state)
            state._state_ctx.is_last_backward = True
            getattr(state._comm_ctx, "post_forward_order", []).clear()  # there is none before the first forward
        for group in self._groups:
            if as_stored:
                group.mp_policy = _as_stored(group.mp_policy)
            group.reduce_grads = group.all_reduce_grads = group.reshard_after_backward = True
            group._partial_reduce_output = None
        for param in self._params:
            param.sharded_param = stand_ins[id(param.sharded_param)]
            param.all_gather_outputs, param.unsharded_accumulated_grad = [], None
            vars(param).pop("_unsharded_param", None)
            if as_stored:
                param.mp_policy = _as_stored(param.mp_policy)
            param.reset_sharded_param()
        for group in self._groups:
            group._init_mp_dtypes()

    def put_back(self) -> None:
        """Gives everything back as it was; what a replay that failed has left under way is waited for."""
        if self._groups and self._groups[0].device.type == "cuda":
            torch.cuda.synchronize(self._groups[0].device)
        for held, before in self._held:
            held.clear()
            held.update(before)
        for container, content in self._inner:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        for group in self._gathered:
            for param in group.fsdp_params:
                held = param._unsharded_param if group.is_unsharded else param._sharded_post_forward_param
                param._setattr_on_modules(held)


@contextlib.contextmanager
def gathered(model: nn.Module, layer: nn.Module) -> Iterator[None]:
    """One layer's weights are whole within, and calling it sends no messages. All ranks enter this together.

    Args:
        model: The model around it.
        layer: The layer.

    Raises:
        SupportError: The layer's weights would take more than the largest group of the model and a rank's part of a set
            of gradients, or are split over ranks otherwise.
    """
    if not may_be_sharded():
        yield
        return
    own = set(layer.modules())
    leaders = [
        leader
        for leader in _leader_of_each_state(model)
        if any(own & {i.module, *i.shared_modules} for i in _module_infos(leader))
    ]
    room = largest_group_bytes(model) + sum(4 * local_part(each.detach()).numel() for each in model.parameters())
    if sum(map(_bytes, leaders)) > room:
        raise SupportError(
            "its weights are sharded, and too large to be whole on each rank; what is inside is compared"
        )
    with contextlib.ExitStack() as stack:
        for leader in leaders:
            stack.callback(leader.reshard)
            leader.unshard()
        if any(hasattr(param, "full_tensor") for param in layer.parameters()):
            raise SupportError("its weights are split over ranks, so that it cannot be run alone")
        stack.enter_context(without_hooks(layer))
        yield


def largest_group_bytes(model: nn.Module) -> int:
    """Bytes of the largest group of weights that FSDP2 gathers, in fp32; 0 without any."""
    return max(map(_bytes, leaders_of(model)), default=0)


def _bytes(leader: Any) -> int:
    groups = param_groups(leader._get_fsdp_state())
    return sum(4 * param._orig_size.numel() for group in groups for param in group.fsdp_params)


def with_local_part(sharded: Any, local: Tensor) -> Tensor:
    """A tensor that is spread over ranks as another one is, of which this is a rank's own part."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, sharded.device_mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
    )


def _leader_of_each_state(model: nn.Module) -> list[Any]:
    return list({id(leader._get_fsdp_state()): leader for leader in leaders_of(model)}.values())


def _module_infos(leader: Any) -> Iterator[Any]:
    for group in param_groups(leader._get_fsdp_state()):
        for param in group.fsdp_params:
            yield param._module_info


def _gather_nothing_ahead(state: Any) -> None:
    """Has the next group gathered when it is needed: in fp32 one group less is there at a time."""
    state._states_to_forward_prefetch = []
    state._states_to_backward_prefetch = [state]  # itself, which is there by then; none would be torch's choice


def _as_stored(policy: Any) -> Any:
    return replace(policy, param_dtype=None, output_dtype=None, cast_forward_inputs=False)
