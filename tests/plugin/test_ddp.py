"""Two processes under DDP: the same on both, and the same as Lightning's own plugins."""

from pathlib import Path

import pytest
import torch
from plugin_models import same
from processes import saved_by_two

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).parent / "ddp_script.py", tmp_path_factory.mktemp("ddp"))


TRAINED = [
    "ours fp32",
    "ours bf16",
    "ours fp16",
    "mixed",
    "mixed, accumulating",
    "mixed, two optimizers",
    "fp16, spoiled",
    "bf16, spoiled",
    "mixed, spoiled",
    "moved",
]


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
def test_a_uniform_policy_is_bit_for_bit_lightnings_own_plugin(ranks, format):
    for results in ranks:
        expected, found = results[f"stock {format}"], results[f"ours {format}"]
        for what in ("losses", "weights", "buffers", "step"):
            assert same(found[what], expected[what])


@pytest.mark.parametrize("case", TRAINED)
def test_both_processes_agree(ranks, case):
    first, second = (results[case] for results in ranks)
    for what in ("weights", "step", "skipped", "scale", "history", "formats"):
        assert same(first[what], second[what])
    assert not same(first["losses"], second["losses"])
    assert all(torch.isfinite(weight).all() for weight in first["weights"])
    # DDP itself leaves one on the LightningModule.
    assert first["own forwards"] == second["own forwards"] == ranks[0]["stock fp32"]["own forwards"]


@pytest.mark.parametrize(("case", "scale"), [("fp16, spoiled", 256), ("bf16, spoiled", 1), ("mixed, spoiled", 256)])
def test_an_overflow_on_one_process_is_skipped_on_both(ranks, case, scale):
    for results in ranks:
        # The third batch of each of the two epochs.
        assert results[case]["skipped"] == 2
        assert results[case]["step"] == 6
        assert results[case]["scale"] == scale


def test_statistics_of_a_batch_that_was_skipped_are_undone_on_both(ranks):
    for results in ranks:
        for case in ("fp16, spoiled", "bf16, spoiled", "mixed, spoiled"):
            assert all(torch.isfinite(buffer).all() for buffer in results[case]["buffers"])


def test_a_mixed_policy_is_in_force_and_can_be_changed_on_both(ranks):
    for results in ranks:
        formats = ["fp16", "fp32", "bf16", "bf16", "bf16", "fp32"]
        assert [results["mixed"]["formats"][f"net.{i}"] for i in range(6)] == formats
        assert results["moved"]["formats"]["net.3"] == "fp32"
        assert [(entry["step"], entry["layer"]) for entry in results["moved"]["history"]] == [(2, "net.3")]
        assert not same(results["moved"]["weights"], results["mixed"]["weights"])


def test_a_mistake_is_one_line_on_both(ranks):
    for results in ranks:
        assert "net.5" in results["refused"]["error"]
        assert "\n" not in results["refused"]["error"]
