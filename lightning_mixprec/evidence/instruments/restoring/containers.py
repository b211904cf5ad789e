"""Containers of any class, read and written as the builtin that they are made of, past the methods of their class.

A class of a user's own may refuse ``clear()``, count what is read or raise while it is iterated over. What is put back
after a step is put back all the same.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from operator import is_
from types import CellType, MemberDescriptorType
from typing import Any, NamedTuple

from torch import Tensor

Held = dict[Any, Any] | list[Any] | frozenset[Any] | bytes
"""What a container holds, in a container of ours."""


class Kind(NamedTuple):
    """A kind of container: the functions that read all that one holds, and that make it hold that and no more."""

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None]


def is_same(now: Held, before: Held) -> bool:
    """True for the same objects in the same order, whatever their classes take for equal."""
    if len(now) != len(before) or isinstance(now, bytes):
        return now == before
    if isinstance(now, frozenset):
        return set(map(id, now)) == set(map(id, before))
    if isinstance(now, dict) and isinstance(before, dict) and not all(map(is_, now.values(), before.values())):
        return False
    return all(map(is_, now, before))


def put_back(kind: Kind, container: Any, before: Any) -> None:
    """Makes a container hold what it held before; one that does is not touched, unless it is a list that is long."""
    is_long = type(container) is list and len(before) > 1000  # written faster than compared
    is_plain = kind is ATTRIBUTES and type(container) is dict  # whose copy says nothing more
    now = container if is_plain else kind.read(container)
    if is_long or not is_same(now, before):
        kind.write(container, before)


def clear(empty: Iterable[Any]) -> None:
    """Empties containers that were empty before, of the builtin classes themselves."""
    for each in empty:
        if each:
            each.clear()


@lru_cache(1024)
def kind_of(type_of_value: type) -> Kind | None:
    """The kind of a class's instances; None for what is no container that can be written to."""
    return next((kind for builtin, kind in _KINDS if issubclass(type_of_value, builtin)), None)


def attributes_of(value: object) -> dict[str, Any] | None:
    """The ``__dict__`` of an object, whatever its class makes of the name; None if it has none."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if type(found) is dict else None


def slots_of(type_of_value: type) -> dict[str, Any]:
    """The ``__slots__`` of a class and its bases, as descriptors by name."""
    own = (vars(each) for each in type_of_value.__mro__ if "__slots__" in vars(each))
    return {name: slot for each in own for name, slot in each.items() if isinstance(slot, MemberDescriptorType)}


def slots_kind(slots: dict[str, Any]) -> Kind:
    """Objects with these slots, as containers of what is in them."""

    def read(value: Any) -> dict[str, Any]:
        found = {}
        for name, slot in slots.items():
            try:
                found[name] = slot.__get__(value)
            except AttributeError:
                continue
        return found

    def write(value: Any, before: dict[str, Any]) -> None:
        for name in read(value):
            if name not in before:
                slots[name].__delete__(value)
        for name, held in before.items():
            slots[name].__set__(value, held)

    return Kind(read, write)


def table_kind(table: Any) -> Kind:
    """A module's table of parameters or buffers; that of a scripted module is a view of what its program holds."""
    return ATTRIBUTES if isinstance(table, dict) else _SCRIPTED_TABLE


def scripted_attributes(module: Any) -> list[Callable[[], Any]]:
    """The steps that put the numbers, texts and lists back that a scripted module's program holds."""
    program = module._c
    names = [name for name in module._concrete_type.get_attributes() if not isinstance(program.getattr(name), Tensor)]
    return [partial(program.setattr, name, program.getattr(name)) for name in names]


def _write_scripted(table: Any, before: dict[str, Any]) -> None:
    for name, tensor in before.items():
        if table[name] is not tensor:
            table[name] = tensor


def _write_dict(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    dict.clear(held)
    dict.update(held, before)


def _write_ordered(held: OrderedDict[Any, Any], before: dict[Any, Any]) -> None:
    OrderedDict.clear(held)
    for key, value in before.items():
        OrderedDict.__setitem__(held, key, value)


def _write_list(held: list[Any], before: list[Any]) -> None:
    list.__setitem__(held, slice(None), before)


def _write_deque(held: deque[Any], before: list[Any]) -> None:
    deque.clear(held)
    deque.extend(held, before)


def _write_set(held: set[Any], before: frozenset[Any]) -> None:
    set.clear(held)
    set.update(held, before)


def _read_ordered(held: OrderedDict[Any, Any]) -> Held:
    return {key: dict.__getitem__(held, key) for key in OrderedDict.__iter__(held)}


def _read_cell(cell: CellType) -> Held:
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _write_cell(cell: CellType, before: list[Any]) -> None:
    if before:
        cell.cell_contents = before[0]
    else:
        del cell.cell_contents


def _write_bytes(held: bytearray, before: bytes) -> None:
    held[:] = before


def _write_array(held: array, before: bytes) -> None:  # type: ignore[type-arg]
    held[:] = array(held.typecode, before)


BUILTIN = {OrderedDict, dict, list, deque, set}
"""Classes of containers that do what they are known for."""

ATTRIBUTES = Kind(dict.copy, _write_dict)
"""The ``__dict__`` of an object."""

_SCRIPTED_TABLE = Kind(lambda table: dict(table.items()), _write_scripted)

_KINDS: tuple[tuple[type, Kind], ...] = (
    (OrderedDict, Kind(_read_ordered, _write_ordered)),
    (dict, Kind(lambda held: dict(dict.items(held)), _write_dict)),
    (list, Kind(list.copy, _write_list)),
    (deque, Kind(lambda held: list(deque.__iter__(held)), _write_deque)),
    (set, Kind(frozenset, _write_set)),
    (bytearray, Kind(bytes, _write_bytes)),
    (array, Kind(array.tobytes, _write_array)),
    (CellType, Kind(_read_cell, _write_cell)),
)
