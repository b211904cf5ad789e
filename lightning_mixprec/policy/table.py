"""The table of an assignment: who gets what, and why. Big models are folded until the table fits a screen or two."""

import shutil
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, TextIO

from lightning_mixprec.policy.table_folding import Row, fold

if TYPE_CHECKING:
    from lightning_mixprec.policy.assignment import Assignment, RuleTally

_COLUMNS = ("layer", "type", "parameters", "param/compute/output", "rule")
_MAX_RULES = 10
_MAX_RULE_WIDTH = 44
_LEAST_TERMINAL = 80
_LEAST_WIDTH = 12


def render(assignment: "Assignment", *, rich: bool = False, width: int | None = None) -> str:
    """The table as text.

    Args:
        assignment: What to show.
        rich: Whether to draw it with rich, if that is installed, for a terminal.
        width: The terminal's width in characters, for rich; on less than 80 the table is plain.

    >>> from torch import nn
    >>> from lightning_mixprec.policy.policy import as_policy
    >>> print(render(as_policy({"default": "bf16", "1": "c=fp32,o=input"}).resolve(
    ...     nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9)))))
    layer  type        parameters  param/compute/output  rule
    ""     Sequential           -  fp32/bf16/-           default
    0      Linear              90  fp32/bf16/-           default
    1      LayerNorm           18  fp32/fp32/input       1
    rule 1: 1 -> c=fp32,o=input: matched 1, decided 1
    """
    cells = [_cells(row) for row in fold(assignment)]
    notes = _rule_lines(assignment)
    is_wide = width is None or width >= _LEAST_TERMINAL
    if rich and is_wide and (drawn := _draw(cells, notes, width)) is not None:
        return drawn
    return "\n".join([*align([_COLUMNS, *cells], right=["parameters"]), *notes])


def show(assignment: "Assignment", title: str | None = None, file: TextIO | None = None) -> None:
    """Print the table, with rich if that is installed and the file is a terminal."""
    file = sys.stdout if file is None else file
    is_terminal = file.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else None
    text = render(assignment, rich=is_terminal, width=width)
    text = text if title is None else f"{title}\n{text}"
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file)


def _cells(row: Row) -> tuple[str, ...]:
    parameters = "lazy" if row.parameters is None else f"{row.parameters:,}" if row.parameters else "-"
    if row.parameters == 0 and row.is_tied:
        parameters = "tied"
    return (printable(row.name), row.type_name, parameters, row.formats, _shortened(row.rule, _MAX_RULE_WIDTH))


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


def _rule_lines(assignment: "Assignment") -> list[str]:
    rules = assignment.policy.rules
    lines = [
        f"rule {number}: {_shortened(rule.label, 80)} -> {rule.value}: {_fate(tally)}"
        for number, (rule, tally) in enumerate(zip(rules, assignment.tallies, strict=True), start=1)
    ]
    if len(lines) > _MAX_RULES + 1:
        left_out = len(lines) - _MAX_RULES
        lines[_MAX_RULES:] = [f"... and {left_out} more rules"]
    return lines


def _fate(tally: "RuleTally") -> str:
    if not tally.matched:
        return "matched nothing"
    fate = f"matched {tally.matched}, decided {tally.decided}"
    if not tally.lost:
        return fate
    winners = [
        f"{count} to {'attention modules' if winner is None else f'rule {winner + 1}'}"
        for winner, count in tally.lost.items()
    ]
    return f"{fate}, lost {', '.join(winners)}"


def printable(text: str) -> str:
    r"""A text as it can stand in a line: what would break the line, or steer a terminal, is escaped.

    >>> print(printable("head"), printable("new\nline"))
    head new\nline
    """
    return text if text.isprintable() else repr(text)[1:-1]


def _shortened(text: str, width: int) -> str:
    text = printable(text)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _most_widths(rows: Sequence[Sequence[str]], width: int | None) -> tuple[int | None, ...]:
    """How wide each column may be: on a narrow terminal types and rules are cut, then layer names broken."""
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
