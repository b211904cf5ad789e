"""Two processes under FSDP1 (``FSDPStrategy``): weights are gathered as stored, so all is as under DDP, bit for bit."""

from pathlib import Path

import pytest
import torch
from processes import saved_by_two

pytestmark = pytest.mark.slow

CASES = ["fp32", "bf16", "fp16", "norms", "by block", "spoiled", "moved", "clipped", "linears"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).parent / "fsdp_script.py", tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_one_under_ddp(ranks, case):
    for results in ranks:
        expected, found = results[f"ddp {case}"], results[f"fsdp {case}"]
        for what in ("step", "skipped", "scale", "history"):
            assert found[what] == expected[what]
        for what in ("losses", "evaluated", "weights"):
            torch.testing.assert_close(found[what], expected[what], rtol=1e-6, atol=1e-7, equal_nan=True)


def test_fp16_scales_its_loss_which_lightnings_own_plugin_cannot_be_told_to(ranks):
    assert ranks[0]["fsdp fp16"]["scale"] == 32768 and ranks[0]["fsdp fp16"]["skipped"] == 1
    assert ranks[0]["fsdp spoiled"]["skipped"] == 3


@pytest.mark.parametrize("policy", ["bf16", "fp16"])
def test_an_overflow_in_the_part_that_one_rank_holds_is_skipped_on_both(ranks, policy):
    for results in ranks:
        found = results[f"spoiled part {policy}"]
        assert found["skipped"] == results[f"fsdp {policy}"]["skipped"] + 2
        assert found["scale"] == ranks[0][f"spoiled part {policy}"]["scale"]
        assert all(weights.isfinite().all() for weights in found["weights"])


def test_wrapped_modules_can_be_gathered_in_16_bits(ranks):
    expected, found = ranks[0]["ddp linears"], ranks[0]["gathered"]
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-2, atol=1e-3)
    assert found["losses"] != expected["losses"]
