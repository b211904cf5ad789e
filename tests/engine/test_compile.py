"""torch.compile of a model with borders: whole graphs, and no more of them than there are assignments."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from lightning_mixprec.policy.policy import as_policy

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


MIXED = {"default": "bf16", "norm": "c=fp32,o=input", "b": "fp32"}


def counted(backend="eager"):
    return CompileCounter() if backend == "eager" else CompileCounterWithBackend(backend)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "policy",
    [MIXED, {"default": "fp32", "a": "fp16"}, {"default": "fp32", "norm": "fp64"}, {"default": "fp32", "a": "p=fp64"}],
)
def test_a_mixed_model_compiles_to_one_graph_with_the_same_values(policy, backend, attached):
    model, counter = Net(), counted(backend)
    x = torch.randn(3, 4)
    with attached(model, policy) as attachment:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        with attachment.context():
            eager = model(x)
        eager.float().sum().backward()
        expected = [p.grad for p in model.parameters()]
        model.zero_grad()
        for _ in range(3):
            with attachment.context():
                y = compiled(x)
        y.float().sum().backward()
        assert counter.frame_count == 1
        assert y.dtype == eager.dtype and torch.equal(y, eager)
        for parameter, grad in zip(model.parameters(), expected, strict=True):
            assert parameter.dtype == parameter.grad.dtype and torch.allclose(parameter.grad, grad, atol=1e-2)


def test_a_compiled_model_has_the_gradients_of_one_compiled_with_casts_by_hand(attached):
    class ByHand(Net):
        def forward(self, x):
            h = self.a(x)
            with torch.autocast("cpu", enabled=False):
                h = self.norm(h.float()).to(h.dtype)
            with torch.autocast("cpu", enabled=False):
                return self.b(h.float())

    model, x = Net(), torch.randn(3, 4)
    oracle = ByHand()
    oracle.load_state_dict(model.state_dict())
    with attached(model, MIXED) as attachment, attachment.context():
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        expected = torch.compile(oracle, backend="aot_eager", fullgraph=True)(x)
    y.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    assert torch.equal(y, expected)
    for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_changing_recompiles_once_and_changing_back_never(attached):
    model, counter = Net(), counted()
    x = torch.randn(3, 4)
    policies = [MIXED, "bf16", {"default": "bf16", "b": "fp16"}]
    assignments = [as_policy(policy).resolve(model) for policy in policies]
    with attached(model, policies[0]) as attachment:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(4):
            for assignment in assignments:
                attachment.change(assignment)
                with attachment.context():
                    y = compiled(x)
                    assert torch.equal(y, model(x))
        assert counter.frame_count == len(policies)


def test_the_first_step_check_recompiles_nothing(attached):
    model, counter = nn.Sequential(nn.Sequential(nn.Linear(4, 4))), counted()
    model[0] = torch.compile(model[0], backend=counter, fullgraph=True)
    x = torch.randn(3, 4)
    with attached(model, {"default": "bf16", "0": "fp32"}) as attachment:
        attachment.begin_first_step()
        with attachment.context():
            model(x)
        attachment.end_first_step()
        with attachment.context():
            model(x)
    assert counter.frame_count == 1


def test_containers_of_inputs_and_results_compile_whole(attached):
    class Nested(nn.Module):
        def forward(self, x, *, more):
            return {"y": (x, [more["a"], None]), "max": torch.max(x, 1)}

    class Top(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Nested()

        def forward(self, x):
            return self.inner(x, more={"a": x * 2, "b": (x, 3)})

    model, counter = Top(), counted()
    x = torch.randn(2, 3)
    with attached(model, {"default": "bf16", "inner": "c=fp32,o=bf16"}) as attachment, attachment.context():
        out = torch.compile(model, backend=counter, fullgraph=True)(x.bfloat16())
        eager = model(x.bfloat16())
    assert counter.frame_count == 1
    assert out["y"][0].dtype == out["max"].values.dtype == torch.bfloat16
    assert torch.equal(out["y"][1][0], eager["y"][1][0]) and torch.equal(out["max"].indices, eager["max"].indices)


def test_fp32_and_fp64_callers_compile(attached):
    class Caller(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared = shared

        def forward(self, x):
            return self.shared(x)

    shared = nn.Linear(2, 2)
    model = nn.Sequential(Caller(shared), Caller(shared))
    with attached(model, {"default": "fp32", "0": "fp64", "**.shared": "bf16"}) as attachment, attachment.context():
        eager = model(torch.ones(1, 2))
        y = torch.compile(model, backend="eager", fullgraph=True)(torch.ones(1, 2))
    assert torch.equal(y, eager)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_block_compiles(use_reentrant, attached):
    from torch.utils.checkpoint import checkpoint

    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Net()

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=use_reentrant)

    model, x = Saving(), torch.randn(3, 4, requires_grad=True)
    with attached(model, {"default": "bf16", "block.norm": "fp32"}) as attachment:
        with attachment.context():
            eager = model(x)
            y = torch.compile(model, backend="aot_eager", fullgraph=not use_reentrant)(x)
        y.float().sum().backward()
    assert torch.equal(y, eager)


def test_strict_export_is_not_in_the_way(attached):
    model = Net().eval()
    with attached(model, {"default": "fp32", "norm": "bf16"}):
        exported = torch.export.export(model, (torch.randn(3, 4),), strict=True)
        x = torch.randn(3, 4)
        assert torch.allclose(exported.module()(x), model(x))
