"""The lists of operations that CUDA's autocast casts, beside the CPU's, which the rest of the suite runs on.

``x`` and ``y`` are 4 x 4, ``x`` in bf16 as from a layer before and ``y`` in fp32 as a weight, ``labels`` are integers.
"""

import pytest
import torch
from fake_cuda import Recorder, autocast, needs_fake_cuda, on_fake_cuda
from torch import nn
from torch.nn import functional as F
from torch.torch_version import TorchVersion

pytestmark = [
    needs_fake_cuda,
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
]

PRODUCTS = """
    F.linear(x, y); x @ y; torch.bmm(x[None], y[None]); torch.baddbmm(x[None], x[None], y[None]); F.prelu(x, y[0, :1])
    torch.addmm(x, x, y); torch.einsum("ij,jk->ik", x, y); F.conv1d(x[None], y[..., None]); nn.RNNCell(4, 4)(x)
    F.conv2d(x[None, None], y[None, None]); F.conv_transpose2d(x[None, None], y[None, None])
    F.scaled_dot_product_attention(x[None], x[None], y[None])
"""
AS_THEY_COME = """
    x.relu(); x.tanh(); x.sigmoid(); F.gelu(x); F.silu(x); F.mish(x); x.sqrt(); x.sin(); x.mean(); x.var(); x.amax()
    F.dropout(x); F.pad(x, (1, 1)); F.max_pool2d(x[None], 2); F.avg_pool2d(x[None], 2); F.embedding(labels, x)
    F.batch_norm(x, None, None, training=True); F.instance_norm(x[None])
"""
WIDE_ON_BOTH = """
    x.prod(); torch.cdist(x, x); F.mse_loss(x, x); F.l1_loss(x, x); F.smooth_l1_loss(x, x); F.huber_loss(x, x)
    F.kl_div(x, x); F.binary_cross_entropy_with_logits(x, x); F.triplet_margin_loss(x, x, x); F.nll_loss(x, labels)
    F.cross_entropy(x, labels); torch.fft.rfft(x).real; x + y; torch.cat([x, y]); torch.addcmul(x, x, y)
    F.grid_sample(x[None, None], torch.ones(1, 2, 2, 2), align_corners=False)
"""
WIDE_ON_CUDA = """
    x.softmax(-1); x.log_softmax(-1); F.softmin(x, -1); F.layer_norm(x, (4,)); F.group_norm(x[None], 2)
    F.local_response_norm(x[None], 2); F.normalize(x); torch.renorm(x, 2, 0, 1.0); x.sum(); x.norm()
    torch.linalg.vector_norm(x); x.cumsum(0); x.cumprod(0); x.logsumexp(0); x.exp(); x.expm1(); x.log(); x.log1p()
    x.rsqrt(); x.reciprocal(); x.erfinv(); x.acos(); x.sinh(); x.tan(); x**2; 2**x; F.softplus(x); F.pdist(x)
    F.cosine_similarity(x, x); F.interpolate(x[None, None], scale_factor=2)
"""
ONE_DTYPE_ON_CPU = """
    F.bilinear(x, x, torch.ones(2, 4, 4)); torch.dot(x[0], y[0]); torch.tensordot(x, y, 1)
    x.scatter_add(0, labels[None], y)
"""
"""Operations that promote what they are given on CUDA; on a CPU it must have one dtype."""
IN_16_BITS_ON_CUDA = "torch.mv(y, y[0]); torch.addmv(y[0], y, y[0]); torch.addr(y, y[0], y[0])"


def expressions(text):
    return [each.strip() for line in text.split("\n") for each in line.split(";") if each.strip()]


def dtype_of(expression, device):
    with on_fake_cuda(device), autocast("bf16", device):
        names = {"x": torch.ones(4, 4, dtype=torch.bfloat16), "y": torch.ones(4, 4)}
        names |= {"labels": torch.zeros(4, dtype=torch.long), "torch": torch, "nn": nn, "F": F}
        return eval(expression, names).dtype


@pytest.mark.parametrize("expression", expressions(PRODUCTS + AS_THEY_COME))
def test_both_compute_products_in_16_bits_and_others_as_they_come(expression):
    assert dtype_of(expression, "cuda") == dtype_of(expression, "cpu") == torch.bfloat16


@pytest.mark.parametrize("expression", expressions(WIDE_ON_BOTH))
def test_both_compute_losses_in_fp32(expression):
    assert dtype_of(expression, "cuda") == dtype_of(expression, "cpu") == torch.float32


@pytest.mark.parametrize("expression", expressions(WIDE_ON_CUDA))
def test_cuda_computes_in_fp32_what_a_cpu_computes_as_it_comes(expression):
    assert dtype_of(expression, "cuda") == torch.float32
    assert dtype_of(expression, "cpu") == torch.bfloat16


def test_rms_norm_is_in_fp32_since_torch_2_12():
    is_wide = TorchVersion(torch.__version__) >= (2, 12)
    assert dtype_of("F.rms_norm(x, (4,))", "cuda") == (torch.float32 if is_wide else torch.bfloat16)
    assert dtype_of("F.rms_norm(x, (4,))", "cpu") == torch.bfloat16


@pytest.mark.parametrize(("device", "rounded_to"), [("cuda", torch.bfloat16), ("cpu", torch.float32)])
def test_cuda_rounds_the_log_probabilities_of_16_bit_logits(device, rounded_to):
    """In cross_entropy, which asks for log_softmax in the logits' dtype, and CUDA's autocast leaves that alone."""
    with on_fake_cuda(device):
        logits, labels = torch.ones(4, 4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.long)
        with autocast("bf16", device), Recorder(nn.Module()) as recorder:
            F.cross_entropy(logits, labels)
    outputs = {call.op: call.outputs[0] for call in recorder.calls if call.outputs}
    assert outputs["_log_softmax"] == rounded_to
    assert outputs["nll_loss_forward"] == torch.float32


@pytest.mark.parametrize("expression", expressions(ONE_DTYPE_ON_CPU))
def test_cuda_promotes_what_a_cpu_refuses(expression):
    assert dtype_of(expression, "cuda") == torch.float32
    with pytest.raises(RuntimeError):
        dtype_of(expression, "cpu")


@pytest.mark.parametrize("expression", expressions(IN_16_BITS_ON_CUDA))
def test_products_with_vectors_are_in_16_bits_on_cuda_alone(expression):
    assert dtype_of(expression, "cuda") == torch.bfloat16
    assert dtype_of(expression, "cpu") == torch.float32
