"""Colours of the formats, in plots and in reports."""

COLORS = {
    "fp64": "#E69F00",
    "fp32": "#56B4E9",
    "bf16": "#0072B2",
    "fp16": "#D55E00",
    "e4m3": "#CC79A7",
    "e5m2": "#009E73",
}
"""The palette of Okabe and Ito (2008), which readers with any of the common colour blindnesses tell apart; fp32 and
bf16, which have one range, are a light and a dark blue. Formats are named next to their colours all the same."""

OTHER = "#979FA6"
"""The colour of a format that has none of its own."""


def tint(color: str, white: float = 0.3) -> str:
    """A colour mixed with white, light enough to be written on in black.

    >>> tint("#0072B2"), tint("#000000", white=1.0)
    ('#4c9cc9', '#ffffff')
    """
    parts = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(part + white * (255 - part)):02x}" for part in parts)
