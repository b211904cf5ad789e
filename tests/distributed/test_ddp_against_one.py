"""Two processes compute what one does on their batches put together: losses, skips, scales, moves and statistics."""

from pathlib import Path

import pytest
import torch
from plugin_models import same
from processes import saved_by_two

pytestmark = pytest.mark.slow

STYLES = ["automatic", "accumulating", "two optimizers", "taking turns"]
POLICIES = ["fp32", "fp16", "bf16", "mixed"]
# Sums of eight products round otherwise than two sums of four; without an exchange losses part by more than a half.
TOLERANCE = {"fp32": 1e-6, "fp16": 5e-4, "bf16": 4e-3, "mixed": 4e-3}

every_run = pytest.mark.parametrize("case", [f"{policy}, {style}" for policy in POLICIES for style in STYLES])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).with_name("ddp_against_one.py"), tmp_path_factory.mktemp("ddp"))


def runs(ranks, case):
    """Alone on all data, and each rank on its own."""
    return ranks[0]["alone"][case], *(results["together"][case] for results in ranks)


@every_run
def test_the_mean_of_the_ranks_losses_is_the_loss_of_one_process(ranks, case):
    alone, first, second = runs(ranks, case)
    expected, found = alone["losses"], (first["losses"] + second["losses"]) / 2
    finite = expected.isfinite()
    assert finite.sum() >= 7
    torch.testing.assert_close(found[finite], expected[finite], rtol=TOLERANCE[case.partition(",")[0]], atol=0)


@every_run
def test_the_weights_are_those_of_one_process(ranks, case):
    alone, first, second = runs(ranks, case)
    assert same(first["weights"], second["weights"])
    tolerance = TOLERANCE[case.partition(",")[0]]
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=tolerance, atol=tolerance)


@every_run
def test_steps_skips_scales_and_moves_are_those_of_one_process(ranks, case):
    alone, first, second = runs(ranks, case)
    for what in ("step", "steps", "skipped", "scales", "history"):
        assert alone[what] == first[what] == second[what]


def test_the_runs_have_something_to_compare(ranks):
    for case, run in ranks[0]["alone"].items():
        if case == "rows":
            continue
        assert run["skipped"] == (2 if "two optimizers" in case else 1)
        assert len(run["history"]) == (0 if "fp32" in case else 1)
        if "fp16" in case or "mixed" in case:
            assert sorted(set(run["scales"]))[:2] == [64, 128]


BY_ROW = ("flow_underflow_rate", "flow_subnormal_share", "flow_headroom_bits", "output_headroom_bits", "sqnr_db")


def test_statistics_of_rows_are_those_of_one_process(ranks):
    alone, together = ranks[0]["alone"]["rows"], ranks[0]["together"]["rows"]
    pairs = [
        (expected[key], found[key], key)
        for expected, found in zip(alone, together, strict=True)
        for key in BY_ROW
        if key in expected
    ]
    for expected, found, key in pairs:
        assert found == (None if expected is None else pytest.approx(expected, abs=1e-3)), key
    assert any(0.05 < expected < 0.95 for expected, _, key in pairs if key == "flow_underflow_rate")
    assert {key for _, _, key in pairs} == set(BY_ROW)
