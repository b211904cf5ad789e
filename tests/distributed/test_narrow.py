"""Products in 8 bits on two processes, copied (DDP) and sharded (FSDP2): the same numbers, decisions and statistics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import saved_by_two

pytestmark = pytest.mark.slow

CASES = {"fp8": "fp8", "fp8 by row": "fp8", "int8": "int8"}
BF16, FP16 = "torch.bfloat16", "torch.float16"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes saved."""
    return saved_by_two(Path(__file__).parent / "narrow_script.py", tmp_path_factory.mktemp("narrow"))


@pytest.mark.parametrize("case", CASES)
def test_sharded_weights_are_those_under_ddp_on_both_ranks(ranks: list[dict[str, Any]], case: str) -> None:
    for results in ranks:
        expected, found = results[f"ddp {case}"], results[f"fsdp2 {case}"]
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-2, atol=1e-4)
        assert found["step"] == expected["step"] > 0
    for name in ("ddp", "fsdp2"):
        one, other = (results[f"{name} {case}"]["weights"] for results in ranks)
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("case", CASES)
def test_weights_are_gathered_in_the_16_bits_around_the_products(ranks: list[dict[str, Any]], case: str) -> None:
    [*_, (gathered, *_)] = ranks[0][f"fsdp2 {case}"]["seen"]
    assert str(gathered[0]) == (FP16 if case == "int8" else BF16)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", CASES)
def test_an_overflow_on_one_rank_is_skipped_on_both(ranks: list[dict[str, Any]], name: str, case: str) -> None:
    for results in ranks:
        found = results[f"{name} {case} spoiled"]
        assert found["skipped"] == results[f"{name} {case}"]["skipped"] + 2
        assert all(weights.isfinite().all() for weights in found["weights"])


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", CASES)
def test_statistics_of_operands_are_of_both_ranks(ranks: list[dict[str, Any]], name: str, case: str) -> None:
    one, other = (results[f"{name} {case}"] for results in ranks)
    told = {layer: row["operands"] for layer, row in one["latest"].items() if "operands" in row}
    assert told == {layer: row["operands"] for layer, row in other["latest"].items() if "operands" in row}
    assert {row["format"] for row in told.values()} == {CASES[case]}
    assert all(row.keys() == {"format", "scaling", "input", "weight", "gradient"} for row in told.values())
    assert all(map(torch.equal, one["weights"], ranks[0][f"{name} {case} unwatched"]["weights"]))
