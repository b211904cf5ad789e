"""Layers that are made of products, where products are emulated: attention, recurrent layers, contractions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.engine.backends.emulated import emulation
from lightning_mixprec.policy.policy import as_policy

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MULTIPLY = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
NATIVE = ("mkldnn_rnn_layer", "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "mv", "dot")
EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Watch(TorchDispatchMode):
    """Asserts of every product that its operands are fp32 numbers which 16 bits hold, and that no kernel hides any."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.seen = dtype, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in NATIVE
        if name in MULTIPLY or "attention" in name:
            self.seen.append(name)
            operands = args[:4] if "backward" in name else args[:3]  # not the sums that attention keeps
            for tensor in (arg for arg in operands if isinstance(arg, torch.Tensor)):
                assert tensor.dtype == torch.float32, f"{name} multiplies {tensor.dtype}"
                assert torch.equal(tensor.to(self.dtype).float(), tensor), f"an operand of {name} is off the grid"
        return function(*args, **(kwargs or {}))


def emulated(dtype, compute):
    with torch.autocast("cpu", dtype, cache_enabled=False), emulation("cpu", (dtype,)):
        return compute()


RECURRENT = {
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "lstm, batch first, no bias": lambda: nn.LSTM(3, 4, bias=False, batch_first=True),
    "lstm, projected": lambda: nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True),
    "gru": lambda: nn.GRU(3, 4, 2, bidirectional=True),
    "tanh": lambda: nn.RNN(3, 4),
    "relu": lambda: nn.RNN(3, 4, nonlinearity="relu"),
    "lstm cell": lambda: nn.LSTMCell(3, 4),
    "gru cell": lambda: nn.GRUCell(3, 4),
    "rnn cell": lambda: nn.RNNCell(3, 4),
}


def flat(value):
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return [value.data]
    return [value] if isinstance(value, torch.Tensor) else [part for each in value for part in flat(each)]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
@pytest.mark.parametrize("packed", [False, True], ids=["even", "packed"])
@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("format", DTYPES)
def test_a_recurrent_layer_computes_as_in_fp32_but_for_rounding(format, kind, packed):
    if packed and "cell" in kind:
        pytest.skip("a cell takes one step")
    torch.manual_seed(0)
    layer, dtype = RECURRENT[kind](), DTYPES[format]
    wide = copy.deepcopy(layer)
    x = torch.randn(2, 3) if "cell" in kind else torch.randn(5, 2, 3)
    if packed:
        x = pack_sequence([torch.randn(length, 3) for length in (4, 2, 7)], enforce_sorted=False)
    with Watch(dtype):
        found = flat(emulated(dtype, lambda: layer(x)))
        sum(part.float().square().sum() for part in found).backward()
    expected = flat(wide(x))
    sum(part.square().sum() for part in expected).backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0, atol=8 * EPS[dtype])
    assert found[0].stride() == expected[0].stride()  # dropout behind it draws in the order of memory
    for one, other in zip(layer.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=16 * EPS[dtype] * other.grad.abs().max().item())


@pytest.mark.parametrize("kind", [kind for kind in RECURRENT if "projected" not in kind])
def test_a_recurrent_layer_has_the_dtypes_of_autocast(kind):
    layer = RECURRENT[kind]()
    x = torch.randn(2, 3) if "cell" in kind else torch.randn(5, 2, 3)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            expected = flat(layer(x))
    except RuntimeError as error:  # of a CPU without AVX-512
        assert "primitive" in str(error)
        expected = [torch.zeros(0, dtype=torch.bfloat16)] * 3
    found = flat(emulated(torch.bfloat16, lambda: layer(x)))
    assert [part.dtype for part in found] == [part.dtype for part in expected[: len(found)]]


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.ones(5, 6, dtype=torch.bool).tril(1)},
    "added mask": {"attn_mask": torch.linspace(-2, 2, 30).view(5, 6)},
    "scaled": {"scale": 0.3},
}


@pytest.mark.parametrize("shape", [(2, 3), (3,), ()], ids=["fused", "products of stacks", "products"])
@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_attention_is_within_a_few_roundings_of_fp64(dtype, kind, shape):
    torch.manual_seed(0)
    sizes = (5, 8), (6, 8), (6, 8)
    narrow = [torch.randn(*shape, *size).to(dtype).requires_grad_() for size in sizes]
    exact = [tensor.detach().double().requires_grad_() for tensor in narrow]
    options = dict(ATTENTION[kind])
    if isinstance(options.get("attn_mask"), torch.Tensor) and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    with Watch(dtype) as watch:
        with emulation("cpu", (dtype,)):
            found = F.scaled_dot_product_attention(*narrow, **options)
        found.float().square().sum().backward()
    assert any("flash" in name for name in watch.seen) == (len(shape) == 2)
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].double()
    expected = F.scaled_dot_product_attention(*exact, **options)
    expected.square().sum().backward()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4 * EPS[dtype] * expected.abs().max().item())
    for one, other in zip(narrow, exact, strict=True):
        bound = 8 * EPS[dtype] * other.grad.abs().max().item()
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=bound)


def test_a_row_of_attention_that_sees_nothing_is_zero():
    x = torch.randn(3, 4).bfloat16()
    with emulation("cpu", (torch.bfloat16,)):
        found = F.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(3, 3, dtype=torch.bool))
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("needs_weights", [True, False])
@pytest.mark.parametrize("is_training", [True, False])
def test_attention_modules_compute_by_products_in_training_and_in_evaluation(is_training, needs_weights):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).train(is_training)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    encoder.train(is_training)
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(is_training), Watch(torch.bfloat16) as watch:
        found = emulated(torch.bfloat16, lambda: attention(x, x, x, need_weights=needs_weights)[0])
        inside = emulated(torch.bfloat16, lambda: encoder(x, src_key_padding_mask=padding))
    assert len(watch.seen) >= 3 + 2 * 4
    torch.testing.assert_close(found.float(), attention(x, x, x)[0], rtol=0, atol=0.02)
    torch.testing.assert_close(inside.float()[0], encoder(x, src_key_padding_mask=padding)[0], rtol=0, atol=0.05)


def test_a_contraction_of_three_has_every_result_on_the_grid():
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5, 3)
    with Watch(torch.bfloat16) as watch:
        found = emulated(torch.bfloat16, lambda: torch.einsum("ij,jk,kl->il", a, b, c))
    assert len(watch.seen) == 2
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), a @ b @ c, rtol=0, atol=0.1)


def test_backward_within_computes_a_checkpointed_function_anew_as_before():
    torch.manual_seed(0)
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(2, 4)
    with Watch(torch.float16) as watch, torch.autocast("cpu", torch.float16), emulation("cpu", (torch.float16,)):
        checkpoint(lambda x: F.linear(x, weight).tanh(), x, use_reentrant=False).float().sum().backward()
    assert watch.seen.count("mm") == 3
    assert weight.grad is not None


@pytest.mark.parametrize("policy", ["bf16", {"default": "fp32", "attention": "fp16", "inner": "bf16"}], ids=str)
def test_compiled_in_one_graph_it_computes_the_same_and_once_more_after_a_change(policy):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 24)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.inner(x).chunk(3, -1))
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = torch.einsum("bts,bsd->btd", torch.einsum("btd,bsd->bts", x, x), x)
            return self.attention(x, x, x)[0] + self.attention(x, x, x, need_weights=False)[0]

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x, graphs = Model(), torch.randn(2, 5, 8), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(run):
        model.zero_grad()
        with attachment.context():
            output = run(x)
        output.float().square().sum().backward()
        return [output.detach(), *(param.grad for param in model.parameters())]

    attachment = attach(model, as_policy(policy).resolve(model), "cpu", emulate=True)
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for each, known in ((policy, 1), ("fp16", 2), (policy, 2)):
        attachment.change(as_policy(each).resolve(model))
        for _ in range(2):
            assert all(map(torch.equal, step(compiled), step(model)))
        assert len(graphs) == known
    attachment.detach()
    torch._dynamo.reset()
