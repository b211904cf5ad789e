"""A copy in memory of what a damaged run needs to go on.

These are the parameters, the buffers, the optimizers' states and the loss scale: what damage spreads to, and what makes
the next step. Time is not turned back: batches that were seen stay seen, so loops, random numbers and learning-rate
schedules go on from where they are, and with them what schedules write into an optimizer (lr, momentum, betas,
weight_decay). Gradients that wait for their step were made with damaged weights and are dropped.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_mixprec import ranks
from lightning_mixprec.engine.sharding import is_sharded, reshard
from lightning_mixprec.evidence.instruments.memory import bytes_of, free_cuda_bytes, free_host_bytes
from lightning_mixprec.numerics.finite import are_nonfinite
from lightning_mixprec.numerics.flat_batches import local_part
from lightning_mixprec.optim.gradients import params_of
from lightning_mixprec.optim.skipped_buffers import buffer_of, copy_each
from lightning_mixprec.plugin.precision import PerLayerPrecision
from lightning_mixprec.policy.module_names import walk

_SHARE = 0.25
_OF_SCHEDULES = {"lr", "initial_lr", "max_lr", "min_lr", "momentum", "base_momentum", "max_momentum", "betas"}
_OF_SCHEDULES |= {"weight_decay", "params"}
_CPU = torch.device("cpu")


class _Kept(NamedTuple):
    """A tensor's copy, and the device of the tensor."""

    data: Tensor
    device: torch.device


class _Copy(NamedTuple):
    """A run as it was at a step; the tensors in it as :class:`_Kept`, and the names of those that may be not finite."""

    step: int
    module: pl.LightningModule
    plugin: PerLayerPrecision
    params: Sequence[tuple[Tensor, Any]]
    buffers: list[tuple[nn.Module, str, Any]]
    optimizers: list[tuple[Optimizer, Any, list[Any]]]
    scaler: dict[str, float | int] | None
    by_design: frozenset[str]


class Snapshots:
    """Keeps the last good copy of a run's weights and states, and writes it back.

    The copy is on the device if it fits there, else on the host. The next one is written into the same memory.

    Args:
        max_bytes: The most that a copy may take; None for a quarter of the memory that is free where it goes.

    Attributes:
        excused: Names of buffers that are no damage, whatever is in them.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.excused = set[str]()
        self.forget()

    def forget(self) -> None:
        """Lets go of the copy and of the run."""
        self._copy: _Copy | None = None
        self._storage: list[Tensor] = []
        self._is_on_host = False
        self._by_design: set[str] | None = None

    @property
    def step(self) -> int | None:
        """The step of the copy; None if there is none."""
        return None if self._copy is None else self._copy.step

    def damaged(self, pl_module: pl.LightningModule) -> list[str]:
        """The parameters and buffers that were finite once and are not now; one read from the device.

        What a model begins with is its own affair, trained weights excepted: a mask of -inf, a threshold that is NaN
        until it is known.
        """
        named = _named_tensors(pl_module)
        found = [name for name, is_bad in zip(named, are_nonfinite(list(named.values())), strict=True) if is_bad]
        unknown = set(found) if self._by_design is None else self._by_design.intersection(found)
        self._by_design = {name for name in unknown if not named[name].requires_grad}
        return [name for name in found if name not in self._by_design | self.excused]

    @staticmethod
    def bytes_needed(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        """The bytes of a copy now. Optimizers that make their state in the first step need more from then on."""
        return sum(map(bytes_of, _tensors_of(trainer, pl_module)))

    @torch.no_grad()
    def take(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, *, is_sound: bool = False) -> bool:
        """Replaces the copy by one of now, if everything in it is finite and it fits; on all ranks or on none.

        For use between steps. Waits for the device and for the other ranks.

        Args:
            trainer: The Trainer.
            pl_module: Its LightningModule.
            step: Optimizer steps taken.
            is_sound: Whether :meth:`damaged` has found nothing since the last step.

        Returns:
            Whether a copy was taken; else the last one is still there.
        """
        reshard(pl_module)
        device = pl_module.device
        is_ready = not any(map(is_lazy, pl_module.parameters())) and not any(map(is_lazy, pl_module.buffers()))
        place = self._place(trainer, pl_module) if is_ready else None
        is_good = is_ready and (is_sound or not self.damaged(pl_module)) and place is not None
        is_good = is_good and not any(are_nonfinite(list(_tensors_in(_states(trainer.optimizers)))))
        if ranks.is_any(not is_good, device):
            return False
        assert place is not None
        writer = _Writer(self._storage if place == self._is_on_host else [], _CPU if place else None)
        self._copy = _copy_of(trainer, pl_module, step, writer.keep, frozenset(self._by_design or ()))
        writer.write()
        self._storage, self._is_on_host = writer.used, place
        return True

    @torch.no_grad()
    def restore(self) -> int:
        """Writes the copy back in place, between steps; what has come into the states since then goes.

        Returns:
            The step of the copy, which stays.
        """
        copy, pairs = self._copy, list[tuple[Tensor, Tensor]]()
        assert copy is not None
        reshard(copy.module)
        for param, kept in copy.params:
            _restored(param, kept, pairs)
            param.grad = None
        for module, name, kept in copy.buffers:
            module._buffers[name] = _restored(buffer_of(module, name), kept, pairs)
        for optimizer, states, groups in copy.optimizers:
            _write_back(optimizer.state, states, pairs)
            for group, numbers in zip(optimizer.param_groups, groups, strict=False):
                group.update({name: _restored(group.get(name), number, pairs) for name, number in numbers.items()})
        _copy_all(pairs)
        copy.plugin.scaler.forget_steps()
        if copy.scaler is not None:
            copy.plugin.scaler.load_state_dict(copy.scaler)
        copy.plugin.guard_buffers_anew()
        self._by_design = set(copy.by_design)
        return copy.step

    def state_dict(self) -> dict[str, Any] | None:
        """The copy, in plain containers and tensors; None if there is none, or if each rank has a part of it."""
        copy = self._copy
        if copy is None or any(map(is_sharded, (param for param, _ in copy.params))):
            return None
        optimizers = []
        for optimizer, states, groups in copy.optimizers:
            numbers = {param: number for number, param in enumerate(params_of(optimizer))}
            kept = {numbers[param]: _taken(state) for param, state in states.items() if param in numbers}
            optimizers.append({"state": kept})
            optimizers[-1]["groups"] = _taken(groups)
        return {
            "step": copy.step,
            "params": [_taken(kept) for _, kept in copy.params],
            "buffers": [_taken(kept) for _, _, kept in copy.buffers],
            "optimizers": optimizers,
            "scaler": copy.scaler,
        }

    def load_state_dict(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: dict[str, Any]) -> None:
        """Reads :meth:`state_dict`, for the same model and optimizers."""
        plugin, device = trainer.precision_plugin, pl_module.device
        assert isinstance(plugin, PerLayerPrecision)
        self.forget()

        def keep(tensor: Tensor) -> _Kept:
            return _Kept(tensor.clone(), device)

        optimizers = []
        for optimizer, entry in zip(trainer.optimizers, state["optimizers"], strict=True):
            of = params_of(optimizer)
            states = {of[number]: _saved(each, keep) for number, each in entry["state"].items()}
            optimizers.append((optimizer, states, _saved(entry["groups"], keep)))
        params = [(param, keep(kept)) for param, kept in zip(pl_module.parameters(), state["params"], strict=True)]
        buffers = [
            (module, name, _saved(kept, keep))
            for (module, name, _), kept in zip(_buffers(pl_module), state["buffers"], strict=True)
        ]
        kept_as = {id(param): kept for param, kept in params}
        kept_as |= {id(buffer_of(module, name)): kept for module, name, kept in buffers if kept is not None}
        named = {
            name: kept_as[id(each)].data for name, each in _named_tensors(pl_module).items() if id(each) in kept_as
        }
        bad = frozenset(name for name, is_bad in zip(named, are_nonfinite(list(named.values())), strict=True) if is_bad)
        self._by_design = set(bad)
        self._copy = _Copy(state["step"], pl_module, plugin, params, buffers, optimizers, state["scaler"], bad)

    def _place(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool | None:
        """True if the copy goes to the host, False if it stays on the device, None if it fits nowhere."""
        needed, held = self.bytes_needed(trainer, pl_module), sum(map(bytes_of, self._storage))
        if needed == held and (self.max_bytes is None or held <= self.max_bytes):
            return self._is_on_host
        for device in dict.fromkeys([pl_module.device, _CPU]):
            on_host = device.type == "cpu"
            reused = held if on_host == self._is_on_host else 0
            free = free_host_bytes() // max(trainer.num_devices, 1) if on_host else free_cuda_bytes(device)
            room = reused + int(free * _SHARE) if self.max_bytes is None else min(self.max_bytes, reused + free)
            if needed <= room:
                return on_host
        return None


class _Writer:
    """Copies tensors, all at once at the end, into memory that is there where it has the right shape."""

    def __init__(self, storage: Iterable[Tensor], device: torch.device | None) -> None:
        self._device = device
        self._free: dict[Any, list[Tensor]] = {}
        for tensor in (tensor for tensor in storage if tensor.layout == torch.strided):
            self._free.setdefault(_kind(tensor, tensor.device), []).append(tensor)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self.used: list[Tensor] = []

    def keep(self, tensor: Tensor) -> _Kept:
        """The place of the copy of a tensor; that of a sparse one is there at once."""
        tensor = local_part(tensor)
        device = self._device or tensor.device
        if tensor.layout != torch.strided:
            copy = tensor.detach().to(device, copy=True)
        else:
            free = self._free.get(_kind(tensor, device))
            copy = free.pop() if free else torch.empty_like(tensor, device=device, requires_grad=False)
            self._pairs.append((copy, tensor))
        self.used.append(copy)
        return _Kept(copy, tensor.device)

    def write(self) -> None:
        """Copies."""
        _copy_all(self._pairs)


def _kind(tensor: Tensor, device: torch.device) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, device


def _copy_of(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    step: int,
    keep: Callable[[Tensor], _Kept],
    by_design: frozenset[str],
) -> _Copy:
    plugin = trainer.precision_plugin
    assert isinstance(plugin, PerLayerPrecision)
    return _Copy(
        step,
        pl_module,
        plugin,
        [(param, keep(param)) for param in pl_module.parameters()],
        [(module, name, _saved(buffer, keep)) for module, name, buffer in _buffers(pl_module)],
        [
            (optimizer, _saved(states, keep), _saved(groups, keep))
            for optimizer, (states, groups) in zip(trainer.optimizers, _states(trainer.optimizers), strict=True)
        ],
        plugin.scaler.state_dict() if plugin.scaler.is_active else None,
        by_design,
    )


def _tensors_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Tensor]:
    yield from pl_module.parameters()
    yield from (tensor for _, _, buffer in _buffers(pl_module) for tensor in _tensors_in(buffer))
    yield from _tensors_in(_states(trainer.optimizers))


def _named_tensors(pl_module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names without those of wrappers, each once."""
    named: dict[int, tuple[str, Tensor]] = {}
    for layer, module, _ in walk(pl_module):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                named.setdefault(id(tensor), (f"{layer}.{name}" if layer else name, tensor))
    return dict(named.values())


def _buffers(pl_module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor | None]]:
    """Buffers that can be written to; an expanded one cannot, and is a constant."""
    for module in pl_module.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.layout != torch.strided or torch._debug_has_internal_overlap(buffer) != 1:
                yield module, name, buffer


def _states(optimizers: Iterable[Optimizer]) -> list[tuple[dict[Any, Any], list[dict[str, Any]]]]:
    """Each optimizer's state and the numbers in its groups that no schedule writes."""
    return [
        (
            dict(optimizer.state),
            [
                {
                    name: value
                    for name, value in group.items()
                    if name not in _OF_SCHEDULES and isinstance(value, (int, float, complex, Tensor))
                }
                for group in optimizer.param_groups
            ],
        )
        for optimizer in optimizers
    ]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors_in(entry)
    elif type(value) in (list, tuple):
        for entry in value:
            yield from _tensors_in(entry)


def _saved(value: Any, keep: Callable[[Tensor], _Kept]) -> Any:
    if isinstance(value, Tensor):
        return keep(value)
    if isinstance(value, dict):
        return {key: _saved(entry, keep) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_saved(entry, keep) for entry in value)
    return deepcopy(value)


def _taken(value: Any) -> Any:
    """A value that :func:`_saved` kept, in memory of its own."""
    if isinstance(value, _Kept):
        return value.data.clone()
    if isinstance(value, dict):
        return {key: _taken(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_taken(entry) for entry in value)
    return deepcopy(value)


def _restored(present: Any, saved: Any, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """A saved value for the place of the present one: the same tensor, to be copied to, wherever it has the shape."""
    if isinstance(saved, _Kept):
        if isinstance(present, Tensor) and _takes(local_part(present), saved.data):
            pairs.append((local_part(present), saved.data))
            return present
        return saved.data.to(saved.device, copy=True)
    if isinstance(saved, dict):
        states = present if isinstance(present, dict) else {}
        _write_back(states, saved, pairs)
        return states
    if type(saved) in (list, tuple):
        return type(saved)(_restored(None, entry, pairs) for entry in saved)
    return deepcopy(saved)


def _takes(present: Tensor, copy: Tensor) -> bool:
    is_writable = present.layout in (torch.strided, torch.sparse_coo)
    return is_writable and (present.shape, present.layout) == (copy.shape, copy.layout)


def _write_back(present: MutableMapping[Any, Any], saved: dict[Any, Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
    for key in [key for key in present if key not in saved]:
        del present[key]
    for key, value in saved.items():
        present[key] = _restored(present.get(key), value, pairs)


def _copy_all(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    dense = [pair for pair in pairs if pair[0].layout == torch.strided]
    copy_each([source for _, source in dense], [to for to, _ in dense])
    for to, source in pairs:
        if to.layout != torch.strided:
            to.copy_(source)
