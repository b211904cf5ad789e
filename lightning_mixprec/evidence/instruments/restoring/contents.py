"""Contents of tensors and arrays, put back after a step: copied before it where they are small, else when it writes.

Up to 32 MiB of what a model's objects hold are copied before the step. Of larger tensors what an operation is about to
write to is copied just before it does; larger arrays of NumPy are read-only for as long as the step runs.
"""

import io
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

_MOST_BYTES = 32 * 2**20
_MOST_COPIES = 1000
_PLAIN = (Tensor, torch.nn.Parameter)

PutBack = Callable[[], Any]


class Contents:
    """Tensors and arrays whose contents are put back.

    Attributes:
        locked: By name the arrays that are read-only while the step runs.
    """

    def __init__(self) -> None:
        self.locked: dict[str, Any] = {}
        self._restores: list[PutBack] = []
        self._room, self._copies = _MOST_BYTES, _MOST_COPIES
        self._storages: set[int] = set()
        self._journaled: dict[int, Any] = {}
        self._journal: _Journal | None = None

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Takes in tensors of which what an operation is about to write to is copied just before it does."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages.add(storage._cdata)
            self._journaled[storage._cdata] = storage

    def was_written_back(self, tensor: Tensor) -> bool:
        """True for a tensor that was written to, and of which what was overwritten was written back."""
        return self._journal is not None and _storage_of(tensor) in self._journal.undone

    def add_tensor(self, tensor: Tensor) -> None:
        """Takes in a tensor with all that its storage holds."""
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                self.add_tensor(getattr(tensor, name))
            return
        if tensor.layout != torch.strided or tensor.is_nested:
            self._restores.append(partial(_write, tensor, tensor.detach().clone()))
            return
        storage, alias = tensor.untyped_storage(), tensor.detach()
        self._restores.append(lambda: reshape(tensor, alias))
        if storage._cdata in self._storages:
            return
        self._storages.add(storage._cdata)
        if self._has_room(storage.nbytes()):
            bytes_before = storage.clone()
            self._restores.append(lambda: _rewrite(storage, bytes_before))
        else:
            self._journaled[storage._cdata] = storage

    def add_array(self, array: Any, name: str) -> None:
        """Takes in an array of NumPy that can be written to."""
        if not self._has_room(array.nbytes):
            self.locked[name] = array
            return
        before, copyto = array.copy(), sys.modules["numpy"].copyto
        self._restores.append(lambda: copyto(array, before))

    def open(self) -> None:
        """Sees to what was not copied."""
        for array in self.locked.values():
            array.flags.writeable = False
        if self._journaled:
            self._journal = _Journal(self._journaled)
            self._journal.open()

    def put_back(self) -> Iterator[PutBack]:
        """The steps that put everything back."""
        if self._journal is not None:
            yield from (self._journal.close, self._journal.undo)
        # What an array is a view of has to be writeable first.
        for array in sorted(self.locked.values(), key=lambda array: array.base is not None):
            yield partial(setattr, array.flags, "writeable", True)
        yield from self._restores

    def _has_room(self, size: int) -> bool:
        if size > self._room or not self._copies:
            return False
        self._room, self._copies = self._room - size, self._copies - 1
        return True


class _Journal(TorchDispatchMode):
    """Everything that operations overwrite in some storages while this is entered."""

    def __init__(self, storages: Mapping[int, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = storages
        self._before: list[tuple[Tensor, Tensor]] = []
        self.undone: set[int | None] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(each, "full_tensor") for each in types):
            return NotImplemented  # of sharded tensors the operations on a rank's own parts follow
        kwargs = kwargs or {}
        for place, name in _written(func):
            value = kwargs.get(name, args[place] if place < len(args) else None)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor) and _storage_of(tensor) in self._storages:
                    self._before.append((tensor.detach(), tensor.clone()))
        return func(*args, **kwargs)

    def open(self) -> None:
        """Sees the operations that follow."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Sees no more of them."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def undo(self) -> None:
        """Writes back what was overwritten, the latest first."""
        while self._before:
            tensor, before = self._before.pop()
            _write(tensor, before)
            self.undone.add(_storage_of(tensor))


def version_of(tensor: Tensor) -> int:
    """The number of writes to a tensor, or to its own part of a sharded one; 0 for inference tensors."""
    tensor = getattr(tensor, "_local_tensor", tensor)
    return 0 if tensor.is_inference() else tensor._version


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """The numbers of writes to tensors, as :func:`version_of` has them."""
    try:
        return [each._version if type(each) in _PLAIN else version_of(each) for each in tensors]
    except RuntimeError:  # of an inference tensor
        return list(map(version_of, tensors))


def is_in_place(tensor: Tensor, alias: Tensor) -> bool:
    """True if a tensor has the storage, shape and strides of an alias."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return True
    is_same = tensor.shape == alias.shape and tensor.stride() == alias.stride()
    return is_same and _storage_of(tensor) == _storage_of(alias)


def reshape(tensor: Tensor, alias: Tensor) -> None:
    """Gives a tensor the storage, shape and strides of an alias back."""
    if not is_in_place(tensor, alias):
        tensor.data = alias


def is_array(kind: type) -> bool:
    """True for arrays of NumPy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and issubclass(kind, numpy.ndarray)


def is_settable(kind: type) -> bool:
    """True for random number generators and files in memory, whose state can be read and set."""
    return any(issubclass(kind, each) for each, _, _ in _settable())


def setter_of(value: Any) -> PutBack | None:
    """A function that sets an object of a settable class to the state that it is in; None if it has none to read."""
    for kind, get, set_ in _settable():
        if isinstance(value, kind):
            if kind is random.Random and isinstance(value, random.SystemRandom):
                return None
            if not get:
                value = getattr(value, "bit_generator", value)
                return partial(setattr, value, "state", value.state)
            return partial(getattr(value, set_), getattr(value, get)())
    return None


def _settable() -> tuple[tuple[type, str, str], ...]:
    """Classes, with the methods that read and set their state; nothing for an attribute ``state``."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return _SETTABLE
    own = numpy.random
    return *_SETTABLE, (own.RandomState, "get_state", "set_state"), (own.Generator, "", ""), (own.BitGenerator, "", "")


_SETTABLE: tuple[tuple[type, str, str], ...] = (
    (torch.Generator, "get_state", "set_state"),
    (random.Random, "getstate", "setstate"),
    (io.StringIO, "__getstate__", "__setstate__"),
    (io.BytesIO, "__getstate__", "__setstate__"),
)


@cache
def _written(operation: Any) -> tuple[tuple[int, str], ...]:
    """The arguments that an operation writes to, by place and name."""
    arguments = enumerate(operation._schema.arguments)
    return tuple((place, each.name) for place, each in arguments if each.alias_info and each.alias_info.is_write)


def _storage_of(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _rewrite(storage: Any, before: Any) -> None:
    if storage.nbytes() != before.nbytes():
        storage.resize_(before.nbytes())
    storage.copy_(before)


def _write(tensor: Tensor, before: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(before)
