"""What a report says of a run, from rows that are written here."""

import copy
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_mixprec import MixPrecError
from lightning_mixprec.report.content import content_of
from lightning_mixprec.report.layers import MAX_ROWS
from lightning_mixprec.report.reading import read_records
from lightning_mixprec.report.timeline import MAX_CELLS, MAX_POINTS
from lightning_mixprec.report.writing import render, write_report

ENVIRONMENT = {"torch": "2.14", "device": "test"}
WATCHED = ["PrecisionReport", "OverflowMonitor"]


def layer(name: str, compute: str = "fp16", rule: str = "default") -> list[Any]:
    return [name, "Linear", 10, "fp32", compute, "", rule]


def report(step: int, **row: Any) -> dict[str, Any]:
    return {"monitor": "report", "step": step, "epoch": 0, "batch_idx": step, **row}


def began(*layers: list[Any], step: int = 0, watched: Iterable[str] = WATCHED) -> dict[str, Any]:
    return report(step, run={"environment": ENVIRONMENT, "layers": list(layers), "watched": list(watched)})


def curve(steps: Iterable[int], loss: Any = 1.0, scale: Any = 1024.0, skipped: Any = 0) -> dict[str, Any]:
    steps = list(steps)
    columns = {"loss": loss, "scale": scale, "skipped": skipped}
    columns = {key: each if isinstance(each, list) else [each] * len(steps) for key, each in columns.items()}
    infinite = [place for place, each in enumerate(columns["loss"]) if each == "inf"]
    columns["loss"] = [None if each == "inf" else each for each in columns["loss"]]
    return report(steps[-1], curve={"steps": steps, **columns, "infinite": infinite})


def sample(step: int, **layers: list[Any]) -> dict[str, Any]:
    return report(step, sample={"layers": layers, "histograms": {}, "loss_scale": 1024.0})


def values(rate: float = 0.0, headroom: float = 5.0, output: float = 5.0, best: float = 1024.0) -> list[Any]:
    return ["fp16", rate, 0.0, headroom, output, best]


def run_of(folder: Path, *rows: dict[str, Any] | str) -> dict[str, Any]:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "mixprec.jsonl").write_text("\n".join(lines) + "\n")
    content = content_of([read_records(folder)])
    json.dumps(content, allow_nan=False)
    return content["runs"][0]


def alerts_of(folder: Path, *rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The alerts of a run that ended well, by title."""
    return {alert["title"]: alert for alert in run_of(folder, *rows, ended(rows))["alerts"]}


def ended(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The end of a run, at the step after the last batch."""
    steps = [step for row in rows for step in row.get("curve", {"steps": [row["step"]]})["steps"]]
    return report(max(steps) + 1, end={"state": "finished", "message": ""})


# Alerts


def test_a_healthy_run_has_none(tmp_path):
    assert alerts_of(tmp_path, began(layer("a")), curve(range(50)), sample(0, a=values())) == {}


def overflow(verdict: str, name: str | None, step: int = 3, fits: str | None = "bf16") -> dict[str, Any]:
    where = {"monitor": "overflow", "step": step, "epoch": 0, "batch_idx": step, "direction": "forward"}
    cause = {"verdict": verdict, "layer": name, "op": "addmm", "format": "fp16", "value": 1e5, "fits": fits}
    return {**where, **cause, "detail": "", "message": "it overflows"}


def test_an_overflow_names_the_layer_and_what_holds_it(tmp_path):
    (found,) = alerts_of(tmp_path, began(layer("a")), overflow("precision", "a")).values()
    assert (found["title"], found["level"]) == ("'a' overflows in fp16 (forward)", "warning")
    assert (found["layer"], found["step"], found["count"]) == ("a", 3, 1)
    assert "in bf16" in found["advice"]


def test_the_same_overflow_again_is_one_alert_and_worse(tmp_path):
    rows = [overflow("precision", "a", step, None) for step in (3, 7, 9)]
    (found,) = alerts_of(tmp_path, began(layer("a")), *rows).values()
    assert (found["level"], found["step"], found["count"]) == ("error", 3, 3)
    assert "in fp32" in found["advice"]


@pytest.mark.parametrize(("moved_at", "level"), [(2, "error"), (9, "note")])
def test_an_overflow_is_over_once_its_layer_has_moved(tmp_path, moved_at, level):
    told = {"step": moved_at, "layer": "a", "from": "fp16", "to": "bf16", "reason": "by hand"}
    change = report(moved_at, change={"layers": [layer("a", "bf16", "a")], "history": [told]})
    rows = [overflow("precision", "a", step) for step in (3, 9)]
    (found,) = alerts_of(tmp_path, began(layer("a")), *rows, change).values()
    assert found["level"] == level
    assert ("Since step 9 it computes in bf16" in found["advice"]) == (level == "note")


def test_what_was_seen_of_a_layer_before_it_moved_is_past(tmp_path):
    told = {"step": 3, "layer": "a", "from": "fp16", "to": "bf16", "reason": "by hand"}
    change = report(3, change={"layers": [layer("a", "bf16", "a")], "history": [told]})
    seen = [sample(0, a=values(0.9, -3.0)), fidelity(0, layer="a", grad_cosine=0.1, sqnr_db=0.0)]
    seen += [fidelity(1, layer="a", grad_cosine=0.1, sqnr_db=0.0), fidelity(0, loss_gap=0.9), fidelity(1, loss_gap=0.9)]
    start = [began(layer("a")), curve(range(9)), *seen]
    assert len(alerts_of(tmp_path, *start)) == 5
    assert alerts_of(tmp_path, *start, change) == {}


def test_the_latest_sample_is_that_of_the_latest_step_whoever_took_it(tmp_path):
    row = underflow(0, 0.9)
    assert alerts_of(tmp_path, began(layer("a")), curve(range(9)), row, sample(8, a=values(0.0))) == {}


def test_values_beyond_the_format_are_an_error(tmp_path):
    found = alerts_of(tmp_path, began(layer("a")), curve(range(9)), sample(0, a=values(headroom=-2.0)))
    assert found["Values overflow"]["level"] == "error"
    assert "4 times too large for fp16" in found["Values overflow"]["text"]


def test_data_and_model_are_not_blamed_on_precision(tmp_path):
    rows = [overflow("data", None, fits=None), overflow("model", "", fits=None)]
    found = alerts_of(tmp_path, began(layer("a")), *rows)
    assert set(found) == {"A batch is not finite itself", "The LightningModule itself is not finite in fp32 either"}
    assert all("no format helps" in alert["advice"] for alert in found.values())


@pytest.mark.parametrize(("skipped", "level"), [(1, None), (2, None), (3, "warning"), (30, "error")])
@pytest.mark.parametrize("plugin", ["PerLayerPrecision", "MixedPrecision"])
def test_many_skipped_steps(tmp_path, skipped, level, plugin):
    flags = [1] * skipped + [0] * (100 - skipped)
    counts = plugin == "MixedPrecision"  # Lightning's plugins count a skipped step as one
    steps = range(100) if counts else [*[0] * skipped, *range(100 - skipped)]
    begins = began(layer("a"))
    begins["run"]["environment"] = {"plugin": plugin}
    found = alerts_of(tmp_path, begins, curve(steps, skipped=flags))
    assert (found["Many steps were skipped"]["level"] if found else None) == level
    if found:
        assert f"({skipped}.0% of all)" in found["Many steps were skipped"]["text"]


def test_a_collapsed_loss_scale(tmp_path):
    scales = [2.0 ** (10 - step) for step in range(14)]
    found = alerts_of(tmp_path, began(layer("a")), curve(range(14), scale=scales))
    assert found["The loss scale collapsed"]["step"] == 10
    assert alerts_of(tmp_path, began(layer("a")), curve(range(14), scale=1.0)) == {}  # was never scaled
    assert alerts_of(tmp_path, began(layer("a")), curve(range(3), scale=[4.0, 1.0, 4.0])) == {}  # came back


@pytest.mark.parametrize(("rate", "level"), [(0.05, None), (0.2, "warning"), (0.6, "error")])
def test_gradients_that_vanish(tmp_path, rate, level):
    rows = [sample(0, a=values(0.9), b=values(0.9)), sample(5, a=values(rate), b=values(rate / 2))]
    found = alerts_of(tmp_path, began(layer("a"), layer("b")), curve(range(9)), *rows)
    assert (found["Gradients vanish"]["level"] if found else None) == level
    if found:
        assert (found["Gradients vanish"]["layer"], found["Gradients vanish"]["step"]) == ("a", 5)


def test_a_larger_scale_is_advised_where_it_helps(tmp_path):
    start = [began(layer("a")), curve(range(9))]
    found = alerts_of(tmp_path, *start, sample(0, a=values(0.2, best=65536.0)))["Gradients vanish"]
    assert "at a loss scale of 1024" in found["text"]
    assert "loss scale of 65536 would keep it: raise init_scale" in found["advice"]
    found = alerts_of(tmp_path, *start, sample(0, a=values(0.2, best=512.0)))["Gradients vanish"]
    assert found["advice"] == "Compute it in bf16, for example policy={'default': ..., 'a': 'bf16'}."


def test_headroom_is_the_smaller_of_gradient_and_output(tmp_path):
    start = [began(layer("a")), curve(range(9))]
    found = alerts_of(tmp_path, *start, sample(0, a=values(headroom=9.0, output=0.5)))["Close to an overflow"]
    assert "if they grow 1.4 times" in found["text"]
    assert alerts_of(tmp_path, *start, sample(0, a=values(output=None))) == {}


@pytest.mark.parametrize(
    "scales", [[65536.0] * 2 + [1024.0] * 7, [65536.0] * 9], ids=["a scale that fell", "one that holds"]
)
def test_gradients_are_judged_at_the_loss_scale_that_holds(tmp_path, scales):
    """Gradients that are four times too large for fp16 at a scale of 65536 have four bits to spare at 1024."""
    first = report(0, sample={"layers": {"a": values(headroom=-2.0)}, "histograms": {}, "loss_scale": 65536.0})
    found = alerts_of(tmp_path, began(layer("a")), curve(range(9), scale=scales), first)
    assert list(found) == ([] if scales[-1] == 1024 else ["Values overflow"])
    output = report(0, sample={"layers": {"a": values(output=-2.0)}, "histograms": {}, "loss_scale": 65536.0})
    assert "Values overflow" in alerts_of(tmp_path, began(layer("a")), curve(range(9), scale=scales), output)


@pytest.mark.parametrize(("scale", "titles"), [(1024.0, []), (1.0, ["Close to an overflow"])])
def test_gradients_nearly_as_large_as_fp16_holds_are_what_the_search_for_the_scale_comes_to(tmp_path, scale, titles):
    row = underflow(8, 0.0, headroom_bits=0.5, loss_scale=scale)
    assert list(alerts_of(tmp_path, began(layer("a")), curve(range(9), scale=scale), row)) == titles


def fidelity(step: int, **row: Any) -> dict[str, Any]:
    rest = {"loss_scale": 1.0, "too_large": []} if "loss_gap" in row else {}
    return {"monitor": "fidelity", "step": step, "epoch": 0, "batch_idx": step, **row, **rest}


def underflow(step: int, rate: float, output: float | None = 5.0, **more: Any) -> dict[str, Any]:
    place = {"monitor": "underflow", "step": step, "epoch": 0, "batch_idx": step, "layer": "a", "loss_scale": 1024.0}
    losses = {"format": "fp16", "underflow_rate": rate, "subnormal_share": 0.0, "headroom_bits": 5.0}
    losses |= {f"flow_{key}": None for key in ("underflow_rate", "subnormal_share", "headroom_bits")}
    what_if = {"underflow_rate": 0.0, "overflow_rate": 0.0, "best_scale": 1024.0, "fits": True}
    losses |= {"output_headroom_bits": output, "what_if": {"fp16": what_if, "bf16": what_if}}
    return {**place, **losses, **more}


@pytest.mark.parametrize(("rate", "level"), [(0.05, None), (0.2, "warning"), (0.7, "error")])
def test_operands_that_vanish_in_8_bits(tmp_path, rate, level):
    operands = {"format": "fp8", "scaling": "tensor", "input": rate, "weight": 0.01}
    rows = [underflow(8, 0.0, format="bf16", what_if={}, operands=operands)]
    found = alerts_of(tmp_path, began(layer("a", "fp8")), curve(range(9)), *rows)
    assert found.get("Operands vanish", {}).get("level") == level
    moved = alerts_of(tmp_path, began(layer("a")), curve(range(9)), *rows)
    assert "Operands vanish" not in moved, "of a layer that computes in another format by now"


def test_gradients_that_point_elsewhere_twice(tmp_path):
    def cosines(*of: float) -> list[dict[str, Any]]:
        return [fidelity(step, layer="a", grad_cosine=each, sqnr_db=30.0) for step, each in enumerate(of)]

    start = [began(layer("a")), curve(range(9))]
    assert alerts_of(tmp_path, *start, *cosines(0.5, 0.99)) == {}
    assert alerts_of(tmp_path, *start, *cosines(0.99, 0.5)) == {}
    assert "Gradients point elsewhere than fp32's" in alerts_of(tmp_path, *start, *cosines(0.99, 0.5, 0.6))


@pytest.mark.parametrize(("ratio", "is_noise"), [(40.0, False), (10.0, False), (3.0, True), (-5.0, True), (None, True)])
def test_an_output_that_is_noise(tmp_path, ratio, is_noise):
    rows = [
        fidelity(0, layer="a", grad_cosine=None, sqnr_db=0.0),
        fidelity(5, layer="a", grad_cosine=None, sqnr_db=ratio),
    ]
    rows = rows[ratio is not None :]
    found = alerts_of(tmp_path, began(layer("a")), curve(range(9)), *rows)
    assert ("An output is not fp32's" in found) == is_noise


def test_a_loss_that_is_not_fp32_s_twice(tmp_path):
    start = [began(layer("a")), curve(range(9))]
    assert alerts_of(tmp_path, *start, fidelity(0, loss_gap=0.2), fidelity(1, loss_gap=0.01)) == {}
    assert "The loss is not fp32's" in alerts_of(tmp_path, *start, *(fidelity(step, loss_gap=0.2) for step in (0, 1)))


def test_weights_that_do_not_move(tmp_path):
    row = {"monitor": "underflow", "step": 4, "epoch": 0, "batch_idx": 4, "layer": "a", "stagnation_rate": 0.8}
    found = alerts_of(tmp_path, began(layer("a")), curve(range(9)), row)["Weights do not move"]
    assert found["text"] == "An optimizer step left 80% of the weights of 'a' as they were."


def test_weights_in_16_bits_that_stand_still(tmp_path):
    row = {"monitor": "underflow", "step": 4, "epoch": 0, "batch_idx": 4, "layer": "a", "stagnation_rate": 0.8}
    rows = [row | {"still_rate": 0.75}, row | {"layer": "b", "still_rate": 0.5, "stagnation_rate": 0.1}]
    found = alerts_of(tmp_path, began(layer("a"), layer("b")), curve(range(9)), *rows)
    assert "Weights do not move" not in found
    told = found["Weights in 16 bits stand still"]
    assert (told["layer"], told["count"]) == ("a", 1)
    assert told["text"].startswith("75% of the weights of layer 'a' have not moved for 3 sampled steps")
    assert "lightning_mixprec.optim" in told["advice"]


@pytest.mark.parametrize(("skipped", "level"), [(1, "note"), (0, "error")])
def test_a_loss_that_is_not_finite(tmp_path, skipped, level):
    row = curve(range(3), loss=[1.0, "inf", 1.0], skipped=[0, skipped, 0])
    found = alerts_of(tmp_path, began(layer("a")), row)["The loss was not finite"]
    assert (found["level"], found["step"]) == (level, 1)


def test_moves_of_the_controller_are_told(tmp_path):
    told = {"step": 4, "layer": "a", "from": "fp16", "to": "bf16", "reason": "adaptive: gradients of 'a' vanish"}
    change = report(4, change={"layers": [layer("a", "bf16", "a")], "history": [told]})
    decision = {"kind": "promote", "moves": [["a", "fp16", "bf16"]], "scale": None, "restores": False}
    decision |= {"reason": "gradients of 'a' vanish", "evidence": {}}
    decided = {"monitor": "adaptive", "step": 4, "epoch": 0, "batch_idx": 4, "decision": decision, "passes": 3}
    start = [began(layer("a")), curve(range(9))]
    found = alerts_of(tmp_path, *start, decided, change)["Layers were moved"]
    assert (found["level"], found["layer"]) == ("note", "a")
    assert alerts_of(tmp_path, *start, decided) == {}  # advice that was not carried out
    assert alerts_of(tmp_path, *start, change) == {}  # by hand, whatever the reason says


def test_the_worst_come_first_and_nobody_watching_is_said(tmp_path):
    begins = began(layer("a"), watched=["PrecisionReport"])
    run = run_of(tmp_path, begins, curve(range(9)), sample(0, a=values(0.9, output=0.1)))
    assert [alert["level"] for alert in run["alerts"]] == ["error", "warning", "note", "note"]
    assert [alert["title"] for alert in run["alerts"]][2:] == ["The run has no end", "Overflows were not watched"]


# Curves


def test_long_runs_are_gathered(tmp_path):
    steps = 100_000
    rows = [curve(range(first, first + 50), loss=[float(each) for each in range(50)]) for first in range(0, steps, 50)]
    run = run_of(tmp_path, began(layer("a")), *rows, ended(rows))
    told = run["curve"]
    assert run["span"] == [0, steps]
    assert len(told["loss"]) == len(told["edges"]) - 1 <= MAX_POINTS
    assert (told["loss_min"][0], told["loss_max"][0]) == (0.0, 49.0)
    assert told["loss"][0] == pytest.approx(sum(i % 50 for i in range(167)) / 167, rel=1e-3)


def test_a_scale_that_falls_tells_of_a_skip_where_nobody_else_does(tmp_path):
    row = curve([0, 1, 2, 3, 4], scale=[8.0, 8.0, 4.0, 4.0, 8.0], skipped=[None] * 5)
    assert run_of(tmp_path, began(layer("a")), row)["curve"]["skipped"] == [0, 1, 0, 0, 0]


def test_without_a_report_in_the_run_the_loss_is_csv_logger_s(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,mixprec/loss_scale,step,train_loss_step,val_loss\n0,,4,0.5,\n,1024.0,4,,\n0,,9,0.25,\n0,,9,,7.0\n"
    )
    run = run_of(tmp_path, underflow(0, 0.5, output=None))
    assert run["span"] == [4, 10]
    assert [each for each in run["curve"]["loss"] if each is not None] == [0.5, 0.25]
    assert run["rows"][0]["spans"] == [[4, 10, "fp16"]]
    assert run["watched"] == ["UnderflowMonitor"]


# Layers


def test_bands_follow_the_changes(tmp_path):
    change = report(4, change={"layers": [layer("b", "fp32")], "history": []})
    run = run_of(tmp_path, began(layer("a"), layer("b")), curve(range(9)), change)
    assert [(row["label"], row["spans"]) for row in run["rows"]] == [
        ("a", [[0, 9, "fp16"]]),
        ("b", [[0, 4, "fp16"], [4, 9, "fp32"]]),
    ]


def test_a_cell_begins_with_a_sample_and_holds_until_the_next(tmp_path):
    samples = [sample(0, a=values(0.1), b=values(0.2)), sample(5, a=values(0.3)), sample(8, b=values(0.4))]
    run = run_of(tmp_path, began(layer("a"), layer("b")), curve(range(10)), *samples)
    assert run["samples"]["edges"] == [0, 5, 8, 10]
    assert [row["underflow_rate"] for row in run["rows"]] == [[0.1, 0.3, 0.3], [0.2, 0.2, 0.4]]
    assert [row["grad_cosine"] for row in run["rows"]] == [[], []]


@pytest.mark.slow
def test_a_thousand_layers_share_rows_and_none_is_lost(tmp_path):
    names = [f"model.blocks.{block}.{part}.{i}" for block in range(50) for part in "abcde" for i in range(4)]
    moved = "model.blocks.7.c.2"
    rates = {name: values(0.9 if name == moved else 0.0) for name in names}
    change = report(40, change={"layers": [layer(moved, "fp32")], "history": []})
    samples = [report(step, sample={"layers": rates, "histograms": {}, "loss_scale": 1.0}) for step in range(90)]
    run = run_of(tmp_path, began(*map(layer, names)), curve(range(90)), change, *samples)
    assert len(run["rows"]) <= MAX_ROWS
    assert sorted(name for row in run["rows"] for name in row["layers"]) == sorted(names)
    (own,) = (row for row in run["rows"] if moved in row["layers"])
    assert own["layers"] == [moved]  # what moved is not hidden among others
    assert own["spans"] == [[0, 40, "fp16"], [40, 90, "fp32"]]
    assert max(own["underflow_rate"]) == 0.9
    assert len(own["underflow_rate"]) == len(run["samples"]["edges"]) - 1 <= MAX_CELLS
    assert len(run["assignment"]) == 1000


def test_a_flat_model_of_a_thousand_layers_has_one_row(tmp_path):
    names = [f"layer{number}" for number in range(1000)]
    change = report(4, change={"layers": [layer(names[3], "fp32")], "history": []})
    run = run_of(tmp_path, began(*map(layer, names)), curve(range(9)), change)
    assert 1 <= len(run["rows"]) <= MAX_ROWS
    assert sorted(name for row in run["rows"] for name in row["layers"]) == sorted(names)


def test_members_that_differ_are_several_while_they_do(tmp_path):
    names = [f"a.{number}" for number in range(160)]
    changes = [report(n + 2, change={"layers": [layer(name, "fp32")], "history": []}) for n, name in enumerate(names)]
    run = run_of(tmp_path, began(*map(layer, names)), curve(range(200)), *changes)
    (row,) = run["rows"]
    assert row["label"] == "a.* (160 layers)"
    assert row["spans"] == [[0, 2, "fp16"], [2, 161, "several"], [161, 200, "fp32"]]


# The size of a page


def busy_run(folder: Path, names: list[str], seed: int) -> Path:
    """100,000 steps in which every value of every layer jumps about."""
    draw = random.Random(seed)
    rows = [began(*map(layer, names))]
    for first in range(0, 100_000, 50):
        loss, skipped = [draw.random() for _ in range(50)], [int(draw.random() < 0.01) for _ in range(50)]
        rows.append(curve(range(first, first + 50), loss, 2.0 ** draw.randint(8, 16), skipped))
    counts = {"lowest": -40, "counts": [draw.randint(0, 9999) for _ in range(40)], "zeros": 3}
    for step in range(0, 100_000, 1000):
        told = {name: values(draw.random() ** 6, draw.uniform(-1, 12), draw.uniform(0, 12)) for name in names}
        histograms = {name: {"gradient": counts, "output": counts} for name in names[:8]}
        flops = {name: draw.randint(1, 10**9) for name in names}
        rows.append(report(step, sample={"layers": told, "histograms": histograms, "loss_scale": 1.0, "flops": flops}))
        for name in names:
            rows.append(fidelity(step, layer=name, grad_cosine=draw.random(), sqnr_db=draw.uniform(10, 60)))
    for step, name in enumerate(draw.sample(names, 40)):
        rows.append(report(1000 * step, change={"layers": [layer(name, "bf16", name)], "history": []}))
    folder.mkdir()
    (folder / "mixprec.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_one_run_and_two_of_a_thousand_layers_stay_below_500_kilobytes(tmp_path):
    names = [
        f"model.blocks.{b}.{part}.{i}" for b in range(50) for part in ("attention", "mlp", "norm") for i in range(7)
    ]
    runs = [busy_run(tmp_path / name, names, seed) for seed, name in enumerate("ab")]
    for folders in (runs[:1], runs):
        page, _ = write_report(folders, tmp_path / "report.html")
        assert 100_000 < page.stat().st_size < 500_000


# Files


ODD = st.sampled_from([None, True, -1, 2**70, 1.5, "", "fp16", "x\ny", [], [1], {}, {"a": 1}, [["a", "b"]]])
WHOLE = [
    began(layer("a"), layer("b")),
    curve(range(3), loss=[1.0, "inf", 2.0]),
    report(1, sample={**sample(1, a=values())["sample"], "flops": {"a": 3}}),
    report(
        2,
        change={
            "layers": [layer("a", "bf16")],
            "history": [{"step": 2, "layer": "a", "from": "fp16", "to": "bf16", "reason": "r"}],
        },
    ),
    overflow("precision", "a"),
    overflow("data", None),
    fidelity(0, layer="a", grad_cosine=0.5, sqnr_db=3.0),
    fidelity(1, loss_gap=0.2),
    {"monitor": "underflow", "step": 1, "epoch": 0, "batch_idx": 1, "layer": "a", "stagnation_rate": 0.7},
    underflow(1, 0.5, threshold=0.2),
    {"monitor": "overflow", "step": 1, "epoch": 0, "batch_idx": 1, "problem": "out of memory"},
    report(3, end={"state": "finished", "message": ""}),
]


def places(value: Any, path: tuple = ()) -> Iterable[tuple]:
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in pairs:
        yield from places(entry, (*path, key))


@given(st.data())
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_odd_rows_are_passed_over(tmp_path, data):
    assert_that_an_odd_row_is_passed_over(tmp_path, data)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_many_odd_rows_are_passed_over(tmp_path, data):
    assert_that_an_odd_row_is_passed_over(tmp_path, data)


def assert_that_an_odd_row_is_passed_over(tmp_path, data):
    rows = copy.deepcopy(WHOLE)
    *way, last = data.draw(st.sampled_from([*places(rows)]))
    at: Any = rows
    for key in way:
        at = at[key]
    if data.draw(st.booleans()):
        del at[last]
    else:
        at[last] = data.draw(ODD)
    (tmp_path / "mixprec.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = content_of([read_records(tmp_path)])
    json.dumps(content, allow_nan=False)
    render(content)


@pytest.mark.parametrize(
    "text", ["", "step\n", "a,b\n1,2,3,4\n", "step,train_loss\nx,nan\n,\n99999999999999999999,1\n", "\x00"]
)
def test_an_odd_metrics_file_is_no_loss(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    run = run_of(tmp_path, sample(2, a=values()))
    assert [each for each in run["curve"]["loss"] if each is not None] == []


def test_what_is_no_row_is_passed_over(tmp_path):
    run = run_of(
        tmp_path, "", "no json", "[1]", '{"monitor": "new", "step": 3}', began(layer("a")), curve(range(4)), '{"mon'
    )
    assert run["span"] == [0, 4]


def moved(step: int, to: str) -> dict[str, Any]:
    told = {"step": step, "layer": "a", "from": "fp16", "to": to, "reason": "by hand"}
    return report(step, change={"layers": [layer("a", to, "a")], "history": [told]})


def test_a_resumed_run_replaces_what_it_does_again(tmp_path):
    first = [
        began(layer("a")),
        curve(range(8), loss=1.0),
        moved(2, "bf16"),
        sample(1, a=values(0.01)),
        moved(6, "fp32"),
    ]
    first += [sample(5, a=values(0.9)), overflow("model", "a", 7), curve([8], loss=["inf"])]
    again = [
        began(layer("a", "bf16", "a"), step=4),
        moved(2, "bf16"),
        curve(range(4, 10), loss=2.0),
        sample(4, a=values(0.02)),
    ]
    again[1]["change"]["layers"] = []  # the history is told again
    run = run_of(tmp_path, *first, *again, ended(again))
    assert run["curve"]["loss"] == [1.0] * 4 + [2.0] * 6
    assert run["rows"][0]["spans"] == [[0, 2, "fp16"], [2, 10, "bf16"]]
    assert run["rows"][0]["underflow_rate"] == [None, 0.01, 0.02]
    assert [move["step"] for move in run["moves"]] == [2]
    assert [alert for alert in run["alerts"] if alert["level"] != "note"] == []
    assert run["assignment"][0]["compute"] == "bf16"


def test_a_new_run_in_an_old_folder_knows_nothing_of_the_old_one(tmp_path):
    old = [began(layer("z")), curve([0, 1], loss="inf"), overflow("model", "z"), fidelity(0, loss_gap=0.5)]
    run = run_of(tmp_path, *old, began(layer("a")), curve(range(3)), ended([curve(range(3))]))
    assert run["alerts"] == []
    assert [row["label"] for row in run["rows"]] == ["a"]
    assert run["span"] == [0, 3]


def test_several_optimizer_steps_in_a_batch_leave_no_holes(tmp_path):
    rows = [began(layer("a")), curve(range(0, 30, 3), loss=2.0), report(30, end={"state": "finished", "message": ""})]
    run = run_of(tmp_path, *rows)
    assert run["span"] == [0, 30]
    assert run["curve"]["loss"] == [2.0] * 10
    assert run["facts"][0] == {"label": "optimizer steps", "value": "30", "hint": "0 skipped"}


def test_an_empty_file_is_a_report_of_nothing(tmp_path):
    run = run_of(tmp_path)
    assert (run["rows"], run["moves"], run["histograms"], run["span"]) == ([], [], [], [0, 1])


def test_no_file_is_one_line(tmp_path):
    with pytest.raises(MixPrecError, match=r"no mixprec\.jsonl in .*; give the log directory"):
        read_records(tmp_path)
