"""Layers and numbers in sentences and tables."""

import math
from collections.abc import Sequence
from typing import Any

MEASURED = 5
"""Significant digits of what is measured on a sample of numbers, such as a rate: more mean nothing."""


def quoted(layer: str | None) -> str:
    """A layer's name in a sentence.

    >>> quoted("net.0"), quoted("")
    ("'net.0'", 'the LightningModule itself')
    """
    return "the LightningModule itself" if layer == "" else repr(layer)


def named(layer: str | None) -> str:
    """A layer in a sentence that has to say that it is one.

    >>> named("net.0"), named("")
    ("layer 'net.0'", 'the LightningModule itself')
    """
    return f"layer {layer!r}" if layer else quoted("")


def listed(layers: Sequence[str], most: int = 3) -> str:
    """A few layers in a sentence.

    >>> listed(["a", "b", "", "c"])
    "'a', 'b', the LightningModule itself and 1 more"
    """
    more = len(layers) - most
    return ", ".join(map(quoted, layers[:most])) + (f" and {more} more" if more > 0 else "")


def also(layers: Sequence[str]) -> str:
    """The others of whom the same is said as of a first layer; nothing if there are none.

    >>> also([]), also(["b", "c"]), also(["b", "c", "d", "e"])
    ('', " (also 2 more: 'b', 'c')", " (also 4 more: 'b', 'c', 'd', ...)")
    """
    shown = ", ".join(map(repr, layers[:3])) + (", ..." if len(layers) > 3 else "")
    return f" (also {len(layers)} more: {shown})" if layers else ""


def counted(count: int, one: str, many: str = "") -> str:
    """A number and its noun.

    >>> counted(1, "step"), counted(1200, "batch", "batches")
    ('1 step', '1,200 batches')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def sentence(text: str) -> str:
    """A sentence of its own: with a capital, unless it begins with a format's name, and a full stop.

    >>> sentence("the loss differs"), sentence("bf16 holds it"), sentence("")
    ('The loss differs.', 'bf16 holds it.', '')
    """
    begins_with_a_name = any(map(str.isdigit, text.partition(" ")[0]))
    return f"{text if begins_with_a_name else text[:1].upper() + text[1:]}." if text else ""


def cell(layer: str | None) -> str:
    """A layer's name in a table; a dash where there is none."""
    return "-" if layer is None else layer or '""'


def printable(text: str) -> str:
    r"""A text as it can stand in a line: characters that would break the line, or steer a terminal, are escaped.

    >>> print(printable("head"), printable("new\nline"))
    head new\nline
    """
    return text if text.isprintable() else repr(text)[1:-1]


def written(value: float | None, spec: str) -> str:
    """A number in a table; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else format(value, spec)


def policy_hint(layer: str, format: str) -> str:
    """An example of a policy in which a layer computes in a format.

    >>> policy_hint("model.head", "bf16")
    "for example policy={'default': ..., 'model.head': 'bf16'}"
    """
    if layer:
        return f"for example policy={{'default': ..., {layer!r}: {format!r}}}"
    return f"for example a rule {{layers: '', compute: {format}, recurse: false}}"


def short(value: Any, digits: int = 7) -> Any:
    """A number with so many significant digits; seven are enough for every drawing. Anything else is itself.

    >>> short(0.1234567890), short(None), short(3), short(15.088015, 5)
    (0.1234568, None, 3, 15.088)
    """
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
