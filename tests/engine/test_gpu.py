"""The engine on CUDA, where autocast, attention and recurrent layers take other ways than on CPU."""

import copy

import pytest
import torch
from torch import nn

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.policy.policy import as_policy

pytestmark = pytest.mark.gpu


@pytest.fixture
def run():
    def run(model, policy, x):
        attachment = attach(model, as_policy(policy).resolve(model), "cuda")
        with attachment.context():
            y = model(x)
        if y.requires_grad:
            y.float().pow(2).sum().backward()
        attachment.detach()
        return y

    return run


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_an_fp32_layer_in_a_16_bit_model_equals_one_cast_by_hand(low, run):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).cuda()
    oracle, x = copy.deepcopy(model), torch.randn(4, 8, device="cuda")
    y = run(model, {"default": "bf16" if low == torch.bfloat16 else "fp16", "1": "fp32"}, x)
    with torch.autocast("cuda", dtype=low):
        h = oracle[0](x)
        with torch.autocast("cuda", enabled=False):
            h = oracle[1](h.float())
        expected = oracle[2](h)
    expected.float().pow(2).sum().backward()
    assert torch.equal(y, expected)
    for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("policy", [{"default": "fp32", "0": "bf16"}, {"default": "bf16", "0": "fp64"}])
def test_inference_of_an_encoder_computes_what_training_computes(policy, run):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.Linear(8, 2)).cuda().eval()
    x = torch.randn(2, 4, 8, device="cuda")
    expected = run(model, policy, x)
    with torch.no_grad():
        y = run(model, policy, x)
    assert y.dtype == expected.dtype
    assert torch.allclose(y.float(), expected.float(), atol=3e-2)


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
@pytest.mark.parametrize("policy", [{"default": "bf16", "0": "fp32"}, {"default": "fp32", "0": "p=fp64"}])
def test_recurrent_layers(policy, run):
    class First(nn.Module):
        def forward(self, pair):
            return pair[0]

    model = nn.Sequential(nn.LSTM(4, 4), First()).cuda()
    x = torch.randn(3, 2, 4, device="cuda")
    expected = copy.deepcopy(model)(x)
    assert torch.allclose(run(model, policy, x).float(), expected, atol=1e-5)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(model(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_cudnn_finds_the_seen_weights_of_a_recurrent_layer_in_one_piece(kind, run):
    """It warns of loose ones, which it copies at every call, and a warning is an error here."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = kind(4, 4, num_layers=2, bidirectional=False)

        def forward(self, x):
            for _ in range(3):
                x, _ = self.cell(x)
            return x

    model = Decoder().cuda().double()
    x = torch.randn(3, 2, 4, device="cuda")
    y = run(model, {"default": "fp32", "cell": "p=fp64,c=fp32"}, x)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    exact = model(x.double())
    exact.float().pow(2).sum().backward()
    assert torch.allclose(y.double(), exact, atol=1e-5)
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(found, parameter.grad, atol=1e-4)


def test_a_mixed_model_compiles_whole(run):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).cuda()
    attachment = attach(model, as_policy({"default": "bf16", "1": "c=fp32,o=input"}).resolve(model), "cuda")
    x = torch.randn(4, 8, device="cuda")
    with attachment.context():
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        assert torch.equal(y, model(x))
    attachment.detach()
