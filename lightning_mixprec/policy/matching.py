"""Matching: the names and the classes of a model's layers that a pattern finds, and those that it nearly finds."""

import difflib
import fnmatch
import re
import sys
from collections.abc import Iterable, Sequence

from torch import nn

from lightning_mixprec.policy.patterns import REGEX_PREFIX, Pattern, Segment, parse

_MAX_SHOWN = 3
_MAX_COMPARED = 20_000


class NameTree:
    """The tree of a model's layer names, indexed so that a pattern costs what it finds and not what it passes.

    Args:
        names: In the order of ``module_names.walk``: parents first, the root ``""`` leading.

    Attributes:
        by_segment: The places in ``names`` of all names that end in a segment.

    >>> tree = NameTree(["", "norm", "blocks", "blocks.0", "blocks.0.norm", "blocks.1", "blocks.1.norm"])
    >>> [tree.names[place] for place in sorted(tree.find(parse("blocks.[-1:].**.norm")))]
    ['blocks.1.norm']
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        children: dict[int, dict[str, int]] = {}
        self._parents = [-1] * len(self.names)
        self._ends = list(range(1, len(self.names) + 1))
        self.by_segment: dict[str, list[int]] = {}
        places = {name: place for place, name in enumerate(self.names)}
        for place, name in enumerate(self.names[1:], start=1):
            prefix, _, segment = name.rpartition(".")
            self._parents[place] = places[prefix]
            children.setdefault(places[prefix], {})[segment] = place
            self.by_segment.setdefault(segment, []).append(place)
        for place in range(len(self.names) - 1, 0, -1):
            parent = self._parents[place]
            self._ends[parent] = max(self._ends[parent], self._ends[place])
        # Most layers have no children; one empty mapping for them all spares the garbage collector ten thousand.
        none: dict[str, int] = {}
        self.children = [children.get(place, none) for place in range(len(self.names))]
        self._numbered = {
            place: sorted((child for child in below if child.isascii() and child.isdecimal()), key=int)
            for place, below in children.items()
        }

    def find(self, pattern: Pattern) -> set[int]:
        """The places in ``names`` of all names that a pattern matches."""
        if pattern.regex is not None:
            matches = pattern.regex.fullmatch
            return {place for place, name in enumerate(self.names) if matches(name)}
        found = {0}
        for segment in pattern.segments:
            found = self.step(found, segment)
        return found

    def step(self, found: set[int], segment: Segment) -> set[int]:
        """The places one segment further down than those found so far."""
        match segment:
            case str():
                return set(self._named(found, segment))
            case re.Pattern():
                matches = segment.match
                return {place for text in self.by_segment if matches(text) for place in self._named(found, text)}
            case slice():
                return self._sliced(found, segment)
            case _:
                return self._below(found)

    def _named(self, found: set[int], text: str) -> list[int]:
        candidates = self.by_segment.get(text, [])
        if len(candidates) < len(found):
            return [place for place in candidates if self._parents[place] in found]
        return [self.children[place][text] for place in found if text in self.children[place]]

    def _below(self, found: set[int]) -> set[int]:
        reached, below = 0, set[int]()
        for place in sorted(found):
            if place >= reached:
                reached = self._ends[place]
                below.update(range(place, reached))
        return below

    def _sliced(self, found: set[int], positions: slice) -> set[int]:
        return {
            self.children[place][text]
            for place in self._numbered.keys() & found
            for text in self._numbered[place][positions]
        }


def class_names(cls: type) -> set[str]:
    """All names of a class: its own, its full one, and those under which packages above it export it.

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
        """The short names of all classes."""
        return sorted({name for names in self._names.values() for name in names if "." not in name})


def near_layers(text: str, tree: NameTree) -> list[str]:
    """Up to three patterns or names that are near a pattern and match something, best first."""
    pattern = parse(text)
    if candidates := _with_prefix(pattern, tree) or _with_segment_corrected(pattern, tree):
        return candidates[:_MAX_SHOWN]
    word = text.removeprefix(REGEX_PREFIX)
    names = tree.names[1 : _MAX_COMPARED + 1]
    if near := difflib.get_close_matches(word, names, n=_MAX_SHOWN):
        return near
    last = difflib.get_close_matches(word.rpartition(".")[2], tree.by_segment, n=1)
    found = tree.find(Pattern("", (..., *last))) if last else ()
    return [tree.names[place] for place in sorted(found)][:_MAX_SHOWN]


def near_words(text: str, known: list[str]) -> list[str]:
    """Up to three words near one; for a dotted word its last part counts too.

    >>> near_words("torch.nn.LayerNrom", ["Linear", "LayerNorm"])
    ['LayerNorm']
    """
    last = text.rpartition(".")[2].strip("*")
    by_case = [word for word in known if word.lower() == last.lower()]
    return by_case or difflib.get_close_matches(last, known, n=_MAX_SHOWN)


def _with_prefix(pattern: Pattern, tree: NameTree) -> list[str]:
    found = tree.find(Pattern("", (..., *pattern.segments))) if pattern.segments else set()
    return [tree.names[place] for place in sorted(found)]


def _with_segment_corrected(pattern: Pattern, tree: NameTree) -> list[str]:
    found = {0}
    for position, segment in enumerate(pattern.segments):
        further = tree.step(found, segment)
        if not further:
            texts = pattern.text.split(".")
            options = sorted({child for place in found for child in tree.children[place]})
            near = difflib.get_close_matches(texts[position], options, n=_MAX_SHOWN)
            corrected = [".".join([*texts[:position], word, *texts[position + 1 :]]) for word in near]
            if not options and position == len(texts) - 1:
                # A layer without children: the last part is the name of a parameter, perhaps.
                corrected = [".".join(texts[:-1])]
            return [text for text in corrected if tree.find(_parse_literally(text))]
        found = further
    return []


def _parse_literally(text: str) -> Pattern:
    return parse(text) if not any(character.isspace() for character in text) else Pattern(text)
