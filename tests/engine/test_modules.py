"""Each kind of module that computes in a way of its own, against the same module cast by hand."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

FORMATS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CROSSINGS = [("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp64"), ("bf16", "fp64"), ("fp64", "fp32")]


class Holder(nn.Module):
    """A root whose own operations are in the default format and hand on what they get."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def own_format(compute):
    """Autocast as Lightning's plugins run it."""
    dtype = FORMATS[compute] if "16" in compute else None
    return torch.autocast("cpu", dtype=dtype, enabled="16" in compute, cache_enabled=False)


def by_hand(layer, compute, x):
    """What the layer gives in ``compute``: with everything of it in fp64, or with its own autocast state."""
    layer = copy.deepcopy(layer)
    if compute == "fp64":
        layer, x = layer.double(), x.double()
    elif compute == "fp32":
        x = x.float()
    with own_format(compute):
        return layer(x), layer


def into(default, y):
    return y.to(FORMATS[default]) if default in ("fp32", "fp64") else y.float() if y.dtype == torch.float64 else y


def assert_as_by_hand(layer, x, default, inner, attached, policy=None):
    oracle = copy.deepcopy(layer)
    expected, oracle = by_hand(oracle, inner, x.to(FORMATS[default]) if default == "fp64" else x)
    model = Holder(layer)
    with attached(model, policy or {"default": default, "layer": inner}) as attachment:
        with attachment.context():
            y = model(x.to(FORMATS[default]) if default == "fp64" else x)
        y.float().pow(2).sum().backward()
    into(default, expected).float().pow(2).sum().backward()
    assert y.dtype == into(default, expected).dtype and torch.equal(y, into(default, expected))
    for (name, mine), theirs in zip(layer.named_parameters(), oracle.parameters(), strict=True):
        assert mine.grad.dtype == mine.dtype, name
        assert torch.equal(mine.grad, theirs.grad.to(mine.dtype)), name
    return oracle


@pytest.mark.parametrize("default, inner", CROSSINGS)
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers(kind, default, inner, attached):
    layer = nn.Sequential(kind(3, 4, batch_first=True), First(), nn.Linear(4, 2))
    assert_as_by_hand(layer, torch.randn(2, 5, 3), default, inner, attached)


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


@pytest.mark.parametrize("default, inner", CROSSINGS)
def test_packed_sequences_go_through_recurrent_layers(default, inner, attached):
    model = Holder(nn.LSTM(3, 4))
    sequences = [torch.randn(4, 3, dtype=FORMATS["fp64" if default == "fp64" else "fp32"]), torch.randn(2, 3)]
    packed = pack_sequence([s.to(sequences[0].dtype) for s in sequences])
    with attached(model, {"default": default, "layer": inner}) as attachment, attachment.context():
        out, (h, c) = model(packed)
    oracle = copy.deepcopy(model.layer)
    with own_format(inner):
        theirs, _ = (oracle.double() if inner == "fp64" else oracle)(
            packed.to(FORMATS["fp32" if "16" in inner else inner])
        )
    assert h.dtype == c.dtype == out.data.dtype == into(default, theirs.data).dtype
    assert torch.equal(pad_packed_sequence(out)[0], into(default, pad_packed_sequence(theirs)[0]))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_weights_stored_in_fp64(kind, attached):
    model = Holder(kind(3, 4, num_layers=2, bidirectional=True))
    x = torch.randn(5, 2, 3)
    expected = model(x)[0]
    flat = list(model.layer._flat_weights)
    with attached(model, {"default": "fp32", "layer": "p=fp64"}):
        y = model(x)[0]
        y.sum().backward()
        assert torch.equal(y, expected)
        assert all(w.dtype == w.grad.dtype == torch.float64 for w in model.layer._flat_weights)
        assert all(a is b for a, b in zip(model.layer._flat_weights, flat, strict=True))
    assert torch.equal(model(x)[0], expected)


@pytest.mark.parametrize("default, inner", CROSSINGS)
@pytest.mark.parametrize("training", [True, False])
def test_batchnorm_keeps_its_statistics_in_fp32_or_wider(training, default, inner, attached):
    layer = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)).train(training)
    oracle = assert_as_by_hand(layer, torch.randn(4, 2, 5), default, inner, attached)
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == (torch.int64 if "num" in name else torch.float32)
        assert torch.equal(buffer, oracle.get_buffer(name).to(buffer.dtype)), name


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)])
@pytest.mark.parametrize("default, inner", CROSSINGS)
def test_norms(norm, default, inner, attached):
    assert_as_by_hand(copy.deepcopy(norm), torch.randn(3, 4), default, inner, attached)


@pytest.mark.parametrize("default, inner", CROSSINGS)
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(training, default, inner, attached):
    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    layer = SelfAttention().train(training)
    assert_as_by_hand(
        layer,
        torch.randn(2, 3, 4),
        default,
        inner,
        attached,
        {"default": default, "layer.attention": inner, "layer": inner},
    )


@pytest.mark.parametrize("default, inner", CROSSINGS)
def test_attention_with_masks_and_weights_returned(default, inner, attached):
    model = Holder(nn.MultiheadAttention(4, 2, batch_first=True))
    x = torch.randn(2, 3, 4, dtype=torch.float64 if default == "fp64" else torch.float32)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    with attached(model, {"default": default, "layer": inner}) as attachment, attachment.context():
        y, weights = model(x, x, value=x, key_padding_mask=mask)
    oracle = copy.deepcopy(model.layer)
    if inner == "fp64":
        oracle, x = oracle.double(), x.double()
    with own_format(inner):
        expected, theirs = oracle(*[x.to(FORMATS["fp32"]) if inner != "fp64" else x] * 3, key_padding_mask=mask)
    assert torch.equal(y, into(default, expected)) and torch.equal(weights, into(default, theirs))


@pytest.mark.parametrize("default, inner", CROSSINGS)
def test_lazy_modules(default, inner, attached):
    model = Holder(nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()))
    x = torch.randn(4, 5, dtype=torch.float64 if default == "fp64" else torch.float32)
    with attached(model, {"default": default, "layer.0": inner}) as attachment, attachment.context():
        y = model(x)
        y.float().sum().backward()
    assert type(model.layer[0]) is nn.Linear and model.layer[0].weight.dtype == torch.float32
    assert model.layer[0].weight.grad.dtype == torch.float32
    assert "forward" not in model.layer[0].__dict__
    with attached(model, {"default": default, "layer.0": inner}) as attachment, attachment.context():
        assert torch.equal(model(x), y)


def test_lazy_weights_are_made_in_the_format_they_are_stored_in(attached):
    model = Holder(nn.LazyLinear(3))
    x = torch.ones(1, 2)
    with attached(model, {"default": "fp32", "layer": "p=fp64"}):
        model(x).sum().backward()
        assert model.layer.weight.dtype == model.layer.weight.grad.dtype == torch.float64
    assert model.layer.weight.dtype == torch.float32


@pytest.mark.parametrize("default, inner", CROSSINGS)
@pytest.mark.parametrize("normed", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations(normed, default, inner, attached):
    torch.manual_seed(0)
    layer = nn.Sequential(normed(nn.Linear(3, 3)), nn.ReLU())
    assert_as_by_hand(layer, torch.randn(2, 3), default, inner, attached)


@pytest.mark.parametrize("normed", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_weights_stored_in_fp64(normed, attached):
    model = Holder(normed(nn.Linear(3, 3)))
    x = torch.randn(2, 3)
    expected = model(x)
    with attached(model, {"default": "fp32", "layer": "p=fp64"}):
        y = model(x)
        y.sum().backward()
        assert torch.equal(y, expected)
        assert all(p.dtype == p.grad.dtype == torch.float64 for p in model.parameters())


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.3)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("default, inner", CROSSINGS)
@pytest.mark.parametrize("hooked", [old_weight_norm, nn.utils.spectral_norm, pruned])
def test_weights_computed_by_hooks(hooked, default, inner, attached):
    layer = hooked(nn.Linear(3, 3))
    hooks = list(layer._forward_pre_hooks.items())
    model, x = Holder(layer), torch.randn(2, 3)
    layer.register_forward_pre_hook(lambda module, args: None)
    oracle = hooked_by_hand(layer, inner)
    with own_format(inner):
        expected = oracle(x.double() if inner == "fp64" else x)
    with attached(model, {"default": default, "layer": inner}) as attachment, attachment.context():
        y = model(x.double() if default == "fp64" else x)
        y.float().sum().backward()
    assert torch.equal(y, into(default, expected))
    assert list(layer._forward_pre_hooks.items())[:-1] == hooks
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, oracle.get_buffer(name).float()), name


def hooked_by_hand(layer, inner):
    # torch refuses to deep-copy a module whose weight is computed, so its copy starts from an uncomputed one.
    with torch.no_grad():
        layer.weight = layer.weight.detach()
    oracle = copy.deepcopy(layer)
    return oracle.double() if inner == "fp64" else oracle


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("hooked", [old_weight_norm, nn.utils.spectral_norm, pruned])
def test_weights_computed_by_hooks_from_what_is_stored_in_fp64(hooked, attached):
    layer = hooked(nn.Linear(3, 3))
    model, x = nn.Sequential(nn.Sequential(layer)), torch.randn(2, 3)
    oracle = hooked_by_hand(layer, "fp32")
    expected = oracle(x)
    with attached(model, {"default": "fp32", "0": "p=fp64"}):
        y = model(x)
        y.sum().backward()
        assert torch.equal(y, expected)
        assert all(p.grad.dtype == torch.float64 for p in layer.parameters())
    assert torch.equal(layer(x), oracle(x))


@pytest.mark.parametrize("default, inner", CROSSINGS)
def test_complex_parameters_keep_their_imaginary_part(default, inner, attached):
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex64))
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(x.float(), dim=-1) * self.weight, n=4) * self.gain.sum().float()

    model = Holder(Spectral())
    before = model.layer.weight.detach().clone()
    x = torch.randn(2, 4, dtype=torch.float64 if default == "fp64" else torch.float32)
    expected = model.layer(x)
    for policy in ({"default": default, "layer": inner}, {"default": default, "layer": f"p=fp64,c={inner}"}):
        with attached(model, policy) as attachment, attachment.context():
            y = model(x)
            y.float().sum().backward()
            assert model.layer.weight.dtype == torch.complex64 and model.layer.weight.grad.is_complex()
        assert torch.equal(model.layer.weight, before)
        assert torch.allclose(y.float(), expected, atol=1e-6)


@pytest.mark.parametrize("default, inner", CROSSINGS)
def test_complex_and_integer_tensors_pass_borders_unharmed(default, inner, attached):
    class Keep(nn.Module):
        def forward(self, *args):
            return args

    model = Holder(Keep())
    given = torch.ones(1, dtype=torch.complex64), torch.ones(1, dtype=torch.complex128), torch.tensor([2**24 + 1])
    with attached(model, {"default": default, "layer": inner}) as attachment, attachment.context():
        assert all(a is b for a, b in zip(model(*given), given, strict=True))


@pytest.mark.parametrize("default, inner", CROSSINGS)
def test_convolutions_and_embeddings(default, inner, attached):
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.conv = nn.Conv1d(4, 2, 2)

        def forward(self, ids):
            return self.conv(self.embedding(ids).transpose(1, 2))

    model, ids = Holder(Text()), torch.tensor([[0, 1, 4]])
    with attached(model, {"default": default, "layer": inner}) as attachment, attachment.context():
        y = model(ids)
        y.float().sum().backward()
    oracle = copy.deepcopy(model.layer)
    with own_format(inner):
        expected = (oracle.double() if inner == "fp64" else oracle)(ids)
    assert torch.equal(y, into(default, expected))


def test_a_loss_in_fp64_of_a_16_bit_model(attached):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3, 3)
            self.loss = nn.CrossEntropyLoss()

        def forward(self, x, y):
            self.logits = self.body(x)
            return self.loss(self.logits, y)

    model = Net()
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with attached(model, {"default": "bf16", "loss": "fp64"}) as attachment, attachment.context():
        loss = model(x, y)
    assert loss.dtype == torch.float32
    assert loss.item() == F.cross_entropy(model.logits.double(), y).float().item()
