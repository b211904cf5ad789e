"""Pruned, distilled and quantized models leave in their formats, too."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_mixprec import export

EXAMPLES = str(Path(__file__).parents[3] / "examples")
IMAGES = torch.randn(2, 3, 16, 16)


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.setattr(sys, "path", [EXAMPLES, *sys.path])


def test_the_pruned_model_of_the_examples(tmp_path, examples):
    from pruning import PrunedClassifier

    torch.manual_seed(0)
    module = PrunedClassifier(10)
    layers = {name: each for name, each in module.named_modules() if isinstance(each, (nn.Conv2d, nn.Linear))}
    for layer in layers.values():
        prune.l1_unstructured(layer, "weight", 0.9)
    made = export(module, tmp_path / "model.pt2", policy="bf16", example_inputs=IMAGES)
    assert made.max_difference == 0
    assert {made.layers[name] for name in layers} == {"bf16"}
    for layer in layers.values():
        assert type(layer.weight) is torch.Tensor
        assert (layer.weight == 0).float().mean() > 0.8
        prune.remove(layer, "weight")  # it is pruned as before
    made = export(module, tmp_path / "model.pt", policy="bf16", example_inputs=IMAGES, format="weights")
    state = torch.load(made.path, weights_only=True)
    assert all((state[f"{name}.weight"] == 0).float().mean() > 0.8 for name in layers)


def test_the_student_of_the_examples(tmp_path, examples):
    from distillation import Distillation

    torch.manual_seed(0)
    module = Distillation(10, True)
    policy = {"default": "bf16", "teacher": "fp32"}
    made = export(module, tmp_path / "model.pt2", policy=policy, example_inputs=IMAGES)
    assert made.max_difference == 0
    assert {name.partition(".")[0] for name in made.layers} == {"model"}


@pytest.mark.slow
def test_chosen_layers_in_int8_by_torchao(tmp_path):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 8)
    made = export(model, tmp_path / "model.pt2", policy={"default": "bf16", "2": "fp32"}, example_inputs=x)
    program = torch.export.load(made.path).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = get_default_x86_inductor_quantization_config()
        watched = prepare_pt2e(program, X86InductorQuantizer().set_module_name_qconfig("module.2", config))
        watched(x)
        quantized = convert_pt2e(watched)
    assert any("quantize_per_channel" in str(node.target) for node in quantized.graph.nodes)
    dtypes = [node.kwargs.get("dtype") for node in quantized.graph.nodes if "_to_copy" in str(node.target)]
    assert torch.bfloat16 in dtypes
    exact = program(x)
    assert 0 < (quantized(x) - exact).abs().max() < 0.05 * exact.abs().max()
