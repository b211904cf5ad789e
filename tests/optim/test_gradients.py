"""Gradients of every format are checked and multiplied as the CPU's kernels do it, by what CUDA has kernels for."""

import math
from contextlib import nullcontext

import pytest
import torch
from like_cuda import LikeCuda

from lightning_mixprec.optim.gradients import check_and_unscale, multiply_, scalar
from lightning_mixprec.optim.loss_scaling import LossScaler
from lightning_mixprec.optim.loss_scaling_options import LossScaling

FORMATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
PLACES = [pytest.param("cpu", id="like CUDA"), pytest.param("cuda", marks=pytest.mark.gpu)]


def kernels_of(device: str) -> LikeCuda | nullcontext[None]:
    return LikeCuda() if device == "cpu" else nullcontext()


def gradients(dtypes: list[torch.dtype], device: str) -> list[torch.Tensor]:
    """Of several sizes, without dimensions and without elements among them."""
    shapes = [(3, 5), (), (0,), (257,)]
    return [torch.randn(shape, dtype=dtype, device=device) for dtype in dtypes for shape in shapes]


def by_torch(grads: list[torch.Tensor], factor: float) -> tuple[list[torch.Tensor], float]:
    """What torch's kernel on the CPU makes of them, which takes every format, and its flag."""
    flag, expected = torch.zeros(()), [grad.cpu().clone() for grad in grads]
    for grad in expected:
        real = torch.view_as_real(grad) if grad.is_complex() else grad
        torch._amp_foreach_non_finite_check_and_unscale_([real], flag, torch.tensor(factor))
    return expected, flag.item()


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("factor", [2.0**-16, 1 / 1000, 1 / 3e5, None])
@pytest.mark.parametrize("dtypes", [[torch.bfloat16], FORMATS], ids=["bf16", "all"])
def test_gradients_of_all_formats_are_multiplied_as_by_the_cpus_kernel(dtypes, factor, device):
    grads = gradients(dtypes, device)
    expected, _ = by_torch(grads, factor or 1.0)
    with kernels_of(device):
        found = check_and_unscale(
            grads, None if factor is None else scalar(factor, torch.device(device)), scalar(0.0, torch.device(device))
        )
    assert found == 0
    assert all(torch.equal(grad.cpu(), each) for grad, each in zip(grads, expected, strict=True))


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(len(FORMATS)))
@pytest.mark.parametrize("is_scaled", [True, False])
def test_a_gradient_of_any_format_that_is_not_finite_is_found(place, value, is_scaled, device):
    grads = gradients(FORMATS, device)
    grads[4 * place + 3][200] = value
    one = scalar(1.0, torch.device(device))
    with kernels_of(device):
        found = check_and_unscale(grads, one if is_scaled else None, torch.zeros_like(one))
    assert found == by_torch(grads, 1.0)[1] == 1


@pytest.mark.parametrize("device", PLACES)
def test_a_large_gradient_is_no_infinite_one(device):
    """Its square is, and so would its norm be."""
    grads = [torch.full((3,), 3e38, dtype=torch.bfloat16, device=device)]
    with kernels_of(device):
        assert check_and_unscale(grads, None, scalar(0.0, torch.device(device))) == 0


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("factor", [65536.0, 1000 / 3, 2.0**-20])
def test_the_factor_is_not_rounded_to_the_format_of_what_it_multiplies(factor, dtype, device):
    tensors = [tensor * 1e-3 for tensor in gradients([dtype], device)]
    factor = scalar(factor, torch.device(device))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = [(tensor.to(wide) * factor.to(wide)).to(dtype) for tensor in tensors]
    with kernels_of(device):
        multiply_(tensors, factor)
    for tensor, each in zip(tensors, expected, strict=True):
        # Of a product that fp32 has rounded half a step may become the other neighbour, now and then.
        torch.testing.assert_close(tensor, each, rtol=torch.finfo(dtype).eps, atol=0)
        assert (tensor == each).float().mean().nan_to_num(1) > 0.9


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("dtype", FORMATS[:4])
def test_a_run_whose_weights_are_stored_in_a_format_is_scaled_and_guarded(dtype, device):
    """Clipping unscales, a further backward scales anew what was unscaled."""
    param = torch.nn.Parameter(torch.ones(2, dtype=dtype, device=device))
    optimizer = torch.optim.SGD([param], lr=1.0)
    for scaler in (LossScaler(LossScaling(init_scale=65536.0)), LossScaler(None)):
        with kernels_of(device):
            scale = scaler.scale(torch.ones((), device=device)).item()
            param.grad = torch.full_like(param, 2**-12 * scale)
            scaler.unscale_(optimizer)
            assert param.grad.tolist() == [2**-12] * 2
            scaler.scale(torch.ones((), device=device))
            assert param.grad.tolist() == [2**-12 * scale] * 2
            assert not scaler.step(optimizer)
            scaler.scale(torch.ones((), device=device))
            param.grad = torch.full_like(param, math.nan)
            assert scaler.step(optimizer)


@pytest.mark.gpu
@pytest.mark.parametrize("is_scaled", [True, False])
def test_checking_bf16_gradients_waits_for_nothing(is_scaled):
    device = torch.device("cuda")
    grads, factor = gradients([torch.bfloat16, torch.float32], "cuda"), scalar(0.5, device)
    found = scalar(0.0, device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = check_and_unscale(grads, factor if is_scaled else None, found)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found == 0


@pytest.mark.parametrize("device", [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("dtype", FORMATS)
def test_large_gradients_are_read_and_not_written(dtype, bad, device):
    """Also those whose squares overflow, and which are finite all the same."""
    largest = min(torch.finfo(dtype).max, 1e300)
    grads = [torch.full((1 << 14, 2), 0.5 * largest, dtype=torch.float64).to(device, dtype) for _ in range(2)]
    if bad is not None:
        grads[1][77, 1] = bad
    before = [(grad._version, grad.data_ptr(), grad.clone()) for grad in grads]
    found = check_and_unscale(grads, None, scalar(0.0, device))
    assert found.item() == (bad is not None)
    for grad, (version, place, value) in zip(grads, before, strict=True):
        assert (grad._version, grad.data_ptr()) == (version, place)
        assert torch.equal(torch.nan_to_num(grad, 7), torch.nan_to_num(value, 7))


def test_one_bad_number_is_found_wherever_it_is():
    for size in (1, 7, (1 << 14) - 1, 1 << 14, 100_003):
        for place in {0, size // 2, size - 1}:
            grads = [torch.ones(3), torch.ones(size), torch.ones(1 << 15)]
            grads[1][place] = math.nan
            assert check_and_unscale(grads, None, scalar(0.0, torch.device("cpu"))) == 1
            grads[1][place] = 0.0
            assert check_and_unscale(grads, None, scalar(0.0, torch.device("cpu"))) == 0
