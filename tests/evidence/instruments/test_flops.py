"""Counted operations, against torch's own counter where it counts, and against sums by hand where it does not."""

import pytest
import torch
import torch.nn.functional as F
from lightnings import pl
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_mixprec.evidence.instruments.flops import FlopCount
from lightning_mixprec.evidence.instruments.probe import layers_of
from lightning_mixprec.evidence.replay import StepReplay
from lightning_mixprec.evidence.run_formats import PolicyFormats

CPU = torch.device("cpu")


def counted(model, run):
    with FlopCount(layers_of(model)) as count:
        run()
    return {layer: flops for layer, flops in count.flops.items() if flops}


def own(function, *args):
    """What a function takes that no layer calls."""
    return counted(nn.Identity(), lambda: function(*args)).get("", 0)


def torchs(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class Attention(nn.Module):
    """Attention written into the forward of a block, with one of two ways to multiply."""

    def __init__(self, is_fused=False):
        super().__init__()
        self.qkv, self.out, self.is_fused = nn.Linear(8, 24), nn.Linear(8, 8), is_fused

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        if self.is_fused:
            return self.out(F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0])
        weights = torch.einsum("bqc,bkc->bqk", query, key).softmax(-1)
        return self.out(weights @ value)


def image_net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.GELU()),
        nn.Flatten(),
        nn.Linear(6 * 5 * 5, 10, bias=False),
    )


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), (5, 8)),
    "images": (image_net, (2, 3, 7, 7)),
    "attention": (Attention, (2, 5, 8)),
    "gru": (lambda: nn.GRU(8, 6, bidirectional=True), (5, 2, 8)),
}


@pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_sum_over_layers_is_what_torch_counts(make, shape, mode):
    model, x = make(), torch.randn(shape)
    with mode():
        assert sum(counted(model, lambda: model(x)).values()) == torchs(lambda: model(x)) > 0


def test_every_layer_has_its_own():
    model, x = image_net(), torch.randn(2, 3, 7, 7)
    assert counted(model, lambda: model(x)) == {
        "0": 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3),
        "1": 2 * (2 * 4 * 2 * 2) * (3 * 3),
        "2.0": 2 * (2 * 4 * 2 * 2) * (3 * 3 * 3),
        "4": 2 * (2 * 150) * 10,
    }


@pytest.mark.parametrize("is_fused", [False, True])
def test_attention_written_into_a_block_is_the_blocks(is_fused):
    model = nn.Sequential(Attention(is_fused))
    flops = counted(model, lambda: model(torch.randn(2, 5, 8)))
    assert flops == {"0": 2 * 2 * (2 * 5 * 5 * 8), "0.qkv": 2 * 10 * 8 * 24, "0.out": 2 * 10 * 8 * 8}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("training", [False, True])
def test_an_attention_layer_is_one_unit(need_weights, mode, training):
    model, x = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)}), torch.randn(3, 5, 8)
    model.train(training)
    with mode():
        flops = counted(model, lambda: model["attention"](x, x, x, need_weights=need_weights))
    assert flops == {"attention": 2 * 15 * 8 * (24 + 8) + 2 * 2 * (3 * 5 * 5 * 8)}


def test_key_and_value_heads_may_be_fewer():
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    flops = own(lambda: F.scaled_dot_product_attention(query, key, key, enable_gqa=True))
    assert flops == 2 * 2 * (2 * 4 * 5 * 7 * 8)


KERNELS = {
    "flash": (torch.ops.aten._scaled_dot_product_flash_attention, ()),
    "efficient": (torch.ops.aten._scaled_dot_product_efficient_attention, (None, True)),
    "cudnn": (torch.ops.aten._scaled_dot_product_cudnn_attention, (None, True)),
}


@pytest.mark.parametrize(("kernel", "rest"), KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_kernels_of_cuda(kernel, rest, heads):
    query = torch.empty(2, 4, 5, 8, device="meta", dtype=torch.float16)
    key = torch.empty(2, heads, 7, 8, device="meta", dtype=torch.float16)
    assert own(lambda: kernel(query, key, key, *rest)) == 2 * 2 * (2 * 4 * 5 * 7 * 8)


GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}


@pytest.mark.parametrize("cls", GATES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers_count_as_in_the_textbook(cls, bias, batch_first, directions):
    model = cls(4, 6, 2, bias=bias, batch_first=batch_first, bidirectional=directions == 2)
    gates, inputs = GATES[cls] * 6, 4 + 6 * directions
    expected = 2 * (5 * 3) * directions * gates * (inputs + 2 * 6)
    assert counted(model, lambda: model(torch.randn(5, 3, 4))) == {"": expected}
    with torch.autocast("cpu", torch.bfloat16):
        assert counted(model, lambda: model(torch.randn(5, 3, 4))) == {"": expected}


def test_packed_sequences_count_the_times_that_they_have():
    model, packed = nn.LSTM(4, 6), pack_padded_sequence(torch.randn(5, 3, 4), [5, 3, 2])
    assert counted(model, lambda: model(packed)) == {"": 2 * (5 + 3 + 2) * 24 * (4 + 6)}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projected_lstm_multiplies_by_what_it_projects_to():
    model = nn.LSTM(4, 6, proj_size=3)
    assert counted(model, lambda: model(torch.randn(5, 3, 4))) == {"": 2 * 15 * (24 * (4 + 3) + 6 * 3)}


@pytest.mark.parametrize("cls", [nn.GRU, nn.LSTM])
def test_cudnns_recurrent_layer_counts_as_the_cpus(cls):
    model = cls(4, 6, 2, bidirectional=True)
    mode = {nn.LSTM: 2, nn.GRU: 3}[cls]
    x, hidden = torch.randn(5, 3, 4, device="meta"), torch.zeros(4, 3, 6, device="meta")
    cell = hidden if cls is nn.LSTM else None
    weights = [weight.to("meta") for weight in model._flat_weights]
    rest = (mode, 6, 0, 2, False, 0.0, True, True, [], None)
    flops = own(lambda: torch.ops.aten._cudnn_rnn(x, weights, 4, None, hidden, cell, *rest))
    assert flops == sum(counted(model, lambda: model(torch.randn(5, 3, 4))).values())


def coo():
    return torch.eye(5).to_sparse()


def csr():
    return torch.eye(5).to_sparse_csr()


A, B, V = torch.randn(5, 8), torch.randn(8, 3), torch.randn(8)
STACK, OTHERS = torch.randn(2, 5, 8), torch.randn(2, 8, 3)
PAIRS = torch.randn(7, 3), torch.randn(7, 4)
BROAD = torch.randn(2, 16, 16, dtype=torch.bfloat16)
OPERATIONS = {
    "mm": (lambda: A @ B, 2 * 5 * 8 * 3),
    "mv": (lambda: A @ V, 2 * 5 * 8),
    "dot": (lambda: V @ V, 2 * 8),
    "vdot": (lambda: torch.vdot(V, V), 2 * 8),
    "batched mv": (lambda: STACK @ V, 2 * 2 * 5 * 8),
    "bmm": (lambda: STACK @ OTHERS, 2 * 2 * 5 * 8 * 3),
    "broadcast": (lambda: STACK @ B, 2 * 2 * 5 * 8 * 3),
    "addmm": (lambda: torch.addmm(torch.zeros(3), A, B), 2 * 5 * 8 * 3),
    "addmm_": (lambda: torch.zeros(5, 3).addmm_(A, B), 2 * 5 * 8 * 3),
    "addmv": (lambda: torch.addmv(torch.zeros(5), A, V), 2 * 5 * 8),
    "addmv_": (lambda: torch.zeros(5).addmv_(A, V), 2 * 5 * 8),
    "addbmm": (lambda: torch.addbmm(torch.zeros(5, 3), STACK, OTHERS), 2 * 2 * 5 * 8 * 3),
    "addbmm_": (lambda: torch.zeros(5, 3).addbmm_(STACK, OTHERS), 2 * 2 * 5 * 8 * 3),
    "baddbmm": (lambda: torch.baddbmm(torch.zeros(3), STACK, OTHERS), 2 * 2 * 5 * 8 * 3),
    "baddbmm_": (lambda: torch.zeros(2, 5, 3).baddbmm_(STACK, OTHERS), 2 * 2 * 5 * 8 * 3),
    "out": (lambda: torch.mm(A, B, out=torch.empty(5, 3)), 2 * 5 * 8 * 3),
    "einsum": (lambda: torch.einsum("bij,bjk,kl->bil", STACK, OTHERS, B.T), 2 * 2 * 5 * (8 * 3 + 3 * 8)),
    "tensordot": (lambda: torch.tensordot(STACK, A, ([2], [1])), 2 * 10 * 8 * 5),
    "bilinear": (lambda: F.bilinear(*PAIRS, torch.randn(6, 3, 4)), 2 * 7 * 6 * (3 * 4)),
    "grouped": (lambda: torch._grouped_mm(BROAD, BROAD), 2 * 2 * 16 * 16 * 16),
    "coo @ dense": (lambda: coo() @ A, 2 * 5 * 8),
    "coo @ vector": (lambda: coo() @ A[:, 0], 2 * 5),
    "csr @ dense": (lambda: csr() @ A, 2 * 5 * 8),
    "sparse.mm": (lambda: torch.sparse.mm(coo(), A), 2 * 5 * 8),
    "sparse.addmm": (lambda: torch.sparse.addmm(torch.zeros(5, 8), coo(), A), 2 * 5 * 8),
    "sparse @ sparse": (lambda: torch.sparse.mm(coo(), coo()), 2 * 5),
    "sampled": (lambda: torch.sparse.sampled_addmm(csr(), A, A.T), 2 * 5 * 8),
    "sparse reduce": (lambda: torch.sparse.mm(csr(), A, "mean"), 2 * 5 * 8),
    "empty": (lambda: torch.zeros(0, 8) @ B, 0),
    "empty lstm": (lambda: nn.LSTM(8, 3)(torch.zeros(4, 0, 8)), 0),
    "elementwise": (lambda: (A * A + A).softmax(-1).sum(), 0),
    "jagged": (lambda: F.linear(torch.nested.nested_tensor([A, A[:2]], layout=torch.jagged), B.T), 2 * 7 * 8 * 3),
}


@pytest.mark.parametrize(("function", "expected"), OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:.*nested tensors", "ignore:.*prototype")
def test_an_operation(function, expected):
    assert own(function) == expected


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:.*prototype")
def test_strided_nested_tensors_compute_and_are_not_counted():
    nested = torch.nested.nested_tensor([A, A[:2]])
    made = []
    assert own(lambda: made.append(F.linear(nested, B.T))) == 0
    assert torch.allclose(made[0].unbind()[1], A[:2] @ B, atol=1e-5)


def step_of(model):
    return lambda: model(torch.randn(5, 8)).square().sum().backward()


def test_backward_is_left_out():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    forward = counted(model, lambda: model(torch.randn(5, 8)))
    assert counted(model, step_of(model)) == forward == {"0": 2 * 5 * 8 * 16, "2": 2 * 5 * 16 * 4}
    assert torchs(step_of(model)) > sum(forward.values())


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.block, self.use_reentrant = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), use_reentrant

    def forward(self, x):
        return checkpoint(self.block, self.first(x), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_computed_again_counts_once(use_reentrant):
    model = Checkpointed(use_reentrant)
    expected = {"first": 2 * 5 * 8 * 8, "block.0": 2 * 5 * 8 * 8}
    assert counted(model, step_of(model)) == expected
    assert counted(model, lambda: [step_of(model)(), step_of(model)()]) == {name: 2 * n for name, n in expected.items()}


def test_a_layer_that_is_called_several_times_adds_up_under_its_first_name():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert counted(model, step_of(model)) == {"0": 2 * (2 * 5 * 8 * 8)}


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.leaf, self.weight = nn.Linear(8, 8), nn.Parameter(torch.ones(8, 8))

    def forward(self, x, depth=2):
        x = self(x, depth - 1) if depth else self.leaf(x)
        return x @ self.weight


def test_a_layer_that_calls_itself_has_the_sum():
    model = nn.Sequential(Recursive())
    assert counted(model, step_of(model)) == {"0": 3 * (2 * 5 * 8 * 8), "0.leaf": 2 * 5 * 8 * 8}


class Direct(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer.forward(x)


def test_what_is_called_directly_is_the_callers():
    model = nn.Sequential(Direct())
    assert counted(model, step_of(model)) == {"0": 2 * 5 * 8 * 8}


def test_a_script_module_is_a_part_of_what_contains_it():
    with pytest.warns((DeprecationWarning, FutureWarning), match="script"):
        model = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 4))
    assert counted(model, lambda: model(torch.randn(5, 8))) == {"": 2 * 5 * 8 * 8, "1": 2 * 5 * 8 * 4}


def hooks_on(model):
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        self.layer(x)
        raise RuntimeError("planted")


class Catching(nn.Module):
    def __init__(self):
        super().__init__()
        self.failing, self.weight = Failing(), nn.Parameter(torch.ones(8, 8))

    def forward(self, x):
        try:
            return self.failing(x)
        except RuntimeError:
            return x @ self.weight


def test_a_layer_that_fails_is_left_behind():
    model = nn.Sequential(Catching(), nn.Linear(8, 4))
    assert counted(model, step_of(model)) == {
        "0": 2 * 5 * 8 * 8,
        "0.failing.layer": 2 * 5 * 8 * 8,
        "1": 2 * 5 * 8 * 4,
    }


def test_after_an_error_nothing_is_left():
    model = nn.Sequential(nn.Linear(8, 8), Failing())
    count = FlopCount(layers_of(model))
    with pytest.raises(RuntimeError, match="planted"), count:
        model(torch.randn(5, 8))
    assert hooks_on(model) == 0
    before = dict(count.flops)
    model[0](torch.randn(5, 8))
    assert count.flops == before
    with count:
        model[0](torch.randn(5, 8))
    assert count.flops["0"] == 2 * before["0"] == 2 * (2 * 5 * 8 * 8)


def test_all_layers_are_named_and_numbers_are_plain():
    model = MODELS["mlp"][0]()
    with FlopCount(layers_of(model)) as count:
        step_of(model)()
    assert list(count.flops) == ["", "0", "1", "2"]
    assert {type(flops) for flops in count.flops.values()} == {int}


class Task(pl.LightningModule):
    def __init__(self, use_reentrant):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.lstm = Checkpointed(use_reentrant), nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Parameter(torch.ones(6, 4))

    def training_step(self, batch, batch_idx):
        hidden, _ = self.lstm(self.net(batch))
        loss = (hidden @ self.head).square().mean()
        self.manual_backward(loss)
        self.optimizers().step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_a_replayed_step_is_counted_without_a_trace(use_reentrant, reference):
    model = Task(use_reentrant)
    model.net.first.weight.requires_grad_(False)
    replay = StepReplay(model, PolicyFormats(model, {"default": "bf16", "net": "fp32"}, CPU, 1.0), CPU)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with replay.opened(reference=reference) as stand_ins, FlopCount(layers_of(model)) as count:
        replayed = replay.run(stand_ins, torch.randn(2, 5, 8), 0)
    assert {layer: flops for layer, flops in count.flops.items() if flops} == {
        "net.first": 2 * 10 * 8 * 8,
        "net.block.0": 2 * 10 * 8 * 8,
        "lstm": 2 * 10 * 24 * (8 + 6),
        "": 2 * 10 * 6 * 4,
    }
    assert "net.block.0.weight" in replayed.gradients
    assert hooks_on(model) == 0
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
