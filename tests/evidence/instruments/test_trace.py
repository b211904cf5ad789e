"""The trace, against overflows planted in known places and against layers run one by one."""

import copy
import json
import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mixprec.evidence.instruments.origins import find_origin, is_given
from lightning_mixprec.evidence.instruments.recording import Call, Value
from lightning_mixprec.evidence.instruments.trace import Trace

HALF = torch.float16


def half(x):
    return x.to(HALF)


def autocast():
    return torch.autocast("cpu", dtype=HALF)


def origin_of(model, step, with_grads=False):
    """The origin for what a step returns, or for the gradients of the model's weights after its backward."""
    for parameter in model.parameters():
        parameter.grad = None
    with Trace(model) as trace:
        result = step()
        if with_grads:
            result.backward()
            targets = [p.grad for p in model.parameters() if p.grad is not None]
        else:
            targets = [result]
    return trace.origin(targets)


def place(origin):
    return origin and (origin.layer, origin.direction)


class Block(nn.Module):
    """A transformer block whose attention core is the block's own operations."""

    def __init__(self, width=4, gain=1.0):
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(width), *(nn.Linear(width, width) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.gain = gain

    def forward(self, x, mask=None):
        h = self.norm(x)
        scores = (self.q(h) * self.gain) @ (self.k(h) * self.gain).transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(mask, -math.inf)
        x = x + torch.softmax(scores, -1) @ self.v(h)
        return x + self.mlp(x)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class BackScale(nn.Module):
    """The identity, whose gradient is scaled: by an operation that only exists in backward."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return (grad * 0.5) * (ctx.factor * 2.0), None

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.Function.apply(x, self.factor)


class Checkpointed(nn.Module):
    def __init__(self, inner, use_reentrant):
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def mlp(width=4, depth=3):
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())))


# Forward


@pytest.mark.parametrize("culprit", [0, 2, 4])
def test_a_linear_layer_that_overflows_is_named(culprit):
    model = mlp()
    nn.init.constant_(model[culprit].bias, 1e5)

    def step():
        with autocast():
            return model(torch.randn(2, 4)).sum()

    assert origin_of(model, step) is None  # tanh makes of an infinity a 1, which no loss is the worse for
    model[culprit + 1] = nn.Identity()
    origin = origin_of(model, step)
    assert place(origin) == (str(culprit), "forward")
    assert (origin.op, origin.format, origin.is_leaf) == ("_to_copy", "fp16", False)
    assert origin.input_amax == 1e5


def test_what_the_layer_itself_overflows_in_is_compared_with_an_fp32_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data.fill_(3e4)
    x = torch.rand(2, 4) + 1

    def traced(enabled):
        with Trace(model) as trace, torch.autocast("cpu", dtype=HALF, enabled=enabled):
            loss = model(x).square().sum()
        return trace, trace.origin([loss])

    (_, origin), (wide, none) = traced(True), traced(False)
    assert none is None
    assert (origin.layer, origin.op, origin.format, origin.occurrence) == ("1", "addmm", "fp16", 0)
    assert wide.amax_of(origin.layer, origin.direction, origin.op, origin.occurrence) > 65504
    exact = model[1](model[0](x)).abs().max().item()
    assert wide.amax_of("1", "forward", "addmm", 0) == exact
    assert origin.input_amax == 3e4 - 3e4 % 16
    assert wide.amax_of("1", "forward", "addmm", 1) is None
    assert wide.amax_of("1", "forward", "_to_copy", 0) is None


def test_a_residual_cnn():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        Residual(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(inplace=True))),
        Residual(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(inplace=True))),
        nn.Flatten(),
    ).half()
    for conv, weight in ((model[0], 1.0), (model[1].inner[0], 1.0), (model[2].inner[0], 6e4)):
        nn.init.constant_(conv.weight, weight)
    origin = origin_of(model, lambda: model(half(torch.rand(1, 1, 4, 4)) + 1).sum())
    assert place(origin) == ("2.inner.0", "forward") and origin.op == "convolution"


def test_the_sum_of_a_residual_is_the_containers_own():
    model = nn.Sequential(Residual(nn.Identity()), Residual(nn.Identity())).half()
    assert place(origin_of(model, lambda: model(half(torch.full((2,), 2e4))).max())) == ("1", "forward")


def test_an_attention_core_written_in_the_block_is_the_blocks_own():
    model = nn.Sequential(Block(), Block(gain=1e4)).half()
    origin = origin_of(model, lambda: model(half(torch.randn(1, 3, 4))).sum())
    assert place(origin) == ("1", "forward") and origin.op == "bmm"


def test_a_shared_layer_that_overflows_when_it_is_called_again():
    shared = Scale(200.0)
    model = nn.Sequential(shared, Scale(2.0), shared)
    x = half(torch.ones(2))
    assert origin_of(model, lambda: model(x * 0.5)) is None
    origin = origin_of(model, lambda: model(x))
    assert place(origin) == ("0", "forward") and origin.occurrence == 1
    with Trace(model) as wide:
        model(x.float())
    assert wide.amax_of("0", "forward", origin.op, 1) == 80000.0
    assert wide.amax_of("0", "forward", origin.op, 0) == 200.0


def test_what_is_outside_of_every_module_is_the_roots_own():
    model = mlp().half()
    origin = origin_of(model, lambda: (model(half(torch.ones(2, 4))) * 6e4 + 6e4 * torch.ones((), dtype=HALF)).sum())
    assert place(origin) == ("", "forward")


def test_a_cast_is_of_the_layer_that_needed_it():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def step():
        with autocast():
            return model[1](model[0](torch.ones(2, 4)).float() + 1e5).sum()

    origin = origin_of(model, step)
    assert place(origin) == ("1", "forward") and origin.op == "_to_copy"
    assert origin.input_amax > 65504


def test_a_division_by_what_has_underflowed():
    class Normalise(nn.Module):
        def forward(self, x):
            return x / x.square().sum(-1, keepdim=True)

    model = nn.Sequential(Scale(1e-4), Normalise())
    origin = origin_of(model, lambda: model(half(torch.ones(1, 2))).sum())
    assert place(origin) == ("1", "forward") and origin.op == "div"


# Backward


@pytest.mark.parametrize("culprit", ["0", "1.inner.1", "2"])
def test_a_gradient_that_overflows(culprit):
    model = nn.Sequential(Scale(1.0), Residual(nn.Sequential(Scale(1.0), Scale(1.0))), Scale(1.0), nn.Sigmoid())
    model.register_parameter("weight", nn.Parameter(torch.ones(3, dtype=HALF)))
    model.get_submodule(culprit).factor = 1e4
    origin = origin_of(model, lambda: model(model.weight * 1e-4).sum() * 100, with_grads=True)
    assert place(origin) == (culprit, "backward") and origin.op == "mul"


def test_own_operations_of_a_container_in_backward():
    class Container(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x):
            return self.inner(x * 3e4) * 1e-3

    model = nn.Sequential(nn.Linear(2, 2), Container(), nn.Linear(2, 2)).half()
    for weight, value in ((model[0].weight, 1e-4), (model[0].bias, 0.0), (model[1].inner.weight, 1.0)):
        nn.init.constant_(weight, value)
    nn.init.ones_(model[2].weight)
    origin = origin_of(model, lambda: model(half(torch.ones(1, 2))).sum() * 1e4, with_grads=True)
    assert place(origin) == ("1", "backward") and origin.op == "mul"


def test_what_a_container_does_after_its_children_is_its_own_too():
    class Container(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Scale(1e-4)

        def forward(self, x):
            return self.inner(x) * 3e4

    model = nn.Sequential(nn.Linear(2, 2), Container()).half()
    origin = origin_of(model, lambda: model(half(torch.ones(1, 2))).sum() * 100, with_grads=True)
    assert place(origin) == ("1", "backward") and origin.op == "mul"


def test_the_roots_own_operations_in_backward():
    model = nn.Linear(2, 2).half()
    small = half(torch.full((1, 2), 1e-4))

    def step():
        return ((model(small) * 1e-3) * 3e4).sum() * 3e4

    origin = origin_of(model, step, with_grads=True)
    assert place(origin) == ("", "backward") and origin.frames


def test_two_losses_and_two_calls_of_grad():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "a": BackScale(1.0), "b": BackScale(1e5)}).half()
    weights = list(model.body.parameters())
    with Trace(model) as trace:
        h = model.body(half(torch.ones(1, 2)))
        a, b = model.a(h).sum(), model.b(h).sum()
        first = torch.autograd.grad(a, weights, retain_graph=True)
        fine = trace.origin(first)
        second = torch.autograd.grad(b, weights)
    assert fine is None and trace.origin(first) is None
    assert place(trace.origin(second)) == ("b", "backward")
    assert place(trace.origin([*first, *second])) == ("b", "backward")


def test_a_backward_that_does_not_begin_with_the_latest_node():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "a": BackScale(1.0), "b": Scale(1e4)}).half()
    weights = list(model.body.parameters())
    with Trace(model) as trace:
        h = model.body(half(torch.full((1, 2), 1e-3)))
        a = model.a(h)
        b = model.b(h * 1e-3)
        torch.autograd.grad(a, weights, half(torch.ones(1, 2)), retain_graph=True)
        grads = torch.autograd.grad(b, weights, half(torch.full((1, 2), 100.0)))
    assert place(trace.origin(grads)) == ("b", "backward")


@pytest.mark.parametrize("culprit", ["left", "right"])
def test_of_two_uses_of_a_tensor_the_one_whose_gradient_overflows_is_named(culprit):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = BackScale(1.0), BackScale(1.0)

        def forward(self, x):
            return self.left(x) + self.right(x) + x

    model = nn.Sequential(nn.Linear(2, 2), Fork(), Scale(2.0)).half()
    getattr(model[1], culprit).factor = 1e5
    origin = origin_of(model, lambda: model(half(torch.ones(1, 2))).sum(), with_grads=True)
    assert place(origin) == (f"1.{culprit}", "backward")


class Several(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


@pytest.mark.parametrize(
    "uses",
    [
        Residual(nn.Sequential(BackScale(1.0), Scale(1.0))),
        Residual(nn.Sequential(nn.Unflatten(1, (2, 1)), nn.Flatten(), Scale(1.0))),
        Several(Scale(1.0), nn.Sequential(nn.Flatten(), Scale(1.0))),
        Several(nn.Sequential(Scale(1.0)), Scale(0.1), BackScale(1.0)),
    ],
)
def test_a_sum_of_gradients_is_of_the_container_of_all_uses(uses):
    model = nn.ModuleList([nn.Linear(2, 2), Scale(1.0), nn.ModuleList([uses]), Scale(1.0)]).half()

    def step():
        h = model[3](model[2][0](model[1](model[0](half(torch.ones(1, 2))))))
        return h.float().sum() * 4e4

    origin = origin_of(model, step, with_grads=True)
    assert place(origin) == ("2.0", "backward") and origin.op == "add"


def test_only_uses_that_have_a_gradient_share_in_its_sum():
    class Times(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return x * self.weight

    first = Times(nn.Parameter(torch.ones(2)))
    uses = Residual(nn.Sequential(Times(first.weight)))
    model = nn.Sequential(nn.Linear(2, 2), first, uses).half()

    def step():
        h = model[1](model[0](half(torch.ones(3, 2))))
        with torch.no_grad():
            model[0](h)
        return uses(h).float().sum() * 4e4

    with Trace(model) as trace:
        step().backward()
    origin = trace.origin([model[0].weight.grad])
    assert place(origin) == ("2", "backward") and origin.op == "add"


def test_what_is_no_sum_of_gradients_is_of_its_own_layer():
    class Square(nn.Module):
        def forward(self, x):
            return x * x

    model = nn.Sequential(nn.Linear(2, 2), Residual(Square())).half()
    nn.init.constant_(model[0].bias, 100.0)
    origin = origin_of(model, lambda: model(half(torch.zeros(1, 2))).float().sum() * 1e3, with_grads=True)
    assert place(origin) == ("1.inner", "backward") and origin.op == "mul"


def test_an_addition_within_one_backward_is_of_its_own_layer():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2.0

        @staticmethod
        def backward(ctx, grad):
            return grad + grad

    class Double(nn.Module):
        def forward(self, x):
            return Doubled.apply(x)

    model = nn.Sequential(nn.Linear(2, 2), Double(), Scale(1.0)).half()
    origin = origin_of(model, lambda: model(half(torch.ones(1, 2))).float().sum() * 4e4, with_grads=True)
    assert place(origin) == ("1", "backward") and origin.op == "add"


def test_a_function_whose_backward_runs_operations_of_its_own():
    model = nn.Sequential(nn.Linear(2, 2), Residual(BackScale(1e5)), nn.ReLU(inplace=True)).half()
    origin = origin_of(model, lambda: model(half(torch.ones(1, 2))).sum(), with_grads=True)
    assert place(origin) == ("1.inner", "backward") and origin.occurrence == 1


def test_a_gradient_that_only_overflows_where_it_is_accumulated():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), Scale(1.0)).half()
    with Trace(model) as trace:
        for _ in range(2):
            model(half(torch.full((1, 1), 4e4))).sum().backward()
    assert place(trace.origin([model[0].weight.grad])) == ("0", "backward")


def test_a_second_backward_is_of_the_layers_that_made_the_first():
    class Square(nn.Module):
        def forward(self, x):
            return x * x * 100.0

    model = nn.Sequential(Scale(1.0), Square(), Scale(1.0))
    x = half(torch.ones(2)).requires_grad_()
    with Trace(model) as trace:
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((grad * 1e3).sum(), x)
    assert torch.isfinite(grad).all()
    origin = trace.origin([second])
    assert place(origin) == ("1", "backward")


def test_a_gradient_that_is_taken_inside_a_forward():
    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = nn.Sequential(BackScale(1e5), Scale(1.0))

        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    model = nn.Sequential(Force(), Scale(1.0))
    assert place(origin_of(model, lambda: model(half(torch.ones(2))))) == ("0.energy.0", "backward")


def test_of_several_results_of_one_operation_each_answers_for_itself():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), Scale(1.0)).half()
    nn.init.ones_(model[0].weight)
    x = half(torch.full((1, 1, 2, 2), 2e4)).requires_grad_()
    with Trace(model) as trace:
        (model(x) * 1e-3 * 8e3).sum().backward()
    assert trace.origin([x.grad]) is None
    origin = trace.origin([model[0].weight.grad])
    assert place(origin) == ("0", "backward") and origin.op == "convolution_backward"


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("culprit", [0, 2])
def test_a_gradient_in_a_checkpointed_part(use_reentrant, culprit):
    inner = nn.Sequential(BackScale(1.0), nn.Linear(2, 2), BackScale(1.0))
    inner[culprit].factor = 1e5
    nn.init.ones_(inner[1].weight)
    model = nn.Sequential(nn.Linear(2, 2), Checkpointed(inner, use_reentrant), BackScale(1.0)).half()
    origin = origin_of(model, lambda: model(half(torch.ones(1, 2))).sum(), with_grads=True)
    assert place(origin) == (f"1.inner.{culprit}", "backward")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_infinity_that_only_the_gradient_of_a_checkpointed_part_meets(use_reentrant):
    class Vanishing(nn.Module):
        def forward(self, x):
            return 1 / torch.exp(x)

    model = nn.Sequential(nn.Linear(2, 2), Checkpointed(nn.Sequential(Scale(1.0), Vanishing()), use_reentrant)).half()
    model[0].bias.data.fill_(100.0)
    origin = origin_of(model, lambda: model(half(torch.ones(1, 2))).sum(), with_grads=True)
    assert place(origin) == ("1.inner.1", "forward") and origin.op == "exp"


# Infinities that are meant


def test_a_mask_of_infinities_is_not_accused():
    model = nn.Sequential(Block(), Block()).half()
    mask = torch.ones(3, 3).triu(1).bool()

    def step():
        return model[1](model[0](half(torch.randn(1, 3, 4)), mask), mask).sum()

    assert origin_of(model, step) is None
    model[1].gain = 1e4
    origin = origin_of(model, step)
    assert place(origin) == ("1", "forward") and origin.op == "bmm"


@pytest.mark.parametrize("how", ["buffer", "full", "log", "triu", "where"])
def test_infinities_that_softmax_absorbs(how):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

        def forward(self, x):
            if how == "buffer":
                x = x + self.mask.to(x.dtype)
            elif how == "full":
                x = torch.stack([x[..., 0], torch.full_like(x[..., 1], -math.inf)], -1)
            elif how == "log":
                x = x + torch.log(torch.tensor([1.0, 0.0], dtype=x.dtype))
            elif how == "triu":
                x = x + torch.full((2, 2), -math.inf, dtype=x.dtype).triu(1)[:1]
            else:
                x = torch.where(torch.tensor([True, False]), x, -math.inf)
            return torch.softmax(x, -1)

    model = nn.Sequential(nn.Linear(2, 2), Masked(), nn.Linear(2, 2)).half()
    assert origin_of(model, lambda: model(half(torch.ones(1, 2))).sum(), with_grads=True) is None
    nn.init.constant_(model[2].weight, 6e4)
    nn.init.constant_(model[2].bias, 6e4)
    origin = origin_of(model, lambda: model(half(torch.ones(1, 2))).sum())
    assert place(origin) == ("2", "forward") and not origin.is_leaf


def test_a_finite_mask_that_overflows_and_hides_a_whole_row():
    class Mask(nn.Module):
        def forward(self, scores, hidden):
            return scores + hidden.to(scores.dtype) * -1e9

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask, self.softmax = Mask(), nn.Softmax(-1)

        def forward(self, x, hidden):
            return self.softmax(self.mask(x, hidden))

    model, x = Attention(), half(torch.randn(2, 2))
    assert origin_of(model, lambda: model(x, torch.eye(2).bool()).sum()) is None
    origin = origin_of(model, lambda: model(x, torch.tensor([[True, True], [False, False]])).sum())
    assert place(origin) == ("mask", "forward") and origin.op == "mul" and not origin.is_leaf


def test_a_row_of_meant_infinities_that_becomes_nan_is_the_softmaxs_doing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1)).half()
    hidden = torch.tensor([[True, True], [True, False]])

    def step():
        return model[1](model[0](half(torch.ones(2, 2))).masked_fill(hidden, -math.inf)).sum()

    origin = origin_of(model, step)
    assert place(origin) == ("1", "forward") and origin.op == "_softmax" and not origin.is_leaf


# Finite, and given as non-finite


def test_all_finite_is_no_origin():
    model = nn.Sequential(Block(), Block()).half()
    assert origin_of(model, lambda: model(half(torch.randn(1, 3, 4))).sum(), with_grads=True) is None


def test_an_infinity_that_does_not_reach_the_result_is_nobodys():
    model = nn.Sequential(Scale(1e5), nn.Tanh())
    x = half(torch.ones(2))
    assert origin_of(model, lambda: model(x)) is None
    assert place(origin_of(model, lambda: model[0](x))) == ("0", "forward")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite(value):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.ones_(model[0].weight), nn.init.ones_(model[1].weight)
    x = torch.ones(3, 2)
    x[1, 1] = value
    for batch in (x, torch.stack([x, x])[0]):
        origin = origin_of(model, lambda batch=batch: model(batch).sum())
        assert origin.is_leaf and origin.layer == "0" and origin.op == "addmm"
    assert origin_of(model, lambda: model(x[:1]).sum()) is None


def test_a_batch_that_is_looked_at_in_part_or_without_a_result_before_it_is_read():
    class Halves(nn.Module):
        def forward(self, x):
            return (x[:, :1] * 2.0).sum() + (x * 2.0).sum()

    class Asks(nn.Module):
        def forward(self, x):
            return x.isnan(), x[:, 1:] * 2.0

    x = torch.tensor([[1.0, math.nan], [1.0, 2.0]])
    for module, look in ((Halves(), lambda y: y), (Asks(), lambda y: y[1])):
        model = nn.Sequential(module)
        origin = origin_of(model, lambda model=model, look=look: look(model(x)))
        assert origin.is_leaf and (origin.layer, origin.op) == ("0", "mul")


def test_a_weight_that_is_nan_and_a_target_that_nothing_made():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].bias.data[0] = math.nan
    origin = origin_of(model, lambda: model(torch.ones(3, 2)).sum())
    assert origin.is_leaf and origin.layer == "1"
    with Trace(model) as trace:
        pass
    alone = trace.origin([model[1].bias])
    assert alone.is_leaf and (alone.layer, alone.op, alone.frames) == ("", "", ())


def test_a_number_that_is_infinite_is_given():
    model = nn.Sequential(Scale(1.0), Scale(math.inf))
    origin = origin_of(model, lambda: model(torch.ones(2)).sum())
    assert origin.is_leaf and origin.layer == "1"


# Views and writes in place


def test_a_view_answers_for_its_own_part_of_the_memory():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.pack, self.use = Scale(torch.tensor([[1e5], [1.0]], dtype=HALF)), Scale(1e5)

        def forward(self, x):
            absorbed, used = self.pack(x).unbind(0)
            return torch.tanh(absorbed) + self.use(used)

    model = Packed()
    model.pack.factor[0] = math.inf
    assert place(origin_of(model, lambda: model(half(torch.ones(2, 3))).sum())) == ("use", "forward")


class Loop(nn.Module):
    """Fills memory piece by piece with what its cell makes."""

    def __init__(self, cell, new):
        super().__init__()
        self.cell, self.head, self.new = cell, Scale(1.0), new

    def forward(self, x):
        out = self.new(x)
        for t in range(len(x)):
            out[t] = self.cell(x[t])
        return self.head(out)


class Cancel(nn.Module):
    def forward(self, x):
        return x * 300.0 - x * 300.0


@pytest.mark.parametrize("new", [torch.zeros_like, torch.empty_like, lambda x: torch.full_like(x, -math.inf)])
@pytest.mark.parametrize("cell", [Scale(300.0), Cancel()])
def test_a_buffer_that_is_written_piece_by_piece(cell, new):
    # Uninitialised memory is NaN then.
    torch.use_deterministic_algorithms(True)
    try:
        model = Loop(cell, new)
        assert origin_of(model, lambda: model(half(torch.ones(3, 2))).sum()) is None
        x = half(torch.tensor([[1.0, 1.0], [300.0, 1.0], [1.0, 1.0]]))
        origin = origin_of(model, lambda: model(x).sum())
        assert place(origin) == ("cell", "forward") and not origin.is_leaf
        model.head.factor = 3e5
        expected = ("head", "forward") if isinstance(cell, Scale) else None
        assert place(origin_of(model, lambda: model(half(torch.ones(3, 2))))) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_that_was_written_over_answers_for_its_last_content():
    class Overwrite(nn.Module):
        def forward(self, x):
            buffer = x * 1e5
            buffer.copy_(x)
            return buffer * 300.0

    model = nn.Sequential(Overwrite(), Scale(300.0))
    assert place(origin_of(model, lambda: model(half(torch.ones(2))).sum())) == ("1", "forward")


def test_what_was_written_over_is_not_where_the_new_content_comes_from():
    class Overwrite(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Scale(1e5)

        def forward(self, x):
            buffer = x * 1e5
            return buffer.copy_(self.inner(x))

    model = Overwrite()
    assert place(origin_of(model, lambda: model(half(torch.ones(2))))) == ("inner", "forward")


def test_an_operation_in_place_is_the_one_that_made_the_infinity():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(1e5)

    model = nn.Sequential(Scale(1.0), InPlace(), nn.ReLU(inplace=True))
    origin = origin_of(model, lambda: model(half(torch.ones(2))).sum())
    assert place(origin) == ("1", "forward") and origin.op == "mul_"


def test_results_that_are_written_to_given_tensors():
    class Out(nn.Module):
        def forward(self, x, factor):
            buffer = torch.full_like(x, math.nan)
            return torch.mul(x, factor, out=buffer)

    class Foreach(nn.Module):
        def forward(self, x, factor):
            torch._foreach_mul_([x], factor)
            return x

    for module in (Out(), Foreach()):
        model = nn.ModuleList([module])
        for factor, expected in ((2.0, None), (1e5, ("0", "forward"))):
            assert place(origin_of(model, lambda f=factor, m=module: m(half(torch.ones(2)), f))) == expected
            origin = origin_of(model, lambda f=factor, m=module: m(half(torch.ones(2)), f))
            assert origin is None or not origin.is_leaf


def test_a_sparse_gradient():
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), BackScale(1e5)).half()
    origin = origin_of(model, lambda: model(torch.tensor([1, 3])).sum(), with_grads=True)
    assert place(origin) == ("1", "backward")


# Lineage alone, in values written by hand


def call(index, *scalars):
    return Call(index, "op", "", "forward", (), scalars)


def value(inputs=(), infs=False, nans=False, scalars=(), given=False):
    return Value(HALF, tuple(inputs), None if given else call(0, *scalars), infs=infs, nans=nans)


INF, NAN = {"infs": True}, {"nans": True}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([value(), value([0])], None),
        ([value(), value([0], **INF), value([1], **INF)], 1),
        ([value(), value([0], **INF), value([1])], None),
        # two operations: the earlier; an operation and a leaf or number: the operation
        ([value(**INF), value(**INF), value([1, 0], **INF)], 0),
        ([value(**INF, given=True), value(**INF), value([1, 0], **INF)], 1),
        ([value(**INF, scalars=[-math.inf]), value(**INF), value([1, 0], **INF)], 1),
        ([value(**INF, given=True), value([0], **INF)], 0),
        # NaN made of infinities: who made these, or the maker of the NaN where they were handed in
        ([value(), value([0], **INF), value([1, 0], **NAN), value([2], **NAN)], 1),
        ([value(**INF, given=True), value([0], **NAN), value([1], **NAN)], 1),
        ([value(**INF, scalars=[-math.inf]), value([0], **NAN)], 1),
        ([value(), value([0], **NAN, scalars=[math.inf])], 1),
        ([value(), value([0], **NAN)], 1),
        # NaN goes before an infinity that has nothing to do with it
        ([value(**INF), value(**NAN), value([0, 1], **NAN)], 1),
        ([value(**NAN, scalars=[math.nan]), value([0], **NAN), value([1], **NAN)], 0),
        # an infinity that was made of a NaN
        ([value(**INF), value([0], **NAN), value([1], **INF), value([2], **INF)], 0),
    ],
)
def test_lineage(values, expected):
    assert find_origin(values, [len(values) - 1]) == expected


def test_what_was_given():
    assert is_given(value(**INF, given=True)) and is_given(value(**INF, scalars=[-math.inf]))
    assert is_given(value(**NAN, scalars=[math.nan])) and not is_given(value(**NAN, scalars=[math.inf]))
    assert not is_given(value(**INF))


# Against layers run one by one


@pytest.mark.parametrize("seed", range(12))
def test_chains_of_layers_in_forward_and_backward_against_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)

    def layer():
        kind = int(torch.randint(4, (), generator=generator))
        factor = float(10 ** torch.empty(()).uniform_(-1.5, 2.0, generator=generator))
        return [Scale(factor), BackScale(factor), nn.Linear(2, 2), Residual(Scale(factor))][kind]

    layers = [layer() for _ in range(8)]
    model, x = nn.Sequential(nn.Linear(2, 2), *layers).half(), half(torch.ones(1, 2))
    forward, backward = _brute_force(model, x)
    loss_origin = origin_of(model, lambda: model(x).sum() * 8)
    assert place(loss_origin) == forward
    if forward is None:
        assert place(origin_of(model, lambda: model(x).sum() * 8, with_grads=True)) == backward


def _brute_force(model, x):
    """The first layer that makes infinities of finite numbers, and the last whose gradient does."""
    inputs = [x]
    for index, layer in enumerate(model):
        inputs.append(layer(inputs[-1]).detach())
        if not inputs[-1].isfinite().all():
            inner = isinstance(layer, Residual) and not layer.inner(inputs[-2]).isfinite().all()
            return (f"{index}.inner" if inner else str(index), "forward"), None
    if not (inputs[-1].sum() * 8).isfinite():
        return ("", "forward"), None
    grad = torch.full_like(inputs[-1], 8.0)
    for index, layer in reversed(list(enumerate(model))):
        entry = inputs[index].clone().requires_grad_()
        grads = torch.autograd.grad(layer(entry), [entry, *layer.parameters()], grad)
        if index == 0:
            grads = grads[1:]
        if not all(each.isfinite().all() for each in grads):
            inner = isinstance(layer, Residual)
            return None, (f"{index}.inner" if inner else str(index), "backward")
        grad = grads[0]
    return None, None


@pytest.mark.parametrize("model", [nn.MultiheadAttention(4, 2), nn.TransformerEncoderLayer(4, 2, 8)])
def test_torchs_own_containers_under_fp16(model):
    x = torch.randn(3, 1, 4)

    def step(scale):
        with autocast():
            results = model(*[x * scale] * (3 if isinstance(model, nn.MultiheadAttention) else 1))
            return (results if isinstance(results, torch.Tensor) else results[0]).float().square().sum()

    assert origin_of(model, lambda: step(1.0), with_grads=True) is None
    origin = origin_of(model, lambda: step(1e6))
    assert place(origin) == ("self_attn" if hasattr(model, "self_attn") else "", "forward")
    assert origin.op == "_to_copy"


# Leaving no trace


def models():
    encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return {
        "mlp": (mlp(), torch.randn(2, 4)),
        "block": (nn.Sequential(Block(), Block()), torch.randn(2, 3, 4)),
        "cnn": (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True)), torch.randn(2, 1, 5, 5)),
        "encoder": (encoder, torch.randn(2, 3, 4)),
        "lstm": (nn.LSTM(4, 3, batch_first=True), torch.randn(2, 3, 4)),
        "gru": (nn.GRU(4, 3, num_layers=2), torch.randn(2, 3, 4)),
        "attention": (nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(2, 3, 4)),
        "embedding": (nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4)), torch.tensor([[1, 2, 2]])),
        "checkpoint": (nn.Sequential(nn.Linear(4, 4), Checkpointed(mlp(), False)), torch.randn(2, 4)),
        "spectrum": (nn.Sequential(nn.Linear(4, 4), Spectrum()), torch.randn(2, 4)),
    }


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.rfft(x.float()).abs()


def train_step(model, x, low):
    inputs = (x, x, x) if isinstance(model, nn.MultiheadAttention) else (x,)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        output = model(*inputs)
        output = output[0] if isinstance(output, tuple) else output
        loss = output.square().mean()
    loss.backward()
    return output.detach(), loss.detach()


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", list(models()))
def test_a_step_computes_the_same_bits_and_the_model_is_as_before(name, low, snapshot):
    model, x = models()[name]
    twin = copy.deepcopy(model)
    before = snapshot(model)
    with Trace(model) as trace:
        pass
    assert snapshot(model).differences(before) == []
    with Trace(model) as trace:
        results = train_step(model, x, low)
    for mine, theirs in zip(results, train_step(twin, x, low), strict=True):
        assert torch.equal(mine, theirs)
    for (key, mine), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), key
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(_dense(mine.grad), _dense(theirs.grad))
    assert trace.origin([results[1], *(p.grad for p in model.parameters())]) is None
    assert trace.backward_amax() > 0


def _dense(grad):
    return grad.to_dense() if grad.is_sparse else grad


def test_the_hooks_of_a_model_keep_their_order_and_are_left_alone(snapshot):
    model = nn.Sequential(Scale(2.0), nn.Sequential(Scale(3.0)))
    order = []
    model[0].register_forward_pre_hook(lambda *_: order.append("pre"))
    model[0].register_forward_hook(lambda *_: order.append("post"))
    before = snapshot(model)
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    hooks = [list(getattr(module, name).items()) for module in model.modules() for name in names]
    with pytest.raises(KeyError), Trace(model):
        model(torch.ones(1))
        raise KeyError
    assert snapshot(model).differences(before) == [] and order == ["pre", "post"]
    assert hooks == [list(getattr(module, name).items()) for module in model.modules() for name in names]
    assert torch.autograd.grad_mode.set_multithreading_enabled(True).prev is True


def test_an_exception_in_a_forward_leaves_the_module_that_raised():
    class Fragile(nn.Module):
        def forward(self, x):
            raise KeyError

    model = nn.Sequential(nn.Sequential(Fragile()), Scale(1e5))

    def step():
        with pytest.raises(KeyError):
            model(torch.ones(1))
        return model[1](half(torch.ones(2)) * 1.0) + half(torch.ones(2)) * 1e5

    assert place(origin_of(model, step)) == ("1", "forward")
    assert place(origin_of(model, lambda: step() * 0 + 1)) == ("1", "forward")

    def after():
        with pytest.raises(KeyError):
            model(torch.ones(1))
        return half(torch.ones(2)) * 1e5

    assert place(origin_of(model, after)) == ("", "forward")


def test_no_tensor_is_kept():
    model = mlp()
    alive = []
    for layer in model:
        layer.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    with Trace(model) as trace:
        loss = model(torch.randn(2, 4)).sum()
        alive.append(weakref.ref(loss))
        loss.backward()
        grads = [weakref.ref(parameter.grad) for parameter in model.parameters()]
        del loss
        assert not any(ref() is not None for ref in alive)
        model.zero_grad(set_to_none=True)
        assert not any(ref() is not None for ref in grads)
    assert trace.backward_amax() > 0
    assert all(value.stats is None for value in trace._recorder.values)


# What is reported


def test_frames_are_plain_data_and_end_soon_after_the_origin():
    model = nn.Sequential(*(Scale(2.0) for _ in range(30)), Scale(1e5), *(Scale(1.0) for _ in range(10)))
    with Trace(model) as trace:
        y = model(half(torch.ones(2)) * 1e-3)
    origin = trace.origin([y])
    first = [frame.layer for frame in origin.frames if not frame.infs]
    assert [frame.layer for frame in origin.frames].index(origin.layer) == 23 and len(first) == 23
    assert len(origin.frames) == 24 + 4
    data = [frame.to_dict() for frame in origin.frames]
    assert json.loads(json.dumps(data)) == data
    assert data[0]["format"] == "fp16"
    before = origin.frames[22]
    assert before.amin == before.amax == origin.input_amax


def test_magnitudes_are_of_finite_elements():
    model = nn.Sequential(Scale(2.0), Scale(1e4))
    x = torch.tensor([3.0, -7.0, 0.5], dtype=HALF, requires_grad=True)
    with Trace(model) as trace:
        model(x).sum().backward()
    assert trace.backward_amax() == 2e4
    with Trace(model) as trace:
        y = model(torch.tensor([3.0, -70.0, 0.5, math.nan], dtype=HALF))
        count = len(trace._recorder.calls)
        last = trace.origin([y[1]]).frames[-1]
        assert trace._recorder.calls[count:] == []
    assert (last.amin, last.amax, last.infs, last.nans) == (1e4, 6e4, True, True)


def test_a_compiled_model_is_traced_operation_by_operation():
    model = nn.Sequential(Scale(1.0), Scale(1e5))
    compiled = torch.compile(model, backend="eager")
    x = half(torch.ones(2))
    compiled(x)
    assert place(origin_of(compiled, lambda: compiled(x))) == ("1", "forward")


def test_what_a_hook_of_a_module_computes_is_the_modules():
    model = nn.Sequential(Scale(1.0), Scale(1.0), Scale(1.0))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 1e3,))
    model[1].register_forward_hook(lambda module, args, output: output * 1e3)
    assert place(origin_of(model, lambda: model(half(torch.ones(2))))) == ("1", "forward")
    assert place(origin_of(model, lambda: model(half(torch.full((2,), 100.0))))) == ("0", "forward")


def test_a_trace_that_begins_inside_a_forward():
    class Late(nn.Module):
        def forward(self, x):
            trace.__enter__()
            return x * 1e5

    model = nn.Sequential(Late(), Scale(1.0))
    # With a hook of its own a module asks for hooks again when its forward has ended.
    model[0].register_forward_hook(lambda *_: None)
    trace = Trace(model)
    try:
        y = model(half(torch.ones(2)))
    finally:
        trace.__exit__(None, None, None)
    assert trace.origin([y]).layer == ""


def test_a_cast_is_not_looked_up_in_another_trace():
    with Trace(nn.Identity()) as trace:
        torch.ones(2).half()
    assert trace.amax_of("", "forward", "ones", 0) == 1.0
    assert trace.amax_of("", "forward", "_to_copy", 0) is None


def test_wrappers_are_transparent():
    class ActivationWrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._checkpoint_wrapped_module = inner

        def forward(self, x):
            return self._checkpoint_wrapped_module(x)

    model = nn.Sequential(nn.Sequential(ActivationWrapper(Scale(1e5))))
    assert place(origin_of(model, lambda: model(half(torch.ones(2))))) == ("0.0", "forward")


def test_operations_of_a_script_module_are_its_containers():
    with pytest.warns((DeprecationWarning, FutureWarning), match="deprecated"):
        script = torch.jit.script(Scale(1e5))
    model = nn.Sequential(Residual(script), Scale(1.0))
    assert place(origin_of(model, lambda: model(half(torch.ones(2))))) == ("0", "forward")


# On CUDA, where backward has threads of its own


@pytest.mark.gpu
@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_a_gradient_that_overflows_on_a_gpu(use_reentrant):
    inner = nn.Sequential(BackScale(1.0), nn.Linear(2, 2), BackScale(1e5), BackScale(1.0))
    part = Residual(inner) if use_reentrant is None else Checkpointed(inner, use_reentrant)
    model = nn.Sequential(nn.Linear(2, 2), part, BackScale(1.0)).half().cuda()
    x = half(torch.ones(1, 2)).cuda()
    for _ in range(2):
        origin = origin_of(model, lambda: model(x).sum(), with_grads=True)
        assert place(origin) == ("1.inner.2", "backward")


@pytest.mark.gpu
def test_a_forward_overflow_and_the_same_bits_on_a_gpu():
    model = nn.Sequential(Block(), Block()).cuda()
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 4, device="cuda")

    def step(model):
        with torch.autocast("cuda", dtype=HALF):
            loss = model(x).square().mean()
        loss.backward()
        return loss

    with Trace(model) as trace:
        loss = step(model)
    assert torch.equal(loss, step(twin)) and trace.origin([loss]) is None
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    model[1].gain = 1e4
    origin = origin_of(model, lambda: step(model))
    assert place(origin) == ("1", "forward") and origin.op == "bmm"
