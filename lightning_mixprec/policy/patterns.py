"""Patterns that select layers: by name, and by type.

Names are selected by dotted names, globs, ``**``, slices of numbered blocks and regular expressions, types by
``LayerNorm``, ``torch.nn.LayerNorm`` or ``"*Norm*"``. A pattern is checked when it is written,
without a model, because most mistakes are visible in it: ``fnmatch`` reads ``blocks.[20-23]`` as the characters 2, 0 to
2, and 3, and would silently select blocks 0, 1, 2 and 3.
"""

import fnmatch
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import EllipsisType

from lightning_mixprec.errors import PolicyError

REGEX_PREFIX = "re:"

_SLICE = re.compile(r"\[(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?\]")
_NUMERIC_CLASS = re.compile(r"[\d,:;-]+")
_WRONG_RANGE = re.compile(r"\d\d+-|-\d\d+")


Segment = str | re.Pattern[str] | slice | EllipsisType
"""A name; a glob (``*``, ``?`` or ``[ab]``) as a regular expression; a slice of the parent's numbered children, by
position; or ``...`` for ``**``, any number of segments, zero included."""


@dataclass(frozen=True)
class Pattern:
    """A checked pattern: its segments, or one regular expression for the whole name."""

    text: str
    segments: tuple[Segment, ...] = ()
    regex: re.Pattern[str] | None = None


@lru_cache(maxsize=4096)
def parse(text: str) -> Pattern:
    """Check a pattern and take it apart.

    Raises:
        PolicyError: the pattern is malformed, or is sure to select other layers than it seems to.

    >>> parse("model.**.[0:4]").segments
    ('model', Ellipsis, slice(0, 4, None))
    >>> parse("model.blocks.[20-23]")
    Traceback (most recent call last):
    lightning_mixprec.errors.PolicyError: pattern 'model.blocks.[20-23]': ... write the slice model.blocks.[20:24]
    """
    if text.startswith(REGEX_PREFIX):
        return Pattern(text, regex=_regex(text))
    if any(character.isspace() for character in text):
        raise PolicyError(f"pattern {text!r} has a blank in it; write ? where a layer's name has one")
    if not text:
        return Pattern(text)
    segments = text.split(".")
    if "" in segments:
        raise PolicyError(f"pattern {text!r} has an empty segment; single dots join names, as in model.head")
    return Pattern(text, tuple(_segment(segment, text) for segment in segments))


def literal(name: str) -> str:
    r"""The pattern that matches the layer of a dotted name, and no other.

    >>> print(literal("model.head"), literal("heads.[a]"))
    model.head re:heads\.\[a\]
    """
    try:
        pattern = parse(name)
    except PolicyError:
        return REGEX_PREFIX + re.escape(name)
    is_plain = pattern.regex is None and all(isinstance(segment, str) for segment in pattern.segments)
    return name if is_plain else REGEX_PREFIX + re.escape(name)


def check_type_pattern(text: str) -> None:
    """Check a type pattern as far as that goes without a model.

    Raises:
        PolicyError: it is malformed.
    """
    if any(character.isspace() for character in text):
        raise PolicyError(f"type {text!r} has a blank in it; write a class name such as LayerNorm")
    if "" in text.split("."):
        raise PolicyError(f"type {text!r} has an empty segment; write a class name such as torch.nn.LayerNorm")
    _bracketed(text, text)


def _bracketed(text: str, whole: str) -> list[str]:
    """The bodies of the character classes in a glob, as ``fnmatch`` delimits them.

    Raises:
        PolicyError: a bracket has no partner.
    """
    bodies, position = [], 0
    while position < len(text):
        if text[position] == "[":
            start = position + 1
            first = start + text.startswith("!", start)
            end = text.find("]", first + text.startswith("]", first))
            if end < 0:
                raise PolicyError(f"pattern {whole!r} opens '[' and does not close it; write ']' where it ends")
            bodies.append(text[start:end])
            position = end
        elif text[position] == "]":
            raise PolicyError(f"pattern {whole!r} closes ']' without opening it; write '[' where it begins")
        position += 1
    return bodies


def _regex(text: str) -> re.Pattern[str]:
    source = text.removeprefix(REGEX_PREFIX)
    if not source:
        raise PolicyError("pattern 're:' has no regular expression after the colon; write one, as in re:.*norm")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(source)
    except (re.error, OverflowError, RecursionError) as error:
        raise PolicyError(f"pattern {text!r} is no regular expression: {error}; correct it after 're:'") from None


def _segment(segment: str, whole: str) -> Segment:
    if segment == "**":
        return ...
    if "**" in segment:
        raise PolicyError(f"pattern {whole!r}: '**' stands alone between dots, not inside {segment!r}; write *")
    if found := _SLICE.fullmatch(segment):
        start, stop, step = (None if number is None else int(number) for number in found.groups())
        if step == 0:
            raise PolicyError(f"pattern {whole!r}: the step of slice {segment} is 0; write 1 or more, or leave it out")
        return slice(start, stop, step)
    for body in _bracketed(segment, whole):
        _check_class(body, segment, whole)
    if any(character in segment for character in "*?["):
        return re.compile(fnmatch.translate(segment))
    return segment


def _check_class(body: str, segment: str, whole: str) -> None:
    members, is_segment = body.removeprefix("!"), segment == f"[{body}]"
    is_backwards = any(low > high for low, high in re.findall(r"(?=(.)-(.))", members) if "-" not in (low, high))
    # [8-11] is the range 8 to 1 for fnmatch, but whoever wrote it meant blocks 8 to 11.
    if is_backwards and not _is_ascending(members):
        raise PolicyError(f"pattern {whole!r}: a range in [{body}] runs backwards; write the smaller end first")
    if not _NUMERIC_CLASS.fullmatch(members):
        return
    if ":" in members:
        raise PolicyError(
            f"pattern {whole!r}: [{body}] is no slice; a slice is a segment of its own with integers: blocks.[0:4]"
        )
    is_wrong = "," in members or ";" in members or members.startswith("-") or _WRONG_RANGE.search(members)
    if is_wrong or (is_segment and (body != members or re.fullmatch(r"[1-9]\d+", members))):
        raise PolicyError(
            f"pattern {whole!r}: the character class [{body}] stands for one character and would match the wrong "
            f"blocks; {_meant(body, segment, whole)}"
        )


def _is_ascending(members: str) -> bool:
    low, _, high = members.partition("-")
    return low.isdecimal() and high.isdecimal() and int(low) <= int(high)


def _meant(body: str, segment: str, whole: str) -> str:
    numbers: Sequence[int] = [int(number) for number in re.findall(r"\d+", body)]
    is_range = re.fullmatch(r"\d+-\d+", body) is not None
    if is_range:
        numbers = range(min(numbers), max(numbers) + 1)
    if segment != f"[{body}]":
        names = ", ".join(segment.replace(f"[{body}]", str(number), 1) for number in numbers[:12])
        return f"list the layers instead{': ' if names else ''}{names}{', ...' if len(numbers) > 12 else ''}"
    if body.startswith("!"):
        return "write a slice of the blocks that are meant, as in [1:]"
    if re.fullmatch(r"-\d+", body):
        stop = "" if numbers[0] == 1 else str(1 - numbers[0])
        return f"write the slice {whole.replace(segment, f'[-{numbers[0]}:{stop}]', 1)}"
    if re.fullmatch(r"\d\d+", body):
        return f"write {whole.replace(segment, body, 1)}, or a slice as in [0:4]"
    if is_range or numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"write the slice {whole.replace(segment, f'[{numbers[0]}:{numbers[-1] + 1}]', 1)}"
    return f"list the layers: {', '.join(whole.replace(segment, str(number), 1) for number in numbers)}"
