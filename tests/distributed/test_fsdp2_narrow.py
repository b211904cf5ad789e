"""Weights in 16 bits under FSDP2, in uneven shards: as on one process, or stock on fp32 weights, bit for bit."""

from pathlib import Path

import pytest
import torch
from exact_gradients import outcome, ran
from plugin_models import same
from processes import saved_by_two
from uneven_shards import CONFIGURED, Uneven

pytestmark = pytest.mark.slow
FORMATS = ["bf16", "fp16"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    return saved_by_two(Path(__file__).parent / "fsdp2_narrow_script.py", tmp_path_factory.mktemp("narrow"))


def alone(stored, name):
    """Stock Lightning and torch on fp32 weights, or ours on one process where bits are lost."""
    is_exact = name in ("exact", "sgd", "undamped")
    return outcome(*ran(None if is_exact else stored, Uneven, configure=CONFIGURED[name]))


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("name", CONFIGURED)
def test_shards_are_those_of_one_process(ranks, name, stored):
    """Rounding at random does not depend on who has which part."""
    expected = alone(stored, name)
    assert all(same(results[stored, name]["outcome"], expected) for results in ranks)


@pytest.mark.parametrize("stored", FORMATS)
def test_a_group_is_stored_in_one_format_and_each_rank_has_its_part(ranks, stored):
    dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[stored]
    for results, rows in zip(ranks, (4, 3), strict=True):
        looks = results[stored, "exact"]["looks"]
        assert looks["stored"] == {
            "pair.first.weight": dtype,
            "pair.first.bias": dtype,
            "pair.second.weight": "torch.float32",
            "pair.second.bias": "torch.float32",
        }
        assert looks["sizes"] == [rows * 4, rows, rows * 4, rows]


@pytest.mark.parametrize("stored", FORMATS)
def test_layers_that_torchs_function_shards_are_stored_so_too(ranks, stored):
    assert all(same(results[stored, "by hand"]["outcome"], alone(stored, "exact")) for results in ranks)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("name", ["exact", "undamped"])
def test_a_distributed_checkpoint_goes_on_bit_for_bit(ranks, name, stored):
    assert all(same(results[stored, f"resumed {name}"]["outcome"], alone(stored, name)) for results in ranks)


@pytest.mark.parametrize("stored", FORMATS)
def test_a_group_of_two_stored_formats_is_one_line(ranks, stored):
    for results in ranks:
        message = results[stored, "together"]
        assert (
            f"a group is to store 'pair.first' in {stored} and 'pair.second' in fp32; shard with plugin.fully_shard"
            in message
        )
        assert "\n" not in message


def test_the_shards_are_of_fp32_again(ranks):
    weights = ranks[0]["bf16", "exact"]["outcome"]
    assert {value.dtype for value in weights.values()} == {torch.float32}
