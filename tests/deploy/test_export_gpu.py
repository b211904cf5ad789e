"""``export`` of modules on a GPU, and policies for it: what stands in the file is what the GPU computes."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_mixprec import PrecisionPolicy, export
from lightning_mixprec.engine.apply import attach
from lightning_mixprec.policy.policy import as_policy

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*torch.jit.*")]

MIXED = {"default": "bf16", "1": "c=fp32,o=input", "4": "fp16"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 128), nn.Linear(128, 16)
    ).cuda()


def eager(module: nn.Module, x: Tensor) -> Tensor:
    """What the module computes under the mixed policy, without a file."""
    module = copy.deepcopy(module).eval()
    attachment = attach(module, as_policy(MIXED).resolve(module), "cuda", False)
    with torch.no_grad(), attachment.context():
        return module(x)


def test_pt2_is_bitwise_the_module_and_its_layers_are_read_from_the_graph(tmp_path):
    model, x = network(), torch.randn(8, 64, device="cuda")
    made = export(model, tmp_path / "model.pt2", policy=MIXED, example_inputs=x)
    assert made.layers == {"0": "bf16", "1": "fp32", "2": "bf16", "3": "bf16", "4": "fp16"}
    assert made.max_difference == 0
    other = torch.randn(8, 64, device="cuda")
    assert torch.equal(torch.export.load(made.path).module()(other), eager(model, other))


def test_an_aoti_package_is_near_the_module(tmp_path):
    model, x = network(), torch.randn(8, 64, device="cuda")
    made = export(model, tmp_path / "model.pt2", policy=MIXED, example_inputs=x, format="aoti")
    found = torch._inductor.aoti_load_package(str(made.path))(x).float()
    expected = eager(model, x).float()
    assert (found - expected).abs().max() <= 1e-2 * expected.abs().max()


@pytest.mark.parametrize("format", ["onnx", "torchscript", "weights"])
def test_other_files_are_written_and_the_module_stays_on_the_gpu(tmp_path, format):
    model, x = network(), torch.randn(8, 64, device="cuda")
    suffix = {"onnx": ".onnx", "torchscript": ".ts", "weights": ".pt"}[format]
    made = export(model, tmp_path / f"model{suffix}", policy=MIXED, example_inputs=x, format=format)
    assert (made.layers["0"], made.layers["4"]) == ("bf16", "fp16")
    assert {param.device.type for param in model.parameters()} == {"cuda"}


def test_a_policy_for_this_gpu_trains_on_it_without_emulation():
    model = network()
    policy = PrecisionPolicy.from_dict({"default": "bf16", "3": "fp8"}).for_device("cuda:0")
    attachment = attach(model, policy.resolve(model), "cuda", False)
    with attachment.context():
        loss = model(torch.randn(32, 64, device="cuda")).float().square().mean()
    loss.backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())
