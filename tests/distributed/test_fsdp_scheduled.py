"""PrecisionScheduler replays nothing: its phases come under FSDP1 and tensor parallelism, on two processes."""

from pathlib import Path

import pytest
import torch
from processes import saved_by_two

pytestmark = pytest.mark.slow

AS_UNDER_DDP = [("fsdp1", "ddp"), ("fsdp2", "ddp"), ("split", "ddp shared")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).parent / "fsdp_scheduled_script.py", tmp_path_factory.mktemp("scheduled"))


@pytest.mark.parametrize(("case", "ddp"), AS_UNDER_DDP)
def test_phases_come_as_under_ddp_on_both_ranks(ranks, case, ddp):
    for results in ranks:
        found, expected = results[case], results[ddp]
        assert [each["step"] for each in found["came"]] == [2, 6, 8]
        assert found["came"] == expected["came"] == ranks[0][case]["came"]
        assert found["history"] == expected["history"] == ranks[0][case]["history"]


@pytest.mark.parametrize(("case", "ddp"), AS_UNDER_DDP)
def test_formats_change_with_the_phases(ranks, case, ddp):
    for results in ranks:
        found, expected = results[case], results[ddp]
        assert found["step"] == expected["step"] == 12
        first, second = ({computed for _, computed in block} for block in found["seen"])
        assert first == {"torch.bfloat16", "torch.float32"} and second == {"torch.bfloat16"}
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-2, atol=1e-3)


def test_under_fsdp1_a_run_with_phases_is_the_one_under_ddp(ranks):
    for results in ranks:
        torch.testing.assert_close(results["fsdp1"]["losses"], results["ddp"]["losses"], rtol=1e-6, atol=1e-7)


def test_a_phase_in_another_format_than_weights_are_gathered_in_is_refused_before_the_first_step(ranks):
    for results in ranks:
        line, steps = results["gathered"]
        assert line.startswith("phase 1: ") and "gathers the weights of layer" in line and "\n" not in line
        assert steps == 0
