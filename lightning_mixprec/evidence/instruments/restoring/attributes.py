"""The Python objects that modules hold: found before a step, replaced for it where need be, put back after it."""

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from functools import lru_cache, partial
from types import BuiltinMethodType, FunctionType, MappingProxyType, MethodType, MethodWrapperType, ModuleType
from typing import Any
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from lightning_mixprec.evidence.instruments.restoring import code_names, containers, refusals
from lightning_mixprec.evidence.instruments.restoring.containers import Kind
from lightning_mixprec.evidence.instruments.restoring.contents import (
    Contents,
    PutBack,
    is_array,
    is_settable,
    setter_of,
)

_PLAIN: tuple[type, ...] = (type(None), bool, int, float, complex, str, bytes, range, slice, type(...))
_PLAIN += (torch.Size, torch.dtype, torch.device, torch.layout)
_NOT_LOOKED_INTO = (type, ModuleType, Enum, *_PLAIN)
_OTHERS = (sys.stdlib_module_names - {"collections", "types", "argparse", "weakref"}) | {"torch", "numpy"}
_OTHERS |= {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_mixprec"}
_MOST_ITEMS = 1000
_MOST_OBJECTS = 10_000
_MOST_IN_MODULE = 30

Path = tuple[Any, ...]
"""Where an object was found: its holder's path, and its name or place there; empty for the model."""


class Attributes:
    """Everything that modules hold, recorded to be put back, with the tables of their parameters, buffers and hooks.

    Looks into containers of all kinds, into objects of classes that are not torch's or Lightning's and whatever these
    hold in turn, and into the variables that functions close over; then into the global variables and classes that the
    user's own code names. Restores tensors, arrays of NumPy and random number generators, too. Of a container with more
    than a thousand objects it restores which it holds in which order, and it looks at ten thousand objects in all, and
    thirty more for each module.

    Args:
        model: The model.
        refused: Makes the error for a step that uses what cannot be put back, by its name.
        beside: What code that names a Trainer reaches through it, by the names that it has there.

    Attributes:
        modules: The modules of the model, and those that it holds without having them registered.
        leaves: Tensors that require a gradient and are no module's parameters.
        contents: Tensors and arrays that are restored.
    """

    def __init__(
        self, model: nn.Module, refused: Callable[[str], Exception], beside: Mapping[str, Any] | None = None
    ) -> None:
        self.modules: list[nn.Module] = []
        self.leaves: list[Tensor] = []
        self.contents = Contents()
        self._refused = refused
        self._held: list[tuple[Kind, Any, Any]] = []
        self._to_replace: set[int | None] = set()
        self._stand_ins: dict[int, Any] = {}
        self._own: set[int] = set()
        self._known: set[Any] = set()
        self._restores: list[PutBack] = []
        self._references: list[ReferenceType[Any]] = []
        self._graphs: list[Tensor] = []
        self._empty: list[Any] = []
        self._takers: dict[type, Any] = {type(model): self._take_module}
        self._found: deque[tuple[Any, Path, int | None]] = deque([(model, (), None)])
        self._functions: list[FunctionType] = []
        self._classes: list[type] = []
        self._is_named = False
        self._walk()
        self._take_named(beside or {})
        self._takers.clear()  # which know this: what it holds goes with it, stand-ins of all weights among it
        self._found.clear()

    def open(self, stand_ins: Mapping[int, Tensor]) -> None:
        """Puts stand-ins in the places of parameters and buffers, by their ``id``, and of what the step may not use."""
        self._stand_ins.update(stand_ins)
        for reference in self._references:
            if (stand_in := stand_ins.get(id(reference()))) is not None:
                self._stand_ins[id(reference)] = ReferenceType(stand_in)
        self._stand_ins.update({id(tensor): _cut(tensor) for tensor in self._graphs})
        for place in self._to_replace - {None}:
            kind, container, before = self._held[place]  # type: ignore[index]
            replaced = self._replaced(before)
            if not containers.is_same(replaced, before):
                kind.write(container, replaced)
        self.contents.open()

    def _walk(self) -> None:
        while self._found and len(self._known) < _MOST_OBJECTS + _MOST_IN_MODULE * len(self.modules):
            value, path, holder = self._found.popleft()
            key = (id(value), holder) if isinstance(value, tuple) else id(value)
            if key not in self._known:
                self._known.add(key)
                self._takers[type(value)](value, path, holder)
            if id(value) in self._stand_ins or isinstance(value, (Tensor, ReferenceType)):
                self._to_replace.add(holder)

    def _take_named(self, beside: Mapping[str, Any]) -> None:
        """What the code names of what was found, and so on for what is found by these names."""
        self._is_named = True
        while self._classes or self._functions:
            while self._classes:
                for kind in self._classes.pop().__mro__:
                    self._take_class(kind)
            named_in: dict[int, tuple[dict[str, Any], set[str], set[str]]] = {}
            while self._functions:
                function = self._functions.pop()
                if (names := code_names.named_by(function)) is not None:
                    new = (function.__globals__, set[str](), set[str]())
                    _, variables, attributes = named_in.setdefault(id(function.__globals__), new)
                    variables |= names.variables
                    attributes |= names.attributes
            for held, variables, attributes in named_in.values():
                self._take_variables(held, frozenset(variables), frozenset(attributes))
                if "trainer" in attributes:
                    self._look_at(beside, (), None)
            self._walk()

    def _take_class(self, kind: type) -> None:
        if id(kind) not in self._known and code_names.is_own(kind):
            self._known.add(id(kind))
            self._functions += code_names.functions_of(kind)
            if not issubclass(kind, Enum):
                self._hold(code_names.CLASS, kind, (kind.__name__,))

    def _take_variables(self, held: dict[str, Any], names: frozenset[str], attributes: frozenset[str]) -> None:
        """Variables of a file, and of other files of the user's own those that are named as their attributes."""
        kind = code_names.variables(names)
        for value in kind.read(held).values():
            if isinstance(value, type):
                self._classes.append(value)
            elif isinstance(value, ModuleType) and id(value) not in self._known and code_names.is_own_module(value):
                self._known.add(id(value))
                self._take_variables(vars(value), attributes, attributes)
        self._hold(kind, held, ())

    def put_back(self) -> Iterator[PutBack]:
        """The steps that put everything back, tables of parameters and buffers first."""
        for kind, container, before in self._held:
            yield partial(containers.put_back, kind, container, before)
        yield partial(containers.clear, self._empty)
        yield from self.contents.put_back()
        yield from self._restores

    def _replaced(self, value: Any) -> Any:
        """A container's items, or one of them that may be a tuple of further ones, with stand-ins in place."""
        if type(value) is dict:
            return {self._replaced_item(key): self._replaced_item(item) for key, item in value.items()}
        return type(value)(map(self._replaced_item, value))

    def _replaced_item(self, item: Any) -> Any:
        if isinstance(item, tuple) and id(item) not in self._stand_ins:
            before = list(tuple.__iter__(item))
            items = [self._replaced_item(each) for each in before]
            return item if containers.is_same(items, before) else tuple.__new__(type(item), items)
        return self._stand_ins.get(id(item), item)

    def _hold(self, kind: Kind, container: Any, path: Path) -> None:
        """Records what a container holds, and has it looked at."""
        before = kind.read(container)
        self._held.append((kind, container, before))
        if before and not isinstance(before, bytes):
            self._look_at(before, path, len(self._held) - 1)

    def _look_at(self, items: Any, path: Path, holder: int | None) -> None:
        if len(items) > _MOST_ITEMS:
            kinds = set(map(type, items.values() if isinstance(items, dict) else items))
            if kinds <= set(_PLAIN) or not all(issubclass(each, (Tensor, *_PLAIN)) for each in kinds):
                return
        pairs: Iterable[tuple[Any, Any]] = items.items() if isinstance(items, dict) else enumerate(items)
        for key, value in pairs:
            for each in (value,) if type(key) in _PLAIN else (key, value):
                kind: Any = type(each)
                if kind in containers.BUILTIN and not each:
                    self._empty.append(each)
                    continue
                if kind not in self._takers:
                    name = _taker(kind)
                    self._takers[kind] = name and getattr(self, name)
                if self._takers[kind] is not None:
                    self._found.append((each, (path, key), holder))

    def _take_tensor(self, tensor: Tensor, path: Path, holder: int | None) -> None:
        if id(tensor) not in self._own:
            if tensor.requires_grad:
                (self.leaves if tensor.is_leaf else self._graphs).append(tensor)
            self.contents.add_tensor(tensor)

    def _take_module(self, module: nn.Module, path: Path, holder: int | None) -> None:
        new = [(name, each) for name, each in module.named_modules() if each is module or id(each) not in self._known]
        for _, each in new:
            self.modules.append(each)
            self._known.update((id(each), id(each._parameters), id(each._buffers)))
            for table in (each._parameters, each._buffers):
                if type(table) is dict and not table:
                    self._empty.append(table)
                else:
                    self._own.update(map(id, table.values()))
                    self._hold(containers.table_kind(table), table, ())
                    self._to_replace.add(len(self._held) - 1)  # however many there are
        self._restores.append(partial(_give_classes, [(each, type(each)) for _, each in new]))
        for name, each in new:
            self._classes.append(type(each))
            self._hold(containers.ATTRIBUTES, vars(each), (path, name) if name else path)
            if isinstance(each, torch.jit.ScriptModule):
                self._restores += containers.scripted_attributes(each)

    def _take_fixed(self, value: Any, path: Path, holder: int | None) -> None:
        """A tuple, whose holder is given another one if something in it is replaced; or another read-only container."""
        kept = holder if isinstance(value, tuple) else None
        self._look_at(dict(value) if isinstance(value, MappingProxyType) else list(value), path, kept)

    def _take_container(self, value: Any, path: Path, holder: int | None) -> None:
        kind = containers.kind_of(type(value))  # type: ignore[arg-type]
        assert kind is not None
        self._hold(kind, value, path)
        attributes = None if type(value) in containers.BUILTIN else containers.attributes_of(value)
        if attributes:
            self._hold(containers.ATTRIBUTES, attributes, path)

    def _take_function(self, function: FunctionType, path: Path, holder: int | None) -> None:
        if (function.__module__ or "").partition(".")[0] in _OTHERS:
            return
        self._functions.append(function)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            self._look_at({name: cell}, path, None)
        self._look_at([vars(function), function.__defaults__, function.__kwdefaults__], path, None)

    def _take_call(self, call: Any, path: Path, holder: int | None) -> None:
        """A bound method or a partial; of what may not be used neither may its methods."""
        parts = (call.func, *call.args, call.keywords) if isinstance(call, partial) else (call.__self__,)
        if any(_is_refused(type(part)) for part in parts):
            self._refuse(call, path, holder)
        else:
            self._look_at(parts, path, None)

    def _take_reference(self, reference: Any, path: Path, holder: int | None) -> None:
        self._references.append(reference)
        self._look_at([reference()], path, None)

    def _take_cached(self, cached: Any, path: Path, holder: int | None) -> None:
        """A function with a cache, which cannot be put back: the step has another, empty one."""
        function = cached.__wrapped__
        if isinstance(function, FunctionType) and code_names.named_by(function) is not None:
            self._stand_ins[id(cached)] = code_names.fresh(cached)
            self._look_at([function], path, None)

    def _take_settable(self, value: Any, path: Path, holder: int | None) -> None:
        setter = setter_of(value)
        if setter is not None:
            self._restores.append(setter)

    def _take_array(self, array: Any, path: Path, holder: int | None) -> None:
        if array.flags.writeable:
            self.contents.add_array(array, named(path))

    def _take_object(self, value: Any, path: Path, holder: int | None) -> None:
        attributes, slots = containers.attributes_of(value), containers.slots_of(type(value))
        parts = [(containers.ATTRIBUTES, attributes)] if attributes is not None else []
        parts += [(containers.slots_kind(slots), value)] if slots else []
        if any(_holds_live(kind.read(held)) for kind, held in parts):
            self._refuse(value, path, holder)  # others are at work on it, so nothing of it can be put back
            return
        self._classes.append(type(value))
        for kind, held in parts:
            self._hold(kind, held, path)

    def _take_lock(self, lock: Any, path: Path, holder: int | None) -> None:
        lent = refusals.LentLock(lock, partial(self._refused, f"the lock {named(path)}, which somebody else holds"))
        self._stand_ins[id(lock)] = lent
        self._restores.append(lent.put_back)

    def _refuse(self, value: Any, path: Path, holder: int | None) -> None:
        if self._is_named and not refusals.is_taken_from(type(value)):
            return  # a bar of progress or a logger of the file's, at which others may be at work, goes on
        copied = refusals.copied(value)
        refused = refusals.refusal(value, partial(self._refused, named(path))) if copied is None else copied
        self._stand_ins[id(value)] = refused


@contextlib.contextmanager
def replaced(attributes: dict[str, Any], new: Mapping[str, Any]) -> Iterator[None]:
    """Attributes are others within, and what they were after."""
    before = {name: attributes[name] for name in new if name in attributes}
    attributes.update(new)
    try:
        yield
    finally:
        for name in new.keys() - before.keys():
            attributes.pop(name, None)
        attributes.update(before)


def named(path: Path) -> str:
    """A path as a user would write it."""
    names = []
    while path:
        path, name = path
        names.append(str(name))
    return ".".join(reversed(names))


@lru_cache(1024)
def _taker(kind: type) -> str | None:
    """The name of the method that records objects of a class; None for a class without a state."""
    is_others = kind.__module__.partition(".")[0] in _OTHERS and not kind.__module__.startswith("torch.utils.data")
    choices = (
        (issubclass(kind, _NOT_LOOKED_INTO), None),
        (issubclass(kind, Tensor), "_take_tensor"),
        (issubclass(kind, nn.Module), "_take_module"),
        (issubclass(kind, (tuple, frozenset, MappingProxyType)), "_take_fixed"),
        (issubclass(kind, FunctionType), "_take_function"),
        (issubclass(kind, (MethodType, BuiltinMethodType, MethodWrapperType, partial)), "_take_call"),
        (issubclass(kind, code_names.CACHED), "_take_cached"),
        (issubclass(kind, ReferenceType), "_take_reference"),
        (is_settable(kind), "_take_settable"),
        (is_array(kind), "_take_array"),
        (_is_refused(kind), "_refuse"),
        (containers.kind_of(kind) is not None, "_take_container"),
        (refusals.is_lock(kind), "_take_lock"),
        (is_others, None),
    )
    return next((taker for is_chosen, taker in choices if is_chosen), "_take_object")


def _is_refused(kind: type) -> bool:
    """True for what waits, for what other threads are at work on, and for iterators that are not a user's own class."""
    is_own = kind.__module__.partition(".")[0] not in _OTHERS
    return refusals.is_live(kind) or (refusals.is_consumed(kind) and not is_own)


def _holds_live(held: Any) -> bool:
    within = (item for value in held.values() if type(value) in (list, tuple) for item in value[:_MOST_ITEMS])
    return any(refusals.is_live(type(each)) for each in (*held.values(), *within))


def _cut(tensor: Tensor) -> Tensor:
    """A copy of what was computed in steps before, without their graph, which a backward would free."""
    with torch.enable_grad():
        return tensor.detach().requires_grad_().clone()


def _give_classes(modules: list[tuple[nn.Module, type]]) -> None:
    for module, kind in modules:
        if type(module) is not kind:
            module.__class__ = kind
