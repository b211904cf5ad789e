"""Products in 8 bits: against ml_dtypes and fp64 by hand, against torchao, and under everything that runs a layer."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad

from lightning_mixprec.engine.backends import scaled_products
from lightning_mixprec.engine.backends.scaled_linear import Products, linear
from lightning_mixprec.engine.backends.scaled_products import scaled_product
from lightning_mixprec.errors import SupportError
from lightning_mixprec.numerics.devices import native_support

BF16 = torch.bfloat16


def is_emulated(format: str) -> bool:
    """Whether this machine has no such product: torch's one of integers is wrong on a CPU without VNNI."""
    return format == "int8" and not native_support("int8", "cpu").native


FP8 = {f"fp8 by {scaling}": Products("fp8", scaling) for scaling in ("tensor", "row")}
INT8 = {
    f"int8, {gradients} gradients": Products("int8", "row", gradients, is_emulated("int8"))
    for gradients in ("none", "all")
}
KINDS = FP8 | INT8
each_kind = pytest.mark.parametrize("products", KINDS.values(), ids=KINDS)

MAX = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}
CAST = {
    "e4m3": lambda values: values.astype(ml_dtypes.float8_e4m3fn),
    "e5m2": lambda values: values.astype(ml_dtypes.float8_e5m2),
    "int8": np.rint,
}
OPERANDS = [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("int8", "int8")]


def rounded(matrix: Tensor, format: str, per_row: bool) -> np.ndarray:
    """What 8 bits keep of a matrix, in fp64, by hand."""
    wide = matrix.float().numpy()
    scale = np.abs(wide).max(axis=1 if per_row else None, keepdims=True) / np.float32(MAX[format])
    return CAST[format](wide / scale).astype(np.float64) * scale


def sqnr_db(value: Tensor, exact: Tensor) -> float:
    error = (value.double() - exact.double()).square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / error))


def step(forward: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output, and the gradients of input, weight and bias."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = forward(x)
    y.backward(gradient.to(y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, *(param.grad for param in layer.parameters())]  # type: ignore[list-item]


def in_8_bits(layer: nn.Linear, products: Products) -> Callable[[Tensor], Tensor]:
    return lambda x: linear(x, layer.weight, layer.bias, BF16, products)


@pytest.fixture
def case() -> tuple[nn.Linear, Tensor, Tensor]:
    """A layer, its input and the gradient of its output, whose rows are of sizes far apart."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 192)
    x = torch.randn(320, 256) * torch.logspace(-2, 0, 320)[:, None]
    return layer, x, torch.randn(320, 192) * torch.logspace(-3, 0, 320)[:, None]


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("formats", OPERANDS, ids="-".join)
@pytest.mark.parametrize("shape", [(32, 48, 64), (5, 7, 3), (1, 1, 1), (33, 16, 17)], ids=str)
def test_a_product_is_that_of_operands_rounded_by_hand(
    shape: tuple[int, int, int], formats: tuple[str, str], per_row: bool, emulated: bool
) -> None:
    if is_emulated(formats[0]) and not emulated:
        pytest.skip("this CPU has no products of integers")
    torch.manual_seed(1)
    rows, columns, summed = shape
    left, right = torch.randn(rows, summed, dtype=BF16), torch.randn(columns, summed, dtype=BF16) * 30
    exact = torch.from_numpy(rounded(left, formats[0], per_row) @ rounded(right, formats[1], per_row).T)
    product = scaled_product(left, right, *formats, per_row, emulated)
    assert product.dtype == BF16
    size = left.double().norm(dim=1)[:, None] * right.double().norm(dim=1)
    assert ((product.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5 * size).all()


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@each_kind
def test_operands_may_be_transposed_and_are_left_alone(products: Products, dtype: torch.dtype) -> None:
    left, right = torch.randn(40, 24).to(dtype), torch.randn(24, 9).to(dtype)
    before = left.clone(), right.clone()
    format = "int8" if products.format == "int8" else "e4m3"
    arguments = format, format, products.scaling == "row", True
    product = scaled_product(left, right.t(), *arguments)
    assert torch.equal(product, scaled_product(left, right.t().contiguous(), *arguments))
    assert product.dtype == dtype
    assert torch.equal(left, before[0])
    assert torch.equal(right, before[1])


def test_sums_of_integers_do_not_wrap_around() -> None:
    ones = torch.ones(1, 140_000, dtype=BF16)
    is_wrong = is_emulated("int8")
    assert scaled_product(ones, ones, "int8", "int8", True, is_wrong).item() == torch.tensor(140_000.0).to(BF16)


@each_kind
def test_an_empty_batch_gives_an_empty_result(products: Products) -> None:
    layer = nn.Linear(4, 3)
    results = step(in_8_bits(layer, products), layer, torch.ones(0, 4), torch.ones(0, 3))
    assert [tuple(each.shape) for each in results] == [(0, 3), (0, 4), (3, 4), (3,)]
    assert not any(each.any() for each in results)


@each_kind
def test_rows_of_zeros_stay_finite(products: Products) -> None:
    layer, x = nn.Linear(16, 16), torch.randn(4, 16)
    nn.init.zeros_(layer.weight[3:5].detach())
    x[1] = 0
    gradient = torch.randn(4, 16)
    gradient[2] = 0
    results = step(in_8_bits(layer, products), layer, x, gradient)
    assert all(each.isfinite().all() for each in results)
    assert not results[1][2].any()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@each_kind
def test_what_is_not_finite_reaches_the_result(products: Products, bad: float) -> None:
    layer, x, gradient = nn.Linear(16, 16), torch.randn(4, 16), torch.randn(4, 16)
    broken = x.clone()
    broken[1, 3] = bad
    output = step(in_8_bits(layer, products), layer, broken, gradient)[0]
    assert output.isfinite().all(1).tolist() == [products.scaling == "row" and row != 1 for row in range(4)]
    gradient[1, 3] = bad
    _, of_input, of_weight, of_bias = step(in_8_bits(layer, products), layer, x, gradient)
    assert not of_input[1].isfinite().any()
    assert not of_weight[3].isfinite().any()
    assert not of_bias[3].isfinite()


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 1, 3)], ids=str)
@each_kind
def test_any_number_of_leading_dimensions(products: Products, lead: tuple[int, ...]) -> None:
    layer, x = nn.Linear(8, 5), torch.randn(*lead, 8)
    y = in_8_bits(layer, products)(x)
    assert y.shape == (*lead, 5)
    assert torch.equal(y.reshape(-1, 5), in_8_bits(layer, products)(x.reshape(-1, 8)))


def test_what_is_kept_for_backward_is_in_16_bits() -> None:
    kept: list[torch.dtype] = []
    layer, x = nn.Linear(8, 8), torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        in_8_bits(layer, Products("fp8"))(x)
    assert kept == [BF16, BF16]


# How near: to torchao, and to what 8 bits allow


def test_gradients_in_16_bits_are_those_of_the_operands_before_they_were_cast(case: Any) -> None:
    layer, x, gradient = case
    none = step(in_8_bits(layer, INT8["int8, none gradients"]), layer, x, gradient)
    g, rows, weight = gradient.to(BF16), x.to(BF16), layer.weight.detach().to(BF16)
    assert torch.equal(none[1], (g @ weight).float())
    assert torch.equal(none[2], (g.t() @ rows).float())
    _, of_input, of_weight, _ = step(in_8_bits(layer, Products("fp8", "row", "input")), layer, x, gradient)
    assert torch.equal(of_weight, none[2])
    assert not torch.equal(of_input, none[1])


@each_kind
def test_the_noise_is_that_of_the_number_of_digits(products: Products, case: Any) -> None:
    """Rounding to m + 1 digits leaves about 6.02 (m + 1) dB + 4.4 of each operand; int8 by row about 41 of both."""
    layer, x, gradient = case
    exact = step(layer, layer, x, gradient)
    y, of_input, of_weight, of_bias = map(sqnr_db, step(in_8_bits(layer, products), layer, x, gradient), exact)
    assert of_bias > 45
    if products.format == "fp8":
        assert y > 27
        assert 22 < min(of_input, of_weight) <= max(of_input, of_weight) < 27
    else:
        assert y > 38
        assert min(of_input, of_weight) > (38 if products.gradients == "all" else 45)


def torchao_float8(layer: nn.Linear, scaling: str) -> nn.Module:
    float8 = pytest.importorskip("torchao.float8")
    config = pytest.importorskip("torchao.float8.config")
    size = config.ScalingGranularity.AXISWISE if scaling == "row" else config.ScalingGranularity.TENSORWISE
    forward = config.CastConfig(scaling_granularity=size, target_dtype=config.e4m3_dtype)
    backward = config.CastConfig(scaling_granularity=size, target_dtype=config.e5m2_dtype)
    wanted = float8.Float8LinearConfig(
        cast_config_input=forward, cast_config_weight=forward, cast_config_grad_output=backward, emulate=True
    )
    return float8.convert_to_float8_training(nn.Sequential(copy.deepcopy(layer)), config=wanted)


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_fp8_is_within_half_a_decibel_of_torchao(scaling: str, case: Any) -> None:
    layer, x, gradient = case
    theirs = torchao_float8(layer, scaling)

    def theirs_in_bf16(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            return theirs(x)

    exact = step(layer, layer, x, gradient)
    expected = step(theirs_in_bf16, theirs, x, gradient)
    results = step(in_8_bits(layer, Products("fp8", scaling)), layer, x, gradient)
    for ours, torchaos, fp32 in zip(results, expected, exact, strict=True):
        assert sqnr_db(ours, fp32) == pytest.approx(sqnr_db(torchaos, fp32), abs=0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("gradients", ["none", "all"])
def test_int8_is_within_half_a_decibel_of_torchao(gradients: str, case: Any) -> None:
    quantize = pytest.importorskip("torchao").quantize_
    training = pytest.importorskip("torchao.prototype.quantized_training")
    if is_emulated("int8"):
        pytest.skip("torchao takes torch's product of integers, which is wrong on this CPU")
    layer, x, gradient = case
    theirs, narrow = nn.Sequential(copy.deepcopy(layer)).to(BF16), gradients == "all"
    config = training.int8_mixed_precision_training(
        output=True, grad_input=narrow, grad_weight=narrow, module_swap=True
    )
    quantize(theirs, config)
    exact = step(layer, layer, x, gradient)
    expected = step(lambda x: theirs(x.to(BF16)), theirs, x, gradient)
    results = step(in_8_bits(layer, INT8[f"int8, {gradients} gradients"]), layer, x, gradient)
    for ours, torchaos, fp32 in zip(results, expected, exact, strict=True):
        assert sqnr_db(ours, fp32) == pytest.approx(sqnr_db(torchaos, fp32), abs=0.5)


# What runs a layer


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@each_kind
def test_without_a_graph_the_output_is_the_same(products: Products, context: Any, case: Any) -> None:
    layer, x, _ = case
    with context():
        without = in_8_bits(layer, products)(x)
    assert torch.equal(without, in_8_bits(layer, products)(x))


@each_kind
def test_under_vmap_each_sample_has_its_own_scales(products: Products) -> None:
    layer, samples = nn.Linear(8, 6), torch.randn(3, 5, 8) * torch.tensor([1.0, 30.0, 1e-3])[:, None, None]
    run = in_8_bits(layer, products)
    assert torch.equal(torch.vmap(run)(samples), torch.stack([run(each) for each in samples]))


@pytest.mark.parametrize("products", FP8.values(), ids=FP8)
def test_a_cpu_without_torchs_kernel_multiplies_in_fp32_as_that_does(
    products: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under torch 2.11."""
    layer, x = nn.Linear(40, 24), torch.randn(7, 40)
    expected = linear(x, layer.weight, layer.bias, BF16, products)
    monkeypatch.setattr(scaled_products, "_has_kernel_on_cpu", lambda: False)
    monkeypatch.delattr(F, "scaled_mm", raising=False)
    monkeypatch.delattr(torch, "_scaled_mm")
    found = linear(x, layer.weight, layer.bias, BF16, products)
    assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # torch's own, where it derives
@pytest.mark.parametrize("derive", ["jvp", "vmap of jvp", "dual numbers"])
@each_kind
def test_forward_mode_is_of_the_16_bit_operands(products: Products, derive: str) -> None:
    """The tangent is fp64's of the operands in 16 bits, within what 16 bits round."""
    layer = nn.Linear(8, 6)
    x, t = torch.randn(5, 8), torch.randn(5, 8)
    weight, of_weight = layer.weight.detach(), torch.randn(6, 8)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, layer.bias, BF16, products)

    if derive == "jvp":
        output, tangent = torch.func.jvp(run, (x, weight), (t, of_weight))
    elif derive == "vmap of jvp":
        _, tangent = torch.vmap(lambda x, t: torch.func.jvp(run, (x, weight), (t, of_weight)))(x[:, None], t[:, None])
        output, tangent = run(x, weight), tangent[:, 0]
    else:
        with forward_ad.dual_level():
            output = run(forward_ad.make_dual(x, t), forward_ad.make_dual(weight, of_weight))
            output, tangent = forward_ad.unpack_dual(output)
    assert torch.equal(output, run(x, weight))
    wide = [each.to(BF16).double() for each in (t, weight, x, of_weight)]
    expected = wide[0] @ wide[1].T + wide[2] @ wide[3].T
    assert (tangent.double() - expected).abs().max() <= 3 * 2**-8 * expected.abs().max()


@each_kind
def test_gradients_of_gradients(products: Products, case: Any) -> None:
    """A gradient penalty; its own gradients are of 16 bits, so they are near fp32's."""
    layer, x, _ = case

    def penalty(forward: Callable[[Tensor], Tensor]) -> Tensor:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        [gradient] = torch.autograd.grad(forward(leaf).float().square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad.clone()

    exact = penalty(layer)
    assert sqnr_db(penalty(in_8_bits(layer, products)), exact) > 15


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@each_kind
def test_compiled_in_one_graph_it_computes_the_same(products: Products, backend: str, case: Any) -> None:
    layer, x, gradient = case
    compiled = torch.compile(in_8_bits(layer, products), backend=backend, fullgraph=True)
    results = step(compiled, layer, x, gradient)
    eager = step(in_8_bits(layer, products), layer, x, gradient)
    # Inductor does not round the bias before it adds it, and sums its gradient in another order: no products of ours.
    bits = 2.0**-7 if backend == "inductor" else 0.0
    for now, before, bound in zip(results, eager, (bits, 0.0, 0.0, bits), strict=False):
        torch.testing.assert_close(now, before, rtol=bound, atol=bound)
    assert len(results) == len(eager)


@each_kind
def test_compilers_see_one_operation_for_each_product(products: Products, case: Any) -> None:
    """No cast to 8 bits is left to them: triton 3.8 stores transposed fp8 wrongly."""
    seen: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(graph)
        return make_boxed_func(graph.forward)

    layer, x, gradient = case
    torch._dynamo.reset()
    compiled = torch.compile(
        in_8_bits(layer, products), backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True
    )
    step(compiled, layer, x, gradient)
    targets = [node.target for graph in seen for node in graph.graph.nodes if node.op == "call_function"]
    of_ours = targets.count(torch.ops.lightning_mixprec.scaled_product.default)
    assert of_ours == (3 if products.gradients == "all" else 1)
    dtypes = {node.meta["val"].dtype for graph in seen for node in graph.graph.nodes if "val" in node.meta}
    assert all(dtype.itemsize >= 2 for dtype in dtypes)


def test_a_tensor_that_products_do_not_take_is_refused() -> None:
    sparse = torch.eye(4).to_sparse()
    with pytest.raises(SupportError, match="linear in fp8 was given .* sparse tensors; .* give this layer bf16"):
        linear(sparse, torch.ones(2, 4), None, BF16, Products("fp8"))
    with pytest.raises(SupportError, match="a weight of 1 dimensions"):
        linear(torch.ones(2, 4), torch.ones(4), None, BF16, Products("fp8"))


def test_the_older_name_of_the_product_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch before 2.14, which has no public one."""
    left, right = torch.randn(32, 48).to(BF16), torch.randn(16, 48).to(BF16)
    arguments = [("e4m3", "e4m3", False, False), ("e5m2", "e4m3", True, False)]
    now = [scaled_product(left, right, *each) for each in arguments]
    monkeypatch.delattr(F, "scaled_mm", raising=False)
    assert all(map(torch.equal, now, [scaled_product(left, right, *each) for each in arguments]))


@pytest.mark.gpu
@each_kind
def test_on_a_gpu_products_are_near_those_on_the_cpu(products: Products, case: Any) -> None:
    if not (support := native_support(products.format, "cuda")).native:
        pytest.skip(support.reason)
    layer, x, gradient = case
    for size in (320, 313, 7):  # multiples of 16 and others
        part, arriving = x[:size], gradient[:size]
        on_cpu = step(in_8_bits(layer, products._replace(is_emulated=True)), layer, part, arriving)
        there = copy.deepcopy(layer).cuda()
        on_gpu = step(in_8_bits(there, products._replace(is_emulated=False)), there, part.cuda(), arriving.cuda())
        assert all(sqnr_db(one.cpu(), other) > 40 for one, other in zip(on_gpu, on_cpu, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_on_a_gpu_odd_sizes_and_fp16_are_taken(scaling: str) -> None:
    if not (support := native_support("fp8", "cuda")).native:
        pytest.skip(support.reason)
    sizes = 1, 3, 15, 17, 33
    for rows, (inside, outside) in zip(sizes, pairwise((*sizes, 5)), strict=True):
        x = torch.randn(rows, inside, device="cuda", dtype=torch.float16)
        weight = torch.randn(outside, inside, device="cuda", dtype=torch.float16)
        y = linear(x, weight, None, torch.float16, Products("fp8", scaling))
        assert y.dtype == torch.float16
        assert sqnr_db(y, x.double() @ weight.double().t()) > 18
