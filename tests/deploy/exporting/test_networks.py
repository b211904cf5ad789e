"""Networks that people have, exported: what stands in the file is what the policy said, and computes the same."""

import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from capabilities import lacks_16_bit_lstm
from selection import slow_cases_but_for
from torch import nn
from torch._inductor import cpp_builder

from lightning_mixprec import MixPrecError, export

slow = pytest.mark.slow
SUFFIX = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx", "torchscript": ".ts", "weights": ".safetensors"}
FORMATS = [pytest.param("onnx", marks=slow), "pt2", "torchscript", "weights"]


def has_compiler():
    try:
        cpp_builder.get_cpp_compiler()
    except Exception:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="AOTInductor needs a C++ compiler, here is none")


def exported(folder: Path, module, policy, inputs, format):
    with warnings.catch_warnings():
        if format == "torchscript":
            warnings.simplefilter("ignore", FutureWarning)
        path = folder / f"model{SUFFIX[format]}"
        return export(module, path, policy=policy, example_inputs=inputs, format=format)


class Recommender(nn.Module):
    """A DLRM in small: a bag of embeddings, two perceptrons, an interaction."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 8, mode="sum")
        self.bottom = nn.Linear(4, 8)
        self.top = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, dense, indices, offsets):
        low = self.bottom(dense)
        return self.top(torch.cat([low, (low * self.bag(indices, offsets)).sum(1, keepdim=True)], 1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.cell = kind(8, 8, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens):
        return self.head(self.cell(self.embedding(tokens))[0])


class Chain(nn.Module):
    """Products of several matrices as one operation of torch."""

    def __init__(self, name):
        super().__init__()
        self.name, self.weight = name, nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        if self.name == "multi_dot":
            return torch.linalg.multi_dot([x, self.weight, self.weight])
        return x @ torch.linalg.matrix_power(self.weight, 3)


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return torch.einsum("bi,io->bo", x, self.weight)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        heads = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in self.qkv(self.norm(x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Gpt(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(64, 16), nn.Embedding(8, 16)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.head = nn.Linear(16, 64, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.blocks(self.tokens(tokens) + self.places(places)))


def convolutional():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)


NETWORKS = {
    "convolutions": (convolutional, (torch.randn(2, 3, 8, 8),), {"default": "bf16", "4": "fp32"}),
    "encoder": (encoder, (torch.randn(2, 3, 16),), {"default": "bf16", "layers.0.linear1": "fp32"}),
    "encoder, uniform": (encoder, (torch.randn(2, 3, 16),), "bf16"),
    "gpt": (Gpt, (torch.randint(64, (2, 8)),), {"default": "fp16", "head": "fp32", "tokens": "fp32"}),
    "recommender": (
        Recommender,
        (torch.randn(3, 4), torch.randint(50, (7,)), torch.tensor([0, 2, 5])),
        {"default": "bf16", "bag": "fp32"},
    ),
}
PRODUCTS = (nn.Linear, nn.Conv2d, nn.MultiheadAttention, nn.LSTM, nn.GRU)


def check(made, module, policy):
    """Each layer that has products computes them in its format."""
    from lightning_mixprec.policy.policy import as_policy

    assigned = as_policy(policy).resolve(module)
    named = {name for name, each in module.named_modules() if isinstance(each, PRODUCTS)}
    inner = {f"{name}.out_proj" for name in named}  # attention computes that itself
    if made.format != "weights":
        named -= inner
    assert {name: made.layers[name] for name in named} == {name: assigned[name].compute for name in named}


@pytest.mark.parametrize("network", slow_cases_but_for(["convolutions", "gpt"], {k: (v,) for k, v in NETWORKS.items()}))
@pytest.mark.parametrize("format", FORMATS)
def test_networks(tmp_path, network, format):
    make, inputs, policy = network
    torch.manual_seed(0)
    module = make()
    made = exported(tmp_path, module, policy, inputs, format)
    check(made, module, policy)
    if format in ("pt2", "torchscript"):
        assert made.max_difference == 0


@slow
@pytest.mark.parametrize("policy", ["fp16", {"default": "bf16", "conv1": "fp32", "fc": "fp32"}])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.parametrize("format", ["onnx", "pt2", "torchscript", "weights"])
def test_torchvision(tmp_path, name, format, policy):
    import torchvision

    if name != "resnet18" and policy != "fp16":
        policy = {"default": "bf16", "classifier": "fp32"}
    torch.manual_seed(0)
    module = getattr(torchvision.models, name)(num_classes=10)
    check(exported(tmp_path, module, policy, torch.randn(1, 3, 32, 32), format), module, policy)


@slow
@needs_compiler
@pytest.mark.parametrize("network", [NETWORKS["convolutions"], NETWORKS["encoder"]], ids=["convolutions", "encoder"])
def test_aoti(tmp_path, network):
    make, inputs, policy = network
    torch.manual_seed(0)
    module = make()
    made = exported(tmp_path, module, policy, inputs, "aoti")
    check(made, module, policy)
    with torch.no_grad():
        found = torch._inductor.aoti_load_package(str(made.path))(*inputs)
    exact = exported(tmp_path / "exact", module, policy, inputs, "pt2")
    expected = torch.export.load(exact.path).module()(*inputs)
    assert (found.float() - expected.float()).abs().max() <= 1e-3 * expected.float().abs().max()


class TestWhatIsMadeOfProducts:
    """Operations inside which autocast casts are taken apart, so that the casts stand in the graph."""

    @slow
    @pytest.mark.parametrize("format", ["pt2", "onnx"])
    def test_gru(self, tmp_path, format):
        made = exported(tmp_path, Recurrent(nn.GRU), "bf16", torch.randint(20, (2, 3)), format)
        assert made.layers["cell"] == "bf16"
        assert format == "onnx" or made.max_difference == 0

    def test_einsum(self, tmp_path):
        made = exported(tmp_path, Einsum(), "bf16", torch.randn(2, 4), "pt2")
        assert (made.layers, made.max_difference) == ({"": "bf16"}, 0)

    @pytest.mark.parametrize("name", ["multi_dot", "matrix_power"])
    def test_chains_of_products(self, tmp_path, name):
        made = exported(tmp_path, Chain(name), "bf16", torch.randn(2, 4), "pt2")
        assert (made.layers, made.max_difference) == ({"": "bf16"}, 0)

    def test_lstm_in_fp32_is_the_kernel_of_torch(self, tmp_path):
        policy = {"default": "bf16", "cell": "fp32"}
        made = exported(tmp_path, Recurrent(nn.LSTM), policy, torch.randint(20, (2, 3)), "pt2")
        assert (made.layers["cell"], made.layers["head"], made.max_difference) == ("fp32", "bf16", 0)

    @slow
    @pytest.mark.skipif(lacks_16_bit_lstm(), reason="torch has no LSTM in 16 bits on this processor")
    def test_lstm_in_16_bits_is_its_parts_and_close(self, tmp_path):
        made = exported(tmp_path, Recurrent(nn.LSTM), "bf16", torch.randint(20, (2, 3)), "pt2")
        assert made.layers["cell"] == "bf16"
        assert 0 < made.max_difference < 0.01

    def test_torchscript_names_the_layer_that_it_cannot_hold(self, tmp_path):
        with pytest.raises(MixPrecError, match="layer 'cell' is assigned bf16, and its gru is in fp32"):
            exported(tmp_path, Recurrent(nn.GRU), "bf16", torch.randint(20, (2, 3)), "torchscript")
        assert list(tmp_path.iterdir()) == []
