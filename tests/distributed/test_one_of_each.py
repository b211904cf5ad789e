"""Two processes, quickly: of each suite that needs two, which are slow, one case that asks what they ask.

It takes the seconds that two processes need to import torch and Lightning.
"""

from pathlib import Path

import pytest
import torch
from plugin_models import same
from processes import saved_by_two

from lightning_mixprec import UnderflowRate


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).with_name("one_of_each.py"), tmp_path_factory.mktemp("both"))


def test_a_uniform_policy_under_ddp_is_bit_for_bit_lightnings_own_plugin(ranks):
    for results in ranks:
        for what in ("losses", "weights", "buffers", "step"):
            assert same(results["ours"][what], results["stock"][what])


def test_an_overflow_of_one_process_is_skipped_on_both(ranks):
    first, second = (results["spoiled"] for results in ranks)
    assert (first["skipped"], first["step"], first["scale"]) == (2, 6, 256)
    for what in ("weights", "step", "skipped", "scale", "history", "formats"):
        assert same(first[what], second[what])
    assert all(torch.isfinite(buffer).all() for spoiled in (first, second) for buffer in spoiled["buffers"])


def test_both_keep_to_one_schedule(ranks):
    first, second = (results["scheduled"] for results in ranks)
    assert first == second
    assert [(each["phase"], each["step"]) for each in first["came"]] == [(1, 1), (2, 5)]


def test_what_overflows_on_one_moves_on_both(ranks):
    first, second = (results["adapted"] for results in ranks)
    assert first["moves"][0] == ("net.down", "fp16", "bf16")
    assert first["skipped"] <= 3
    for what in ("decisions", "history", "policies", "state", "weights", "skipped"):
        assert same(first[what], second[what])


@pytest.mark.parametrize(("expected", "found"), [("ddp", "fsdp"), ("ddp norms", "fsdp2 norms")])
def test_a_sharded_run_is_the_one_under_ddp(ranks, expected, found):
    for results in ranks:
        for what in ("step", "skipped", "scale", "history"):
            assert results[found][what] == results[expected][what]
        for what in ("losses", "evaluated", "weights"):
            torch.testing.assert_close(
                results[found][what], results[expected][what], rtol=1e-5, atol=1e-6, equal_nan=True
            )
    assert ranks[0]["fsdp"]["skipped"] == 3
    assert ranks[0]["fsdp2 norms"]["history"]


def test_a_metric_counts_what_both_have(ranks):
    metric = UnderflowRate("fp16")
    metric.update(torch.logspace(-9, 0, 40))
    for results in ranks:
        assert results["underflow"] == metric.compute()
    assert 0 < metric.compute() < 0.5
