"""Patterns that select layers by type: ``LayerNorm``, ``torch.nn.LayerNorm``, ``"*Norm*"``, subclasses included."""

import fnmatch
import sys
from collections.abc import Iterable

from torch import nn

from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.patterns import check_brackets


def check_type_pattern(text: str) -> None:
    """Check a type pattern as far as that goes without a model.

    Raises:
        PolicyError: it is malformed.
    """
    if any(character.isspace() for character in text):
        raise PolicyError(f"type {text!r} has a blank in it; write a class name such as LayerNorm")
    if "" in text.split("."):
        raise PolicyError(f"type {text!r} has an empty segment; write a class name such as torch.nn.LayerNorm")
    check_brackets(text, text)


def class_names(cls: type) -> set[str]:
    """What a class may be called: its name, its full name, and the names under which packages above it export it.

    >>> sorted(class_names(nn.LayerNorm))
    ['LayerNorm', 'torch.nn.LayerNorm', 'torch.nn.modules.LayerNorm', 'torch.nn.modules.normalization.LayerNorm']
    """
    names = {cls.__name__, f"{cls.__module__}.{cls.__qualname__}"}
    package = cls.__module__
    while package:
        if vars(sys.modules.get(package, object)).get(cls.__name__) is cls:
            names.add(f"{package}.{cls.__name__}")
        package = package.rpartition(".")[0]
    return names


class ClassIndex:
    """The distinct classes of a model's layers, each with the names of itself and of its bases."""

    def __init__(self, classes: Iterable[type]) -> None:
        bases: dict[type, set[str]] = {}
        self._names: dict[type, set[str]] = {}
        for cls in set(classes):
            for base in cls.__mro__[:-1]:
                bases.setdefault(base, class_names(base))
            self._names[cls] = set().union(*(bases[base] for base in cls.__mro__[:-1]))
        # Every layer is a Module, so a glob such as "Mo*" would match them all.
        self._of_all = class_names(nn.Module)

    def matching(self, text: str) -> set[type]:
        """The classes that a type pattern matches."""
        if not any(character in text for character in "*?["):
            return {cls for cls, names in self._names.items() if text in names}
        is_dotted = "." in text
        return {
            cls
            for cls, names in self._names.items()
            if any(
                ("." in name) == is_dotted and fnmatch.fnmatchcase(name, text)
                for name in (names - self._of_all if text != "*" else names)
            )
        }

    @property
    def known(self) -> list[str]:
        """All names, for near misses; the short ones."""
        return sorted({name for names in self._names.values() for name in names if "." not in name})
