"""Free memory is what nobody has taken, and what torch has taken from the GPU and does not use."""

from types import SimpleNamespace

import pytest
import torch

from lightning_mixprec.errors import SupportError
from lightning_mixprec.evidence.instruments import memory
from lightning_mixprec.evidence.instruments.memory import free_cuda_bytes
from lightning_mixprec.evidence.snapshot import Snapshots

CUDA = torch.device("cuda", 0)
MIB = 2**20


@pytest.fixture
def gpu(monkeypatch):
    """A simulated one: 10 MiB are nobody's, of 60 MiB that torch has reserved 20 MiB are in use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * MIB, 80 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20 * MIB)


def test_what_torch_holds_and_does_not_use_is_free(gpu):
    assert free_cuda_bytes(CUDA) == 50 * MIB


@pytest.mark.parametrize(("gradients", "fits"), [(24, True), (26, False)])
@pytest.mark.parametrize("group", [0, 1])
def test_sharded_weights_are_replayed_where_two_sets_of_gradients_and_a_group_fit_into_it(
    gpu, monkeypatch, gradients, group, fits
):
    module = torch.nn.Linear(gradients * MIB // 4, 1, bias=False, device="meta")
    monkeypatch.setattr(memory, "is_sharded", lambda param: True)
    monkeypatch.setattr(memory, "is_any_sharded", lambda module: True)
    monkeypatch.setattr(memory, "largest_group_bytes", lambda module: group * MIB)
    if fits:
        memory.agree_on_room(module, CUDA)
    else:
        with pytest.raises(SupportError, match="do not fit beside the run"):
            memory.agree_on_room(module, CUDA)


OWNED = {"stem": ["0.weight"], "block": ["1.weight"], "head": ["2.weight"]}


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (2, [("stem", "block", "head")]),  # 48 of 50 MiB are left for two sets of 24
        (10, [("stem", "block"), ("head",)]),  # 40
        (35, [("stem",), ("block",), ("head",)]),  # 15
        (60, [("stem",), ("block",), ("head",)]),  # none: what is taken up with each of them is said where it fails
    ],
)
def test_layers_are_looked_at_in_parts_whose_two_gradients_fit_beside_the_largest_group(
    gpu, monkeypatch, group, expected
):
    module = torch.nn.Sequential(*(torch.nn.Linear(2 * MIB, 1, bias=False, device="meta") for _ in range(3)))
    monkeypatch.setattr(memory, "is_sharded", lambda param: True)
    monkeypatch.setattr(memory, "is_any_sharded", lambda module: True)
    monkeypatch.setattr(memory, "largest_group_bytes", lambda module: group * MIB)
    lacking = []
    monkeypatch.setattr(memory, "_free_bytes", lambda device: free_cuda_bytes(CUDA))
    monkeypatch.setattr(memory.ranks, "take_largest", lacking.extend)
    assert memory.parts_with_room(module, torch.device("cpu"), OWNED) == expected
    assert len(lacking) == 1  # ranks agree on it


def test_whole_weights_are_looked_at_all_at_once():
    module = torch.nn.Sequential(*(torch.nn.Linear(2, 1, bias=False) for _ in range(3)))
    assert memory.parts_with_room(module, torch.device("cpu"), OWNED) == [tuple(OWNED)]


@pytest.mark.parametrize(("needed", "on_host"), [(49, False), (51, True)])
def test_a_snapshot_stays_on_the_gpu_where_it_fits_into_it(gpu, monkeypatch, needed, on_host):
    monkeypatch.setattr(Snapshots, "bytes_needed", lambda self, trainer, module: needed * MIB)
    trainer, module = SimpleNamespace(num_devices=1), SimpleNamespace(device=CUDA)
    assert Snapshots(max_bytes=2**40)._place(trainer, module) is on_host


@pytest.mark.gpu
def test_on_cuda_memory_that_was_given_back_to_torch_is_free():
    torch.cuda.empty_cache()
    before = free_cuda_bytes(CUDA)
    held = torch.empty(256 * MIB, dtype=torch.uint8, device=CUDA)
    assert free_cuda_bytes(CUDA) <= before - 256 * MIB + 32 * MIB
    del held
    assert torch.cuda.memory_reserved(CUDA) >= 256 * MIB
    assert abs(free_cuda_bytes(CUDA) - before) < 32 * MIB
    torch.cuda.empty_cache()
