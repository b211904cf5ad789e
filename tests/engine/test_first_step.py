"""The first-step check."""

import pytest
import torch
from torch import nn

from lightning_mixprec.errors import PolicyError


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        self.decoder = nn.Linear(2, 2)

    def forward(self, x):
        return self.decoder(self.encode(x))

    def encode(self, x):
        return self.encoder(x)


class Root(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.v = Autoencoder()
        self.w = nn.Linear(2, 2)
        self.call = call

    def forward(self, x):
        return self.call(self, x)


def step(model, policy, attached):
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    with attached(model, policy) as attachment:
        before = [dict(module._forward_pre_hooks) for module in model.modules()]
        attachment.begin_first_step()
        try:
            with attachment.context():
                model(torch.ones(1, 2))
        finally:
            try:
                attachment.end_first_step()
            finally:
                assert [dict(module._forward_pre_hooks) for module in model.modules()] == before
        attachment.end_first_step()
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize(
    "call", [lambda m, x: m.v.encode(x), lambda m, x: m.v.decoder(x), lambda m, x: m.v.encoder[0](x)]
)
@pytest.mark.parametrize("policy", [{"default": "bf16", "v": "fp32"}, {"default": "fp32", "v": "o=bf16"}])
def test_a_border_that_is_walked_around_is_an_error(call, policy, attached):
    with pytest.raises(PolicyError) as caught:
        step(Root(call), policy, attached)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("'v'", "'v.*'", "the rule for 'v'", "'v.encoder"):
        assert part in message or part == "'v.encoder" and "'v.decoder'" in message


def test_what_the_error_says_to_write_works(attached):
    step(Root(lambda m, x: m.v.encode(x)), {"default": "bf16", "v.*": "fp32"}, attached)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.v(x),
        lambda m, x: m.w(x),
        lambda m, x: m.v.forward(x),
        lambda m, x: m.v.encode(m.v(x)),
    ],
)
def test_a_border_that_is_entered_or_not_needed_is_no_error(call, attached):
    step(Root(call), {"default": "bf16", "v": "fp32"}, attached)


def test_a_module_that_is_also_called_from_elsewhere_is_no_error(attached):
    model = Root(lambda m, x: m.w(x))
    model.v.decoder = model.w
    step(model, {"default": "bf16", "v": "fp32", "w": "bf16", "v.decoder": "bf16"}, attached)


def test_a_border_below_a_border_that_is_walked_around(attached):
    policy = {"default": "bf16", "v": "fp32", "v.encoder": "bf16"}
    with pytest.raises(PolicyError, match=r"'v' computes in fp32 .* although 'v.encoder'"):
        step(Root(lambda m, x: m.v.encode(x)), policy, attached)


def test_weights_that_are_merely_stored_otherwise_are_no_reason_to_complain(attached):
    step(Root(lambda m, x: m.v.encode(x)), {"default": "fp32", "v": "p=fp64"}, attached)


def test_an_error_in_the_step_leaves_no_hooks(attached):
    def fails(m, x):
        raise RuntimeError("in the step")

    with pytest.raises(RuntimeError, match="in the step"):
        step(Root(fails), {"default": "bf16", "v": "fp32"}, attached)


def test_detach_ends_a_watch(attached):
    model = Root(lambda m, x: m.v.encode(x))
    with attached(model, {"default": "bf16", "v": "fp32"}) as attachment:
        attachment.begin_first_step()
        model(torch.ones(1, 2))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_compiled_parts_are_not_watched(attached):
    model = Root(lambda m, x: m.v.encode(m.w(x)))
    model.v.compile(backend="eager")
    with attached(model, {"default": "bf16", "v": "fp32"}) as attachment:
        attachment.begin_first_step()
        assert not any(module._forward_pre_hooks for module in model.modules())
        model(torch.ones(1, 2))
        attachment.end_first_step()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_border_entered_in_a_compiled_function_is_no_error(attached):
    compiled = torch.compile(lambda v, x: v(x), backend="eager")
    step(Root(lambda m, x: compiled(m.v, x)), {"default": "bf16", "v": "fp32"}, attached)


class ByHand(nn.Linear):
    def forward(self, x):
        return x @ self.weight.t() + self.bias


class Halves(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) / 2


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_a_linear_that_multiplies_by_itself_is_an_error_in_8_bits(format, attached):
    model = nn.Sequential(nn.Linear(2, 2), ByHand(2, 2))
    with pytest.raises(PolicyError) as caught:
        step(model, {"default": "bf16", "1": format}, attached)
    assert "layer '1'" in str(caught.value) and "ByHand.forward" in str(caught.value) and "bf16" in str(caught.value)
    assert not any(module._forward_hooks for module in model.modules())
    step(model, {"default": "bf16", "0": format}, attached)


def test_a_linear_that_is_not_called_or_calls_linear_itself_is_none(attached):
    model = nn.Sequential(Halves(2, 2), nn.Identity())
    model[1].unused = ByHand(2, 2)
    step(model, {"default": "bf16", "0": "fp8", "1.unused": "fp8"}, attached)
