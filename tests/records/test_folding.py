"""Rows of many layers are one line in the file, and the same rows when they are read."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_models import Task, fit, ours
from torch import nn

from lightning_mixprec import FidelityMonitor, OverflowMonitor, PrecisionReport, UnderflowMonitor
from lightning_mixprec.records.folding import LEAST_ROWS, folded, unfolded
from lightning_mixprec.records.journal import FILE_NAME, Journal, rows_in
from lightning_mixprec.report.reading import read_records

BYTES_OF_A_LAYER = 250


def again(rows):
    """As they are read."""
    return [row for line in json.loads(json.dumps(folded(rows))) for row in unfolded(line)]


def of_layers(count, **more):
    return [{"monitor": "m", "step": 1, "layer": f"net.{place}", "rate": place / 2, **more} for place in range(count)]


SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS |= st.sampled_from(["fp16", "bf16"])
ROWS = st.fixed_dictionaries(
    {"monitor": st.sampled_from("ab"), "step": st.integers(0, 1)},
    optional={
        "layer": st.sampled_from(["", "net.0", "net.1"]),
        "rate": SCALARS,
        "what_if": st.fixed_dictionaries({}, optional={"fp8": st.fixed_dictionaries({"fits": SCALARS})}),
        "listed": st.lists(SCALARS, max_size=2),
    },
)


@given(st.lists(ROWS, max_size=80))
def test_no_row_is_lost_or_changed_and_those_of_one_kind_keep_their_order(rows):
    found = again(rows)
    assert sorted(map(repr, map(sorted, map(dict.items, found)))) == sorted(
        map(repr, map(sorted, map(dict.items, rows)))
    )

    def of(kind, every):
        return [row for row in every if (row["monitor"], row["step"], frozenset(row)) == kind]

    for kind in {(row["monitor"], row["step"], frozenset(row)) for row in rows}:
        if "what_if" not in kind[2]:  # whose keys are a part of the kind
            assert of(kind, found) == of(kind, rows)


def test_equal_numbers_of_different_types_stay_apart():
    rows = of_layers(LEAST_ROWS)
    for row, value in zip(rows, [0, 0.0, False] * LEAST_ROWS, strict=False):
        row["rate"] = value
    assert list(map(repr, again(rows))) == [
        repr({key: row[key] for key in ("monitor", "step", "layer", "rate")}) for row in rows
    ]


def test_few_rows_stay_as_they_are_and_many_are_one_line():
    few, many = of_layers(LEAST_ROWS - 1), of_layers(LEAST_ROWS, format="fp16")
    other = {"monitor": "m", "step": 1, "loss_gap": 0.5}
    assert folded([*few, other]) == [*few, other]
    (first, line) = folded([other, *many])
    assert first == other
    assert (line["rows"], line["format"], line["rate"][-1]) == (LEAST_ROWS, "fp16", (LEAST_ROWS - 1) / 2)
    assert again([other, *many]) == [other, *many]


@pytest.mark.parametrize("damage", ["short", "count", "names"])
def test_a_line_whose_columns_do_not_fit_is_none_of_ours(damage):
    (line,) = folded(of_layers(LEAST_ROWS))
    if damage == "short":
        line["rate"].pop()
    elif damage == "count":
        line["rows"] += 1
    else:
        line["layer"].append("net.99")
    Path(FILE_NAME).write_text(json.dumps(line) + "\n" + json.dumps({"monitor": "m", "step": 2}) + "\n")
    assert list(rows_in(Path(FILE_NAME))) == [{"monitor": "m", "step": 2}]


def test_what_a_journal_writes_is_read_as_it_was_written():
    journal = Journal(".", "0123abcd")
    for row in of_layers(40, what_if={"fp8": {"fits": True}}):
        journal.write(**row)
    journal.write(monitor="m", step=1, problem="none")
    journal.flush()
    assert len(Path(FILE_NAME).read_text().splitlines()) == 2
    read = list(rows_in(Path(FILE_NAME)))
    assert [row["layer"] for row in read[:-1]] == [f"net.{place}" for place in range(40)]
    assert all(row["run_id"] == "0123abcd" and row["what_if"] == {"fp8": {"fits": True}} for row in read[:-1])


def test_a_sample_of_many_layers_takes_few_bytes_and_the_report_has_all_of_them():
    def model():
        layers = [part for _ in range(16) for part in (nn.Linear(6, 6), nn.Tanh())]
        return Task(nn.Sequential(*layers, nn.Linear(6, 2)))

    watching = [OverflowMonitor(), UnderflowMonitor(1), FidelityMonitor(1), PrecisionReport(1)]
    fit(task := model(), ours("fp16"), callbacks=watching, max_steps=3)
    lines = [line for line in Path(FILE_NAME).read_text().splitlines() if json.loads(line)["batch_idx"] == 2]
    sample = [line for line in lines if "curve" not in line and "end" not in json.loads(line)]
    layers = sum(1 for _ in task.modules())
    assert layers >= 33
    assert sum(map(len, sample)) < BYTES_OF_A_LAYER * layers
    records = read_records(Path())
    underflow = [row for row in records.underflow if "format" in row and row["step"] == 2]
    assert len(underflow) >= 33
    for row in underflow:
        latest = watching[1].latest[row["layer"]]
        assert row["what_if"].keys() == latest["what_if"].keys()
        assert row["headroom_bits"] == pytest.approx(latest["headroom_bits"], rel=1e-4)
        assert row["what_if"]["fp16"]["best_scale"] == latest["what_if"]["fp16"]["best_scale"]
    cosines = {row["layer"]: row["grad_cosine"] for row in records.fidelity if "layer" in row and row["step"] == 2}
    known = {name: each["grad_cosine"] for name, each in watching[2].latest["layers"].items()}
    assert {name for name, each in cosines.items() if each is None} <= {name for name in known if known[name] is None}
    measured = {name: each for name, each in cosines.items() if each is not None}
    assert len(measured) >= 8
    assert measured == pytest.approx({name: known[name] for name in measured}, rel=1e-6)
