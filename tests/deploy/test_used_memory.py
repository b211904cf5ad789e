"""Bytes of a toy whose every tensor is known."""

import pytest
import torch
from lightnings import pl
from torch import nn

from lightning_mixprec import compare
from lightning_mixprec.deploy.used_memory import LiveBytes, Peak, SavedBytes, bytes_held, peak_of

MIB = 2**20


def test_what_is_let_go_of_no_longer_counts():
    with LiveBytes() as live:
        for _ in range(5):
            torch.empty(MIB // 4).add_(1)
    assert live.peak == MIB
    with LiveBytes() as live:
        kept = [torch.empty(MIB // 4) for _ in range(5)]
    assert live.peak == 5 * MIB and len(kept) == 5


def test_views_and_writes_take_nothing():
    x = torch.ones(MIB // 4)
    with LiveBytes() as live:
        x.view(2, -1)[0].mul_(2).add_(1)
        x.reshape(-1, 2).t()
    assert live.peak == 0


def test_saved_bytes_are_those_of_memories_that_weights_are_not():
    weight, x = nn.Parameter(torch.ones(64, 64)), torch.ones(32, 64)
    saved = SavedBytes([weight])
    with saved.counting():
        hidden = x @ weight  # keeps x, and the weight, which is there anyway
        (hidden.relu() * hidden).sum()  # keeps the result of relu, and hidden
    assert saved.bytes == 4 * (32 * 64) * 3
    assert bytes_held([weight, weight.detach()[:2]]) == 4 * 64 * 64


class Toy(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(256, 512, bias=False)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).relu().sum()


@pytest.mark.parametrize("emulate", [False])
def test_a_toy_takes_what_its_tensors_take(emulate):
    rows, weight = 64, 256 * 512
    comparison = compare(Toy(), {"bf16": "bf16"}, [torch.ones(rows, 256)] * 2, repeats=1, emulate=emulate)
    hidden = rows * 512
    exact = 4 * weight + 4 * (2 * hidden)  # the weight, and the output of the layer while relu makes its own
    assert comparison.reference["bytes"] == exact
    assert comparison.reference["saved_bytes"] == 4 * (hidden + rows * 256)
    # In bf16 there are a copy of the weight and one of the input beside the output of the layer.
    low = 4 * weight + 2 * (weight + rows * 256 + hidden)
    (row,) = comparison.rows
    assert row["memory_ratio"] == pytest.approx(low / exact)
    # The cast weight is kept for the gradient of the input only where that has one.
    assert row["saved_ratio"] == pytest.approx(2 * (hidden + rows * 256) / (4 * (hidden + rows * 256)))


def test_weights_stored_in_16_bits_take_half():
    policy = {"default": "fp32", "layer": "p=bf16,c=bf16"}
    comparison = compare(Toy(), {"stored": policy}, [torch.ones(1, 256)] * 2, repeats=1, emulate=False)
    assert comparison.rows[0]["memory_ratio"] == pytest.approx(0.5, abs=0.02)


def test_what_there_is_no_room_for_is_not_told():
    class Large(Toy):
        def training_step(self, batch, batch_idx):
            if torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().training_step(batch, batch_idx)

    comparison = compare(Large(), {"bf16": "bf16"}, [torch.ones(1, 256)] * 2, repeats=1)
    assert comparison.rows[0]["saved_ratio"] is None and comparison.rows[0]["memory_ratio"] > 0
    assert "memory of 'bf16' could not be counted (OutOfMemoryError" in str(comparison)


class Attending(pl.LightningModule):
    """In eval mode its encoder is one fused operation, whose inside no count of tensors sees."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def training_step(self, batch, batch_idx):
        return self.encoder(batch).float().square().mean()


def test_fused_attention_is_counted_part_by_part_and_stays_fused_elsewhere():
    policies = {"bf16": "bf16", "stored": {"default": "bf16", "encoder": "p=bf16"}}
    comparison = compare(Attending(), policies, [torch.randn(2, 5, 16) for _ in range(2)], repeats=1, emulate=False)
    assert comparison.rows[0]["memory_ratio"] > 0 and torch.backends.mha.get_fastpath_enabled()
    # Not fused, torch has no layer norm with weights in bf16 and an input in fp32.
    assert comparison.rows[1]["memory_ratio"] is None and "memory of 'stored' could not be counted" in str(comparison)
    assert comparison.best(1e9) in policies


@pytest.mark.gpu
def test_the_allocator_says_it_on_cuda():
    device, peak = torch.device("cuda"), Peak()
    x = torch.ones(MIB // 4, device=device)
    with peak_of(device, peak):
        (x + 1).relu()
    assert peak.bytes == 2 * MIB
