"""Emulation against torch's autocast with kernels of its own: what works there works here, and gives the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mixprec.engine.backends import Backends

MASK = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
"""Its second query may attend to nothing."""


def attention(mask):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sparse(multiply):
    return lambda a, b: multiply(a.detach().to_sparse(), b)


QUERIES, KEYS = (2, 2, 3, 8), (2, 2, 4, 8)
CASES = {
    "attention, mask of booleans": (attention(MASK), QUERIES, KEYS, KEYS),
    "attention, a mask per sample": (attention(MASK.expand(2, 1, 3, 4)), QUERIES, KEYS, KEYS),
    "attention without batches, mask": (attention(MASK), (3, 8), (4, 8), (4, 8)),
    "einsum of numbers alone": (lambda a, b: torch.einsum(",", a, b), (), ()),
    "einsum to one number": (lambda a, b: torch.einsum("ij,kl->", a, b), (3, 4), (2, 2)),
    "einsum, rows of one": (lambda a, b: torch.einsum("ij,jk", a, b), (3, 1), (4, 5)),
    "einsum, one number per row": (lambda a, b: torch.einsum("ij,jk->ik", a, b), (3, 1), (1, 5)),
    "rows of none": (torch.matmul, (3, 0), (0, 4)),
    "vectors of none": (torch.matmul, (0,), (0,)),
    "linear of none": (F.linear, (3, 0), (5, 0), (5,)),
    "linear of no rows": (F.linear, (0, 4), (5, 4), (5,)),
    "sparse and matrix": (sparse(torch.matmul), (3, 4), (4, 5)),
    "sparse and vector": (sparse(torch.matmul), (3, 4), (4,)),
}


def computed(compute, shapes, dtype_name, emulate):
    torch.manual_seed(0)
    operands = [torch.randn(shape).requires_grad_() for shape in shapes]
    with Backends("cpu", emulate).region(dtype_name).context():
        result = compute(*operands)
    grads = torch.autograd.grad(result.float().square().sum(), operands, allow_unused=True)
    return [result.detach(), *grads]


@pytest.mark.parametrize("format", ["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_torch(format, case):
    compute, *shapes = CASES[case]
    mine, expected = (computed(compute, shapes, format, emulate) for emulate in (True, False))
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-5, atol=2**-5)


@pytest.mark.parametrize("shape", [(5, 0, 4), (5, 2, 4)])
def test_an_lstm_hands_on_what_torch_hands_on(shape):
    model = nn.LSTM(4, 6)

    def dtypes(emulate):
        with Backends("cpu", emulate).region("bf16").context():
            output, state = model(torch.randn(shape))
        return [tensor.dtype for tensor in (output, *state)]

    # What torch does on a CPU of its own arithmetic; on others it has no bf16 LSTM.
    assert dtypes(True) == [torch.float32 if 0 in shape else torch.bfloat16] * 3


WRONG = {
    "a mask and is_causal": lambda a: F.scaled_dot_product_attention(a, a, a, torch.ones(4, 4).bool(), is_causal=True),
    "a mask of integers": lambda a: F.scaled_dot_product_attention(a, a, a, torch.ones(4, 4).long()),
    "a mask of one dimension": lambda a: F.scaled_dot_product_attention(a, a, a, torch.ones(4).bool()),
    "integers and fractions": lambda a: a.long() @ a,
    "complex and real numbers": lambda a: a.to(torch.complex64) @ a,
}


@pytest.mark.parametrize("case", WRONG)
def test_what_torch_refuses_is_refused_in_its_words(case):
    def outcome(emulate):
        try:
            with Backends("cpu", emulate).region("bf16").context():
                return WRONG[case](torch.linspace(-1, 1, 32).view(1, 2, 4, 4))
        except (RuntimeError, IndexError) as error:
            return str(error)

    expected = outcome(False)
    if case == "a mask and is_causal" and not isinstance(expected, str):  # torch 2.11 takes both
        torch.testing.assert_close(outcome(True), expected)
    else:
        assert isinstance(expected, str)
        assert outcome(True) == expected


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.last = nn.Conv1d(1, 4, 3, padding=1), nn.Linear(24, 2)

    def forward(self, x):
        return self.last(F.scaled_dot_product_attention(*[self.rows(x[None]).tanh()[None]] * 3).flatten()).float()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # torch's own, where it derives
@pytest.mark.parametrize(
    "derive",
    [
        lambda model, x: torch.func.jvp(model, (x,), (x + 1,)),
        lambda model, x: (torch.func.jacfwd(model)(x),),
        lambda model, x: (torch.func.jacfwd(torch.func.jacrev(model))(x),),
    ],
    ids=["jvp", "jacfwd", "hessian"],
)
def test_forward_mode_derives_as_in_fp64(derive):
    torch.manual_seed(0)
    model, x = Field(), torch.randn(1, 6)
    with (
        Backends("cpu", True).region("bf16").context(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        mine = derive(model, x)
    exact = model.double()
    exact.forward = lambda x: Field.forward(exact, x).double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = derive(exact, x.double())
    for one, other in zip(mine, expected, strict=True):
        assert (one.double() - other).norm() <= 0.05 * other.norm()
