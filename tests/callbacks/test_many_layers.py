"""Models with more layers than a sample looks at: each sample looks at the next ones, and is bounded by them."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from plugin_models import Batches, Task, one_line, ours, trainer
from torch import nn

from lightning_mixprec import FidelityMonitor, MixPrecError, PrecisionReport, UnderflowMonitor
from lightning_mixprec.evidence import sampled_step
from lightning_mixprec.report.reading import read_records

pytestmark = pytest.mark.filterwarnings("ignore:.*vanish in", "ignore:.*left 100%")


def chain(layers):
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers - 1)), nn.Linear(6, 2))


def fit(layers, *callbacks, batches=3):
    torch.manual_seed(0)
    model = Task(chain(layers), partial(torch.optim.SGD, lr=1e-2))
    trainer(ours("fp16"), callbacks=list(callbacks)).fit(model, Batches(6, count=batches))
    return model


def rows(monitor):
    lines = [json.loads(line) for line in Path("mixprec.jsonl").read_text().splitlines()]
    return [row for row in lines if row["monitor"] == monitor and "layer" in row]


def seen_at(monitor, step, key):
    return [row["layer"] for row in rows(monitor) if row["step"] == step and row.get(key) is not None]


def test_each_sample_looks_at_the_next_layers_and_says_of_them_what_one_of_all_says():
    some, every = UnderflowMonitor(1, max_layers=4), UnderflowMonitor(1, max_layers=None)
    fit(8, some, batches=3)
    # The LightningModule, the Sequential and eight layers; the first two compute nothing that is not their children's.
    first, second, third = (seen_at("underflow", step, "underflow_rate") for step in range(3))
    assert set(first) <= {"net.0", "net.1"} and set(second) == {"net.2", "net.3", "net.4", "net.5"}
    assert set(third) <= {"net.6", "net.7", "net.0", "net.1"}
    stagnating = [row["layer"] for row in rows("underflow") if "stagnation_rate" in row]
    assert len(stagnating) <= 3 * 4
    partly = {(row["step"], row["layer"]): row for row in rows("underflow") if "format" in row}
    Path("mixprec.jsonl").unlink()
    fit(8, every, batches=3)
    whole = {(row["step"], row["layer"]): row for row in rows("underflow") if "format" in row}
    assert partly.keys() < whole.keys()
    for key, row in partly.items():
        assert {**row, "run_id": ""} == {**whole[key], "run_id": ""}


def test_gradients_are_compared_of_those_layers_and_warned_of_after_two_samples_of_theirs():
    some = FidelityMonitor(1, layers_per_sample=1, max_layers=3, min_cosine=1.0)
    with pytest.warns(UserWarning, match="gradient") as warned:
        fit(6, some, batches=8)
    known = [set(seen_at("fidelity", step, "grad_cosine")) for step in range(8)]
    assert max(map(len, known)) <= 4
    assert set.union(*known) == {f"net.{number}" for number in range(6)}
    told = next(str(each.message) for each in warned if "gradient" in str(each.message))
    step, layer = re.match("step ([0-9]+): .*?'(net[^']*)'", told).groups()
    times = [number for number, seen in enumerate(known) if layer in seen and number <= int(step)]
    assert len(times) >= 2 and times[-1] == int(step)


def test_where_memory_has_no_room_for_all_gradients_samples_keep_those_of_a_part_in_turn_and_say_so(monkeypatch):
    fit(6, UnderflowMonitor(1), FidelityMonitor(1), batches=1)
    whole = {row["layer"]: row for row in rows("fidelity")}
    Path("mixprec.jsonl").unlink()
    halves = [("net.0", "net.1", "net.2"), ("net.3", "net.4", "net.5")]
    monkeypatch.setattr(sampled_step, "is_any_sharded", lambda module: True)
    monkeypatch.setattr(sampled_step, "parts_with_room", lambda module, device, owned: halves)
    kept = []

    class Kept(FidelityMonitor):
        def _take_in(self, trainer, found):
            super()._take_in(trainer, found)
            kept.append((sorted(found.agreement.layers), sorted(found.weights)))

    with pytest.warns(UserWarning, match="room for the gradients of 3 of 6 layers") as warned:
        model = fit(6, UnderflowMonitor(1), Kept(1), batches=3)
    assert len([each for each in warned if "room for" in str(each.message)]) == 1
    first, second = (list(half) for half in halves)
    assert kept == [(first, first), (second, second), (first, first)]
    partly = {row["layer"]: row for row in rows("fidelity") if row["step"] == 0 and row["grad_cosine"] is not None}
    assert [*partly] == first
    assert all(partly[name]["grad_cosine"] == whole[name]["grad_cosine"] for name in first)
    problems = [json.loads(line) for line in Path("mixprec.jsonl").read_text().splitlines() if "problem" in line]
    assert {row["is_sampled"] for row in problems} == {True}
    for mine, plain in zip(model.parameters(), fit(6, batches=3).parameters(), strict=True):
        assert torch.equal(mine, plain)


def test_training_stays_the_same_to_the_last_bit():
    watched = fit(
        8, UnderflowMonitor(1, max_layers=2), FidelityMonitor(1, max_layers=3), PrecisionReport(1, max_layers=4)
    )
    plain = fit(8)
    assert all(
        torch.equal(a, b) for a, b in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True)
    )


def test_a_samples_rows_and_numbers_are_bounded_however_many_layers_there_are(capsys):
    def sample(layers):
        Path("mixprec.jsonl").unlink(missing_ok=True)
        monitors = [
            UnderflowMonitor(1, max_layers=8),
            FidelityMonitor(1, max_layers=8),
            PrecisionReport(1, max_layers=8),
        ]
        fit(layers, *monitors, batches=1)
        lines = Path("mixprec.jsonl").read_text().splitlines()
        of_sample = [line for line in lines if not any(key in json.loads(line) for key in ("run", "curve", "end"))]
        flops = sum(len(json.dumps(json.loads(line).get("sample", {}).get("flops", {}))) for line in of_sample)  # once
        return len(of_sample), sum(map(len, of_sample)) - flops

    few, many = sample(20), sample(80)
    assert many[0] <= few[0]
    assert many[1] <= 1.05 * few[1]
    assert read_records(Path.cwd()).samples


def test_tables_show_ten_rows_and_say_how_many_more_there_are(capsys):
    fit(24, UnderflowMonitor(1), FidelityMonitor(1), batches=1)
    told = capsys.readouterr().out
    assert "the 10 layers that lose most, at their latest sample (14 more not shown)" in told
    assert re.search(r"the 10 layers farthest off \(1[45] more not shown\)", told)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "8"])
@pytest.mark.parametrize("kind", [UnderflowMonitor, FidelityMonitor, PrecisionReport])
def test_another_number_is_refused_in_one_line(kind, wrong):
    with pytest.raises(MixPrecError, match="max_layers") as caught:
        kind(max_layers=wrong)
    one_line(caught)
