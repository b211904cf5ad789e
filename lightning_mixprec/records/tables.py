"""Rows of many layers in one line: each value that differs in a column, and what all of them share once.

>>> row = {"monitor": "fidelity", "step": 3}
>>> rows = [{**row, "layer": "a", "sqnr_db": 20.0}, {**row, "layer": "b", "sqnr_db": 30.5}]
>>> [packed] = pack(rows)
>>> packed
{'monitor': 'fidelity', 'step': 3, 'table': {'layer': ['a', 'b'], 'sqnr_db': [20.0, 30.5]}}
>>> list(unpack(packed)) == rows
True
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

_TABLE, _STEP = "table", "."
_TABLES = "underflow", "fidelity"
_DIGITS = 10


def pack(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows of monitors, those of layers in a row that have the same keys as one; their numbers with ten digits."""
    place = 0
    while place < len(rows):
        end = place + 1
        while end < len(rows) and _has_layer(rows[place]) and _is_like(rows[place], rows[end]):
            end += 1
        yield _table(rows[place:end]) if end - place > 1 else rows[place]
        place = end


def unpack(row: Row) -> Iterator[Row]:
    """The rows that :func:`pack` put into one; a row of another kind as it is.

    Raises:
        ValueError: The columns have different lengths, or a row has no such value.
    """
    table = row.get(_TABLE)
    if not isinstance(table, dict) or not all(isinstance(column, list) for column in table.values()):
        yield row
        return
    shared = {key: value for key, value in row.items() if key != _TABLE}
    for values in zip(*table.values(), strict=True):
        yield _nested({**_flat(shared), **dict(zip(table, values, strict=True))})


def _has_layer(row: Row) -> bool:
    return "layer" in row and row.get("monitor") in _TABLES


def _is_like(first: Row, second: Row) -> bool:
    """True if two rows are about one step, and have the same keys."""
    is_one_step = all(first.get(key) == second.get(key) for key in ("monitor", "step", "epoch", "batch_idx"))
    return is_one_step and _flat(first).keys() == _flat(second).keys()


def _table(rows: Sequence[Row]) -> Row:
    flat = [_flat(row) for row in rows]
    columns = {key: [_short(row[key]) for row in flat] for key in flat[0]}
    shared = {key: each[0] for key, each in columns.items() if key != "layer" and all(one == each[0] for one in each)}
    return _nested(shared) | {_TABLE: {key: each for key, each in columns.items() if key not in shared}}


def _flat(row: Mapping[str, Any]) -> Row:
    """Values of mappings in mappings by their path; what is empty stays."""
    flat: Row = {}
    for key, value in row.items():
        if isinstance(value, dict) and value:
            flat |= {f"{key}{_STEP}{inner}": each for inner, each in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _nested(flat: Mapping[str, Any]) -> Row:
    row: Row = {}
    for path, value in flat.items():
        *outer, key = path.split(_STEP)
        within = row
        for name in outer:
            within = within.setdefault(name, {})
            if not isinstance(within, dict):
                raise ValueError(f"{path} is in something else than a mapping")
        within[key] = value
    return row


def _short(value: Any) -> Any:
    """A number with ten digits, which tell how far a cosine is from 1; whole ones are exact."""
    is_long = isinstance(value, float) and not value.is_integer()
    return float(f"{value:.{_DIGITS}g}") if is_long else value
