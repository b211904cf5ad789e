"""Random module trees under random assignments, and an interpreter that reads the contract and nothing else."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

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


def interpret(node, name_of, assignment, x, autocast):
    """What the contract says a root computes.

    Args:
        node: the root.
        name_of: the first name of each module, by ``id``.
        assignment: by name, what has ``compute`` and ``output``.
        x: its input.
        autocast: a context that computes in a format as torch's autocast does, or not at all in a wide one.
    """
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
        with autocast(own):
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


def first_names(model):
    """The first name of each module, by ``id``."""
    names = {}
    for name, module, _ in walk(model):
        names.setdefault(id(module), name)
    return names
