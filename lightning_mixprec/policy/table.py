"""The table of an assignment: each layer's formats, and the rule that decided. It fits a screen or two."""

import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TextIO

from lightning_mixprec.policy.table_folding import Row, fold
from lightning_mixprec.records.words import printable

_COLUMNS = ("layer", "type", "parameters", "param/compute/output", "rule")
_MAX_RULES = 10
_MAX_RULE_WIDTH = 44
_LEAST_TERMINAL = 80
_LEAST_WIDTH = 12


@dataclass(frozen=True)
class Table:
    """A table of layers, and lines about the rules below it.

    Attributes:
        rows: A row for each layer, parents first, from the model itself (``""``) on.
        rule_lines: A line for each rule.
    """

    rows: Sequence[Row]
    rule_lines: Sequence[str]

    def render(self, *, rich: bool = False, width: int | None = None) -> str:
        """The table as text.

        Args:
            rich: Whether to draw it with rich, if that is installed, for a terminal.
            width: The terminal's width in characters, for rich; on less than 80 the table is plain.
        """
        cells, lines = [_cells(row) for row in fold(self.rows)], list(self.rule_lines)
        if len(lines) > _MAX_RULES + 1:
            lines[_MAX_RULES:] = [f"... and {len(lines) - _MAX_RULES} more rules"]
        is_wide = width is None or width >= _LEAST_TERMINAL
        if rich and is_wide and (drawn := _draw(cells, lines, width)) is not None:
            return drawn
        return "\n".join([*align([_COLUMNS, *cells], right=["parameters"]), *lines])

    def show(self, title: str | None = None, file: TextIO | None = None) -> None:
        """Print the table, with rich if that is installed and the file is a terminal."""
        file = sys.stdout if file is None else file
        is_terminal = file.isatty()
        width = shutil.get_terminal_size().columns if is_terminal else None
        text = self.render(rich=is_terminal, width=width)
        text = text if title is None else f"{title}\n{text}"
        encoding = getattr(file, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=file)


def _cells(row: Row) -> tuple[str, ...]:
    parameters = "lazy" if row.parameters is None else f"{row.parameters:,}" if row.parameters else "-"
    if row.parameters == 0 and row.is_tied:
        parameters = "tied"
    return (printable(row.name), row.type_name, parameters, row.formats, shortened(row.rule, _MAX_RULE_WIDTH))


def align(rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> list[str]:
    """Lines of text with the cells of each column below each other.

    Args:
        rows: Cells; the first row holds the columns' names.
        right: Names of the columns whose cells are moved to the right.

    >>> align([["layer", "bits"], ["head", "3"]], right=["bits"])
    ['layer  bits', 'head      3']
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(rows[0], row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def shortened(text: str, width: int) -> str:
    """A text as it can stand in a line, cut to a width."""
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _most_widths(rows: Sequence[Sequence[str]], width: int | None) -> tuple[int | None, ...]:
    """The largest width of each column: on a narrow terminal types and rules are cut, then layer names broken."""
    if width is None or not rows:
        return (None,) * len(_COLUMNS)
    layer, type_name, parameters, formats, rule = (max(map(len, column)) for column in zip(*rows, strict=True))
    fixed = max(parameters, len("parameters")) + max(formats, len("param/compute")) + 2 * (len(_COLUMNS) - 1)
    spare = max(width - fixed - layer, 2 * _LEAST_WIDTH)
    most_rule = min(rule, max(_LEAST_WIDTH, spare - type_name))
    return max(width - fixed - spare, _LEAST_WIDTH), spare - most_rule, None, None, most_rule


def _draw(rows: Sequence[Sequence[str]], notes: Sequence[str], width: int | None) -> str | None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False, show_edge=False)
    for name, most in zip(_COLUMNS, _most_widths(rows, width), strict=True):
        table.add_column(
            name.replace("/output", "\n/output"),
            justify="right" if name == "parameters" else "left",
            overflow="fold" if name == "layer" else "ellipsis",
            no_wrap=name != "layer",
            max_width=most,
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(force_terminal=True, width=width)
    with console.capture() as capture:
        console.print(table)
        for note in notes:
            console.print(Text(note))
    return capture.get().rstrip("\n")
