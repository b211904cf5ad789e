"""What emulation computes: products of operands on the format's grid, in fp32, rounded once."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.engine.backends import Backends
from lightning_mixprec.engine.backends.emulated import emulation
from lightning_mixprec.policy.policy import as_policy

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MULTIPLY = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "mv", "dot")


class Watch(TorchDispatchMode):
    """Asserts of every product that runs that its operands are fp32 numbers which 16 bits can hold."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.seen = dtype, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in MULTIPLY:
            self.seen.append(name)
            for tensor in (arg for arg in args if isinstance(arg, torch.Tensor)):
                assert tensor.dtype == torch.float32, f"{name} multiplies {tensor.dtype}"
                assert torch.equal(tensor.to(self.dtype).float(), tensor), f"an operand of {name} is off the grid"
        return function(*args, **(kwargs or {}))


def attached(model, policy, emulate=True):
    return attach(model, as_policy(policy).resolve(model), "cpu", emulate)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same", dilation=2)
        self.wide = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.rows = nn.Conv1d(4, 6, 3, bias=False)
        self.into = nn.Linear(126, 16)
        self.norm = nn.LayerNorm(16)
        self.out = nn.Linear(16, 8)

    def forward(self, x):
        x = F.relu(self.wide(F.relu(self.first(x)))).flatten(2)
        h = self.norm(self.into(self.rows(x))).to(x.dtype)
        mixed = (h @ h.mT).softmax(-1).to(x.dtype)
        return self.out(torch.bmm(mixed, h) + torch.matmul(h[:, 0], h[0].mT).mean())


@pytest.mark.parametrize("format", DTYPES)
def test_every_product_of_a_step_has_operands_on_the_grid(format):
    torch.manual_seed(0)
    model = Convolutional()
    attachment = attached(model, format)
    with Watch(DTYPES[format]) as watch:
        with attachment.context():
            output = model(torch.randn(2, 3, 4, 8))
        output.float().square().mean().backward()
    assert output.dtype == DTYPES[format]
    assert watch.seen.count("convolution") == 3
    assert watch.seen.count("convolution_backward") == 3
    assert all(param.grad is not None and param.grad.dtype == torch.float32 for param in model.parameters())
    attachment.detach()


def within_one_rounding(result, exact, dtype):
    """Each number is what rounding gives, or its neighbour where the sum in fp32 falls on the other side."""
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    return bool(((result.double() - exact).abs() <= 0.51 * spacing + 1e-6 * exact.abs().max()).all())


BROADCAST = "broadcast stacks"
"""Its gradients are summed over the copies in 16 bits, after each was rounded, as torch does."""

CASES = {
    "linear": (F.linear, (2, 3, 5), (4, 5), (4,)),
    "linear of a vector": (F.linear, (5,), (4, 5), (4,)),
    "linear to one": (F.linear, (3, 5), (5,)),
    "mm": (torch.mm, (3, 5), (5, 4)),
    "mm of columns": (lambda a, b: torch.mm(a, b.t()), (3, 5), (4, 5)),
    "bmm": (torch.bmm, (2, 3, 5), (2, 5, 4)),
    "vectors": (torch.matmul, (5,), (5,)),
    "matrix and vector": (torch.matmul, (3, 5), (5,)),
    "vector and matrix": (torch.matmul, (5,), (5, 3)),
    "vector and stack": (torch.matmul, (5,), (2, 5, 3)),
    "stack and vector": (torch.matmul, (2, 3, 5), (5,)),
    "stack and matrix": (lambda a, b: a @ b, (2, 3, 5), (5, 4)),
    "matrix and stack": (lambda a, b: a @ b, (3, 5), (2, 5, 4)),
    BROADCAST: (torch.matmul, (2, 1, 3, 5), (4, 5, 6)),
    "conv1d": (F.conv1d, (2, 3, 9), (4, 3, 3), (4,)),
    "conv1d, one sample": (F.conv1d, (3, 9), (4, 3, 3), (4,)),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, 2, (1, 2), groups=2), (2, 4, 6, 7), (6, 2, 3, 3), (6,)),
    "conv2d, same": (lambda x, w: F.conv2d(x, w, padding="same", dilation=(1, 3)), (2, 3, 6, 7), (4, 3, 2, 2)),
    "conv2d, valid": (lambda x, w: F.conv2d(x, w, padding="valid"), (2, 3, 6, 7), (4, 3, 2, 2)),
    "conv3d": (F.conv3d, (1, 2, 4, 4, 4), (3, 2, 2, 2, 2), (3,)),
    "conv_transpose1d": (lambda x, w: F.conv_transpose1d(x, w, stride=2, output_padding=1), (2, 3, 5), (3, 4, 3)),
    "conv_transpose2d": (lambda x, w, b: F.conv_transpose2d(x, w, b, groups=3), (2, 3, 5, 4), (3, 2, 3, 2), (6,)),
    "mv": (torch.mv, (3, 5), (5,)),
    "dot": (torch.dot, (5,), (5,)),
    "vdot": (torch.vdot, (5,), (5,)),
    "inner": (torch.inner, (2, 3, 5), (4, 5)),
    "vecdot": (lambda a, b: torch.linalg.vecdot(a, b, dim=1), (2, 5, 3), (2, 5, 3)),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), (4,), (3, 5), (5, 4)),
    "addmv": (lambda c, a, b: torch.addmv(c, a, b, beta=-1), (3,), (3, 5), (5,)),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b, alpha=0.5), (3, 4), (2, 3, 5), (2, 5, 4)),
    "addbmm": (torch.addbmm, (3, 4), (2, 3, 5), (2, 5, 4)),
    "conv_tbc": (lambda x, w, b: torch.conv_tbc(x, w, b, 1), (6, 2, 3), (3, 3, 4), (4,)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, ([0, -1], [2, 0])), (2, 3, 5), (5, 4, 2)),
    "einsum": (lambda a, b: torch.einsum("bi...,b...j->...ji", a, b), (2, 3, 5), (2, 5, 4)),
    "einsum of numbers": (lambda a, b: torch.einsum(a, [0, 1, 1], b, [1, 2], [2, 0]), (2, 3, 3), (3, 4)),
    "einsum over all": (lambda a, b: torch.einsum("ij, ij", a, b), (3, 5), (3, 5)),
    "conv_transpose3d": (F.conv_transpose3d, (1, 2, 3, 3, 3), (2, 3, 2, 2, 2)),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_product_and_its_gradients_are_one_rounding_from_those_in_fp64(dtype, case):
    torch.manual_seed(0)
    compute, *shapes = CASES[case]
    narrow = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in narrow]
    with emulation("cpu", (dtype,)):
        result = compute(*narrow)
    expected = compute(*exact)
    assert result.dtype == dtype
    assert within_one_rounding(result.detach(), expected.detach(), dtype)
    grad = torch.randn(result.shape).to(dtype)
    result.backward(grad)
    expected.backward(grad.double())
    for mine, oracle in zip(narrow, exact, strict=True):
        assert mine.grad.dtype == dtype
        assert mine.grad.stride() == mine.stride()
        if case != BROADCAST:
            assert within_one_rounding(mine.grad, oracle.grad, dtype)


@pytest.mark.parametrize("case", CASES)
def test_emulation_returns_the_shape_and_layout_of_torch_and_raises_where_it_does(case):
    compute, *shapes = CASES[case]
    operands = [torch.randn(shape).bfloat16() for shape in shapes]
    expected = compute(*operands)
    with emulation("cpu", (torch.bfloat16,)):
        result = compute(*operands)
        assert result.shape == expected.shape
        with pytest.raises((RuntimeError, IndexError)):
            compute(operands[0], operands[1].flatten()[1:], *operands[2:])


def test_overflow_is_infinite_and_subnormals_are_kept():
    with emulation("cpu", (torch.float16,)):
        large = torch.full((1, 2), 300.0).half() @ torch.full((2, 1), 300.0).half()
        small = torch.full((1, 1), 2.0**-12).half() @ torch.full((1, 1), 2.0**-12).half()
    assert large.isinf().all()
    assert small.item() == 2.0**-24


def test_a_sum_is_kept_in_fp32_until_it_is_rounded():
    ones = torch.ones(1, 4097).half()
    with emulation("cpu", (torch.float16,)):
        assert (ones @ ones.t()).item() == 4096.0  # 4097 is none of fp16, and its ties go to even
        assert (ones[:, :4095] @ ones[:, :4095].t()).item() == 4096.0
        assert F.linear(ones[:, :2049], ones[:, :2049], torch.ones(1).half()).item() == 2050.0


def test_autocast_decides_what_is_cast():
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with emulation("cpu", (torch.bfloat16,)):
        assert F.linear(x, weight).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, weight).dtype == torch.bfloat16
            assert F.linear(x.double(), weight.double()).dtype == torch.float64
            assert torch.mm(x, weight.t(), out=torch.empty(2, 4)).dtype == torch.float32
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(F.linear(x, weight), F.linear(x.clone(), weight))
                with pytest.raises(RuntimeError):
                    F.linear(x.bfloat16(), weight)
        with torch.autocast("cpu", torch.float16):
            assert type(F.linear(x, weight.requires_grad_()).grad_fn).__name__ == "MmBackward0"


@pytest.mark.parametrize("case", CASES)
def test_backward_is_differentiated_as_in_fp64(case):
    torch.manual_seed(0)
    compute, *shapes = CASES[case]
    narrow = [(torch.randint(-2, 3, shape)).bfloat16().requires_grad_() for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in narrow]

    def penalties(operands):
        result = compute(*operands)
        grads = torch.autograd.grad(result.sum(), operands, create_graph=True)
        again = torch.autograd.grad(sum((grad.float() ** 2).sum() for grad in grads), operands, allow_unused=True)
        return [*grads, *(0 * operand if grad is None else grad for operand, grad in zip(operands, again, strict=True))]

    with emulation("cpu", (torch.bfloat16,)):
        mine = penalties(narrow)
    for one, other in zip(mine, penalties(exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2**-7, atol=0.0)


def test_maps_over_samples_as_torch_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(0), nn.Linear(9, 2))
    params = {name: param.detach() for name, param in model.named_parameters()}
    inputs = torch.randn(4, 2, 5)

    def loss(params, x):
        return torch.func.functional_call(model, params, (x,)).float().square().sum()

    attachment = attached(model, "bf16")
    with attachment.context():
        grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, inputs)
        alone = [torch.func.grad(loss)(params, x) for x in inputs]
    for name, grad in grads.items():
        torch.testing.assert_close(grad, torch.stack([each[name] for each in alone]), rtol=2**-7, atol=1e-3)
    attachment.detach()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_a_module_anew_as_before(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant) if self.training else self.block(x)

    def gradients(model):
        with Watch(torch.float16) as watch:
            with attachment.context():
                loss = model(torch.linspace(-1, 1, 12).view(2, 6).requires_grad_()).float().sum()
            loss.backward()
        return [param.grad for param in model.parameters()], len(watch.seen)

    torch.manual_seed(0)
    model = Model()
    attachment = attached(model, "fp16")
    grads, products = gradients(model)
    model.zero_grad()
    plain, fewer = gradients(model.eval())
    assert all(map(torch.equal, grads, plain))
    assert products > fewer
    attachment.detach()


def test_it_saves_what_autocast_saves():
    torch.manual_seed(0)
    model = Convolutional()

    def saved(emulate):
        storages = {}
        attachment = attached(model, "bf16", emulate)

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with attachment.context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(torch.randn(2, 3, 4, 8))
        attachment.detach()
        return sum(storage.nbytes() for storage in storages.values()), output

    assert saved(True)[0] <= saved(False)[0]


def test_a_copy_of_an_attached_model_shares_the_mode():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    attachment = attached(model, {"default": "fp32", "1": "bf16"})
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3)
    with attachment.context():
        assert torch.equal(twin(x), model(x))
    assert Backends("cpu", True).region("bf16").mode is copy.deepcopy(Backends("cpu", True)).region("bf16").mode
    attachment.detach()
    assert "forward" not in model[0].__dict__


def test_emulate_says_what_is_emulated():
    assert Backends("cpu", False).region("fp16").mode is None
    assert Backends("cpu", True).region("bf16").mode is not None
    assert Backends("cpu", True).region("fp32").mode is None
    assert Backends("cpu", True).region("fp64").mode is None
    if not torch.cuda.is_available():
        assert Backends("cuda", "auto").region("bf16").mode is None


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_products_have_operands_on_the_grid(format, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    attachment = attached(model, format)
    x = torch.randn(4, 8)
    with attachment.context():
        expected = model(x)
        compiled = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert torch.equal(compiled, expected)
    fused = (x @ model[0].weight.T).to(DTYPES[format])
    assert not torch.equal(expected, fused)
    attachment.detach()
    torch._dynamo.reset()
