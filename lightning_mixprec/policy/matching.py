"""The tree of a model's layer names, indexed so that a pattern costs what it finds and not what it passes."""

from collections.abc import Sequence

from lightning_mixprec.policy.patterns import AnyDepth, Glob, Literal, Pattern, Segment, Slice


class NameTree:
    """Layer names in the order of ``module_names.walk``, parents first, the root ``""`` leading.

    >>> from lightning_mixprec.policy.patterns import parse
    >>> tree = NameTree(["", "norm", "blocks", "blocks.0", "blocks.0.norm", "blocks.1", "blocks.1.norm"])
    >>> [tree.names[place] for place in sorted(tree.find(parse("blocks.[-1:].**.norm")))]
    ['blocks.1.norm']
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        children: dict[int, dict[str, int]] = {}
        self._parents = [-1] * len(self.names)
        self._ends = list(range(1, len(self.names) + 1))
        self._by_segment: dict[str, list[int]] = {}
        places = {name: place for place, name in enumerate(self.names)}
        for place, name in enumerate(self.names[1:], start=1):
            prefix, _, segment = name.rpartition(".")
            self._parents[place] = places[prefix]
            children.setdefault(places[prefix], {})[segment] = place
            self._by_segment.setdefault(segment, []).append(place)
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

    @property
    def last_segments(self) -> list[str]:
        """The distinct last segments of all names."""
        return list(self._by_segment)

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
            case AnyDepth():
                return self._below(found)
            case Slice():
                return self._sliced(found, segment.as_slice())
            case Glob(regex):
                matches = regex.match
                return {place for text in self._by_segment if matches(text) for place in self._named(found, text)}
            case Literal(text):
                return set(self._named(found, text))

    def _named(self, found: set[int], text: str) -> list[int]:
        candidates = self._by_segment.get(text, [])
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
