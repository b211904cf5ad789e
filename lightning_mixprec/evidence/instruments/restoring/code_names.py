"""What the code of a step names: global variables and classes, which no attribute of a module leads to.

A step may count in a global variable, play a global environment, or keep a schedule in a class. Read are functions in
the user's own files, not those of installed packages, and of these the names that their code says: a variable that is
looked up by a computed name is not seen.
"""

import contextlib
import contextvars
import dis
import functools
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from lightning_mixprec.evidence.instruments.restoring.containers import Kind
from lightning_mixprec.evidence.instruments.restoring.contents import PutBack

CACHED: type = type(lru_cache(lambda: None))
"""The class of what ``functools.lru_cache`` makes of a function."""

_GLOBAL = {"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"}
_OUTSIDE_STEPS = {"setup", "teardown", "configure_model", "configure_optimizers", "prepare_data"}
_OUTSIDE_STEPS |= {f"{stage}_{what}" for stage in ("val", "test", "train", "predict") for what in ("dataloader",)}
_OUTSIDE_STEPS |= {f"{stage}_step" for stage in ("validation", "test", "predict")}
_ABSENT = object()


class Named(NamedTuple):
    """What some code names.

    Attributes:
        variables: The global variables.
        attributes: The attributes, of whatever object.
    """

    variables: frozenset[str]
    attributes: frozenset[str]


def is_own(kind: type) -> bool:
    """True for a class in a file of the user's own."""
    module = sys.modules.get(kind.__module__)
    return module is not None and is_own_module(module)


def is_own_module(module: ModuleType) -> bool:
    """True for a module in a file of the user's own, or in none, as what is typed in."""
    return _is_own_file(getattr(module, "__file__", None) or ("<typed>" if module.__name__ == "__main__" else ""))


def functions_of(kind: type) -> Iterator[FunctionType]:
    """The functions of a class's own that may run in a step; of modules not those that make them or their data."""
    is_module, takes_steps = issubclass(kind, nn.Module), hasattr(kind, "training_step")
    for name, member in vars(kind).items():
        if not (name == "__init__" and is_module or takes_steps and name in _OUTSIDE_STEPS):
            yield from _functions_in(member)


def named_by(function: FunctionType) -> Named | None:
    """What a function's code names; None for code of an installed package."""
    return _named_in(function.__code__) if _is_own_file(function.__code__.co_filename) else None


@lru_cache(1024)
def variables(names: frozenset[str]) -> Kind:
    """Some variables of a module, in its dict, which holds others that are left alone."""

    def read(held: dict[str, Any]) -> dict[str, Any]:
        return {name: held[name] for name in names if name in held}

    def write(held: dict[str, Any], before: dict[str, Any]) -> None:
        for name in names:
            if name not in before:
                held.pop(name, None)
        held.update(before)

    return Kind(read, write)


def fresh(cached: Any) -> Any:
    """A function with a cache like the given one's, which is empty: what a step computes in it is gone with it."""
    return lru_cache(**cached.cache_parameters())(cached.__wrapped__)


def context() -> PutBack:
    """The function that gives variables of the context (``contextvars``) the values that they have now."""
    before = contextvars.copy_context()

    def put_back() -> None:
        for variable, value in contextvars.copy_context().items():
            if variable in before:
                if value is not before[variable]:
                    variable.set(before[variable])
            else:
                with contextlib.suppress(LookupError):  # one without a default cannot be unset
                    variable.set(contextvars.Context().run(variable.get))

    return put_back


def _read_class(kind: type) -> dict[str, Any]:
    return {name: member for name, member in vars(kind).items() if _is_state(name, member)}


def _write_class(kind: type, before: dict[str, Any]) -> None:
    for name in _read_class(kind):
        if name not in before:
            type.__delattr__(kind, name)
    for name, member in before.items():
        if vars(kind).get(name, _ABSENT) is not member:
            type.__setattr__(kind, name, member)


CLASS = Kind(_read_class, _write_class)
"""What a class holds beside its methods."""


def _is_state(name: str, member: object) -> bool:
    if name.startswith(("__", "_abc_")):
        return False
    return isinstance(member, CACHED) or not hasattr(type(member), "__get__")


def _functions_in(member: Any) -> Iterator[FunctionType]:
    if isinstance(member, property):
        members: tuple[Any, ...] = (member.fget, member.fset)
    else:
        found = getattr(member, "func", member) if isinstance(member, functools.cached_property) else member
        members = (getattr(found, "__func__", found),)
    for each in members:
        each = getattr(each, "__wrapped__", each) if isinstance(each, CACHED) else each
        if isinstance(each, FunctionType):
            yield each


@lru_cache(8192)
def _named_in(code: CodeType) -> Named:
    within = [_named_in(each) for each in code.co_consts if isinstance(each, CodeType)]
    names = frozenset(each.argval for each in dis.get_instructions(code) if each.opname in _GLOBAL)
    others = frozenset(code.co_names)
    return Named(names.union(*(each.variables for each in within)), others.union(*(each.attributes for each in within)))


@lru_cache(4096)
def _is_own_file(name: str) -> bool:
    return bool(name) and not any(name.startswith(each) for each in _installed())


@lru_cache(1)
def _installed() -> tuple[str, ...]:
    """Where Python's own files, installed packages and this package are."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [each for each in sys.path if each.endswith(("site-packages", "dist-packages"))]
    ours = Path(__file__).resolve().parents[3]
    return ("<frozen", *(f"{each}/" for each in (*dict.fromkeys(paths), ours)))
