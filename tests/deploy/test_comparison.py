"""What a comparison says of its rows: the best policy, the table, the picture, the section in a run's report."""

import json
import math
import re
from pathlib import Path

import matplotlib
import pytest
from plugin_models import one_line
from report.test_html import page_of

from lightning_mixprec import MixPrecError
from lightning_mixprec.deploy.comparison import Comparison
from lightning_mixprec.report.content import content_of
from lightning_mixprec.report.reading import read_records
from lightning_mixprec.report.writing import write_report

matplotlib.use("Agg")


def row(policy, gap, spread=0.0, time=1.0, memory=1.0, **more):
    told = {"policy": policy, "loss": 1.0 + gap, "loss_gap": gap, "loss_gap_low": gap - spread}
    told |= {"loss_gap_high": gap + spread, "output_sqnr_db": 50.0, "equal_decisions": 0.75}
    return {**told, "time_ratio": time, "memory_ratio": memory, "saved_ratio": 0.5, **more}


REFERENCE = {**row("fp32", 0.0), "seconds": 0.0125, "bytes": 3 * 2**20, "saved_bytes": 2**20}


def comparison(*rows, **more):
    return Comparison(rows, REFERENCE, batches=24, **more)


# The best


def test_the_best_is_the_cheapest_whose_whole_interval_is_within():
    rows = [row("wide", 0.0, 0.2, time=0.3), row("off", 0.15, 0.01, time=0.4), row("good", 0.05, 0.02, time=0.5)]
    rows += [row("slow", 0.0, 0.0, time=0.9)]
    told = comparison(*rows)
    assert [told.best(tolerance) for tolerance in (0.0, 0.069, 0.0701, 0.17, 0.21)] == [
        "slow",
        "slow",
        "good",
        "off",
        "wide",
    ]
    assert comparison(rows[0]).best(0.1) is None


def test_of_equally_fast_ones_it_is_the_smaller():
    assert comparison(row("a", 0.0, memory=0.9), row("b", 0.0, memory=0.5)).best(0.1) == "b"


def test_a_loss_below_the_references_is_an_error_unless_the_weights_are_others():
    lower = row("lower", -0.5, 0.1, time=0.5)
    assert comparison(lower).best(0.1) is None
    assert comparison(lower, same_weights=False).best(0.1) == "lower"


@pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_best(gap):
    assert comparison(row("broken", gap), same_weights=False).best(1e30) is None


def test_one_batch_is_never_enough():
    assert comparison(row("once", 0.0, math.inf)).best(1e30) is None


@pytest.mark.parametrize("tolerance", [-0.1, "0.1", None, True, math.nan])
def test_a_tolerance_is_a_number(tolerance):
    with pytest.raises(MixPrecError, match="tolerance is") as caught:
        comparison(row("a", 0.0)).best(tolerance)
    assert one_line(caught)


# The table and the picture


def test_the_table_has_the_reference_first_and_every_gap_with_its_interval():
    told = comparison(
        row("bf16", 0.25, 0.125, time=0.5, accuracy=0.875), row("fp16", math.nan), notes=("one thing to know",)
    )
    lines = str(told).splitlines()
    assert lines[0].split("  ")[0] == "policy" and lines[0].split()[-1] == "accuracy"
    assert [line.split()[0] for line in lines[1:4]] == ["fp32", "bf16", "fp16"]
    assert "+0.25 [+0.125, +0.375]" in lines[2] and "75.00%" in lines[2] and lines[2].endswith("0.875")
    assert "nan" in lines[3] and lines[3].endswith("-")
    assert lines[4] == "training_step on 24 batches; of the reference 12.5 ms and 3 MiB at the peak"
    assert lines[5] == "one thing to know"
    assert all(line == line.rstrip() for line in lines)


def test_a_column_that_nobody_has_is_left_out():
    rows = [{**row("a", 0.0), "equal_decisions": None}]
    told = Comparison(tuple(rows), {**REFERENCE, "equal_decisions": None}, batches=2)
    assert "equal decisions" not in str(told)


def test_the_picture_has_each_gap_at_its_time_with_its_interval():
    told = comparison(
        row("bf16", 0.2, 0.1, time=0.5), row("once", 0.3, math.inf, time=0.6), row("fp16 $x", math.nan, time=2.0)
    )
    figure, ax = told.plot()
    bars = ax.containers
    assert [bar.get_label() for bar in bars] == ["bf16", "once"]
    assert [tuple(map(float, point)) for point in bars[0].lines[0].get_xydata()] == [(0.5, 0.2)]
    (segment,) = bars[0].lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([0.1, 0.3])
    assert not bars[1].has_yerr
    assert ax.get_title() == "not finite: fp16 $x"
    figure.canvas.draw()
    matplotlib.pyplot.close(figure)
    other, axes = matplotlib.pyplot.subplots()
    assert told.plot(ax=axes) == (other, axes)
    matplotlib.pyplot.close(other)


def test_its_file_has_all_of_it():
    told = comparison(row("bf16", 0.25, accuracy=0.5), row("fp16", math.inf), notes=("one",))
    told.to_file("folder/comparison.json")
    read = json.loads(Path("folder/comparison.json").read_text())
    assert read["rows"][0] == told.rows[0] and read["reference"] == REFERENCE and read["notes"] == ["one"]
    assert read["rows"][1]["loss_gap"] is None and (read["batches"], read["same_weights"]) == (24, True)
    Path("taken").mkdir()
    with pytest.raises(MixPrecError, match="cannot be written to 'taken'") as caught:
        told.to_file("taken")
    assert one_line(caught)


# The report


def begun(folder, **more):
    """A folder with a row of a monitor."""
    folder.mkdir()
    row = {"monitor": "fidelity", "step": 7, "layer": "net", "sqnr_db": 60.0, "grad_cosine": 1.0, **more}
    (folder / "mixprec.jsonl").write_text(json.dumps(row) + "\n")


def test_it_is_a_section_of_the_runs_report():
    begun(Path("run"))
    told = comparison(row("bf16", 0.25, 0.125, accuracy=0.875), row("<b>odd", math.nan), notes=("few batches",))
    assert told.add_to("run") == Path("run/mixprec.jsonl")
    records = read_records("run")
    assert records.monitors == ["FidelityMonitor"] and records.last_step == 7
    (read,) = records.compared
    assert [each["policy"] for each in read["policies"]] == ["bf16", "<b>odd"]
    assert read["policies"][0]["columns"] == {"accuracy": 0.875} and read["policies"][1]["loss_gap"] is None
    page = page_of(content_of([records]))
    assert "The model under several policies" in page.text
    assert "bf16 1.25 0.25 0.125 to 0.375 50 75" in page.text and "<b>odd" in page.text
    assert "training_step on 24 batches, made" in page.text and "12.5 ms and 3 MiB. Few batches." in page.text
    bars = [attributes["d"] for attributes in page.all("path", **{"class": "line"})]
    assert "M34.67 5H96M65.33 1V9".replace(".67", ".7").replace(".33", ".3") in bars  # 0.125 to 0.375 on 0 to 0.375


def test_several_comparisons_and_two_runs_stand_side_by_side():
    for name in ("a", "b"):
        begun(Path(name))
    comparison(row("bf16", 0.25)).add_to("a")
    comparison(row("fp16", 0.5)).add_to("a")
    page = page_of(content_of([read_records("a"), read_records("b")]))
    assert len(page.all("table", **{"class": "list compared"})) == 2
    assert "Nothing was compared after this run." in page.text


def test_a_report_without_a_comparison_has_no_such_section():
    begun(Path("run"))
    path, _ = write_report(["run"], "report.html")
    assert "under several policies" not in path.read_text()


def test_it_is_added_to_the_latest_of_several_runs_in_a_folder():
    begun(Path("run"), run_id="0123abcd")
    comparison(row("bf16", 0.25)).add_to("run")
    assert read_records("run").compared
    assert json.loads(Path("run/mixprec.jsonl").read_text().splitlines()[-1])["run_id"] == "0123abcd"


def test_a_damaged_record_is_passed_over():
    begun(Path("run"))
    comparison(row("bf16", 0.25)).add_to("run")
    path = Path("run/mixprec.jsonl")
    path.write_text(re.sub(r'"loss_gap": ?[0-9.]+', '"loss_gap": "?"', path.read_text()))
    assert read_records("run").compared == []


@pytest.mark.parametrize(("folder", "match"), [("nowhere", "there is no folder 'nowhere'"), ("full", "cannot be")])
def test_what_cannot_be_written_is_one_line(folder, match):
    Path("full/mixprec.jsonl").mkdir(parents=True)
    with pytest.raises(MixPrecError, match=match) as caught:
        comparison(row("a", 0.0)).add_to(folder)
    assert one_line(caught)
