"""Attach, change and detach."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_mixprec.engine.apply import attach
from lightning_mixprec.engine.borders import border_of
from lightning_mixprec.errors import MixPrecError, PolicyError
from lightning_mixprec.policy.policy import as_policy


def net():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3),
        nn.BatchNorm1d(4),
        nn.ModuleDict({"unused": nn.Linear(1, 1)})["unused"],
        nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 1),
        nn.MultiheadAttention(4, 2),
        nn.LSTM(4, 4),
    )


def borders(model):
    return {name for name, module in model.named_modules() if border_of(module) is not None}


POLICIES = [
    "fp32",
    "bf16",
    "fp16",
    {"default": "bf16", "1": "c=fp32,o=input", "5": "fp32"},
    {"default": "fp32", "3": "bf16", "4": "fp16", "5": "fp64"},
    {"default": "fp32", "**": "p=fp64"},
    {"default": "fp64", "1": "p=fp64,c=fp64,o=bf16", "**": "p=fp64,c=fp32"},
]


@pytest.mark.parametrize("policy", POLICIES)
def test_detach_leaves_the_model_as_it_was(policy, snapshot):
    model = net()
    before, keys = snapshot(model), list(model.state_dict())
    attachment = attach(model, as_policy(policy).resolve(model), "cpu")
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == [n for n in keys if "running" not in n and "num" not in n]
    attachment.detach()
    assert snapshot(model).differences(before) == []
    attachment.detach()
    assert snapshot(model).differences(before) == []


@pytest.mark.parametrize("storage", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES[:5])
def test_detach_leaves_models_of_other_storage_as_they_were(policy, storage, snapshot):
    model = net().to(storage)
    before = snapshot(model)
    attach(model, as_policy(policy).resolve(model), "cpu").detach()
    assert snapshot(model).differences(before) == []


def test_only_borders_of_regions_are_instrumented(attached):
    model = nn.Sequential(
        nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1), nn.ReLU())),
        nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)),
    )
    with attached(model, "bf16"):
        assert borders(model) == set()
    with attached(model, {"default": "bf16", "0": "fp32"}):
        assert borders(model) == {"0"}
    with attached(model, {"default": "bf16", "0": "fp32", "0.1": "bf16"}):
        assert borders(model) == {"0", "0.1"}
    with attached(model, {"default": "fp32", "rules": [{"layers": "", "compute": "bf16", "recurse": False}]}):
        assert borders(model) == {"0", "1"}
    with attached(model, {"default": "bf16", "rules": [{"layers": "0.1", "compute": "fp32", "recurse": False}]}):
        assert borders(model) == {"0.1", "0.1.0", "0.1.1"}


def test_borders_count_every_parent_of_a_shared_module(attached):
    shared = nn.Linear(1, 1)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    with attached(model, {"default": "bf16", "b": "fp32", "a.0": "bf16", "b.0": "bf16"}):
        assert borders(model) == {"b", "a.0"}
        x = torch.randn(2, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model["a"](x).dtype == torch.bfloat16
            assert model["b"](x).dtype == torch.float32
        assert torch.equal(model["b"](x), torch.autocast("cpu", torch.bfloat16)(shared)(x).float())


def test_attention_is_one_unit(attached):
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    with attached(model, {"default": "bf16", "0": "fp32"}):
        assert borders(model) == {"0"}
    with attached(model, {"default": "fp32", "0": "p=fp64"}):
        assert borders(model) == {"0"}
        assert model[0].out_proj.weight.dtype == torch.float64
        x = torch.randn(3, 1, 4)
        model[0](x, x, x)[0].sum().backward()
        assert model[0].out_proj.weight.grad.dtype == torch.float64


def test_change_equals_attaching_afresh(attached):
    policies = [{"default": "bf16", "1": "fp32"}, "fp32", {"default": "fp32", "0": "bf16", "2": "o=bf16"}, "bf16"]
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    oracle = copy.deepcopy(model)
    x = torch.randn(5, 3)
    with attached(model, policies[-1]) as attachment:
        for policy in policies * 2:
            attachment.change(as_policy(policy).resolve(model))
            with attachment.context():
                mine = model(x)
            with attached(oracle, policy) as fresh, fresh.context():
                theirs = oracle(x)
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
            assert borders(model) == borders(copy.deepcopy(model)) != {""}


def test_buffers_that_follow_their_layer_leave_no_border_behind(attached):
    model = nn.Sequential(nn.BatchNorm1d(2, affine=False))
    for before, after in (("fp64", "bf16"), ("bf16", "fp64")):
        with attached(model, before) as attachment:
            assert borders(model) == set()
            attachment.change(as_policy(after).resolve(model))
            assert borders(model) == set()


def test_changing_back_brings_the_same_wrappers_back(attached):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    mixed, uniform = ({"default": "bf16", "1": "fp32"}, "bf16")
    with attached(model, mixed) as attachment:
        border = model[1].forward
        attachment.change(as_policy(uniform).resolve(model))
        assert borders(model) == set()
        attachment.change(as_policy(mixed).resolve(model))
        assert model[1].forward is border


def test_a_refused_change_leaves_the_old_formats_in_force(attached):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with attached(model, {"default": "bf16", "1": "fp32"}) as attachment:
        bad = {
            n: SimpleNamespace(param="fp32", compute="e4m3" if n == "1" else "fp32", output=None)
            for n in ("", "0", "1")
        }
        with pytest.raises(
            PolicyError, match="'1' is to compute in 'e4m3', and layers compute in fp64, fp32, bf16, fp16, fp8, int8"
        ):
            attachment.change(bad)
        assert borders(model) == {"1"}
        with attachment.context():
            assert model(torch.ones(1, 1)).dtype == torch.float32


def test_a_refused_attach_leaves_no_trace(snapshot):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    before = snapshot(model)
    bad = {name: SimpleNamespace(param="fp64", compute="e4m3", output=None) for name in ("", "0", "1")}
    with pytest.raises(MixPrecError, match="choose one of these"):
        attach(model, bad, "cpu")
    assert snapshot(model).differences(before) == []
    attach(model, as_policy("bf16").resolve(model), "cpu").detach()


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_a_scripted_layer_is_refused_in_one_line():
    model = nn.Sequential(nn.Linear(1, 1))
    model.append(torch.jit.script(nn.Linear(1, 1)))
    plain = SimpleNamespace(param="fp32", compute="fp32", output=None)
    low = SimpleNamespace(param="fp32", compute="bf16", output=None)
    with pytest.raises(PolicyError, match="'1' is a TorchScript module"):
        attach(model, {"": plain, "0": plain, "1": low}, "cpu")
    attach(model, {"": plain, "0": low, "1": plain}, "cpu").detach()


def test_changing_what_is_detached_is_an_error(attached):
    model = nn.Sequential(nn.Linear(1, 1))
    with attached(model, "bf16") as attachment:
        pass
    with pytest.raises(PolicyError, match="after they were detached"):
        attachment.change(as_policy("fp32").resolve(model))


@pytest.mark.parametrize("root", ["fp64", "fp32", "bf16", "fp16"])
def test_the_context_is_the_roots_own_format_whatever_is_around_it(root, attached):
    model = nn.Sequential(nn.Linear(1, 1))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(root)
    with attached(model, root) as attachment:
        for outer in (None, torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=outer or torch.bfloat16, enabled=outer is not None):
                with attachment.context(), attachment.context():
                    assert torch.is_autocast_enabled("cpu") == (dtype is not None)
                    assert dtype is None or torch.get_autocast_dtype("cpu") == dtype
                    assert dtype is None or not torch.is_autocast_cache_enabled()
                assert torch.is_autocast_enabled("cpu") == (outer is not None)


def test_a_detached_model_can_be_forgotten(attached):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with attached(model, {"default": "bf16", "1": "fp32"}) as attachment:
        pass
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None and attachment is not None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at what the layer before hands on
def test_wrappers_around_and_inside_are_looked_through(attached):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2), backend="eager"))
    with attached(model, {"default": "bf16", "0": "fp32", "1": "fp32"}) as attachment:
        assert border_of(model[0]._checkpoint_wrapped_module) is not None
        assert border_of(model[1]._orig_mod) is not None
        with attachment.context():
            y = model(torch.ones(1, 2, requires_grad=True))
        assert y.dtype == torch.float32
        y.sum().backward()


def test_a_big_model_is_changed_quickly(attached):
    import time

    block = lambda: nn.Sequential(nn.Linear(1, 1), nn.LayerNorm(1), nn.Sequential(nn.ReLU(), nn.Linear(1, 1)))  # noqa: E731
    model = nn.Sequential(*(block() for _ in range(1000)))
    low, high = (as_policy({"default": "bf16", "*.1": f}).resolve(model) for f in ("fp32", "fp16"))
    with attached(model, "bf16") as attachment:
        began = time.process_time()
        attachment.change(low)
        attachment.change(high)
        assert time.process_time() - began < 5
        assert len(borders(model)) == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"assignment": "bf16"}, "attach was given a Sequential and a str; give a module and its assignment"),
        ({"model": None}, "attach was given a NoneType and a Assignment; give a module and its assignment"),
        ({"model": nn.Sequential(nn.Linear(1, 1))}, "the assignment is not of this Sequential: '1' is in one of them"),
        ({"model": nn.Sequential(*[nn.ReLU()] * 3)}, "the assignment is not of this Sequential: '2' is in one of them"),
        ({"device_type": "cuda:0"}, "device_type is 'cuda:0'; it must be 'cpu' or 'cuda'"),
        ({"device_type": ["cpu"]}, r"device_type is \['cpu'\]; it must be"),
        ({"emulate": 1.0}, "emulate is 1.0; allowed are 'auto', True, False"),
    ],
)
def test_what_is_no_model_assignment_or_device_is_one_line(arguments, message):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    good = {"model": model, "assignment": as_policy("bf16").resolve(model), "device_type": "cpu"}
    with pytest.raises(MixPrecError, match=f"^{message}"):
        attach(**{**good, **arguments})
    attach(**good).detach()
