"""Crossing borders, against models that are cast by hand."""

import copy
import inspect
import io
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.engine.borders import border_of
from lightning_mixprec.errors import PolicyError
from lightning_mixprec.policy.policy import PrecisionPolicy

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def bf16(enabled=True):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


class Echo(nn.Module):
    """Records what arrives and in which autocast state, and hands it on."""

    def forward(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs
        self.enabled, self.dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        self.caches = torch.is_autocast_cache_enabled()
        return args[0] if args else kwargs


class Root(nn.Module):
    def __init__(self, *children):
        super().__init__()
        self.layers = nn.ModuleList(children)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def state():
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.is_autocast_enabled("cuda"),
    )


def grads(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_grads(a, b):
    for (name, x), y in zip(grads(a).items(), grads(b).values(), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y), name


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
def test_a_uniform_policy_touches_nothing_and_computes_as_torch_autocast(format, attached, snapshot):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    stock = copy.deepcopy(model)
    before = snapshot(model)
    x = torch.randn(3, 4)
    with attached(model, format) as attachment:
        assert snapshot(model).differences(before) == []
        with attachment.context():
            y = model(x)
        y.float().sum().backward()
    with torch.autocast("cpu", dtype=DTYPES[format] if format != "fp32" else None, enabled=format != "fp32"):
        expected = stock(x)
    expected.float().sum().backward()
    assert y.dtype == expected.dtype and torch.equal(y, expected)
    assert_same_grads(model, stock)


def test_an_fp32_layer_in_a_bf16_model_equals_one_cast_by_hand(attached):
    model = Root(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    stock = copy.deepcopy(model)
    x = torch.randn(3, 4)
    with attached(model, {"default": "bf16", "layers.1": "fp32"}) as attachment, attachment.context():
        y = model(x)
    with bf16():
        h = stock.layers[0](x)
        with bf16(False):
            h = stock.layers[1](h.float())
        expected = stock.layers[2](h)
    y.float().pow(2).sum().backward()
    expected.float().pow(2).sum().backward()
    assert torch.equal(y, expected)
    assert_same_grads(model, stock)


def test_a_bf16_layer_in_an_fp32_model_hands_back_fp32(attached):
    model = Root(nn.Linear(4, 4), nn.Linear(4, 4), Echo())
    x = torch.randn(3, 4)
    with attached(model, {"default": "fp32", "layers.1": "bf16"}) as attachment, attachment.context():
        y = model(x)
    h = model.layers[0](x)
    with bf16():
        expected = model.layers[1](h)
    assert y.dtype == torch.float32 and torch.equal(y, expected.float())
    assert not model.layers[2].enabled


def test_what_children_hand_back_to_an_fp32_container_is_cast(attached):
    class Gram(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = nn.Linear(4, 4)

        def forward(self, x):
            h = self.child(x)
            return h @ h.t()

    model = nn.Sequential(Gram())
    policy = {"default": "bf16", "rules": [{"layers": "0", "compute": "fp32", "recurse": False}]}
    x = torch.randn(3, 4)
    with attached(model, policy) as attachment, attachment.context():
        y = model(x)
    with bf16():
        h = model[0].child(x)
    assert y.dtype == torch.float32 and torch.equal(y, h.float() @ h.float().t())


def test_only_the_other_16_bit_format_is_cast_into_a_16_bit_region(attached):
    model = Root(Echo())
    given = (torch.ones(1), torch.ones(1).half(), torch.ones(1).bfloat16(), torch.ones(1, dtype=torch.int64))
    with attached(model, {"default": "fp32", "layers.0": "bf16"}):
        model.layers[0](*given)
    echo = model.layers[0]
    assert [arg.dtype for arg in echo.args] == [torch.float32, torch.bfloat16, torch.bfloat16, torch.int64]
    assert echo.args[0] is given[0] and echo.args[3] is given[3]


def test_a_timestamp_survives_an_fp16_region(attached):
    model = Root(Echo())
    with attached(model, {"default": "fp32", "layers.0": "fp16"}):
        assert model(torch.tensor([2e5])).item() == 2e5


def test_an_fp16_input_is_squared_in_bf16_in_a_bf16_region(attached):
    class Square(nn.Module):
        def forward(self, h):
            return h * h

    model = Root(Square())
    h = torch.tensor([300.0]).half()
    assert (h * h).isinf()
    with attached(model, {"default": "fp16", "layers.0": "bf16"}) as attachment, attachment.context():
        # The result returns into fp16 surroundings, where it has to be fp16 again.
        assert model.layers[0](h).dtype == torch.float16
    with attached(model, {"default": "fp32", "layers.0": "bf16"}):
        assert model(h).item() == (h.bfloat16() * h.bfloat16()).item()


@pytest.mark.parametrize("default, came_back", [("bf16", torch.float32), ("fp32", torch.float32)])
def test_fp64_results_return_as_fp32(default, came_back, attached):
    model = Root(Echo())
    with attached(model, {"default": default, "layers.0": "fp64"}) as attachment, attachment.context():
        assert model(torch.ones(2)).dtype == came_back
    assert model.layers[0].args[0].dtype == torch.float64 and not model.layers[0].enabled


def test_fp64_surroundings_hand_fp32_to_a_16_bit_region(attached):
    model = Root(nn.Linear(2, 2))
    x = torch.randn(3, 2, dtype=torch.float64)
    with attached(model, {"default": "fp64", "layers.0": "bf16"}) as attachment, attachment.context():
        y = model(x)
    with bf16():
        expected = model.layers[0](x.float())
    assert y.dtype == torch.float64 and torch.equal(y, expected.double())


def test_callers_of_fp32_and_fp64_are_told_apart_by_what_they_pass(attached):
    class Caller(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared = shared

        def forward(self, x):
            self.got = self.shared(x)
            return self.got

    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"wide": Caller(shared), "narrow": Caller(shared)})
    policy = {"default": "fp32", "wide": "fp64", "**.shared": "bf16"}
    with attached(model, policy):
        model["wide"](torch.ones(1, 2))
        model["narrow"](torch.ones(1, 2))
    assert model["wide"].got.dtype == torch.float64 and model["narrow"].got.dtype == torch.float32


@pytest.mark.parametrize("came", [torch.float32, torch.bfloat16])
def test_output_input_hands_on_in_the_format_that_came(came, attached):
    model = Root(nn.LayerNorm(4))
    x = torch.randn(2, 4).to(came)
    with attached(model, {"default": "bf16", "layers.0": "c=fp32,o=input"}) as attachment, attachment.context():
        y = model(x)
    with bf16(False):
        expected = model.layers[0](x.float()).to(came)
    assert y.dtype == came and torch.equal(y, expected)


def test_output_input_goes_by_the_first_floating_input_wherever_it_is(attached):
    model = Root(Echo())
    half = torch.ones(1).half()
    with attached(model, {"default": "fp16", "layers.0": "c=fp32,o=input"}) as attachment, attachment.context():
        assert model.layers[0]([torch.ones(1).long(), half], torch.ones(1))[1].dtype == torch.float16
        assert model.layers[0](a=half)["a"].dtype == torch.float16
        assert model.layers[0](1) == 1


def test_an_output_format_makes_a_border_where_compute_does_not_differ(attached):
    model = Root(Echo())
    with attached(model, {"default": "bf16", "layers.0": "o=fp32"}) as attachment, attachment.context():
        assert model(torch.ones(1).bfloat16()).dtype == torch.float32
        assert model.layers[0].enabled
    with attached(model, {"default": "fp32", "layers.0": "o=bf16"}) as attachment, attachment.context():
        y = model(torch.tensor([1 + 2**-12]))
    # Rounded on the way out, and cast back into fp32 own operations.
    assert y.dtype == torch.float32 and y.item() == 1


def test_an_fp64_output_stays_out_of_16_bit_surroundings(attached):
    model = Root(Echo())
    with attached(model, {"default": "bf16", "layers.0": "c=fp32,o=fp64"}) as attachment, attachment.context():
        assert model(torch.ones(1)).dtype == torch.float32


def test_keyword_arguments_and_nested_containers_are_cast_and_others_left(attached):
    model = Root(Echo())
    given = {"a": [torch.ones(1).half(), {"b": (torch.ones(1).long(), "text")}], "flag": None, "plain": [1, 2]}
    with attached(model, {"default": "bf16", "layers.0": "fp32"}):
        model.layers[0](**given)
    seen = model.layers[0].kwargs
    assert seen["a"][0].dtype == torch.float32 and seen["a"][1]["b"][0].dtype == torch.int64
    assert seen["plain"] is given["plain"] and given["a"][0].dtype == torch.float16


def test_module_lists_and_dicts_are_transparent(attached):
    model = nn.Module()
    model.blocks = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    # The list's own format means nothing: these layers are called by the root.
    triple = {name: SimpleNamespace(param="fp32", compute="bf16", output=None) for name, _ in model.named_modules()}
    triple["blocks.a"] = SimpleNamespace(param="fp32", compute="fp32", output=None)
    attachment = attach(model, triple, "cpu", emulate=False)
    assert all("forward" not in module.__dict__ for module in model.modules())
    attachment.detach()


def test_the_users_own_nested_autocast_holds_inside_and_around(attached):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.low = Echo(), Echo()

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.float16):
                self.inside = F.linear(x, torch.ones(1, 1))
                self.got = self.wide(self.inside)
                self.low(x)
            return self.got

    model = Root(Own())
    policy = {"default": "bf16", "layers.0.wide": "fp32", "layers.0.low": "bf16"}
    with attached(model, policy) as attachment, attachment.context():
        model(torch.ones(1, 1))
        assert state()[:2] == (True, torch.bfloat16)
    own = model.layers[0]
    assert own.inside.dtype == torch.float16
    assert own.wide.args[0].dtype == torch.float32 and not own.wide.enabled
    # The caller's state is the user's fp16, in which fp32 results are left to autocast.
    assert own.got.dtype == torch.float32
    # No border of the policy: the user's own autocast holds.
    assert own.low.dtype == torch.float16


@pytest.mark.parametrize("outer", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("inner", ["fp64", "fp32", "bf16", "fp16"])
def test_an_exception_restores_the_state(outer, inner, attached):
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    model = Root(Fails(), nn.Linear(1, 1))
    with attached(model, {"default": outer, "layers.0": inner}) as attachment:
        before = state()
        with attachment.context():
            during = state()
            with pytest.raises(RuntimeError, match="no"):
                model(torch.ones(1, 1))
            assert state() == during
        assert state() == before
    assert torch.autocast_increment_nesting() == 1 and torch.autocast_decrement_nesting() == 0


@pytest.mark.parametrize("policy", ["bf16", {"default": "fp32", "layers.0": "bf16"}])
def test_no_cast_of_a_weight_outlives_its_use(policy, attached):
    model = Root(nn.Linear(2, 2))
    x = torch.ones(1, 2)
    with attached(model, policy) as attachment, attachment.context():
        before = model(x)
        with torch.no_grad():
            model.layers[0].weight.add_(1)
        assert not torch.equal(model(x), before)


def test_recursion(attached):
    class Countdown(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x, depth):
            return self.linear(x) if depth == 0 else self(self.linear(x), depth - 1)

    model = nn.Sequential(Countdown())
    x = torch.randn(1, 2)
    for default, inner in (("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp64")):
        with attached(model, {"default": default, "0": inner}) as attachment, attachment.context():
            y = model[0](x, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inner == "bf16"):
            h = x.to(DTYPES[inner]) if inner != "bf16" else x
            for _ in range(4):
                h = F.linear(h, *(p.to(h.dtype) if inner == "fp64" else p for p in model[0].linear.parameters()))
        assert torch.equal(y.float(), h.float())


@pytest.mark.parametrize("formats", [("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp64")])
def test_threads_do_not_see_each_other(formats, attached):
    default, inner = formats
    model = Root(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    xs = [torch.randn(4, 8) for _ in range(4)]
    results, failures = {}, []

    def work(i, attachment):
        try:
            for _ in range(30):
                with attachment.context():
                    y = model(xs[i])
                results.setdefault(i, []).append(y.detach())
        except Exception as failure:
            failures.append(failure)

    with attached(model, {"default": default, "layers.1": inner}) as attachment:
        with attachment.context():
            expected = [model(x).detach() for x in xs]
        threads = [threading.Thread(target=work, args=(i, attachment)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    for i, ys in results.items():
        assert all(torch.equal(y, expected[i]) for y in ys)


def test_a_deep_copy_computes_with_its_own_weights(attached):
    model = Root(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.ones(1, 2)
    with attached(model, {"default": "bf16", "layers.1": "fp32"}) as attachment, attachment.context():
        before = model(x)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert other(x).tolist() == [[0, 0]] and torch.equal(model(x), before)
        assert border_of(other.layers[1]).module is other.layers[1]


@pytest.mark.parametrize("policy", [{"default": "bf16", "layers.1": "fp32"}, {"default": "fp32", "layers.1": "fp64"}])
def test_pickle_and_torch_save_carry_the_borders(policy, attached):
    model = Root(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.ones(1, 2)
    with attached(model, policy) as attachment, attachment.context():
        expected = model(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), expected)
            assert border_of(other.layers[1]).module is other.layers[1]


def test_a_copy_of_an_attached_model_can_be_attached_afresh(attached, snapshot):
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), nn.Linear(4, 4))
    before = copy.deepcopy(model)
    with attached(model, {"default": "bf16", "0.norm1": "fp32", "1": "fp32"}):
        other = copy.deepcopy(model)
        with attached(other, "fp32"):
            pass
    assert all(len(m._forward_hooks) == len(m._forward_pre_hooks) == 0 for m in other.modules())
    assert all("forward" not in m.__dict__ for m in other.modules())
    x = torch.randn(1, 3, 4)
    with torch.random.fork_rng():
        expected = before(x)
    assert torch.equal(other(x), expected)


def test_an_instance_forward_that_was_there_is_called_and_comes_back(attached):
    model = Root(nn.Linear(2, 2))
    layer = model.layers[0]

    def twice(x):
        return 2 * type(layer).forward(layer, x)

    layer.forward = twice
    x = torch.ones(1, 2)
    with attached(model, {"default": "bf16", "layers.0": "fp32"}) as attachment, attachment.context():
        y = model(x)
    assert layer.forward is twice and torch.equal(y, twice(x))


def test_a_module_that_changes_its_class_computes_as_its_new_one(attached):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Root(nn.Linear(2, 2))
    with attached(model, {"default": "bf16", "layers.0": "fp32"}) as attachment, attachment.context():
        single = model(torch.ones(1, 2))
        model.layers[0].__class__ = Doubled
        assert torch.equal(model(torch.ones(1, 2)), 2 * single)


def test_what_a_forward_takes_can_still_be_asked(attached):
    model = Root(nn.MultiheadAttention(2, 1))
    expected = inspect.signature(model.layers[0].forward)
    with attached(model, {"default": "bf16", "layers.0": "fp32"}):
        assert inspect.signature(model.layers[0].forward) == expected


def test_attaching_twice_is_an_error(attached):
    model = Root(nn.Linear(2, 2))
    with attached(model, "bf16"), pytest.raises(PolicyError, match="attached already"), attached(model, "fp32"):
        pass
    with attached(model, "fp32"):
        pass


def test_double_backward(attached):
    model = Root(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    x = torch.randn(2, 3)

    def penalty(forward):
        z = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(forward(z).float().sum(), z, create_graph=True)
        return g.pow(2).sum()

    def by_hand(z):
        with bf16():
            h = torch.tanh(model.layers[0](z))
            with bf16(False):
                h = torch.tanh(model.layers[1](h.float()))
            return model.layers[2](h)

    model.layers[0].register_forward_hook(lambda m, a, y: torch.tanh(y))
    model.layers[1].register_forward_hook(lambda m, a, y: torch.tanh(y))
    with attached(model, {"default": "bf16", "layers.1": "fp32"}) as attachment, attachment.context():
        mine = penalty(model)
    mine.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for layer in model.layers[:2]:
        layer._forward_hooks.clear()
    with bf16():
        theirs = penalty(by_hand)
    theirs.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, model.parameters(), strict=False))
    assert any(g.any() for g in found)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        ctx.seen = x.dtype
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        assert g.dtype == ctx.seen
        return g @ w.t(), x.t() @ g


class CustomFwd(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, w):
        assert x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.t(), x.t() @ g


@pytest.mark.parametrize(
    "function, default, inner",
    # A function that knows nothing of autocast fails in 16 bits with torch.autocast too.
    [(Scale, "bf16", "fp32"), (Scale, "bf16", "fp64"), (CustomFwd, "bf16", "fp32"), (CustomFwd, "fp32", "bf16")],
)
def test_custom_autograd_functions(function, default, inner, attached):
    class Custom(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(2))

        def forward(self, x):
            return function.apply(x, self.weight)

    model = Root(nn.Linear(2, 2), Custom(), nn.Linear(2, 2))
    x = torch.ones(3, 2)
    with attached(model, {"default": default, "layers.1": inner}) as attachment, attachment.context():
        model(x).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("default, inner", [("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp64"), ("fp64", "fp32")])
def test_activation_checkpointing(use_reentrant, default, inner, attached):
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
            self.saves = False

        def forward(self, x):
            y = checkpoint(self.block, x, use_reentrant=use_reentrant) if self.saves else self.block(x)
            return y.float().sum()

    for policy in ({"default": default, "block.2": inner}, {"default": default, "block": inner}):
        plain = Net()
        saving = copy.deepcopy(plain)
        saving.saves = True
        x = torch.randn(3, 4, dtype=DTYPES["fp64" if default == "fp64" else "fp32"])
        for model in (plain, saving):
            with attached(model, policy) as attachment:
                with attachment.context():
                    loss = model(x.clone().requires_grad_())
                loss.backward()
        assert_same_grads(plain, saving)


@pytest.mark.parametrize("default, inner", [("bf16", "fp16"), ("fp16", "bf16"), ("fp32", "bf16")])
def test_tied_weights_under_two_formats(default, inner, attached):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3, bias=False) for _ in range(3))
            self.b.weight = self.a.weight
            self.c.weight = self.a.weight

        def forward(self, x):
            self.ys = self.a(x), self.b(x), self.c(x), self.a(x)
            return sum(y.float().sum() for y in self.ys)

    model = Tied()
    other = {"bf16": "fp16", "fp16": "bf16"}[inner]
    x = torch.randn(2, 3)
    with attached(model, {"default": default, "b": inner, "c": other}) as attachment:
        with attachment.context():
            loss = model(x)
        loss.backward()
    for y, format in zip(model.ys, (default, inner, other, default), strict=True):
        with torch.autocast("cpu", dtype=DTYPES[format], enabled=format != "fp32", cache_enabled=False):
            expected = F.linear(x, model.a.weight)
        # Between the 16-bit formats a result is cast to its surroundings', fp32 is not.
        assert torch.equal(y, expected if "fp32" in (default, format) else expected.to(DTYPES[default]))


def test_a_container_may_use_its_childs_weight_in_another_16_bit_format(attached):
    class LanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return F.linear(self.head(F.linear(x, self.head.weight)), self.head.weight)

    model = nn.Sequential(LanguageModel())
    x = torch.randn(2, 3)
    with attached(model, {"default": "fp16", "0.head": "bf16"}) as attachment, attachment.context():
        y = model(x)
    w = model[0].head.weight
    h = (x.half() @ w.half().t()).bfloat16()
    assert torch.equal(y, (h @ w.bfloat16().t()).half() @ w.half().t())


@pytest.mark.parametrize("around", ["fp32", "bf16"])
def test_16_bits_are_computed_without_autocasts_weight_cache_wherever_they_begin(around, attached):
    model = nn.ModuleDict({"a": Echo(), "b": nn.Sequential(Echo()), "c": Echo()})
    with attached(model, {"default": around, "a": "fp16", "b": "bf16", "c": "fp32"}) as attachment:
        with attachment.context():
            for layer in model.values():
                layer(torch.ones(1))
            assert torch.is_autocast_cache_enabled() == (around == "fp32")
        assert not model["a"].caches and not model["b"][0].caches
        with bf16():  # by the user, who wants a cache
            model["a"](torch.ones(1))
            assert torch.is_autocast_cache_enabled() and not model["a"].caches


def test_integer_inputs_reach_an_embedding_unharmed(attached):
    model = Root(nn.Embedding(5, 2), nn.Linear(2, 2))
    ids = torch.tensor([[1, 4]])
    for default, inner in (("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp64")):
        with attached(model, {"default": default, "layers.0": inner}) as attachment, attachment.context():
            y = model.layers[0](ids)
        assert torch.equal(y.float(), model.layers[0].weight[ids])


def test_results_that_are_no_tensors_pass(attached):
    class Loss(nn.Module):
        def forward(self, x):
            return {"loss": x.bfloat16(), "n": 3, "items": [x.bfloat16(), None]}

    model = Root(Loss())
    with attached(model, {"default": "fp32", "layers.0": "bf16"}):
        out = model(torch.ones(1))
    assert out["loss"].dtype == out["items"][0].dtype == torch.float32 and out["n"] == 3 and out["items"][1] is None


def test_an_output_is_said_of_the_matched_layer_and_not_of_those_inside_it():
    """The oracle is the encoder in fp32, its result rounded once."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 2))
    assignment = PrecisionPolicy.from_dict({"default": "bf16", "0": "c=fp32,o=bf16"}).resolve(model)
    x = torch.randn(4, 8)
    expected = model[0](x).bfloat16()
    attachment = attach(model, assignment, "cpu")
    seen = []
    handle = model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with attachment.context():
        model(x)
    handle.remove()
    attachment.detach()
    assert assignment["0.0"].output == "bf16"
    assert assignment.hands_on("0.0") is None
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0], expected)
