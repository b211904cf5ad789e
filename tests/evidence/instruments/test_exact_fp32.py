"""The reference of a comparison computes in fp32, also where the user allows TF32."""

import pytest
import torch

from lightning_mixprec.evidence.instruments.exact_fp32 import without_tf32

CUDA = torch.device("cuda")  # the settings can be read and made without one
UNITS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
OLD_NAMES = (
    lambda: torch.backends.cudnn.allow_tf32,
    lambda: torch.backends.cuda.matmul.allow_tf32,
    torch.get_float32_matmul_precision,
)
BACKENDS = ("generic", "cuda", "mkldnn")
PRECISIONS = [*((each, "all") for each in BACKENDS), *(("mkldnn", each) for each in ("matmul", "conv", "rnn"))]


def settings():
    return [unit.fp32_precision for unit in UNITS]


def old_settings():
    """What torch says by the old names; what it raises where old and new ones disagree."""
    said = []
    for each in OLD_NAMES:
        try:
            said.append(each())
        except RuntimeError:
            said.append("they disagree")
    return said


def all_settings():
    return settings(), old_settings(), [torch._C._get_fp32_precision_getter(*each) for each in PRECISIONS]


def as_it_was():
    for unit in (*PRECISIONS, ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn")):
        torch._C._set_fp32_precision_setter(*unit, "none")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


CHOICES = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "conv in ieee": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "matmul in tf32": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "cudnn off by its old name": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "matmul on by its old name": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "all of cuda in ieee": lambda: setattr(torch.backends.cudnn, "fp32_precision", "ieee"),
    "everything in tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.fixture(params=CHOICES)
def chosen(request):
    as_it_was()
    CHOICES[request.param]()
    yield settings()
    as_it_was()


def test_old_names_agree_inside_and_say_the_same_afterwards(chosen):
    before = all_settings()
    with without_tf32(CUDA):
        assert old_settings() == [False, False, "highest"]
    assert all_settings() == before


def by_flags():
    """As CTC and the double backward of recurrent layers are computed without cuDNN."""
    with torch.backends.cudnn.flags(enabled=False):
        pass


@pytest.mark.parametrize(
    "step",
    [
        by_flags,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
        lambda: torch.set_float32_matmul_precision("high"),
    ],
    ids=["flags", "reads", "sets cudnn", "sets the precision"],
)
def test_a_step_may_use_the_old_names(chosen, step):
    before = all_settings()
    with without_tf32(CUDA):
        step()
    assert all_settings() == before


def test_after_flags_of_a_step_everything_is_fp32_again(chosen):
    with without_tf32(CUDA):
        by_flags()
        assert settings() == ["ieee"] * 3


def test_what_followed_another_setting_follows_it_afterwards():
    as_it_was()
    try:
        for each in UNITS:
            each.fp32_precision = "none"
        with without_tf32(CUDA):
            pass
        torch.backends.fp32_precision = "ieee"
        assert settings() == ["ieee"] * 3
        torch.backends.fp32_precision = "none"
        torch.backends.cudnn.fp32_precision = "tf32"
        assert settings() == ["tf32"] * 3
    finally:
        as_it_was()


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
def test_on_cuda_a_double_backward_through_a_recurrent_layer_runs_inside(chosen):
    lstm = torch.nn.LSTM(4, 4)
    x = torch.randn(3, 2, 4)

    def penalty(lstm, x):
        x = x.detach().requires_grad_()
        with torch.backends.cudnn.flags(enabled=False):
            y = lstm(x)[0]
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return x.grad.cpu().double()

    exact = penalty(lstm.double(), x.double())
    lstm.float().to(CUDA)
    with without_tf32(CUDA):
        assert torch.allclose(penalty(lstm, x.to(CUDA)), exact, rtol=1e-4, atol=1e-6)
    assert settings() == chosen


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["conv", "matmul"])
def test_on_cuda_the_reference_is_exact_to_fp32(operation):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    x, w = torch.randn(8, 64, 32, 32, device=CUDA), torch.randn(64, 64, 3, 3, device=CUDA)
    a, b = torch.randn(64, 1024, device=CUDA), torch.randn(1024, 64, device=CUDA)  # sums of squares would hide it

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
