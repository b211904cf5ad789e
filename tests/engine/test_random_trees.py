"""Random module trees under random assignments, against an interpreter that reads the contract and nothing else."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from module_trees import DTYPES, assigned, first_names, has_two_wide_callers, interpret, stored, trees

from lightning_mixprec.engine.apply import attach


def autocast(format):
    is_low = "16" in format
    return torch.autocast("cpu", dtype=DTYPES[format] if is_low else None, enabled=is_low, cache_enabled=False)


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

    expected = interpret(model, first_names(model), assignment, x, autocast)
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
