"""The reference of a comparison computes in fp32, also where the user allows TF32."""

import pytest
import torch

from lightning_mixprec.evidence.instruments.exact_fp32 import without_tf32

CUDA = torch.device("cuda")  # the settings can be read and made without one
UNITS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def settings():
    return [unit.fp32_precision for unit in UNITS]


@pytest.fixture(params=["default", "high", "highest", "conv in ieee", "matmul in tf32"])
def chosen(request):
    before = settings()
    if request.param in ("high", "highest"):
        torch.set_float32_matmul_precision(request.param)
    elif request.param == "conv in ieee":
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    elif request.param == "matmul in tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield settings()
    for unit, precision in zip(UNITS, before, strict=True):
        unit.fp32_precision = precision
    torch.set_float32_matmul_precision("highest")


def test_inside_everything_is_fp32_and_afterwards_as_it_was_chosen(chosen):
    with without_tf32(CUDA):
        assert settings() == ["ieee"] * 3
    assert settings() == chosen


def test_the_settings_come_back_after_an_error(chosen):
    with pytest.raises(RuntimeError, match="planted"), without_tf32(CUDA):
        raise RuntimeError("planted")
    assert settings() == chosen


def test_other_devices_are_not_concerned(chosen):
    with without_tf32(torch.device("cpu")):
        assert settings() == chosen


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["conv", "matmul"])
def test_on_cuda_the_reference_is_exact_to_fp32(operation):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    x, w = torch.randn(8, 64, 32, 32, device=CUDA), torch.randn(64, 64, 3, 3, device=CUDA)
    a, b = x.flatten(1), x.flatten(1).T

    def compute(convert):
        if operation == "conv":
            return torch.nn.functional.conv2d(convert(x), convert(w)).double()
        return (convert(a) @ convert(b)).double()

    exact = compute(torch.Tensor.double)
    try:
        with without_tf32(CUDA):
            fp32 = compute(torch.Tensor.float)
        tf32 = compute(torch.Tensor.float)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    error, coarse = ((result - exact).norm() / exact.norm() for result in (fp32, tf32))
    assert error < 1e-5 < coarse
