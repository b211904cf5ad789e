"""Whatever class a model's objects are of and whatever a step does to them, a sandbox leaves them as they were."""

import functools
import io
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn

from lightning_mixprec.evidence.instruments.sandbox import sandbox

CPU = torch.device("cpu")


class Frozen(dict):
    def clear(self):
        raise TypeError("frozen")

    def __iter__(self):
        raise TypeError("not to be read")

    keys = values = items = update = clear


class Sealed(list):
    def __iter__(self):
        raise TypeError("not to be read")

    clear = extend = __setitem__ = __iter__


class SealedSet(set):
    def __iter__(self):
        raise TypeError("not to be read")

    clear = update = __iter__


class SealedDeque(deque):
    def __iter__(self):
        raise TypeError("not to be read")

    clear = extend = __iter__


class SealedOrder(OrderedDict):
    def clear(self):
        raise TypeError("frozen")

    update = clear


class Slotted:
    __slots__ = ("count", "seen", "unset")

    def __init__(self):
        self.count, self.seen = 0, [1]


class Refusing:
    """An object whose attributes nobody may set."""

    def __init__(self):
        vars(self)["count"] = 0

    def __setattr__(self, name, value):
        raise AttributeError(f"{name} is read-only")

    count_twice = property(lambda self: 2 * vars(self)["count"])


class Node:
    def __init__(self, depth):
        self.count, self.random, self.noise = 0, random.Random(depth), np.random.default_rng(depth)
        self.table, self.inner = {"a": [0]}, Node(depth - 1) if depth else None


def counter():
    count, seen = 0, []

    def step():
        nonlocal count
        count += 1
        seen.append(count)
        return count, list(seen)

    step.calls = 0
    return step


def spoil_slots(held):
    held.count, held.unset = 1, 1
    held.seen.append(2)


def spoil_node(held):
    while held is not None:
        held.count += 1
        held.random.random(), held.noise.random()
        held.table["a"][0] += 1
        held.new, held = 1, held.inner


def spoil_function(held):
    held()
    held.calls += 1


def state_of_node(held):
    if held is None:
        return None
    names = sorted(vars(held))
    drawn = held.random.getstate()[1][:3] + (held.noise.bit_generator.state["state"]["state"],)
    return names, held.count, repr(held.table), drawn, state_of_node(held.inner)


HELD = {
    "frozen dict": (
        lambda: Frozen(a=1),
        lambda held: dict.__setitem__(held, "b", 2),
        lambda held: list(dict.items(held)),
    ),
    "sealed list": (lambda: Sealed([1]), lambda held: list.append(held, 2), list.__repr__),
    "sealed set": (lambda: SealedSet([1]), lambda held: set.add(held, 2), set.__len__),
    "sealed deque": (lambda: SealedDeque([1]), lambda held: deque.append(held, 2), deque.__len__),
    "order": (lambda: SealedOrder(a=1, b=2), lambda held: held.move_to_end("a"), lambda held: list(held.items())),
    "default": (lambda: defaultdict(list), lambda held: held["new"].append(1), lambda held: list(held.items())),
    "counter": (lambda: Counter("ab"), lambda held: held.update("c"), lambda held: list(held.items())),
    "slots": (Slotted, spoil_slots, lambda held: (held.count, held.seen, hasattr(held, "unset"))),
    "read-only object": (Refusing, lambda held: vars(held).update(count=1), lambda held: dict(vars(held))),
    "nested objects": (lambda: Node(4), spoil_node, state_of_node),
    "closure": (counter, spoil_function, lambda held: (held.__closure__[0].cell_contents, repr(vars(held)))),
    "partial": (lambda: functools.partial(list.append, [0]), lambda held: held(1), lambda held: repr(held.args)),
    "bound method": (lambda: Node(0).table["a"].append, lambda held: held(1), lambda held: repr(held.__self__)),
    "generator's method": (lambda: random.Random(1).random, lambda held: held(), lambda h: h.__self__.getstate()),
    "proxy": (
        lambda: types.MappingProxyType({"a": [0]}),
        lambda held: held["a"].append(1),
        lambda held: repr(dict(held)),
    ),
    "namespace": (
        lambda: types.SimpleNamespace(a=[0]),
        lambda held: setattr(held, "b", held.a.append(1)),
        lambda held: repr(vars(held)),
    ),
    "text in memory": (lambda: io.StringIO("abc"), lambda held: held.write("xyz"), lambda h: (h.getvalue(), h.tell())),
    "bits": (lambda: np.random.PCG64(1), lambda held: held.random_raw(), lambda held: held.state["state"]["state"]),
    "list iterator": (lambda: iter([1, 2, 3]), next, lambda held: held.__length_hint__()),
    "dict iterator": (lambda: iter({1: 1, 2: 2}), next, lambda held: held.__length_hint__()),
}


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("place", ["attribute", "list", "object"])
def test_an_object_is_as_it_was(name, place):
    make, spoil, state = HELD[name]
    model, held = nn.Linear(2, 2), make()
    model.held = {"attribute": held, "list": [0, held], "object": types.SimpleNamespace(held=held)}[place]

    def inside():
        return model.held if place == "attribute" else model.held[1] if place == "list" else model.held.held

    before = state(held)
    with sandbox(model, CPU):
        spoil(inside())
    assert inside() is held
    assert state(held) == before


class Odd(nn.Module):
    """A module that changes what it is made of in its forward."""

    def __init__(self):
        super().__init__()
        self.linear, self.pool = nn.Linear(4, 4), [nn.Parameter(torch.ones(4))]
        self.register_buffer("grown", torch.zeros(0))
        self.register_buffer("replaced", torch.zeros(4))
        self.workspace, self.history = torch.zeros(0), torch.zeros(3)
        self.loose = torch.ones(4, requires_grad=True)

    def forward(self, x):
        self.grown.resize_(x.shape).copy_(x.detach())
        self.replaced = self.replaced + 1
        self.register_buffer("new", torch.ones(1))
        self.workspace.resize_(x.shape).copy_(x.detach())
        self.history.data.add_(1)
        self.extra = nn.Linear(4, 4)
        self.linear.register_forward_hook(lambda module, args, out: out + 1)
        del self.linear._parameters["bias"]
        self.linear.bias = None
        self.register_forward_pre_hook(lambda module, args: None)
        self._register_state_dict_hook(lambda *args: None)
        nn.utils.parametrizations.weight_norm(self.linear)
        self.eval()
        return self.linear(x) * self.pool[0] * self.loose


def picture(model):
    tensors = {name: (id(each), each.shape, each.detach().clone()) for name, each in tensors_of(model).items()}
    tables = [
        {name: list(value.values()) for name, value in vars(module).items() if isinstance(value, dict)}
        for module in model.modules()
    ]
    flags = [(type(module), module.training, sorted(vars(module))) for module in model.modules()]
    return {name: (place, shape) for name, (place, shape, _) in tensors.items()}, tables, flags, tensors


def tensors_of(model):
    loose = {name: value for name, value in vars(model).items() if isinstance(value, torch.Tensor)}
    return {**loose, "pool": model.pool[0], **model.state_dict(keep_vars=True)}


def test_a_module_that_changes_what_it_is_made_of_is_made_of_the_same():
    model, x = Odd(), torch.randn(2, 4)
    *before, tensors = picture(model)
    with sandbox(model, CPU):
        model(x).sum().backward()
    *after, now = picture(model)
    assert after == before
    assert all(torch.equal(now[name][2], each[2]) for name, each in tensors.items())
    assert all(each.grad is None and each.requires_grad for each in (model.loose, model.pool[0], model.linear.weight))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_module_keeps_its_weights_its_counts_and_its_mode():
    model = torch.jit.script(Counting())
    weight, before = model.linear.weight, model.total.clone()
    with sandbox(model, CPU) as opened:
        assert model.linear.weight is opened.parameters["linear.weight"]
        model(torch.ones(2, 3)).sum().backward()
        model.eval()
        assert model.count == 1
    assert model.linear.weight is weight
    assert weight.grad is None
    assert model.count == 0
    assert model.training
    assert torch.equal(model.total, before)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.count = nn.Linear(3, 3), 0
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        self.count += 1
        self.total += 1
        return self.linear(x)


def test_weights_in_closures_keys_and_objects_are_stand_ins_inside():
    model = nn.Linear(2, 2)
    weight, bias = model.weight, model.bias
    model.penalty, model.scales = (lambda: weight.square().sum()), {bias: 2.0}
    model.pair, model.objects = types.SimpleNamespace(both=(weight, [bias])), [types.SimpleNamespace(weight=weight)]
    with sandbox(model, CPU) as opened:
        inside = opened.parameters["weight"]
        assert model.pair.both[0] is model.objects[0].weight is inside
        assert opened.parameters["bias"] in model.scales
        model.penalty().backward()
        assert torch.equal(inside.grad, 2 * inside)
    assert weight.grad is None
    assert bias in model.scales
    assert model.pair.both[0] is model.objects[0].weight is weight


@pytest.mark.parametrize("name", ["forward", "forward_pre", "backward"])
def test_hooks_are_as_they_were_on_modules_everywhere_and_on_weights(name):
    model, register = nn.Linear(2, 2), getattr(nn.modules.module, f"register_module_{name}_hook", None)
    model.weight.register_hook(lambda grad: grad)
    everywhere = getattr(nn.modules.module, f"_global_{name}_hooks")
    register = register or nn.modules.module.register_module_full_backward_hook
    weight, before = model.weight, (dict(model.weight._backward_hooks), dict(everywhere))
    with sandbox(model, CPU):
        register(lambda *args: None)
        model.register_forward_hook(lambda *args: None)
        model.register_full_backward_hook(lambda *args: None)
        weight.requires_grad_(True).register_hook(lambda grad: 2 * grad)
    assert (dict(model.weight._backward_hooks), dict(everywhere)) == before
    assert not model._forward_hooks
    assert not model._backward_hooks
    assert model._is_full_backward_hook is None


# Large


@pytest.fixture
def copies(monkeypatch):
    made, clone = [], torch.UntypedStorage.clone
    monkeypatch.setattr(torch.UntypedStorage, "clone", lambda self: made.append(self.nbytes()) or clone(self))
    return made


WRITES = {
    "row": lambda bank: bank[1].fill_(7),
    "data": lambda bank: bank.data.add_(1),
    "twice": lambda bank: bank.mul_(2)[:, 0].sub_(5),
    "out": lambda bank: torch.add(bank, 1, out=bank),
    "several": lambda bank: torch._foreach_add_([bank[0], bank[2]], 1),
    "resized": lambda bank: bank.resize_(9, 9).fill_(1),
    "inside autograd": lambda bank: bank.copy_(torch.ones(4, 8, requires_grad=True)),
}


@pytest.mark.parametrize("name", WRITES)
def test_of_a_large_tensor_what_is_written_is_put_back_and_nothing_copied_before(name, copies, monkeypatch):
    monkeypatch.setattr("lightning_mixprec.evidence.instruments.restoring.contents._MOST_BYTES", 64)
    model = nn.Linear(2, 2)
    model.bank = torch.arange(32.0).view(4, 8)
    bank = model.bank
    with sandbox(model, CPU):
        assert not copies
        WRITES[name](model.bank)
        assert not torch.equal(model.bank, torch.arange(32.0).view(4, 8))
    assert model.bank is bank
    assert torch.equal(bank, torch.arange(32.0).view(4, 8))


def test_tensors_in_large_containers_are_put_back():
    model = nn.Linear(4, 4)
    model.many = [torch.zeros(1) for _ in range(1500)]
    with sandbox(model, CPU):
        model.many.append(1)
        model.many[3] += 1
        model.many[1400] += 1
    assert len(model.many) == 1500
    assert not any(model.many)


def test_views_of_one_tensor_are_copied_once(copies):
    model = nn.Linear(2, 2)
    bank = torch.zeros(64, 8)
    model.rows = list(bank)
    with sandbox(model, CPU):
        model.rows[5] += 1
    assert copies == [64 * 8 * 4]
    assert not bank.any()


KINDS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "expanded": lambda: torch.zeros(1).expand(4),
    "inference": lambda: torch.inference_mode()(torch.zeros)(3),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "meta": lambda: torch.zeros(3, device="meta"),
    "result": lambda: torch.ones(3, requires_grad=True) * 2,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", KINDS)
def test_tensors_of_all_kinds_may_be_held(name):
    model, made = nn.Linear(2, 2), KINDS[name]()
    model.held = made
    with sandbox(model, CPU), torch.inference_mode():
        if name in ("sparse", "inference", "complex"):
            model.held.mul_(0).add_(model.held)
            model.held.zero_()
    assert model.held is made
    if name == "sparse":
        assert torch.equal(made.to_dense(), torch.eye(3))
