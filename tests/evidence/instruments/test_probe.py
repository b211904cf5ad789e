"""What is observed of a running step is what hooks of one's own would see, and observing changes nothing."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_mixprec.errors import SupportError, TraceLeftError
from lightning_mixprec.evidence.instruments.probe import (
    CallRecorder,
    Observer,
    cast_to_fp32,
    computed_again,
    gradient_dots,
    layers_of,
    leaving_out,
    own_parameters,
    weight_gradients,
)
from lightning_mixprec.numerics.exponents import histogram
from lightning_mixprec.numerics.similarity import cosine_of, dots

CPU = torch.device("cpu")


def rows(observed, layers):
    return {name: observed.select(row) for row, name in enumerate(layers) if observed.elements[row] > 0}


def observe(model, step, max_elements=None):
    layers = layers_of(model)
    with Observer(layers, max_elements) as observer:
        step()
    return rows(observer.outputs(), layers), rows(observer.gradients(), layers)


def same(one, other):
    return torch.equal(one.counts, other.counts) and one.zeros == other.zeros and one.amax == other.amax


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


# Outputs and gradients


def test_outputs_and_the_gradients_that_arrive_at_them_are_seen():
    model, x = mlp(), torch.randn(16, 6)
    outputs, gradients = observe(model, lambda: model(x).square().sum().backward())
    values, h = {}, x
    for name, layer in copy.deepcopy(model).named_children():
        h = layer(h)
        h.retain_grad()
        values[name] = h
    h.square().sum().backward()
    assert outputs.keys() == gradients.keys() == values.keys()
    for name, value in values.items():
        assert same(outputs[name], histogram(value))
        assert same(gradients[name], histogram(value.grad))


def test_a_sample_of_the_elements_has_the_largest_of_all():
    model, x = nn.Linear(6, 512), torch.randn(64, 6)
    outputs, gradients = observe(model, lambda: model(x).pow(3).sum().backward(), max_elements=100)
    assert outputs[""].counted <= 100
    assert outputs[""].amax == pytest.approx(model(x).abs().max().item())
    assert gradients[""].amax == pytest.approx((3 * model(x).square()).max().item(), rel=1e-5)


def test_nothing_is_left_on_the_modules_after_an_error_either():
    model = mlp()
    with pytest.raises(ZeroDivisionError), Observer(layers_of(model), None):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), CallRecorder(layers_of(model), CPU, 10**6):
        raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_observing_changes_no_gradient_by_a_bit():
    model, x = (
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 2)),
        torch.randn(9, 6),
    )
    state, results = torch.get_rng_state(), []
    for layers in ({}, layers_of(model)):
        torch.set_rng_state(state)
        model.zero_grad()
        with Observer(layers, None):
            model(x).square().sum().backward()
        results.append([param.grad.clone() for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_a_container_hands_on_is_the_inner_layers_alone():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return self.inner(x)

    class Adds(Own):
        def forward(self, x):
            return self.inner(x) + x

    for kind, seen in ((Own, {"inner"}), (Adds, {"inner", ""})):
        model, x = kind(), torch.randn(4, 6)
        assert observe(model, lambda model=model, x=x: model(x).sum().backward())[0].keys() == seen


def test_a_layer_that_writes_to_its_input_has_an_output_of_its_own():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)), torch.randn(16, 6)
    outputs, gradients = observe(model, lambda: model(x).sum().backward())
    hidden = model[0](x)
    assert outputs.keys() == {"0", "1", "2"}
    assert same(outputs["0"], histogram(hidden))
    assert same(outputs["1"], histogram(hidden.relu()))
    after = torch.ones(16, 2) @ model[2].weight
    assert gradients["1"].amax == pytest.approx(after.abs().max().item())
    assert gradients["0"].zeros == (hidden < 0).sum()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_layer_is_seen_once(use_reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    model, x = Checkpointed(), torch.randn(4, 6, requires_grad=True)
    outputs, gradients = observe(model, lambda: model(x).square().sum().backward())
    plain, plain_gradients = observe(model.inner, lambda: model.inner(x).square().sum().backward())
    assert outputs["inner.0"].counted == gradients["inner.0"].counted == 24
    assert same(outputs["inner.0"], plain["0"])
    assert same(gradients["inner.0"], plain_gradients["0"])


def test_calls_of_a_shared_layer_are_added_up():
    layer = nn.Linear(6, 6)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(4, 6)
    outputs, gradients = observe(model, lambda: model(x).sum().backward())
    assert outputs["0"].counted == gradients["0"].counted == 48
    assert "2" not in outputs


def test_outputs_that_are_no_floats_or_need_no_gradient_are_no_problem():
    class Mixed(nn.Module):
        def forward(self, x):
            return {"index": x.argmax(-1), "none": None, "pair": (x.detach() * 2, [x * 3])}

    class Teaches(nn.Module):
        @torch.inference_mode()
        def forward(self, x):
            return x * 2

    model, x = nn.ModuleDict({"mixed": Mixed(), "teacher": Teaches()}), torch.randn(4, 6, requires_grad=True)
    outputs, gradients = observe(model, lambda: (model["teacher"](x), model["mixed"](x)["pair"][1][0].sum().backward()))
    assert outputs["mixed"].counted == 48
    assert outputs["teacher"].counted == 24
    assert gradients["mixed"].counted == 24


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_script_modules_are_a_part_of_what_contains_them():
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor):
            return x * 2

    model, x = nn.Sequential(nn.Linear(6, 6), torch.jit.script(Scaled())), torch.randn(4, 6)
    outputs, _ = observe(model, lambda: model(x).sum().backward())
    assert "0" in outputs
    with CallRecorder(layers_of(model), CPU, 10**6) as recorder:
        model(x)
    assert recorder.calls.keys() == {"", "0"}


# Transforms of torch.func, and tensors of other kinds


def per_sample(model, x):
    """Gradients of each sample's loss, by vmap."""

    def loss(weights, sample):
        return functional_call(model, weights, (sample[None],)).square().sum()

    weights = {name: param.detach() for name, param in model.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0))(weights, x)


def test_inside_vmap_all_samples_are_seen_together():
    model, x = mlp(), torch.randn(16, 6)
    outputs, gradients = observe(model, lambda: per_sample(model, x))
    expected, arrived = observe(model, lambda: model(x).square().sum().backward())
    assert outputs.keys() == gradients.keys() == expected.keys()
    for name in expected:
        assert outputs[name].counted == gradients[name].counted == expected[name].counted
        assert outputs[name].amax.item() == pytest.approx(expected[name].amax.item(), rel=1e-5)
        assert gradients[name].amax.item() == pytest.approx(arrived[name].amax.item(), rel=1e-5)


def test_observing_changes_no_bit_of_per_sample_gradients():
    model, x = mlp(), torch.randn(16, 6)
    plain = per_sample(model, x)
    with Observer(layers_of(model), None), CallRecorder(layers_of(model), CPU, 10**6):
        watched = per_sample(model, x)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_seen_and_compared(layout):
    parts = [torch.randn(3, 6), torch.randn(5, 6)]
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.nested.nested_tensor(parts, layout=layout)
    outputs, _ = observe(model, lambda: model(x))
    assert same(outputs["0"], histogram(model[0](torch.cat(parts))))
    signal, noise = computed_again(recorded(model, x, ["0"], dtype=torch.bfloat16).calls["0"]).tolist()
    assert 0 < noise < 1e-3 * signal


def test_a_tensor_that_cannot_be_looked_at_costs_its_layer():
    class Opaque(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.detach:
                raise RuntimeError("cannot be looked at")
            return super().__torch_function__(function, types, args, kwargs)

    class Wraps(nn.Module):
        def forward(self, x):
            return (x * 2).as_subclass(Opaque)

    layers = layers_of(model := nn.ModuleDict({"plain": nn.Linear(6, 6), "wraps": Wraps()}))
    with Observer(layers, None) as observer:
        x = model["wraps"](model["plain"](torch.randn(4, 6)))
    assert type(x) is Opaque
    assert rows(observer.outputs(), layers).keys() == {"plain"}
    assert observer.left_out == {"wraps": "RuntimeError: cannot be looked at"}


# Calls, computed again


def recorded(model, x, names=None, max_bytes=10**6, dtype=torch.float16):
    layers = {name: module for name, module in layers_of(model).items() if names is None or name in names}
    with CallRecorder(layers, CPU, max_bytes) as recorder, torch.autocast("cpu", dtype):
        model(x)
    return recorder


def test_a_call_computed_again_in_the_same_format_is_the_same():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.LayerNorm(8))
    calls = recorded(model, torch.randn(4, 6)).calls
    with torch.autocast("cpu", torch.float16):
        assert all(computed_again(call)[1] == 0 for name, call in calls.items() if name in ("1", "2"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_call_computed_again_in_fp32_differs_by_the_rounding(dtype):
    model, x = nn.Sequential(nn.Linear(6, 64)), torch.randn(64, 6)
    signal, noise = computed_again(recorded(model, x, ["0"], dtype=dtype).calls["0"]).tolist()
    with torch.autocast("cpu", dtype):
        low = model(x).double()
    exact = model(x).double()
    assert signal == pytest.approx(exact.square().sum().item())
    assert noise == pytest.approx((exact - low).square().sum().item())
    assert 10 * math.log10(signal / noise) > 45


def test_computing_again_leaves_no_trace():
    model, x = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)), torch.randn(16, 6)
    calls = recorded(model, x).calls
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for call in calls.values():
        computed_again(call)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_written_to_after_a_call_is_recorded_as_it_was():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            y = self.inner(x)
            x.zero_()
            y.detach().zero_()
            return y

    model, x = Writes(), torch.randn(4, 6)
    expected = model.inner(x)
    call = recorded(model, x, ["inner"], dtype=torch.bfloat16).calls["inner"]
    assert call.output[0].float().allclose(expected, atol=0.05)
    signal, noise = computed_again(call).tolist()
    assert signal == pytest.approx(expected.double().square().sum().item(), rel=1e-4)
    assert noise < 1e-3 * signal


def test_only_the_first_call_is_recorded_and_keywords_are_kept():
    class Scales(nn.Module):
        def forward(self, x, *, by):
            return x * by["factor"]

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Scales()

        def forward(self, x):
            return self.inner(self.inner(x, by={"factor": torch.tensor(2.0)}), by={"factor": torch.tensor(3.0)})

    call = recorded(Twice(), torch.ones(2, 2), ["inner"]).calls["inner"]
    assert call.output[0].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert computed_again(call).tolist() == [16.0, 0.0]


CONDITIONS = {
    "graph": lambda layer, x: torch.is_grad_enabled(),
    "graph of the input": lambda layer, x: x.requires_grad,
    "training": lambda layer, x: layer.training,
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("was", [True, False])
def test_a_call_is_computed_again_under_the_conditions_of_the_first(condition, was):
    seen = []

    class Looks(nn.Module):
        def forward(self, x):
            seen.append(CONDITIONS[condition](self, x))
            return x * 1.0

    model = nn.Sequential(Looks()).train(not was)
    with torch.set_grad_enabled(was or condition != "graph"), CallRecorder(layers_of(model), CPU, 10**6) as recorder:
        model.train(was)
        model(torch.ones(2, requires_grad=was))
    model.train(not was)
    with torch.set_grad_enabled(not was):
        assert computed_again(recorder.calls["0"]).tolist() == [2, 0]
    assert seen == [was, was]
    assert model[0].training is not was


def test_a_layer_that_is_given_something_through_an_attribute_gets_it_again():
    class Hinted(nn.Module):
        hint = torch.zeros(())

        def forward(self, x):
            return x * self.hint

    class Hinting(nn.Module):
        def __init__(self):
            super().__init__()
            self.hinted = Hinted()

        def forward(self, x):
            self.hinted.hint = x.detach().amax()
            return self.hinted(x)

    model = Hinting()
    call = recorded(model, torch.tensor([1.0, 2.0]), ["hinted"]).calls["hinted"]
    model(torch.ones(2))
    assert computed_again(call).tolist() == [4 + 16, 0]
    assert model.hinted.hint == 1


class Cache:
    """Keys of earlier calls, which an attention extends and reads."""

    def __init__(self):
        self.keys = []

    def extended(self, key):
        self.keys.append(key)
        return torch.cat(self.keys, 1)


def test_a_cache_among_the_arguments_is_as_it_was_before_the_call():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.key = nn.Linear(6, 6)

        def forward(self, x, cache):
            return (x @ cache.extended(self.key(x)).transpose(1, 2)).softmax(-1)

    model, x, cache = nn.ModuleDict({"attends": Attends()}), torch.randn(2, 3, 6), Cache()
    with CallRecorder({"attends": model["attends"]}, CPU, 10**6) as recorder:
        first = model["attends"](x, cache)
        assert model["attends"](x, cache).shape != first.shape
    signal, noise = computed_again(recorder.calls["attends"]).tolist()
    assert signal == pytest.approx(first.double().square().sum().item())
    assert noise == 0
    assert len(cache.keys) == 2


def test_a_layer_that_asks_for_gradients_in_its_forward_is_computed_again():
    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x):
            x.mul_(2)
            x = x if x.requires_grad else x.requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    model, x = nn.Sequential(Force()), torch.randn(4, 6)
    first = model(x.clone())
    for given in (x, x.clone().requires_grad_() * 1):
        with CallRecorder({"0": model[0]}, CPU, 10**6) as recorder:
            model(given.clone())
        assert computed_again(recorder.calls["0"])[0].item() == pytest.approx(first.double().square().sum().item())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), TraceLeftError("left a trace")])
def test_what_no_layer_can_answer_for_is_raised(error):
    left_out = {}
    with pytest.raises(type(error)), leaving_out("layer", left_out):
        raise error
    assert left_out == {}


def test_a_layer_that_returns_nothing_to_compare_is_left_out():
    class Counts(nn.Module):
        def forward(self, x):
            return x.argmax(-1)

    recorder = recorded(nn.Sequential(Counts()), torch.randn(4, 6), ["0"])
    assert recorder.calls == {}
    assert recorder.left_out == {"0": "SupportError: it returns no floating-point tensor"}


def test_a_layer_that_returns_another_shape_the_second_time_cannot_be_compared():
    calls = []

    class Grows(nn.Module):
        def forward(self, x):
            calls.append(x)
            return torch.cat(calls)

    recorder = recorded(nn.Sequential(Grows()), torch.randn(4, 6), ["0"])
    with pytest.raises(SupportError, match="another shape"):
        computed_again(recorder.calls["0"])


@pytest.mark.parametrize("how", ["vmap", "functional_call"])
def test_a_layer_that_is_called_with_other_weights_than_its_own_is_left_out(how):
    model, x = mlp(), torch.randn(4, 6)
    fast = {name: param * 2 for name, param in model.named_parameters()}
    with CallRecorder({"0": model[0], "1": model[1]}, CPU, 10**6) as recorder:
        per_sample(model, x) if how == "vmap" else functional_call(model, fast, (x,))
    assert recorder.calls.keys() == ({"1"} if how == "functional_call" else set())
    assert ("torch.func" if how == "vmap" else "other weights") in recorder.left_out["0"]


@pytest.mark.parametrize(
    ("max_bytes", "kept"), [(10**6, {"0", "1"}), (4 * 6 * 4 + 4 * 8 * 2, {"0"}), (4 * 6 * 4, set()), (1, set())]
)
def test_memory_for_calls_is_bounded_and_what_does_not_fit_is_told(max_bytes, kept):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    recorder = recorded(model, torch.randn(4, 6), ["0", "1"], max_bytes)
    assert recorder.calls.keys() == kept
    assert {*recorder.too_large} == {"0", "1"} - kept
    used = sum(t.nbytes for call in recorder.calls.values() for t in (*call.args, *call.output))
    assert used <= max_bytes


def test_16_bits_become_wide_and_nothing_else_changes():
    value = {"a": [torch.ones(2, dtype=torch.float16)], "b": torch.ones(1, dtype=torch.float64), "c": torch.arange(2)}
    wide = cast_to_fp32(value)
    assert (wide["a"][0].dtype, wide["b"].dtype, wide["c"].dtype) == (torch.float32, torch.float64, torch.int64)
    assert cast_to_fp32((torch.ones(1), "x"))[1] == "x"


# Gradients of two runs


def test_weights_belong_to_the_module_that_holds_them_and_shared_ones_to_the_first():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model[1][0].weight = model[0].weight
    model.scale = nn.Parameter(torch.ones(1))
    assert own_parameters(model, layers_of(model)) == {
        "": ["scale"],
        "0": ["0.weight", "0.bias"],
        "1": [],
        "1.0": ["1.0.bias"],
        "1.1": ["1.1.weight", "1.1.bias"],
    }


@pytest.mark.parametrize("is_sparse", [False, True])
def test_agreement_is_the_cosine_of_each_layers_gradients(is_sparse):
    owned = {"a": ["a.weight", "a.bias"], "b": ["b.weight"], "c": ["c.weight"], "d": []}
    low = {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3), "b.weight": torch.randn(2)}
    other = {name: value + torch.randn_like(value) for name, value in low.items()} | {"c.weight": torch.ones(1)}
    given = {name: value.to_sparse() if is_sparse and value.dim() > 1 else value for name, value in low.items()}
    parts = gradient_dots(owned, given, other)
    expected = nn.functional.cosine_similarity(
        torch.cat([low["a.weight"].flatten(), low["a.bias"]]),
        torch.cat([other["a.weight"].flatten(), other["a.bias"]]),
        dim=0,
    )
    assert cosine_of(parts)[0].item() == pytest.approx(expected.item(), abs=1e-6)
    assert parts[2:].tolist() == [[0, 0, 0], [0, 0, 0]]


ANY_ORDER = {torch.ops.aten.index_add_.default, torch.ops.aten.scatter_add_.default, torch.ops.aten.index_put_.default}
"""Operations that add in any order on a GPU."""


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


def of_layers(device):
    """Names of weights by layer, one without any among them, and two sets of gradients."""
    owned = {str(layer): [f"{layer}.{each}" for each in range(5 * (layer % 3))] for layer in range(7)}
    names = [name for each in owned.values() for name in each]
    generator = torch.Generator().manual_seed(0)
    first, second = ({name: torch.randn(50, generator=generator).to(device) for name in names} for _ in range(2))
    return owned, first, second


def test_products_of_a_layers_weights_are_added_in_the_order_of_the_weights():
    owned, first, second = of_layers("cpu")
    expected = torch.zeros(len(owned), 3, dtype=torch.float64)
    for row, names in enumerate(owned.values()):
        for name in names:
            expected[row] += dots([first[name]], [second[name]])[0]
    with Called() as called:
        parts = gradient_dots(owned, first, second)
    assert torch.equal(parts, expected)
    assert not called.seen & ANY_ORDER


@pytest.mark.gpu
def test_on_cuda_cosines_are_the_same_to_the_last_bit_every_time():
    owned, first, second = of_layers("cuda")
    parts = [gradient_dots(owned, first, second) for _ in range(20)]
    assert all(torch.equal(each, parts[0]) for each in parts)
    assert torch.allclose(parts[0].cpu(), gradient_dots(*of_layers("cpu")), rtol=1e-12)


def test_statistics_of_weight_gradients_are_by_layer():
    owned = {"a": ["a.weight", "a.bias"], "b": ["b.weight"], "c": []}
    gradients = {"a.weight": torch.tensor([[1.0, 0.0]]), "a.bias": torch.tensor([4.0])}
    seen = weight_gradients(owned, gradients, None)
    assert seen.counted.tolist() == [3, 0, 0]
    assert seen.zeros.tolist() == [1, 0, 0]
    assert seen.amax.tolist() == [4, 0, 0]


@pytest.mark.gpu
def test_observing_on_cuda_waits_for_nothing():
    model, x = mlp().cuda(), torch.randn(16, 6, device="cuda")
    layers = layers_of(model)
    model(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with Observer(layers, 64) as observer, CallRecorder(layers, torch.device("cuda"), 10**6) as recorder:
            model(x).square().sum().backward()
        seen = observer.outputs(), observer.gradients()
        energies = [computed_again(call) for call in recorder.calls.values()]
        parts = gradient_dots(own_parameters(model, layers), *[{n: p.grad for n, p in model.named_parameters()}] * 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen[0].elements.sum() == seen[1].elements.sum() > 0
    assert all(energy[1] < 1e-6 * energy[0] for energy in energies)
    assert all(cosine == pytest.approx(1) for cosine in cosine_of(parts[parts[:, 2] > 0]).tolist())
