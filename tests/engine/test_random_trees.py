"""Random module trees under random assignments, against an interpreter that reads the contract and nothing else."""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.policy.module_names import walk

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OTHER = {"bf16": torch.float16, "fp16": torch.bfloat16}


class Node(nn.Module):
    """Own operations before, between and after calls of children, some of which sit in containers without a forward."""

    def __init__(self, children, listed, result):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3) / 2)
        self.first = nn.ModuleList(children[:1]) if listed else None
        self.rest = nn.ModuleDict({f"c{i}": child for i, child in enumerate(children[1 if listed else 0 :])})
        self.result = result

    def inner(self):
        return [*(self.first or []), *self.rest.values()]

    def forward(self, x):
        return compute(self, x, self.weight, lambda child, h: child(h))


def compute(node, x, weight, call):
    x = x["x"] if isinstance(x, dict) else x
    h = F.linear(x, weight)
    for child in node.inner():
        given = {"x": h, "n": torch.tensor([2**24 + 1])} if node.result == "dict" else h
        got = call(child, given)
        h = got[0] * 0.5 if isinstance(got, tuple) else got + h
    h = torch.tanh(h) * h
    return (h, torch.tensor([3])) if node.result == "tuple" else h


def interpret(node, name_of, assignment, x):
    """What the contract says a root computes."""
    root = assignment[name_of[id(node)]].compute
    parents = {}
    for name, module, _ in walk(node):
        if isinstance(module, Node) and name:
            parent = name.rpartition(".")[0].rpartition(".")[0]
            parents.setdefault(id(module), set()).add(assignment[parent].compute)

    def cast(value, rule):
        if isinstance(value, dict):
            return {key: cast(item, rule) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(cast(item, rule) for item in value)
        return value.to(rule(value.dtype)) if value.is_floating_point() else value

    def into(own, other):
        """Into wide own operations everything goes; into 16 bits the other 16-bit format, and fp64 from fp64."""

        def rule(dtype):
            if own in ("fp64", "fp32"):
                return DTYPES[own]
            if dtype == torch.float64 and other == "fp64":
                return torch.float32
            return DTYPES[own] if dtype == OTHER[own] else dtype

        return rule

    def run(module, value, own):
        weight = module.weight
        if own in ("fp64", "fp32"):
            weight = weight.to(DTYPES[own])
        elif weight.dtype not in (torch.float32, DTYPES[own]):
            weight = weight.float()
        half = own in OTHER
        with torch.autocast("cpu", dtype=DTYPES[own] if half else None, enabled=half, cache_enabled=False):
            return compute(module, value, weight, lambda child, h: enter(child, h, own))

    def enter(module, value, caller):
        entry = assignment[name_of[id(module)]]
        own, output = entry.compute, entry.output
        is_border = output or any(parent != own for parent in parents[id(module)])
        if not is_border:
            return run(module, value, own)
        came = (value["x"] if isinstance(value, dict) else value).dtype
        result = run(module, cast(value, into(own, caller)), own)
        if output:
            target = came if output == "input" else DTYPES[output]
            result = cast(result, lambda _: target)
            own = "fp64" if target == torch.float64 else own
        return cast(result, into(caller, own))

    return run(node, x, root)


formats = st.sampled_from(["fp64", "fp32", "bf16", "fp16"])


@st.composite
def trees(draw, depth=0):
    children = [draw(trees(depth=depth + 1)) for _ in range(draw(st.integers(0, 3 - depth)))]
    if children and draw(st.booleans()):
        children.append(children[0])
    return Node(children, draw(st.booleans()), draw(st.sampled_from(["tensor", "tuple", "dict"])))


def assigned(draw, model):
    entries, by_module = {}, {}
    for name, module, _ in walk(model):
        if id(module) not in by_module:
            output = draw(st.sampled_from([None, None, None, "input", "bf16", "fp32", "fp64"]))
            by_module[id(module)] = SimpleNamespace(
                param="fp32" if not isinstance(module, Node) else stored(module), compute=draw(formats), output=output
            )
        entries[name] = by_module[id(module)]
    return entries


def stored(module):
    return next(name for name, dtype in DTYPES.items() if module.weight.dtype == dtype)


def has_two_wide_callers(model, assignment):
    """fp32 and fp64 callers of one module are told apart by what they pass, which is no matter of the contract."""
    callers = {}
    for name, module, _ in walk(model):
        if isinstance(module, Node) and name:
            callers.setdefault(id(module), set()).add(assignment[name.rpartition(".")[0].rpartition(".")[0]].compute)
    return any({"fp32", "fp64"} <= found for found in callers.values())


@given(trees(), st.data())
@settings(max_examples=150)
def test_attached_models_compute_as_the_contract_says_and_detach_is_the_identity(model, data):
    torch.manual_seed(0)
    if data.draw(st.booleans()):
        model.to(data.draw(st.sampled_from([torch.float64, torch.bfloat16])))
    assignment = assigned(data.draw, model)
    if has_two_wide_callers(model, assignment):
        return
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    root = assignment[""].compute
    x = torch.randn(2, 3).to(DTYPES[root] if root in ("fp64", "fp32") else torch.float32)
    # The root is never cast for: its own weights must be such as its operations can use.
    model.weight.data = model.weight.data.to(x.dtype)
    assignment[""].param = stored(model)
    weights["weight"] = model.weight.data.clone()

    names = {}
    for name, module, _ in walk(model):
        names.setdefault(id(module), name)
    expected = interpret(model, names, assignment, x)
    wanted = backward(model, expected)
    for initial in (assignment, assigned(data.draw, model)):
        initial[""] = assignment[""]
        attachment = attach(model, initial, "cpu")
        attachment.change(assignment)
        with attachment.context():
            y = model(x)
        got = backward(model, y)
        attachment.detach()
        assert [t.dtype for t in tensors(y)] == [t.dtype for t in tensors(expected)]
        assert all(torch.equal(a, b) for a, b in zip(tensors(y), tensors(expected), strict=True))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.1, equal_nan=True)
        for name, module in model.named_modules():
            assert module.__dict__ == before[name], name
        for name, value in model.state_dict().items():
            assert value.dtype == weights[name].dtype and torch.equal(value, weights[name])


def tensors(y):
    return y if isinstance(y, tuple) else (y,)


def backward(model, y):
    model.zero_grad()
    tensors(y)[0].float().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]
