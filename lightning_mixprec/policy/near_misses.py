"""Near misses: what a pattern that matches nothing was probably meant to be."""

import difflib

from lightning_mixprec.policy.matching import NameTree
from lightning_mixprec.policy.patterns import REGEX_PREFIX, AnyDepth, Literal, Pattern, parse

_MAX_SHOWN = 3
_MAX_COMPARED = 20_000


def near_layers(text: str, tree: NameTree) -> list[str]:
    """Up to three patterns or names that are near a pattern and match something, best first."""
    pattern = parse(text)
    if pattern.regex is None:
        for candidates in (_with_prefix(pattern, tree), _with_segment_corrected(pattern, tree)):
            if candidates:
                return candidates[:_MAX_SHOWN]
    word = text.removeprefix(REGEX_PREFIX)
    names = tree.names[1 : _MAX_COMPARED + 1]
    near = difflib.get_close_matches(word, names, n=_MAX_SHOWN)
    return (
        near
        or [
            tree.names[place]
            for last in difflib.get_close_matches(word.rpartition(".")[2], tree.last_segments, n=1)
            for place in sorted(tree.find(Pattern("", (AnyDepth(), Literal(last)))))
        ][:_MAX_SHOWN]
    )


def near_words(text: str, known: list[str]) -> list[str]:
    """Up to three words near one; for a dotted word its last part counts too.

    >>> near_words("torch.nn.LayerNrom", ["Linear", "LayerNorm"])
    ['LayerNorm']
    """
    last = text.rpartition(".")[2].strip("*")
    by_case = [word for word in known if word.lower() == last.lower()]
    return by_case or difflib.get_close_matches(last, known, n=_MAX_SHOWN)


def _with_prefix(pattern: Pattern, tree: NameTree) -> list[str]:
    found = tree.find(Pattern("", (AnyDepth(), *pattern.segments))) if pattern.segments else set()
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
