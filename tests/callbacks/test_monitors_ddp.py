"""The monitors in two processes under DDP: they agree, and see the data of both."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from plugin_models import Batches, same
from processes import saved_by_two
from torch import nn

from lightning_mixprec.records.words import MEASURED, short

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).parent / "ddp_monitors.py", tmp_path_factory.mktemp("ddp"))


CASES = ["mixed", "small", "stock", "spoiled", "elsewhere", "broken", "unguarded", "searching", "failing"]


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(nan=-7), b.nan_to_num(nan=-7))
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("what", ["events", "skipped", "reasons", "underflow", "fidelity", "metrics"])
def test_both_processes_say_the_same(ranks, case, what):
    first, second = (results[case][what] for results in ranks)
    assert equal(first, second)


def test_watching_changes_nothing_on_either(ranks):
    for results in ranks:
        alone, watched = results["alone"]["trace"], results["mixed"]["trace"]
        assert [key for key in alone if not same(alone[key], watched[key])] == []


def test_an_overflow_on_one_process_is_diagnosed_on_both(ranks):
    for results in ranks:
        events = [event for event in results["spoiled"]["events"] if event["batch_idx"] == 2]
        assert [(event["verdict"], event["rank"]) for event in events] == [("precision", 0)]
        assert events[0]["layer"].startswith("net.")
        assert results["spoiled"]["skipped"] >= 1


def test_the_batch_of_any_process_is_kept(ranks):
    (event,) = [event for event in ranks[1]["elsewhere"]["events"] if event["batch_idx"] == 2]
    (said,) = [said for said in ranks[0]["elsewhere"]["warned"] if "batch 2" in said]
    saved = torch.load(re.search(r"diagnose\(model, '(.*)'\)", said)[1], weights_only=True)
    assert (event["verdict"], event["rank"]) == ("precision", 1)
    assert saved["batch"][0].eq(60000).all()


@pytest.mark.parametrize("case", ["broken", "unguarded", "searching"])
def test_broken_data_of_one_process_accuses_no_layer(ranks, case):
    events = [event for event in ranks[0][case]["events"] if event["batch_idx"] == 2]
    assert [(event["verdict"], event["layer"], event["rank"]) for event in events] == [("data", None, 1)]
    assert {event["verdict"] for event in ranks[0][case]["events"]} <= {"data", "scale", "model"}


def test_rates_are_those_of_the_data_of_both(ranks):
    torch.manual_seed(3)
    nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))  # what the script draws first
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    gradients = {"net.0": [], "net.2": []}
    for rank in range(2):
        x, y = (each.double() for each in Batches(6, seed=7 + rank).batches[0])
        net.zero_grad()
        (nn.functional.mse_loss(net(x), y) * 1e-10).backward()
        for name, layer in (("net.0", net[0]), ("net.2", net[2])):
            gradients[name] += [param.grad.flatten().numpy() * 1024.0 for param in layer.parameters()]
    rates = []
    for name, parts in gradients.items():
        both = np.concatenate(parts)
        rates.append(float((both[both != 0].astype(np.float16) == 0).mean()))
        row = next(row for row in rows(ranks[0]["small"]) if row.get("layer") == name and "underflow_rate" in row)
        assert row["underflow_rate"] == pytest.approx(rates[-1], abs=0.02)
        assert row["headroom_bits"] == short(math.log2(65504 / np.abs(both).max()), MEASURED)
    assert 0.1 < max(rates) < 0.95


def rows(results):
    return [json.loads(line) for line in results["rows"]]


@pytest.mark.parametrize("case", CASES)
def test_rows_are_written_once(ranks, case):
    places = [
        (row["monitor"], row["batch_idx"], row.get("layer"), "stagnation_rate" in row, "problem" in row)
        for row in rows(ranks[0][case])
    ]
    assert len(places) == len(set(places))
    assert {("underflow", 0, "net.0", False, False), ("fidelity", 0, "net.0", False, False)} <= set(places)


def test_a_replay_that_fails_on_one_process_is_a_loss_for_none(ranks):
    for results in ranks:
        assert results["failing"]["underflow"]["net.0"]["underflow_rate"] is not None
        assert results["failing"]["trace"]["weights"]
