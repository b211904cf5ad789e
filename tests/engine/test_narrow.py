"""Layers whose products are in 8 bits, in a model: what they compute, and that nothing else changes."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.engine.backends import Backends, Manner
from lightning_mixprec.engine.backends.scaled_linear import Products, linear
from lightning_mixprec.errors import PolicyError, SupportError
from lightning_mixprec.numerics.devices import Support, native_support
from lightning_mixprec.policy.assignment import EightBits, LayerPrecision
from lightning_mixprec.policy.policy import as_policy

FORMATS = ["fp8", "int8"]
AROUND = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks between two layers; blocks may be recomputed in backward."""

    def __init__(self, recomputed: bool = False) -> None:
        super().__init__()
        self.first, self.blocks, self.head = nn.Linear(8, 16), nn.ModuleList([Block(), Block()]), nn.Linear(16, 4)
        self.recomputed = recomputed

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputed else block(x)
        return self.head(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, policy: Any, emulate: Any = "auto", call: Any = None) -> list[Tensor]:
    """The output and all gradients."""
    model.zero_grad()
    attachment = attach(model, as_policy(policy).resolve(model), "cpu", emulate)
    with attachment.context():
        y = (model if call is None else call)(X)
    y.float().square().mean().backward()
    attachment.detach()
    return [y.detach(), *(param.grad for param in model.parameters() if param.grad is not None)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("default", AROUND)
def test_it_is_linear_by_hand_in_the_16_bits_around(default: str, format: str, net: Net) -> None:
    emulated = not native_support(format, "cpu").native
    manner = ("tensor", "all") if format == "fp8" else ("row", "none")
    around = Backends("cpu").region("bf16" if default == "fp32" else default)
    by_hand = Products(format, *manner, emulated, around.mode is not None)
    dtype = AROUND[default]
    outside = around if default != "fp32" else Backends("cpu").region("fp32")

    def block(module: Block, x: Tensor) -> Tensor:
        hidden = F.gelu(linear(module.norm(x), module.up.weight, module.up.bias, dtype, by_hand))
        return x + linear(hidden, module.down.weight, module.down.bias, dtype, by_hand)

    def expected(x: Tensor) -> Tensor:
        with outside.context():
            x = net.first(x)
        for each in net.blocks:
            with around.context():
                x = block(each, x)
            x = x.float() if default == "fp32" else x
        with outside.context():
            return net.head(x)

    results = run(net, {"default": default, "blocks": format}, emulate="auto")
    net.zero_grad()
    y = expected(X)
    y.float().square().mean().backward()
    assert equal(results, [y.detach(), *(param.grad for param in net.parameters() if param.grad is not None)])


@pytest.mark.parametrize("format", FORMATS)
def test_names_parameters_hooks_and_aliases_stay(format: str, net: Net) -> None:
    calls: list[torch.dtype] = []
    alias = net.blocks[0].up
    net.blocks[0].up.register_forward_hook(lambda module, args, output: calls.append(output.dtype))
    keys, parameters, modules = list(net.state_dict()), list(net.parameters()), list(net.modules())
    attachment = attach(net, as_policy({"default": "bf16", "blocks": format}).resolve(net), "cpu")
    with attachment.context():
        net(X)
    assert calls == [torch.bfloat16]
    assert net.blocks[0].up is alias
    assert list(net.state_dict()) == keys
    assert all(map(lambda one, other: one is other, net.parameters(), parameters))
    assert all(map(lambda one, other: one is other, net.modules(), modules))
    attachment.detach()
    assert not any("forward" in vars(module) for module in net.modules())


def test_a_subclass_runs_its_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    plain, doubled = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(Doubled(8, 4))
    doubled.load_state_dict(plain.state_dict())
    policy = {"default": "fp32", "0": "fp8"}
    assert torch.equal(run(doubled, policy)[0], 2 * run(plain, policy)[0])


def test_a_layer_inside_a_linear_has_its_own_format() -> None:
    class Lora(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + self.up(self.down(input))

    torch.manual_seed(0)
    model = nn.Sequential(Lora())
    policy = {"default": "bf16", "0.down": "bf16", "0.up": "fp32", "0": "fp8"}
    seen: dict[str, Tensor] = {}
    for name, layer in model[0].named_children():
        layer.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output, "in": args[0]}))
    run(model, policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        down = model[0].down(X)
    assert torch.equal(run(model, policy) and seen["down"], down)
    assert torch.equal(seen["up"], model[0].up(down.float()))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("emulate", ["auto", True])
def test_recomputed_in_backward_it_computes_the_same(format: str, emulate: Any, net: Net) -> None:
    policy = {"default": "bf16", "blocks": format}
    recomputing = copy.deepcopy(net)
    recomputing.recomputed = True
    assert equal(run(net, policy, emulate), run(recomputing, policy, emulate))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", FORMATS)
def test_compiled_in_one_graph(format: str, backend: str, net: Net) -> None:
    torch._dynamo.reset()
    policy = {"default": "bf16", "blocks": f"c={format},g=all"}
    eager = run(net, policy)
    compiled = run(net, policy, call=torch.compile(net, backend=backend, fullgraph=True))
    if backend == "aot_eager":
        assert equal(compiled, eager)
    else:  # which rounds elsewhere between products
        assert all(
            F.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.99 for a, b in zip(compiled, eager, strict=True)
        )


def test_each_new_assignment_is_compiled_once(net: Net) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    policies = [as_policy({"default": "bf16", "blocks": each}) for each in ("fp8", "bf16", "c=fp8,s=row", "int8")]
    attachment = attach(net, policies[0].resolve(net), "cpu")
    for _ in range(2):
        for policy in policies:
            attachment.change(policy.resolve(net))
            with attachment.context(), torch.no_grad():
                compiled(X)
    assert counter.frame_count == len(policies)
    attachment.detach()


@pytest.mark.parametrize("format", FORMATS)
def test_a_deep_copy_computes_with_its_own_weights(format: str, net: Net) -> None:
    policy = as_policy({"default": "bf16", "blocks": format}).resolve(net)
    attachment = attach(net, policy, "cpu")
    copied = copy.deepcopy(net)
    with torch.no_grad(), attachment.context():
        for param in net.parameters():
            param.zero_()
        assert copied(X).any()
        assert not net(X).any()
    attachment.detach()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_evaluation(context: Any, net: Net) -> None:
    policy = {"default": "bf16", "blocks": "c=fp8,s=row"}
    expected = run(net, policy)[0]
    attachment = attach(net, as_policy(policy).resolve(net), "cpu")
    with context(), attachment.context():
        assert torch.equal(net(X), expected)
    attachment.detach()


def test_a_model_that_is_a_linear_itself() -> None:
    layer = nn.Linear(8, 4)
    plain = {"": LayerPrecision("fp32", "fp8", eight_bits=EightBits("bf16", "row", "all"))}
    attachment = attach(layer, plain, "cpu")
    with attachment.context():
        y = layer(X)
    attachment.detach()
    assert torch.equal(y, linear(X, layer.weight, layer.bias, torch.bfloat16, Products("fp8", "row", "all", True)))


def test_the_first_step_finds_a_layer_that_its_model_walks_around(net: Net) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = nn.Linear(8, 8)
            self.outer.inner = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.outer.inner(F.linear(x, self.outer.weight))

    model = Around()
    attachment = attach(model, as_policy({"default": "bf16", "outer": "fp8"}).resolve(model), "cpu")
    attachment.begin_first_step()
    with attachment.context():
        model(X)
    with pytest.raises(PolicyError, match="layer 'outer' computes in fp8 by the rule for 'outer', but .* never called"):
        attachment.end_first_step()
    attachment.detach()


# Devices


def answering(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    support = Support(native, "Some GPU has no such arithmetic")
    for room in ("backends", "backends.narrow"):
        monkeypatch.setattr(f"lightning_mixprec.engine.{room}.native_support", lambda format, device: support)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("native", "emulate", "expected"),
    [(True, "auto", False), (True, True, True), (True, False, False), (False, "auto", True), (False, True, True)],
)
def test_products_are_emulated_where_the_device_has_none_or_all_are_to_be(
    monkeypatch: pytest.MonkeyPatch, format: str, native: bool, emulate: Any, expected: bool
) -> None:
    answering(monkeypatch, native)
    region: Any = Backends("cuda", emulate).region("fp32", Manner(format, "row", "all"))
    assert region.mode.products.is_emulated is expected


@pytest.mark.parametrize("format", FORMATS)
def test_without_emulation_a_device_without_them_is_refused(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    answering(monkeypatch, False)
    with pytest.raises(SupportError, match=f"compute in {format} with emulate=False, but Some GPU has no such arith"):
        Backends("cuda", False).region("fp32", Manner(format, "row", "all"))
    if format == "fp8":
        assert Backends("cpu", False).region("fp32", Manner("fp8", "row", "all")).mode is not None
    else:  # without the instructions torch's product of integers is wrong
        with pytest.raises(SupportError, match="emulate='auto', or bf16"):
            Backends("cpu", False).region("fp32", Manner("int8", "row", "all"))


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_on_a_gpu_a_model_computes_what_it_computes_emulated(format: str, net: Net) -> None:
    if not (support := native_support(format, "cuda")).native:
        pytest.skip(support.reason)
    results = []
    for emulate in ("auto", True):
        model = copy.deepcopy(net).cuda()
        policy = as_policy({"default": "bf16", "blocks": format}).resolve(model)
        attachment = attach(model, policy, "cuda", emulate)
        with attachment.context():
            y = model(X.cuda())
        y.float().square().mean().backward()
        attachment.detach()
        results.append(torch.cat([y.flatten().float(), *(param.grad.flatten() for param in model.parameters())]))
    assert F.cosine_similarity(*results, dim=0) > 0.999
