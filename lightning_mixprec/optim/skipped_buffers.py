"""Buffers that a forward pass changes, put back when the optimizer step it belongs to is skipped.

BatchNorm folds every batch into its running statistics during forward, before anyone knows that the step will be
skipped: one outlier batch then leaves them at inf, training goes on healthily in batch statistics, and evaluation is
NaN. A skipped step is not a step, so the buffers return to what they were when its accumulation window opened.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mixprec.optim.gradients import params_of


class _Slot(NamedTuple):
    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor | None:
        return buffer_of(self.module, self.name)


class BufferGuard:
    """The buffers of a model as they were when each optimizer's accumulation window opened.

    Which buffers training changes is learned: the first window copies all of them, later windows only those of modules
    that were seen to change one. The first window is judged by values, later ones by version counters alone, which
    cost nothing; the kernels of BatchNorm write statistics without a new version, but BatchNorm counts its batches. A
    buffer belongs to the optimizer of its module's parameters; one without parameters follows the nearest module
    around it that has some.

    Args:
        model: The model whose buffers are guarded.
        optimizers: The optimizers that train it.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._windows = [_Window(slots) for slots in _slots_by_owner(model, optimizers)]
        self._optimizers = list(optimizers)

    def open(self) -> None:
        """Copies the buffers of every optimizer whose window is not open. Call before a forward pass."""
        for window in self._windows:
            if not window.is_open:
                window.open()

    def close(self, optimizer: Optimizer, skipped: bool | Tensor) -> None:
        """Ends an optimizer's window after its step, skipped or not.

        After a skip all open windows are put back, because a forward pass may run through the modules of several
        optimizers.

        Args:
            optimizer: The optimizer that stepped.
            skipped: Whether the step was skipped; a device flag is obeyed on the device, without reading it.
        """
        for window in self._windows:
            window.learn()
            if skipped is not False:
                window.restore(skipped)
        if optimizer in self._optimizers:
            self._windows[self._optimizers.index(optimizer)].close()


class _Window:
    def __init__(self, slots: list[_Slot]) -> None:
        self.is_open = False
        self._unchanging = slots
        self._changing: list[_Slot] = []
        self._versions: list[tuple[int, int]] = []
        self._saved: list[tuple[_Slot, Tensor]] = []
        self._is_first = True

    def open(self) -> None:
        self.is_open = True
        slots = self._unchanging if self._is_first else self._changing
        if not slots and not self._unchanging:
            return
        self._save([slot for slot in slots if slot.tensor is not None])
        self._versions = [_version(slot) for slot in self._unchanging]

    def close(self) -> None:
        self._is_first = self.is_open = False

    def learn(self) -> None:
        if not self.is_open or not self._unchanging:
            return
        moved = {
            id(slot.module)
            for slot, seen in zip(self._unchanging, self._versions, strict=True)
            if _version(slot) != seen
        }
        if self._is_first:
            moved |= {id(slot.module) for slot, old in self._saved if not _is_equal(slot.tensor, old)}
        if moved:
            self._changing += [slot for slot in self._unchanging if id(slot.module) in moved]
            self._unchanging = [slot for slot in self._unchanging if id(slot.module) not in moved]
            self._versions = [_version(slot) for slot in self._unchanging]

    @torch.no_grad()
    def restore(self, skipped: bool | Tensor) -> None:
        if not self.is_open or not self._saved:
            return
        news, olds = [], []
        for slot, old in self._saved:
            new = slot.tensor
            if new is not None and new.shape == old.shape and is_written_in_place(new):
                news.append(new)
                olds.append(old)
            elif skipped and not _is_equal(new, old):  # nothing on the device chooses here, so a flag is read
                slot.module._buffers[slot.name] = old.clone()
        if isinstance(skipped, Tensor):
            copy_where(skipped, olds, news)
        elif news:
            copy_each(olds, news)
        self._versions = [_version(slot) for slot in self._unchanging]

    @torch.no_grad()
    def _save(self, slots: list[_Slot]) -> None:
        tensors = [tensor for slot in slots if (tensor := slot.tensor) is not None]
        saved = [old for _, old in self._saved]
        if list(map(_kind, tensors)) == list(map(_kind, saved)) and all(t.layout == torch.strided for t in tensors):
            copy_each(tensors, saved)
        else:
            saved = [tensor.clone() for tensor in tensors]
        self._saved = list(zip(slots, saved, strict=True))


def buffer_of(module: nn.Module, name: str) -> Tensor | None:
    """A buffer of a module; None if it has no such. The mapping that holds those of TorchScript has no ``get``."""
    if name not in module._buffers:
        return None
    return module._buffers[name]


def copy_where(flag: Tensor, olds: list[Tensor], news: list[Tensor]) -> None:
    """Copies old into new where the flag is set: a few kernels for all of them, and no NaN of the new ones is left."""
    for before, after in _by_kind([old.to(new) for old, new in zip(olds, news, strict=True)], news):
        flat = torch.where(flag.to(after[0].device) > 0, _flat(before), _flat(after))
        chosen = flat.split([new.numel() for new in after])
        torch._foreach_copy_(after, [part.view_as(new) for part, new in zip(chosen, after, strict=True)])


def copy_each(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies each into its target: a few kernels for all of them, where torch has one per tensor for mixed formats."""
    for same, into in _by_kind(sources, targets):
        torch._foreach_copy_(into, same)


def _by_kind(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """Pairs whose sources are of one format and device, and whose targets are."""
    kinds: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        same, into = kinds.setdefault((source.dtype, source.device, target.dtype, target.device), ([], []))
        same.append(source)
        into.append(target)
    return kinds.values()


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _version(slot: _Slot) -> tuple[int, int]:
    tensor = slot.tensor
    if tensor is None or tensor.is_inference():
        return id(tensor), 0
    return id(tensor), tensor._version


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def is_written_in_place(tensor: Tensor) -> bool:
    """True if kernels copy into a tensor as it is: not into a sparse one, nor into one that was expanded."""
    return tensor.layout == torch.strided and torch._debug_has_internal_overlap(tensor) != 1


def _is_equal(tensor: Tensor | None, old: Tensor) -> bool:
    if tensor is None or (tensor.shape, tensor.layout) != (old.shape, old.layout):
        return False
    return all(map(torch.equal, _parts(tensor), _parts(old)))


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a sparse one is made of."""
    if tensor.layout == torch.strided:
        return (tensor,)
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()


def _slots_by_owner(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[list[_Slot]]:
    owner_of = {
        id(param): index for index, optimizer in reversed(list(enumerate(optimizers))) for param in params_of(optimizer)
    }
    modules = dict(model.named_modules())
    slots: list[list[_Slot]] = [[] for _ in optimizers]
    for name, module in modules.items():
        own = [_Slot(module, buffer) for buffer, tensor in module._buffers.items() if tensor is not None]
        if own and slots:
            slots[_owner(name, modules, owner_of)] += own
    return slots


def _owner(name: str, modules: dict[str, nn.Module], owner_of: dict[int, int]) -> int:
    """The optimizer of a module's parameters, or of the nearest module around it that has some."""
    owner = next((owner_of[id(param)] for param in modules[name].parameters() if id(param) in owner_of), None)
    if owner is None and name:
        return _owner(name.rpartition(".")[0], modules, owner_of)
    return owner or 0
