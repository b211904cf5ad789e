"""The engine under CUDA's own operation lists, on fake tensors: which dtype each layer computes and hands on in."""

import contextlib
import importlib
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from fake_cuda import DTYPES, Recorder, autocast, caller_of, cast_by_hand, needs_fake_cuda, on_fake_cuda, recorded
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from module_trees import assigned, first_names, has_two_wide_callers, interpret, stored, trees
from selection import slow_but_for
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.evidence.instruments.flops import FlopCount
from lightning_mixprec.evidence.instruments.own_dtypes import DtypeRecorder, OwnDtypes
from lightning_mixprec.policy.assignment import LayerPrecision
from lightning_mixprec.policy.policy import as_policy

ROOT = Path(__file__).parent.parent.parent
pytestmark = needs_fake_cuda

CASTS = {"_to_copy", "copy_"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}
"""What CUDA's autocast computes in 16 bits, as it is called below autocast."""
WIDE = {"native_layer_norm", "native_group_norm", "_softmax", "exp", "sum", "nll_loss_forward", "upsample_nearest2d"}
"""What CUDA's autocast computes in fp32."""
FUSED = {"scaled_dot_product_attention", "multi_head_attention_forward", "cross_entropy"}
"""Functions that decide for themselves what they compute inside."""
ALWAYS_LOW = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.MultiheadAttention)
ALWAYS_WIDE = (nn.LayerNorm, nn.GroupNorm, nn.Bilinear)
FORMATS = ["fp32", "bf16", "fp16"]
OUTPUTS = [None, None, None, "input", "bf16", "fp32"]


class Loss(nn.Module):
    """Parts that are called one after another, named as in a LightningModule, and its loss."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, y):
        for part in self.children():
            y = part(y)
        return F.cross_entropy(y.flatten(0, -2), torch.zeros(y.shape[:-1], dtype=torch.long).flatten())


class Inside(nn.Module):
    """A model in a LightningModule that does nothing else."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


class Kinds(nn.Module):
    """Each kind of layer that computes in a way of its own, one after another."""

    def __init__(self):
        super().__init__()
        self.conv, self.group = nn.Conv1d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.batch, self.instance = nn.BatchNorm1d(8), nn.InstanceNorm1d(8)
        self.up, self.prelu = nn.ConvTranspose1d(8, 8, 1), nn.PReLU()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.bilinear, self.rms = nn.Bilinear(8, 8, 8), nn.RMSNorm(8)
        self.weighted = parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.listed = nn.ModuleList([nn.Linear(8, 8), nn.ModuleDict({"a": nn.Linear(8, 8)})])

    def forward(self, x):
        h = self.prelu(self.up(self.instance(self.batch(self.group(self.conv(x)))))).transpose(1, 2)
        h = self.block(self.attention(h, h, h)[0])
        h = self.spectral(self.weighted(self.rms(self.bilinear(h, h))))
        h = self.listed[1]["a"](self.listed[0](h)) * torch.sigmoid(h)
        return h.softmax(-1) @ h.transpose(1, 2) + h.exp().sum()


def of_fixed_shapes(model):
    """A Mask R-CNN of those parts alone whose shapes do not depend on numbers, under the names they have in it."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.roi_heads import RoIHeads
    from torchvision.models.detection.rpn import RegionProposalNetwork
    from torchvision.ops import roi_align

    class Whole(MaskRCNN):
        def forward(self, images):
            features = list(self.backbone(images).values())
            return self.rpn(features), self.roi_heads(features[0])

    class Proposals(RegionProposalNetwork):
        def forward(self, features):
            return self.head(features)

    class Heads(RoIHeads):
        def forward(self, features):
            boxes = [torch.tensor([[0.0, 0.0, 8.0, 8.0], [4.0, 4.0, 20.0, 30.0]], dtype=features.dtype)]
            small, large = (roi_align(features, boxes, size) for size in (7, 14))
            return self.box_predictor(self.box_head(small)), self.mask_predictor(self.mask_head(large))

    model.__class__, model.rpn.__class__, model.roi_heads.__class__ = Whole, Proposals, Heads
    return model


def resnet18():
    model = pytest.importorskip("torchvision").models.resnet18(num_classes=16)
    return Loss(model=model), [torch.randn(2, 3, 64, 64)]


def gpt():
    decoder = examples("gpt").Decoder(width=16, depth=2, heads=2, is_tied=True)
    return Loss(model=decoder), [torch.zeros(2, 6, dtype=torch.long)]


def bert():
    encoder = examples("bert").Encoder(width=16, depth=2, heads=2)
    return Loss(encoder=encoder, head=nn.Linear(16, 8)), [torch.zeros(2, 6, dtype=torch.long)]


def mask_rcnn():
    model = examples("mask_rcnn").small_mask_rcnn(num_classes=3, size=64, channels=16)
    return Inside(of_fixed_shapes(model)), [torch.randn(1, 3, 64, 64)]


def kinds():
    return Kinds(), [torch.randn(2, 4, 6)]


MODELS = {each.__name__: each for each in (resnet18, gpt, bert, mask_rcnn, kinds)}


def examples(name):
    for package in ("torchvision", "jsonargparse"):
        pytest.importorskip(package)
    return importlib.import_module(name)


def of_config(name):
    """The policy that an example's configuration gives."""
    config = yaml.safe_load((ROOT / "examples" / "configs" / f"{name}.yaml").read_text())
    return config["trainer"]["plugins"]["init_args"]["policy"]


NORMS_APART = {"default": "bf16", "rules": [{"types": "*Norm*", "compute": "fp32", "output": "input"}]}
OWN_POLICIES = {
    "resnet18": [of_config("image_classification"), of_config("image_classification_fp16")],
    "gpt": [of_config("gpt")],
    "bert": [of_config("bert")],
    "mask_rcnn": [of_config("mask_rcnn")],
    "kinds": [
        NORMS_APART,
        {"default": "fp32", "attention": "bf16", "block.**": "fp16", "bilinear": "bf16", "listed": "bf16"},
        {
            "default": "fp16",
            "conv": "bf16",
            "attention": "fp32",
            "block": "c=bf16,o=fp32",
            "listed.1.a": "c=fp16,o=fp64",
        },
    ],
}
CASES = [
    pytest.param(name, policy, id=f"{name}-{number}")
    for name, policies in OWN_POLICIES.items()
    for number, policy in enumerate(policies)
]


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    with on_fake_cuda():
        yield


def attached(model, inputs, policy):
    """What a model does under a policy, and the assignment."""
    assignment = as_policy(policy).resolve(model)
    attachment = attach(model, assignment, "cuda")
    recorder = recorded(model, inputs, attachment.context())
    attachment.detach()
    return recorder, assignment


@pytest.mark.parametrize("format", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_a_uniform_policy_casts_as_plain_autocast(name, format):
    model, inputs = MODELS[name]()
    plain = recorded(model, inputs, autocast(format))
    assert attached(model, inputs, format)[0].seen == plain.seen
    casts = [call for call in plain.calls if call.op == "_to_copy" and call.outputs != call.inputs]
    assert bool(casts) == (format != "fp32")


@pytest.mark.parametrize("name, policy", CASES)
def test_a_mixed_policy_casts_as_the_contract_says_by_hand(name, policy):
    model, inputs = MODELS[name]()
    recorder, assignment = attached(model, inputs, policy)
    layers = {name: replace(layer, output=assignment.hands_on(name)) for name, layer in assignment.items()}
    with cast_by_hand(model, layers):
        expected = recorded(model, inputs, contextlib.nullcontext())
    for mine, theirs in zip(recorder.seen, expected.seen, strict=True):
        assert mine == theirs


@pytest.mark.parametrize("name, policy", CASES)
def test_each_layer_computes_in_its_format_by_cudas_lists(name, policy):
    """Whoever casts: in a 16-bit layer products are computed in its format and what CUDA's list names in fp32."""
    model, inputs = MODELS[name]()
    recorder, assignment = attached(model, inputs, policy)
    computed = set()
    for call in recorder.calls:
        own = DTYPES[assignment[call.layer].compute]
        dtypes = {*call.inputs, *call.outputs}
        if call.op in CASTS or call.function in FUSED:
            continue
        if own.itemsize > 2:
            assert dtypes <= {own}, call
        elif call.op in PRODUCTS:
            assert dtypes == {own}, call
        elif call.op in WIDE:
            assert dtypes == {torch.float32}, call
        else:
            assert dtypes <= {own, torch.float32}, call
        computed.add((call.layer, own))
    layers = {name for name, module in model.named_modules() if not list(module.children())}
    assert len(computed) >= len(layers) * 0.8


@pytest.mark.parametrize("name, policy", CASES)
def test_each_layer_hands_on_in_the_format_that_follows(name, policy):
    model, inputs = MODELS[name]()
    recorder, assignment = attached(model, inputs, policy)
    for handed in recorder.handed_on:
        layer, output = assignment[handed.layer], assignment.hands_on(handed.layer)
        module, own = model.get_submodule(handed.layer), DTYPES[layer.compute]
        around = DTYPES[assignment[caller_of(handed.layer, model)].compute if handed.layer else layer.compute]
        first, *others = handed.outputs
        if around.itemsize > 2:
            assert {first, *others} == {around}, handed
        elif output == "input":
            assert first == handed.inputs[0], handed
        elif output is not None:
            assert first == (torch.float32 if output == "fp64" else DTYPES[output]), handed
        elif isinstance(module, ALWAYS_LOW) and own.itemsize == 2:
            assert first == around, handed
        elif isinstance(module, ALWAYS_WIDE):
            assert first == torch.float32, handed
        else:
            assert {first, *others} <= {around, torch.float32}, handed


EIGHT_BITS = {
    "fp8": ({"compute": "fp8"}, "_scaled_mm", [torch.float8_e4m3fn] * 2),
    "fp8 by row": ({"compute": "fp8", "scaling": "row"}, "_scaled_mm", [torch.float8_e4m3fn] * 2),
    "int8": ({"compute": "int8"}, "_int_mm", []),
}


@pytest.mark.parametrize(("said", "product", "operands"), EIGHT_BITS.values(), ids=EIGHT_BITS)
def test_linear_layers_in_8_bits_have_one_product_and_it_is_the_devices_own(said, product, operands):
    """Below it all is bf16 and scales: a device that is not there is taken to have the format, and nothing emulates."""
    model, inputs = gpt()
    blocks = model.get_submodule("model.transformer.blocks")
    rule = {"layers": "model.transformer.blocks", **said}
    recorder, assignment = attached(model, inputs, {"default": "bf16", "rules": [rule]})
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks" in name}
    assert len(linears) == 4 * len(blocks)
    for name in linears:
        calls = [call for call in recorder.calls if call.layer == name]
        (found,) = [call for call in calls if call.op.startswith(product)]
        assert [*found.inputs[: len(operands)]] == operands
        assert not [call for call in calls if call.op in PRODUCTS]
        assert [handed.outputs for handed in recorder.handed_on if handed.layer == name] == [(torch.bfloat16,)]
    others = {call.layer for call in recorder.calls if call.op.startswith(product)} - linears
    assert not others and assignment["model.head"].compute == "bf16"


@pytest.mark.parametrize("seed", slow_but_for([0, 1], range(8)))
@pytest.mark.parametrize("name", MODELS)
def test_any_assignment_casts_as_the_contract_says_by_hand(name, seed):
    model, inputs = MODELS[name]()
    draw = random.Random(seed).choice
    layers = {each: LayerPrecision("fp32", draw(FORMATS), draw(OUTPUTS)) for each, _ in model.named_modules()}
    for each in layers:
        if each.endswith("extra_blocks"):  # writes into lists that it is lent: tests/engine/test_loans.py
            layers[each] = replace(layers[each.rpartition(".")[0]], output=None)
    attachment = attach(model, layers, "cuda")
    recorder = recorded(model, inputs, attachment.context())
    attachment.detach()
    with cast_by_hand(model, layers):
        expected = recorded(model, inputs, contextlib.nullcontext())
    for mine, theirs in zip(recorder.seen, expected.seen, strict=True):
        assert mine == theirs


@given(data=st.data())
@settings(max_examples=12, phases=[Phase.generate])  # a failure is not made smaller: that would take minutes
def test_random_trees_compute_in_the_dtypes_that_the_contract_says(data):
    """As in test_random_trees.py: shared modules, containers, and fp64 among the formats."""
    with on_fake_cuda():
        model = data.draw(trees())
        assignment = assigned(data.draw, model)
        if has_two_wide_callers(model, assignment):
            return
        root = DTYPES[assignment[""].compute]
        x = torch.randn(2, 3, dtype=root if root.itemsize > 2 else torch.float32)
        model.weight.data = model.weight.data.to(x.dtype)
        assignment[""].param = stored(model)
        attachment = attach(model, assignment, "cuda")
        mine = recorded(model, [x], attachment.context())
        attachment.detach()
        with Recorder(model) as theirs:
            interpret(model, first_names(model), assignment, x, autocast)

    def computed(recorder):
        return [call[2:] for call in recorder.calls if call.op in ("mm", "tanh", "mul", "add")]

    assert computed(mine) == computed(theirs) != []


def test_the_context_is_that_of_a_device_that_is_not_there():
    model = nn.Linear(2, 2)
    attachment = attach(model, {"": LayerPrecision("fp32", "fp16")}, "cuda")
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_autocast_cache_enabled()
    with attachment.context():
        assert torch.is_autocast_enabled("cuda") and not torch.is_autocast_cache_enabled()
        with attachment.context():
            assert model(torch.ones(1, 2)).dtype == torch.float16
        assert torch.is_autocast_enabled("cuda")
    assert (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")) == before[:2]
    assert torch.is_autocast_cache_enabled() == before[2]
    attachment.detach()


def test_arithmetic_and_dtypes_of_layers_are_found_as_on_cuda():
    """What evidence says of a layer: FLOPs in its products, and the narrowest dtype that its numbers have."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Softmax(-1), nn.ReLU())
    layers = dict(model.named_modules())
    attachment = attach(model, as_policy("bf16").resolve(model), "cuda")
    own = OwnDtypes()
    with attachment.context(), FlopCount(layers) as count, DtypeRecorder(layers, own):
        model(torch.ones(3, 4, requires_grad=True))
    attachment.detach()
    assert count.flops == {"": 0, "0": 2 * 3 * 4 * 8, "1": 0, "2": 0, "3": 0}
    assert [own.of_output(name) for name in "0123"] == [torch.bfloat16, *3 * [torch.float32]]
    assert own.weights["0"] == torch.bfloat16 and own.weights["1"] == torch.float32
