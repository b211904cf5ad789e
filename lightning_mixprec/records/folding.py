"""Rows about many layers of one batch, written as one line: what they share once, and what differs in columns.

A folded line has the keys of its rows and ``"rows"``, their number. A list under one of the keys has a value for each
row; any other value is that of all of them:

    {"monitor": "underflow", "step": 4, "rows": 2, "layer": ["a", "b"], "format": "fp16", "underflow_rate": [0.0, 0.5]}
"""

from collections.abc import Iterator, Sequence
from typing import Any

LEAST_ROWS = 16
"""The rows that become one line, at least; fewer stay as they are, so that small models' files are read by eye."""

_COUNT, _BY = "rows", "layer"
_PLACE = ("monitor", "step", "epoch", "batch_idx", "run_id")

Row = dict[str, Any]


def folded(rows: Sequence[Row]) -> list[Row]:
    """Rows of JSON's types, those that are alike but for the layer and its numbers in one of them.

    Args:
        rows: The rows. What belongs together has the same monitor, place and keys, and nowhere a list.

    >>> folded([{"layer": name, "rate": 0.0} for name in "ab"])
    [{'layer': 'a', 'rate': 0.0}, {'layer': 'b', 'rate': 0.0}]
    """
    kinds = [_kind(row) for row in rows]
    groups: dict[Any, list[Row]] = {}
    for kind, row in zip(kinds, rows, strict=True):
        groups.setdefault(kind, []).append(row)
    lines = []
    for kind, row in zip(kinds, rows, strict=True):
        group = groups[kind]
        if kind is None or len(group) < LEAST_ROWS:
            lines.append(row)
        elif group[0] is row:
            first = {key: row[key] for key in _PLACE if key in row}
            lines.append({**first, _COUNT: len(group), **_columns(group), _BY: [each[_BY] for each in group]})
    return lines


def unfolded(line: Row) -> Iterator[Row]:
    """The rows that a line was folded from; a line that is none is a row itself, and one that is damaged none.

    >>> line = {"rows": 2, "layer": ["a", "b"], "format": "fp16", "what_if": {"bf16": {"fits": [True, False]}}}
    >>> [row["what_if"]["bf16"] for row in unfolded(line)]
    [{'fits': True}, {'fits': False}]
    """
    names, count = line.get(_BY), line.get(_COUNT)
    if not isinstance(names, list) or not isinstance(count, int):
        yield line
    elif _is_whole({**line, _BY: names}, count):
        rest = {key: value for key, value in line.items() if key != _COUNT}
        yield from (_at(rest, place) for place in range(count))


def _kind(row: Row) -> Any:
    """Equal for rows that can be folded together; None for one that cannot be."""
    keys = _keys(row)
    is_of_layer = keys is not None and isinstance(row.get(_BY), str) and _COUNT not in row
    return (*(row.get(key) for key in _PLACE), keys) if is_of_layer else None


def _keys(value: Any) -> tuple[Any, ...] | None:
    """The keys of nested dicts; None if there is a list in them."""
    if isinstance(value, list):
        return None
    if not isinstance(value, dict):
        return ()
    within = [(key, _keys(part)) for key, part in value.items()]
    return None if any(keys is None for _, keys in within) else tuple(within)


def _columns(rows: Sequence[Row]) -> Row:
    return {key: _column([row[key] for row in rows]) for key in rows[0]}


def _column(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return _columns(values)
    is_same = all(type(each) is type(first) and each == first for each in values)
    return first if is_same else list(values)


def _is_whole(value: Any, count: int) -> bool:
    if isinstance(value, dict):
        return all(_is_whole(part, count) for part in value.values())
    return not isinstance(value, list) or len(value) == count


def _at(value: Any, place: int) -> Any:
    if isinstance(value, dict):
        return {key: _at(part, place) for key, part in value.items()}
    return value[place] if isinstance(value, list) else value
