"""Monitors and the report of one run: the same symptoms, at the same limits, in the same sentences."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from plugin_models import Batches, Task, fit, mlp, ours
from torch import nn

from lightning_mixprec import FidelityMonitor, OverflowMonitor, PrecisionReport, UnderflowMonitor
from lightning_mixprec.records import advice
from lightning_mixprec.records.journal import FILE_NAME, PARTS, ROWS
from lightning_mixprec.records.schema import matches
from lightning_mixprec.records.words import sentence
from lightning_mixprec.report.content import content_of
from lightning_mixprec.report.reading import read_records

pytestmark = pytest.mark.filterwarnings("ignore:step .*")


class RMSNorm(nn.Module):
    """That of examples/quickstart.py: squares numbers above 256, which are infinite in fp16."""

    def forward(self, x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


class Faint(Task):
    """A loss so small that a part of its gradient vanishes."""

    def training_step(self, batch, batch_idx):
        return 1e-6 * super().training_step(batch, batch_idx)


def quickstart():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(nn.Linear(6, 8), RMSNorm(), *blocks, nn.Linear(8, 2))


def large(count):
    batches = Batches(6, count=count)
    batches.batches = [(1e4 * x, y) for x, y in batches.batches]
    return batches


def told(model, batches, *monitors, plugin=None):
    """What is warned of at a step, and the alerts of the report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, plugin or ours("fp16"), batches, callbacks=[*monitors, PrecisionReport(every_n_steps=1)])
    texts = [str(each.message) for each in caught]
    warned = {text.partition(": ")[2]: text for text in texts if re.match(r"step \d+: ", text)}
    (run,) = json.loads(Path("precision_report.json").read_text())["runs"]
    return set(warned), [alert for alert in run["alerts"] if alert["title"] in TITLES]


TITLES = {
    "An output is not fp32's",
    "Gradients vanish",
    "Gradients point elsewhere than fp32's",
    "The loss is not fp32's",
}


@pytest.mark.parametrize(
    ("make", "symptoms"),
    [
        (lambda: Task(quickstart()), {"An output is not fp32's", "Gradients point elsewhere than fp32's"}),
        (lambda: Faint(quickstart()), {"An output is not fp32's", "Gradients vanish"}),
        (lambda: Task(mlp()), set()),
    ],
    ids=["quickstart", "faint", "healthy"],
)
def test_whatever_is_warned_of_is_alerted_in_the_same_words_and_the_other_way_round(make, symptoms, capsys):
    monitors = [OverflowMonitor(), UnderflowMonitor(1), FidelityMonitor(1, layers_per_sample=20)]
    model = make()
    batches = large(2) if symptoms else Batches(6, count=2)
    warned, alerts = told(model, batches, *monitors)
    assert {alert["title"] for alert in alerts} >= symptoms
    assert bool(alerts) == bool(symptoms)
    # Outputs that are noise are told with the gradients that they spoil; the report has a line of their own, too.
    noise = [alert for alert in alerts if alert["title"] == "An output is not fp32's"]
    assert shapes(warned) == shapes(alert["line"] for alert in alerts if alert not in noise)
    for alert in noise if "Gradients point elsewhere than fp32's" in symptoms else ():
        assert any(shape(alert["line"].removesuffix(".")).lower() in each.lower() for each in shapes(warned))
    printed = capsys.readouterr().out
    for alert in alerts:
        assert alert["text"].removesuffix(".").lower() in alert["line"].lower()
        assert alert["advice"].lower() in alert["line"].lower()
        assert f"  {alert['level']}: {alert['line']}" in printed


def shapes(lines):
    """Sentences without numbers, which are those of the first sample or of the latest, and without the layers."""
    return set(map(shape, lines))


def shape(line):
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", re.sub(r" \(also .*?\)|'net[^']*'", "", line))


# Limits


def journal(**row):
    """The report's alerts of a run in which FidelityMonitor saw the same twice."""
    layer = {"layer": "a", "grad_cosine": row.pop("grad_cosine", 1.0), "sqnr_db": 40.0}
    loss = {"loss_gap": row.pop("loss_gap", 0.0), "loss_scale": 1.0, "too_large": [], **row}
    place = {"monitor": "fidelity", "epoch": 0}
    rows = [{**place, "step": step, "batch_idx": step, **each} for step in (0, 1) for each in (loss, layer)]
    Path(FILE_NAME).write_text("".join(json.dumps(each) + "\n" for each in rows))
    return {alert["title"]: alert for alert in content_of([read_records(".")])["runs"][0]["alerts"]}


class Cosine(FidelityMonitor):
    """Takes the same cosine and loss gap for what it has measured at each sample."""

    planted = (1.0, 0.0)

    def _warn(self, at, cosines, looked_at):
        self.latest["loss_gap"] = self.planted[1]
        super()._warn(at, dict.fromkeys(cosines, self.planted[0]), looked_at)


@pytest.mark.parametrize(
    ("cosine", "gap", "limits", "is_told"),
    [
        (0.95, 0.0, {}, True),  # between the limit of the monitor and the one that the report had
        (0.995, 0.0, {}, False),
        (0.95, 0.0, {"min_cosine": 0.9}, False),
        (0.995, 0.0, {"min_cosine": 0.999}, True),
        (1.0, 0.06, {}, True),
        (1.0, 0.04, {}, False),
        (1.0, 0.06, {"max_loss_gap": 0.1}, False),
        (1.0, 0.04, {"max_loss_gap": 0.03}, True),
    ],
)
def test_a_value_between_two_limits_is_told_by_both_or_by_none(cosine, gap, limits, is_told):
    monitor = Cosine(1, **limits)
    monitor.planted = (cosine, gap)
    warned, _ = told(Task(mlp()), Batches(6, count=2), monitor)
    lines = [row for row in map(json.loads, Path(FILE_NAME).read_text().splitlines()) if "loss_gap" in row]
    assert {key: row[key] for row in lines for key in row.keys() & {"min_cosine", "max_loss_gap"}} == limits
    alerts = journal(grad_cosine=cosine, loss_gap=gap, **limits)
    assert bool(warned) == is_told
    assert bool(alerts.keys() & TITLES) == is_told
    if is_told and gap:
        assert warned == {alerts["The loss is not fp32's"]["line"]}


def test_a_coarse_format_brings_its_limit_to_a_report_that_knows_no_formats():
    told(Task(mlp()), Batches(6, count=2), FidelityMonitor(1), plugin=ours("bf16"))
    rows = [row for row in map(json.loads, Path(FILE_NAME).read_text().splitlines()) if "loss_gap" in row]
    assert [row["min_cosine"] for row in rows] == [advice.MIN_COSINE_IF_COARSE] * 2
    assert not journal(grad_cosine=0.95, min_cosine=rows[0]["min_cosine"]).keys() & TITLES
    assert journal(grad_cosine=0.95).keys() & TITLES


def test_the_users_threshold_of_underflow_is_the_reports():
    for threshold in (0.1, 0.99):
        warned, alerts = told(Faint(quickstart()), large(1), UnderflowMonitor(1, threshold=threshold))
        assert bool(warned) == bool({alert["title"] for alert in alerts} & {"Gradients vanish"}) == (threshold < 0.9)
        Path(FILE_NAME).unlink()


def test_the_controller_acts_where_it_has_been_told_already():
    for is_coarse in (False, True):
        assert advice.min_cosine_to_act(is_coarse=is_coarse) <= advice.min_cosine(is_coarse=is_coarse)
    assert advice.MAX_LOSS_GAP_TO_ACT > advice.MAX_LOSS_GAP


def test_a_sentence_keeps_the_names_that_it_begins_with():
    assert sentence("bf16 holds it: compute 'a' in bf16") == "bf16 holds it: compute 'a' in bf16."


# Rows


def test_every_row_is_as_its_definition_says():
    monitors = [OverflowMonitor(), UnderflowMonitor(1, threshold=0.2), FidelityMonitor(1, min_cosine=0.5)]
    told(Task(quickstart()), large(3), *monitors)
    rows = [json.loads(line) for line in Path(FILE_NAME).read_text().splitlines()]
    assert {row["monitor"] for row in rows} >= {"report", "underflow", "fidelity"}
    for row in rows:
        parts = PARTS.get(row["monitor"], {"": ROWS.get(row["monitor"])})
        if "problem" not in row:
            part = next((key for key in parts if key in row), "")
            assert matches(row.get(part, row), parts[part], in_json=True), row
