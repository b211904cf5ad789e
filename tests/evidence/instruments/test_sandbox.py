"""Whatever is run in a sandbox leaves the model and the random numbers as they were."""

import copy
import gc
import random
import weakref
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

from lightning_mixprec.engine.objects import tensors_in
from lightning_mixprec.errors import SupportError
from lightning_mixprec.evidence.instruments.sandbox import RandomState, sandbox

CPU = torch.device("cpu")


def bits(model):
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in model.state_dict(keep_vars=True).items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, (place, tensor) in first.items():
        assert place == second[name][0]
        assert torch.equal(tensor, second[name][1])


def trained(model, x):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()


# Weights, buffers, gradients


def test_a_model_of_any_number_of_modules_is_given_copies_of_all_its_weights():
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(3400)))
    model[0].kept, last = [model[1].weight], model[-1].weight
    with sandbox(model, CPU) as stand_ins:
        held = dict(model.named_parameters())
        assert all(held[name] is stand_ins.parameters[name] for name in held)
        assert model[0].kept[0] is model[1].weight
        held["3399.weight"].sum().backward()
    assert model[-1].weight is last and last.grad is None


def test_the_copies_of_the_weights_go_when_it_closes_and_not_when_garbage_is_collected():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    gc.collect()
    gc.disable()
    try:
        with sandbox(model, CPU) as stand_ins:
            model(torch.ones(2, 4)).sum().backward()
            copies = [weakref.ref(each) for each in (*stand_ins.parameters.values(), *model.buffers())]
        del stand_ins
        assert [copy() for copy in copies] == [None] * len(copies)
    finally:
        gc.enable()


MODELS = {
    "linear": lambda: nn.Linear(4, 4),
    "norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True)),
    "spectral_norm": lambda: spectral_norm(nn.Linear(4, 4)),
    "parametrization": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_training_inside_changes_neither_tensors_nor_their_identity(kind):
    model, x = MODELS[kind](), torch.randn(8, 4)
    model(x).sum().backward()
    before, grads = bits(model), [param.grad for param in model.parameters()]
    values = [None if grad is None else grad.clone() for grad in grads]
    with sandbox(model, CPU):
        assert all(param.grad is None for param in model.parameters())
        trained(model, x)
        assert not torch.equal(next(iter(model.state_dict().values())), next(iter(before.values()))[1])
    assert_same(before, bits(model))
    for param, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert param.grad is grad
        assert torch.equal(grad, value)


def test_a_model_computes_inside_what_it_computes_outside():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)), torch.randn(8, 4)
    expected = copy.deepcopy(model)
    state = torch.get_rng_state()
    with sandbox(model, CPU):
        inside = model(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(inside, expected(x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_computes_with_its_stand_ins(kind):
    model, x = kind(4, 4, num_layers=2), torch.randn(3, 2, 4)
    expected, flat = model(x)[0], list(model._flat_weights)
    with sandbox(model, CPU) as opened:
        out = model(x)[0]
        out.sum().backward()
        assert all(stand_in.grad is not None for stand_in in opened.parameters.values())
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        assert not torch.equal(model(x)[0], expected)
    assert torch.equal(out, expected)
    assert all(a is b for a, b in zip(model._flat_weights, flat, strict=True))
    assert all(param.grad is None for param in model.parameters())


def test_tied_weights_are_tied_inside():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with sandbox(model, CPU) as opened:
        assert model[1].weight is model[0].weight is opened.parameters["0.weight"]
    assert model[1].weight is model[0].weight


def test_weights_and_buffers_of_16_bits_can_be_wide_inside():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).bfloat16()
    model.register_buffer("fine", torch.zeros(1, dtype=torch.float64))
    with sandbox(model, CPU, widen=True):
        assert {param.dtype for param in model.parameters()} == {torch.float32}
        kinds = {name: buffer.dtype for name, buffer in model.named_buffers()}
        assert kinds["1.running_mean"] == torch.float32
        assert kinds["fine"] == torch.float64
        assert kinds["1.num_batches_tracked"] == torch.int64
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}


def test_frozen_weights_are_frozen_inside_and_nothing_is_thawed_outside():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    with sandbox(model, CPU) as opened:
        assert opened.trained == {"1.weight", "1.bias"}
        assert not model[0].weight.requires_grad
        model.requires_grad_(True)
    assert [param.requires_grad for param in model.parameters()] == [False, False, True, True]


def test_hooks_on_weights_do_not_fire():
    model, fired = nn.Linear(4, 4), []
    model.held = [model.weight]
    model.weight.register_hook(lambda grad: fired.append("hook"))
    model.weight.register_post_accumulate_grad_hook(lambda param: fired.append("accumulated"))
    weight = model.weight
    with sandbox(model, CPU):
        (model(torch.randn(2, 4)).sum() + weight.sum() + model.held[0].sum()).backward()
    assert fired == []
    model(torch.randn(2, 4)).sum().backward()
    assert fired == ["hook", "accumulated"]


def test_held_weights_are_stand_ins_inside_and_get_gradients():
    model = nn.Linear(4, 4)
    model.listed, model.fixed = [model.weight], (model.weight, 1)
    model.named = {"bias": model.bias, "deep": [[model.weight]]}
    model.ordered = deque([model.bias])
    original = model.weight
    with sandbox(model, CPU) as opened:
        weight, bias = opened.parameters["weight"], opened.parameters["bias"]
        assert model.listed[0] is model.fixed[0] is model.named["deep"][0][0] is weight
        assert model.named["bias"] is model.ordered[0] is bias
        model.listed[0].square().sum().backward()
        assert weight.grad is not None
    assert model.listed[0] is model.fixed[0] is model.named["deep"][0][0] is original
    assert original.grad is None


def test_modules_that_are_held_but_not_registered_are_stood_in_for_as_well():
    model = nn.Linear(4, 4)
    model.hidden = [nn.BatchNorm1d(4)]
    vars(model)["apart"] = nn.Linear(4, 4)
    before = bits(model.hidden[0]), bits(model.apart)
    with sandbox(model, CPU):
        model.hidden[0](torch.randn(8, 4))
        with torch.no_grad():
            model.apart.weight.zero_()
    assert_same(before[0], bits(model.hidden[0]))
    assert_same(before[1], bits(model.apart))


def test_lazy_weights_are_refused_in_one_line():
    with pytest.raises(SupportError, match="LazyLinear has lazy parameters") as caught, sandbox(nn.LazyLinear(2), CPU):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_leaves_the_model_as_it_was(error):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.count = 0
    before, state = bits(model), torch.get_rng_state()
    with pytest.raises(error), sandbox(model, CPU):
        model.count += 1
        trained(model, torch.randn(8, 4))
        raise error
    assert_same(before, bits(model))
    assert model.count == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sandbox_inside_a_sandbox_leaves_the_outer_one_as_it_was():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(8, 4)
    before = bits(model)
    with sandbox(model, CPU) as outer:
        model(x).sum().backward()
        inside, grads = bits(model), [stand_in.grad.clone() for stand_in in outer.parameters.values()]
        with sandbox(model[1], CPU):
            trained(model[1], x)
        assert_same(inside, bits(model))
        for stand_in, grad in zip(outer.parameters.values(), grads, strict=True):
            assert torch.equal(stand_in.grad, grad)
    assert_same(before, bits(model))


def test_compiled_modules_run_eagerly_inside_and_are_not_compiled_again():
    torch._dynamo.reset()
    count = []

    def backend(graph, inputs):
        count.append(1)
        return graph.forward

    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model, x = torch.compile(inner, backend=backend), torch.randn(2, 4)
    for _ in range(2):
        model(x).sum().backward()
    compiled, ran = len(count), []
    with sandbox(model, CPU):
        handle = inner[0].register_forward_hook(lambda *_: ran.append(1))
        model(x).sum().backward()
        handle.remove()
    assert ran == [1]
    model(x).sum().backward()
    assert len(count) == compiled == 1


# Attributes


class Meter:
    def __init__(self):
        self.total, self.seen, self.table = 0, [], {"a": [1]}


class Tally(dict):
    """A dict of a user's own."""


def attributes(module):
    module.number, module.text, module.switch = 1, "a", True
    module.listed, module.tuple = [1, [2]], ([1], {"a": 1})
    module.table = {"a": 1, "b": {"c": [1]}}
    module.ordered, module.default = OrderedDict(b=1, a=2), defaultdict(list, {"a": [1]})
    module.counter, module.own = Counter("aab"), Tally(a=1)
    module.set, module.recent = {1, 2}, deque([1, 2], maxlen=2)
    module.tensor, module.tensors, module.array = torch.zeros(2), [torch.zeros(2)], np.zeros(2)
    module.objects = [Meter()]
    module.meter = Meter()


def state_of(module):
    plain = {
        name: copy.deepcopy(value)
        for name, value in sorted(vars(module).items())
        if name not in vars(nn.Module()) and name not in ("objects", "meter")
    }
    meters = [copy.deepcopy(vars(meter)) for meter in (module.meter, *module.objects)]
    return repr(plain), repr(meters), {name: id(value) for name, value in vars(module).items()}, module.training


def spoil(module):
    module.number += 1
    module.text = "b"
    module.switch = False
    module.listed[1].append(3)
    module.listed.insert(0, 0)
    module.tuple[0].append(2)
    module.tuple[1]["a"] = 2
    module.table["b"]["c"].clear()
    del module.table["a"]
    module.ordered.move_to_end("b")
    module.default["new"].append(1)
    module.counter["a"] += 1
    module.own["b"] = 2
    module.set.discard(1)
    module.recent.append(3)
    module.tensor += 1
    module.tensors[0].add_(1)
    module.tensors.append(torch.ones(1))
    module.array[0] = 1
    module.meter.total += 1
    module.meter.seen.append(1)
    module.meter.table["a"].append(2)
    module.objects[0].new = 1
    module.objects.append(Meter())
    module.new = 1
    del module.switch
    module.eval()


@pytest.mark.parametrize("place", ["root", "child"])
def test_attributes_are_put_back(place):
    model = nn.Sequential(nn.Linear(4, 4))
    module = model if place == "root" else model[0]
    attributes(module)
    before = state_of(module)
    with sandbox(model, CPU):
        spoil(module)
    assert state_of(module) == before
    assert not hasattr(module, "new")


def test_modules_that_the_step_adds_or_replaces_are_put_back():
    model = nn.Sequential(nn.Linear(4, 4))
    first = model[0]
    with sandbox(model, CPU):
        model[0] = nn.Linear(4, 2)
        model.add_module("more", nn.ReLU())
    assert [*model.children()] == [first]


def test_a_module_that_refers_to_itself_is_no_problem():
    model = nn.Linear(4, 4)
    model.loop = [model]
    model.loop.append(model.loop)
    with sandbox(model, CPU):
        model.loop.append(1)
    assert len(model.loop) == 2


@pytest.mark.parametrize("large", [lambda: torch.zeros(2**20), lambda: np.zeros(2**20)], ids=["tensor", "array"])
def test_a_memory_bank_is_put_back_however_large_it_is(large):
    model = nn.Linear(4, 4)
    model.bank = large()
    with sandbox(model, CPU):
        model.bank[:] = 1
    assert not model.bank.any()


# Random numbers


DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "python": random.random,
    "numpy": np.random.rand,
}


@pytest.mark.parametrize("draw", DRAWS)
def test_random_numbers_go_on_where_they_were(draw):
    model = nn.Linear(1, 1)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1)
    expected = DRAWS[draw]()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1)
    with sandbox(model, CPU):
        DRAWS[draw]()
    assert DRAWS[draw]() == expected


OWN = {
    "torch": (lambda: torch.Generator().manual_seed(1), lambda own: torch.rand((), generator=own).item()),
    "python": (lambda: random.Random(1), lambda own: own.random()),
    "numpy": (lambda: np.random.default_rng(1), lambda own: own.random()),
    "old numpy": (lambda: np.random.RandomState(1), lambda own: own.rand()),
}


@pytest.mark.parametrize("kind", OWN)
def test_generators_that_a_module_holds_go_on_where_they_were(kind):
    make, draw = OWN[kind]
    model = nn.Linear(1, 1)
    model.generator = make()
    with sandbox(model, CPU):
        draw(model.generator)
    assert draw(model.generator) == draw(make())


def test_a_random_state_can_be_kept_in_a_file():
    state = RandomState(CPU)
    torch.save(state.to_dict(), "state.pt")
    expected = torch.rand(2)
    RandomState.from_dict(torch.load("state.pt", weights_only=True), CPU).restore()
    assert torch.equal(torch.rand(2), expected)


def test_a_random_state_without_the_others_leaves_them():
    random.seed(1)
    state = RandomState(CPU, others=False)
    first = random.random()
    state.restore()
    assert random.random() != first


def test_a_parametrization_that_is_cached_is_not_kept():
    model = parametrizations.weight_norm(nn.Linear(4, 4))
    with sandbox(model, CPU), parametrize.cached():
        inside = model.weight
    with parametrize.cached():
        assert model.weight is not inside


@pytest.mark.parametrize("hold", [lambda x: x, lambda x: [(x, 1)], lambda x: {"last": x}], ids=["bare", "list", "dict"])
def test_a_graph_of_steps_before_is_there_after_a_backward_inside(hold):
    model = nn.Linear(2, 2)
    kept = model(torch.ones(1, 2)).sum()
    model.kept = hold(kept)
    with sandbox(model, CPU):
        inside = next(tensors_in([vars(model)["kept"]]))
        assert inside.requires_grad and torch.equal(inside, kept)
        inside.mul_(2).backward()
    assert model.weight.grad is None and next(tensors_in([model.kept])) is kept
    kept.backward()
    assert torch.equal(model.weight.grad, torch.ones(2, 2))


@pytest.mark.gpu
def test_nothing_is_left_on_cuda():
    device = torch.device("cuda")
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.LSTM(4, 4)).cuda(), None
    x = torch.randn(8, 4, device=device)
    before, state = bits(model), torch.cuda.get_rng_state()
    with sandbox(model, device):
        model(x)[0].sum().backward()
    assert_same(before, bits(model))
    assert torch.equal(torch.cuda.get_rng_state(), state)
