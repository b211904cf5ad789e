"""What the plugin accepts and refuses, and what it chooses when it may."""

import re
import types

import pytest
import torch
from lightning.fabric import Fabric
from lightnings import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    LightningEnvironment,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from plugin_models import Call, Task, fit, mlp, one_line, probes, snapshot, trainer
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

from lightning_mixprec import LossScaling, MixPrecError, PerLayerPrecision, PrecisionPolicy
from lightning_mixprec.numerics.devices import Support, native_support

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


# Arguments

BAD_ARGUMENTS = {
    "format": ({"policy": "bf61"}, "bf16"),
    "lightning's name": ({"policy": "16-mixed"}, "fp16"),
    "format not computed in": ({"policy": "fp8"}, "fp8"),
    "no such file": ({"policy": "policy.yaml"}, "policy.yaml does not exist"),
    "no default": ({"policy": {"model.head": "fp32"}}, "default"),
    "a rule's format": ({"policy": {"default": "bf16", "head": "fp23"}}, "fp32"),
    "unknown key": ({"policy": {"default": "bf16", "ruels": []}}, "rules"),
    "number as policy": ({"policy": 16}, "16"),
    "None as policy": ({"policy": None}, "None"),
    "bool as policy": ({"policy": True}, "True"),
    "list as policy": ({"policy": ["bf16"]}, "format name"),
    "eval format": ({"eval_policy": "bf61"}, "bf16"),
    "scaling True": ({"loss_scaling": True}, "'auto'"),
    "scaling word": ({"loss_scaling": "on"}, "'auto'"),
    "scaling zero": ({"loss_scaling": 0}, "positive"),
    "scaling negative": ({"loss_scaling": -2.0}, "positive"),
    "scaling nan": ({"loss_scaling": float("nan")}, "positive"),
    "scaling infinite": ({"loss_scaling": float("inf")}, "positive"),
    "scaling option": ({"loss_scaling": {"init_scael": 2.0}}, "init_scale"),
    "scaling bounds": ({"loss_scaling": {"init_scale": 2.0, "min_scale": 4.0}}, "min_scale"),
    "scaling None": ({"loss_scaling": None}, "False"),
    "guard": ({"skip_nonfinite": "yes"}, "True, False"),
    "resume": ({"on_policy_change": "rise"}, "'raise', 'accept', 'checkpoint'"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_bad_argument_is_one_line(arguments, says):
    with pytest.raises(MixPrecError) as caught:
        PerLayerPrecision(**arguments)
    assert says in one_line(caught)


@pytest.mark.parametrize("key", ["skip_nonfinite", "on_policy_change"])
@pytest.mark.parametrize("value", [[], {}, None, 2, "1"])
def test_a_choice_takes_no_look_alike(key, value):
    with pytest.raises(MixPrecError) as caught:
        PerLayerPrecision(**{key: value})
    one_line(caught)


def test_a_bad_file_is_named_with_its_line(tmp_path):
    (tmp_path / "policy.yaml").write_text("default: bf16\nmodel.head: fp23\n")
    with pytest.raises(MixPrecError) as caught:
        PerLayerPrecision("policy.yaml")
    assert "policy.yaml:2" in one_line(caught)


def test_a_rule_that_matches_nothing_names_the_file_the_line_and_near_misses(tmp_path):
    (tmp_path / "policy.yaml").write_text("default: bf16\nnet.00: fp32\n")
    with pytest.raises(MixPrecError) as caught:
        fit(Task(mlp()), PerLayerPrecision("policy.yaml"))
    message = one_line(caught)
    assert "policy.yaml:2" in message
    assert "net.0" in message.replace("net.00", "")


# policy="auto"


def pretend(monkeypatch, **reasons):
    """Has a device compute none of the formats that are named, for the reasons given, and all others natively."""
    from lightning_mixprec.engine import backends
    from lightning_mixprec.engine.backends import autocast, emulated
    from lightning_mixprec.plugin import arguments

    def native_support(name, device):
        return Support(name not in reasons, reasons.get(name, f"it has {name}"))

    for module in (arguments, autocast, emulated, backends):
        monkeypatch.setattr(module, "native_support", native_support)


NO_BF16 = {"bf16": "its compute capability is 7.5, bf16 needs 8.0"}
NO_HALVES = {"bf16": "it has no AVX512-BF16", "fp16": "it has no AVX512-FP16"}


def printed(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_auto_is_what_this_cpu_computes_natively(capsys):
    plugin = PerLayerPrecision()
    fit(Task(mlp()), plugin)
    [native, *_] = [name for name in ("bf16", "fp16", "fp32") if native_support(name, "cpu").native]
    assert plugin.policy == PrecisionPolicy(native)
    assert f"auto': {native}" in printed(capsys)


def test_auto_is_bf16_where_it_is_native_and_says_why(monkeypatch, capsys):
    pretend(monkeypatch)
    plugin = PerLayerPrecision()
    assert plugin.policy is None
    model = Task(probes())
    fit(model, plugin)
    out = printed(capsys)
    assert "auto" in out
    assert "bf16, which the CPU computes natively (it has bf16)" in out
    assert plugin.policy == PrecisionPolicy("bf16")
    assert plugin.scaler.get_scale() == 1
    assert all(probe.computed == {BF16} for probe in model.net)


def test_auto_is_fp16_with_loss_scaling_where_only_that_is_native(monkeypatch, capsys):
    pretend(monkeypatch, **NO_BF16)
    plugin = PerLayerPrecision("auto")
    model = Task(probes())
    fit(model, plugin)
    out = printed(capsys)
    assert "fp16 with loss scaling" in out
    assert "compute capability is 7.5" in out
    assert plugin.policy == PrecisionPolicy("fp16")
    assert plugin.scaler.get_scale() > 1
    assert all(probe.computed == {FP16} for probe in model.net)


def test_auto_is_fp32_where_neither_is_native(monkeypatch, capsys):
    pretend(monkeypatch, **NO_HALVES)
    plugin = PerLayerPrecision("auto")
    model = Task(probes())
    fit(model, plugin)
    assert (
        "fp32, because the CPU computes neither bf16 (it has no AVX512-BF16) nor fp16 (it has no AVX512-FP16) natively"
        in printed(capsys)
    )
    assert plugin.policy == PrecisionPolicy("fp32")
    assert plugin.scaler.get_scale() == 1
    assert all(probe.computed == {FP32} for probe in model.net)


@pytest.mark.parametrize(("missing", "instead"), [(NO_BF16, "fp16"), (NO_HALVES, "fp32")])
def test_a_format_that_is_not_native_is_not_slow_silently(monkeypatch, missing, instead):
    pretend(monkeypatch, **missing)
    with pytest.warns(UserWarning, match=f"bf16.*does not compute natively.*emulates.*Use {instead}") as caught:
        fit(Task(mlp()), PerLayerPrecision({"default": instead, "net.0": "bf16"}, emulate=False))
    assert len([warning for warning in caught if "emulates" in str(warning.message)]) == 1


def test_a_format_that_is_not_native_is_not_emulated_silently(monkeypatch, caplog):
    pretend(monkeypatch, **NO_BF16)
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(Task(mlp()), PerLayerPrecision({"default": "fp32", "net.0": "bf16"}, eval_policy="bf16"))
    told = [record.getMessage() for record in caplog.records if "emulated" in record.getMessage()]
    assert len(told) == 1
    assert re.search(r"^bf16 is emulated \(the CPU has .*compute capability.* takes \d+\.\d times as long", told[0])


@pytest.mark.gpu
def test_auto_on_cuda(capsys):
    plugin = PerLayerPrecision()
    fit(Task(mlp()), plugin, accelerator="cuda")
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert plugin.policy.default == ("bf16" if native else "fp16")
    assert plugin.policy.default in capsys.readouterr().out


# Loss scaling


@pytest.mark.parametrize(
    ("policy", "loss_scaling", "scale"),
    [
        ("bf16", "auto", 1),
        ("fp32", "auto", 1),
        ({"default": "bf16", "net.4": "fp16"}, "auto", 65536),
        ({"default": "fp16", "rules": [{"types": "*", "compute": "fp32"}]}, "auto", 1),
        ("fp16", False, 1),
        ("fp16", 1024, 1024),
        ("fp16", 512.0, 512),
        ("bf16", 1024, 1024),
        ("fp16", {"init_scale": 256.0}, 256),
        ("fp16", LossScaling(init_scale=128), 128),
    ],
    ids=str,
)
def test_loss_scaling_as_configured(policy, loss_scaling, scale):
    plugin = PerLayerPrecision(policy, loss_scaling=loss_scaling)
    model = Task(mlp())
    scaled = []

    def loss_grad(trainer, model):
        bias = model.net[6].bias
        scaled.append((bias.grad.clone(), trainer.scaler.get_scale()))

    fit(model, plugin, callbacks=[Call("on_after_backward", loss_grad)])
    assert plugin.scaler.get_scale() == scale
    assert [at for _, at in scaled] == [scale] * 4


def test_the_first_scale_is_that_of_grad_scaler():
    plugin = PerLayerPrecision("fp16")
    scales = Call("on_train_start", lambda run, model: run.scaler.get_scale())
    fit(Task(mlp()), plugin, callbacks=[scales])
    assert scales.results == [65536]


def test_the_scale_reaches_the_gradients_and_leaves_them_before_the_step():
    seen = {}

    def note(name):
        return lambda trainer, model: seen.setdefault(name, model.net[6].bias.grad.clone())

    def watch():
        hooks = ("on_after_backward", "on_before_optimizer_step")
        return [Call(hook, note(hook), at=0) for hook in hooks]

    torch.manual_seed(0)
    fit(Task(mlp()), PerLayerPrecision("bf16", loss_scaling=64), callbacks=watch())
    assert torch.equal(seen["on_after_backward"], 64 * seen["on_before_optimizer_step"])


# Refusals


def strategy(kind, device="cpu"):
    made = object.__new__(kind)
    root = torch.device(device)
    made.__class__ = type(kind.__name__, (kind,), {"root_device": root, "is_global_zero": True})
    return made


REFUSED = {
    "mps": (SingleDeviceStrategy, "mps", "supported are CPU and CUDA"),
    "tpu": (SingleDeviceXLAStrategy, "xla", "whose compiler decides about formats by itself"),
    "tpus": (XLAStrategy, "xla", "single-device strategies, DDP and FSDP2"),
    "hpu": (SingleDeviceStrategy, "hpu", "supported are CPU and CUDA"),
    "fsdp": (FSDPStrategy, "cuda", "which has a plugin of its own: PerLayerFSDPPrecision"),
    "deepspeed": (DeepSpeedStrategy, "cuda", "whose engine casts weights and scales the loss by itself"),
}


@pytest.mark.parametrize(("kind", "device", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_in_one_line(kind, device, says):
    model = Task(mlp())
    before = snapshot(model)
    model._trainer = types.SimpleNamespace(strategy=strategy(kind, device))
    with pytest.raises(MixPrecError) as caught:
        PerLayerPrecision("bf16").convert_module(model)
    message = one_line(caught)
    assert says in message
    assert kind.__name__ in message or device in message
    model._trainer = None
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", [SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_supported_is_not_refused(kind, device):
    from lightning_mixprec.plugin.strategies import check_strategy

    check_strategy(strategy(kind, device))


def test_post_local_sgd_is_refused():
    from lightning_mixprec.plugin.strategies import check_strategy

    state, where = PostLocalSGDState(None, None, 1), {"cluster_environment": LightningEnvironment()}
    averaging = DDPStrategy(parallel_devices=[torch.device("cpu")], ddp_comm_state=state, **where)
    with pytest.raises(MixPrecError, match="LocalSGD"):
        check_strategy(averaging)


def test_fabric_is_refused_in_one_line():
    with pytest.raises(MixPrecError) as caught:
        Fabric(accelerator="cpu", devices=1, plugins=PerLayerPrecision("bf16")).setup(nn.Linear(2, 2))
    assert "Fabric is not supported" in one_line(caught)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), Task(mlp())], ids=["module", "LightningModule without Trainer"])
def test_a_module_without_a_trainer_is_refused_in_one_line(module):
    with pytest.raises(MixPrecError) as caught:
        PerLayerPrecision("bf16").convert_module(module)
    assert "Trainer(plugins=...)" in one_line(caught)


def test_precision_beside_the_plugin_is_refused_by_lightning():
    with pytest.raises(ValueError, match="Received both"):
        trainer(PerLayerPrecision("bf16"), precision="bf16-mixed")
