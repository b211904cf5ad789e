"""Attention in eval mode, where torch has fused paths that take no notice of a layer's format."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

LAYER, ATTENTION = "_transformer_encoder_layer_fwd", "_native_multi_head_attention"
FP32, FP64 = torch.float32, torch.float64

# What may still be fused: encoder layers that are fp32 throughout, and attention that is fp32 or fp64.
POLICIES = [
    ({"default": "bf16", "0.layers.0.norm1": "fp32"}, []),
    ({"default": "bf16", "0.layers.1.self_attn": "fp32"}, [(ATTENTION, FP32)]),
    ({"default": "bf16", "**.linear1": "fp32", "1": "fp32"}, []),
    ({"default": "bf16", "0": "fp32", "**.self_attn": "bf16"}, []),
    ({"default": "fp32", "0.layers.1": "bf16"}, [(LAYER, FP32)]),
    ({"default": "fp32", "0": "bf16"}, []),
    ({"default": "fp32", "**.linear2": "fp64"}, [(ATTENTION, FP32), (ATTENTION, FP32)]),
    ({"default": "fp32", "0.layers.0": "fp64"}, [(ATTENTION, FP64), (LAYER, FP32)]),
    ({"default": "fp32", "0.layers.0.norm2": "o=bf16"}, [(ATTENTION, FP32), (LAYER, FP32)]),
]


class Fused(TorchDispatchMode):
    """Records the fused operations that run, and in which dtype."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) in (LAYER, ATTENTION):
            self.ran.append((name, args[0].dtype))
        return func(*args, **kwargs or {})


def encoder(masked_path):
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=masked_path), nn.Linear(8, 3))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("policy, fused", POLICIES)
@pytest.mark.parametrize("padded", [None, "right", "middle"])
def test_eval_computes_what_training_computes(policy, fused, padded, attached):
    """The oracle is the slow path, which torch takes where a gradient is wanted."""
    model = encoder(masked_path=True)
    x = torch.randn(2, 4, 8)
    padding = None
    if padded:
        padding = torch.zeros(2, 4, dtype=torch.bool)
        padding[1, 2 if padded == "right" else 1] = True
        padding[1, 3] = padded == "right"
    with attached(model, policy) as attachment, attachment.context():
        expected = model[0](x, src_key_padding_mask=padding)
        with torch.no_grad(), Fused() as seen:
            fast = model[0](x, src_key_padding_mask=padding)
        with torch.inference_mode():
            faster = model[0](x, src_key_padding_mask=padding)
    # The encoder turns a padding mask into numbers, which fused attention does not take.
    fused = [(name, dtype) for name, dtype in fused if name == LAYER or not padded]
    assert seen.ran == fused
    assert expected.requires_grad and expected.dtype == fast.dtype
    # Fused fp32 operations round otherwise, and 16-bit layers behind them make a unit in the last place of it.
    assert torch.allclose(expected, fast, atol=3e-2 if fused else 0, rtol=0) and torch.equal(fast, faster)


@pytest.mark.parametrize("policy", [{"default": "fp32", "attn": "bf16"}, {"default": "bf16", "other": "fp32"}])
@pytest.mark.parametrize("by_name", [True, False])
def test_attention_by_itself(policy, by_name, attached):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True), "other": nn.Linear(1, 1)}).eval()
    x = torch.randn(2, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, weights = model["attn"](x, x, x)
    if policy["default"] == "fp32":
        expected, weights = expected.float(), weights.float()
    call = (lambda: model["attn"](query=x, key=x, value=x)) if by_name else (lambda: model["attn"](x, x, x))
    with attached(model, policy) as attachment, attachment.context(), torch.no_grad():
        y, w = call()
    assert y.dtype == expected.dtype and torch.equal(y, expected) and torch.equal(w, weights)


def test_nothing_is_added_where_formats_do_not_meet(attached, snapshot):
    model = encoder(masked_path=True)
    before = snapshot(model)
    for policy in ("fp32", "bf16", "fp16"):
        with attached(model, policy):
            assert snapshot(model).differences(before) == []


def test_what_is_all_fp32_keeps_its_fast_path(attached):
    model = encoder(masked_path=True)
    with attached(model, {"default": "fp32", "1": "bf16"}):
        assert model[0].use_nested_tensor
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_detach_and_change_let_the_fast_path_on_again(attached, snapshot):
    from lightning_mixprec.policy.policy import as_policy

    model = encoder(masked_path=True)
    before = snapshot(model)
    with attached(model, POLICIES[0][0]) as attachment:
        assert not model[0].use_nested_tensor and model[0].layers[0]._forward_hooks
        attachment.change(as_policy("bf16").resolve(model))
        assert snapshot(model).differences(before) == []
        attachment.change(as_policy(POLICIES[0][0]).resolve(model))
        assert copy.deepcopy(model)[0].layers[0].self_attn._forward_pre_hooks
    assert snapshot(model).differences(before) == []
