"""Every layer computes in the format it was given, is stored as it was told, and others can read it."""

import json
import warnings
from functools import partial

import pytest
import torch
from plugin_models import (
    Batches,
    Call,
    Evaluable,
    Probe,
    Task,
    fit,
    mlp,
    one_line,
    ours,
    probes,
    same,
    snapshot,
    stock,
    trainer,
)
from torch import nn
from torch.optim import SGD

from lightning_mixprec import MixPrecError, PerLayerPrecision, PrecisionPolicy, Rule

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


FORMS = {
    "short mapping": {"default": "bf16", "net.2": "fp32"},
    "full mapping": {"default": "bf16", "rules": [{"layers": "net.2", "compute": "fp32"}]},
    "policy": PrecisionPolicy("bf16", [Rule("net.2", compute="fp32")]),
    "file": "policy.yaml",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_a_policy(form):
    PrecisionPolicy("bf16", [Rule("net.2", compute="fp32")]).to_file("policy.yaml")
    plugin = PerLayerPrecision(form)
    assert plugin.policy == FORMS["policy"]
    assert plugin.assignment is None
    model = Task(probes())
    fit(model, plugin)
    assert [probe.computed for probe in model.net] == [{BF16}, {BF16}, {FP32}]
    assert plugin.assignment["net.2"].compute == "fp32"
    assert plugin.assignment["net.2"].rule == Rule("net.2", compute="fp32")
    assert plugin.assignment[""].compute == "bf16"


# Layers


def test_every_layer_computes_in_its_format_and_the_loss_falls():
    model = Task(probes(), partial(SGD, lr=0.1))
    policy = {"default": "bf16", "net.0": "fp16", "net.1": "fp32"}
    plugin = PerLayerPrecision(policy)
    fit(model, plugin, max_epochs=20)
    assert [probe.computed for probe in model.net] == [{FP16}, {FP32}, {BF16}]
    assert {seen[2] for probe in model.net for seen in probe.seen} == {FP32}
    first, last = torch.stack(model.losses[:4]).mean(), torch.stack(model.losses[-4:]).mean()
    assert last < 0.8 * first
    assert plugin.skipped_steps == 0
    assert plugin.history == []


class HandWritten(nn.Module):
    """What the policy below asks for, as one would write it by hand for a uniform bf16 run."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        for index, layer in enumerate(self.net):
            if index in (1, 6):
                with torch.autocast(x.device.type, enabled=False):
                    x = layer(x.float())
                x = x.to(BF16) if index == 1 else x
            else:
                x = layer(x)
        return x


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_mixed_policy_trains_as_the_same_casts_written_by_hand(device):
    policy = {"default": "bf16", "net.net.1": "c=fp32,o=input", "net.net.6": "fp32"}

    def run(net, plugin):
        torch.manual_seed(3)
        model = Task(net(mlp()), partial(SGD, lr=0.05, momentum=0.9))
        torch.manual_seed(4)
        fit(model, plugin, max_epochs=3, accelerator=device)
        return [model.losses, [*model.state_dict().values()]]

    expected = run(HandWritten, stock("bf16", device))
    assert not same(run(lambda net: nn.ModuleDict({"net": net}).net, stock("bf16", device)), expected)
    without_casts = {key.removeprefix("net."): value for key, value in policy.items()}
    assert same(run(lambda net: net, PerLayerPrecision(without_casts)), expected)


def test_the_table_is_printed_when_fit_starts_and_only_then(capsys):
    plugin = PerLayerPrecision({"default": "bf16", "net.6": "fp32"})
    trainer(plugin).validate(Evaluable(mlp()), Batches(6), verbose=False)
    assert "net.6" not in capsys.readouterr().out
    fit(Task(mlp()), plugin)
    out = capsys.readouterr().out
    assert out.count("net.6") >= 1
    assert "fp32" in out
    trainer(PerLayerPrecision("bf16"), barebones=True, logger=None, enable_checkpointing=None,
            enable_progress_bar=None, enable_model_summary=None, num_sanity_val_steps=None).fit(
        Task(mlp()), Batches(6))  # fmt: skip
    assert "net" not in capsys.readouterr().out


# Storage


def test_weights_stored_in_fp64_by_rule_are_so_during_fit_and_in_checkpoints(tmp_path):
    policy = {"default": "fp32", "net.1": "p=fp64,c=fp64"}
    model = Task(probes(), partial(SGD, lr=0.1, momentum=0.9))
    before = snapshot(model)
    plugin = PerLayerPrecision(policy)
    run = trainer(plugin)
    saved = Call("on_train_end", lambda run, model: run.save_checkpoint(tmp_path / "last.ckpt"))
    run.callbacks.append(saved)
    run.fit(model, Batches(6))
    assert [probe.seen[0] for probe in model.net] == [(FP32, FP32, FP32), (FP64, FP64, FP64), (FP32, FP32, FP32)]
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["state_dict"]["net.1.weight"].dtype == FP64
    assert stored["state_dict"]["net.0.weight"].dtype == FP32
    wide = stored["state_dict"]["net.1.weight"]
    assert not torch.equal(wide, wide.float().double())
    assert stored["optimizer_states"][0]["state"][2]["momentum_buffer"].dtype == FP64
    assert snapshot(model) == before
    assert torch.equal(model.net[1].weight, wide.float())


@pytest.mark.parametrize("compute", ["fp64", "fp32"])
def test_fp64_weights_resume_bit_for_bit(tmp_path, compute):
    def plugin():
        return PerLayerPrecision({"default": "fp32", "net.1": f"p=fp64,c={compute}"})

    def final_state(model):
        return Call("on_train_end", lambda run, model: {k: v.clone() for k, v in model.state_dict().items()})

    def new():
        torch.manual_seed(5)
        return Task(probes(), partial(SGD, lr=0.1, momentum=0.9))

    whole = final_state(None)
    fit(new(), plugin(), max_epochs=2, callbacks=[whole])
    run = fit(
        new(), plugin(), max_epochs=1, callbacks=[Call("on_train_end", lambda run, _: run.save_checkpoint("a.ckpt"))]
    )
    resumed = final_state(None)
    run = trainer(plugin(), max_epochs=2, callbacks=[resumed])
    run.fit(Task(probes(), partial(SGD, lr=0.1, momentum=0.9)), Batches(6), ckpt_path="a.ckpt")
    assert whole.results[0]["net.1.weight"].dtype == FP64
    assert same(resumed.results, whole.results)


def test_compiled_layers_with_bf16_weights_are_warned_of_too():
    model = Task(mlp()).bfloat16()
    model.net = torch.compile(model.net, backend="eager")
    with pytest.warns(UserWarning, match="net.0 first"):
        fit(model, PerLayerPrecision("bf16"), Batches(6))


def test_a_frozen_base_in_bf16_loses_no_updates_and_nobody_warns_of_it():
    model = Task(mlp())
    model.net[0].bfloat16().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*updates smaller")
        fit(model, PerLayerPrecision("bf16"))
    assert model.net[0].weight.dtype == BF16


def test_a_model_with_bf16_weights_keeps_them_and_one_warning_says_what_it_costs():
    model = Task(mlp()).bfloat16()
    during = Call("on_train_batch_end", lambda run, model: {param.dtype for param in model.parameters()})
    with pytest.warns(UserWarning, match="store their weights in 16 bits") as caught:
        fit(model, PerLayerPrecision("bf16"), callbacks=[during])
    [message] = [str(warning.message) for warning in caught if "16 bits" in str(warning.message)]
    assert "\n" not in message
    assert during.results == [{BF16}] * 4
    assert {param.dtype for param in model.parameters()} == {BF16}


def test_16_bit_weights_that_fp32_computes_with_are_no_reason_to_warn():
    model = Task(probes()).bfloat16()
    fit(model, PerLayerPrecision("fp32"))
    assert all(probe.computed == {FP32} for probe in model.net)
    assert {param.dtype for param in model.parameters()} == {BF16}
    assert all(torch.isfinite(loss) for loss in model.losses)


def test_an_fp64_policy_trains_as_lightnings_64_true():
    def run(plugin, dtype, **options):
        torch.manual_seed(3)
        model = Task(mlp(), partial(SGD, lr=0.05, momentum=0.9)).to(dtype)
        torch.manual_seed(4)
        fit(model, plugin, max_epochs=2, **options)
        return [model.losses, [*model.state_dict().values()]]

    expected = run(None, FP32, precision="64-true")
    assert same(run(PerLayerPrecision({"default": "fp64", "**": "p=fp64,c=fp64"}), FP64), expected)


def test_batches_are_wide_where_the_modules_own_operations_are_fp64():
    class Noting(Task):
        def training_step(self, batch, batch_idx):
            self.came = [tensor.dtype for tensor in batch]
            return super().training_step(batch, batch_idx)

    for default, dtype in (("fp64", FP64), ("fp32", FP32), ("bf16", FP32)):
        model = Noting(mlp())
        fit(model, PerLayerPrecision(default))
        assert model.came == [dtype, dtype]
        assert {param.dtype for param in model.parameters()} == {FP32}


# eval_policy


class Evaluated(Evaluable):
    """Notes what the plugin says about its head in each stage."""

    def __init__(self, net):
        super().__init__(net, partial(SGD, lr=0.05, momentum=0.9))
        self.said = {}

    def _note(self):
        plugin = self.trainer.precision_plugin
        stage = str(self.trainer.state.stage.value)
        self.said.setdefault(stage, set()).add((plugin.assignment["net.2"].compute, plugin.policy.default))
        for probe in self.net:
            probe.seen.clear()

    def training_step(self, batch, batch_idx):
        self._note()
        loss = super().training_step(batch, batch_idx)
        assert [probe.computed for probe in self.net] == [{BF16}] * 3
        return loss

    def validation_step(self, batch, batch_idx):
        self._note()
        super().validation_step(batch, batch_idx)
        assert [probe.computed for probe in self.net] == [{FP32}, {FP32}, {FP16}]

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)
        return batch_idx


EVAL_POLICY = {"default": "fp32", "net.2": "fp16"}


def test_eval_policy_holds_in_every_kind_of_evaluation():
    model = Evaluated(probes())
    plugin = PerLayerPrecision("bf16", eval_policy=EVAL_POLICY)
    run = trainer(plugin, num_sanity_val_steps=1, max_epochs=2, val_check_interval=2)
    run.fit(model, Batches(6), Batches(6, count=2))
    run.validate(model, Batches(6), verbose=False)
    run.test(model, Batches(6), verbose=False)
    run.predict(model, Batches(6), return_predictions=False)
    evaluated = {("fp16", "fp32")}
    stages = ("sanity_check", "validate", "test", "predict")
    assert model.said == {"train": {("bf16", "bf16")}, **dict.fromkeys(stages, evaluated)}
    assert plugin.policy == PrecisionPolicy("bf16")
    assert plugin.assignment["net.2"].compute == "bf16"
    assert plugin.history == []
    assert plugin.scaler.get_scale() == 1


def test_eval_policy_leaves_no_mark_on_training():
    def run(**arguments):
        torch.manual_seed(3)
        model = Evaluable(mlp(), partial(SGD, lr=0.05, momentum=0.9))
        torch.manual_seed(4)
        plugin = PerLayerPrecision({"default": "fp16", "net.6": "fp32"}, **arguments)
        evaluation = trainer(plugin, num_sanity_val_steps=2, max_epochs=3, val_check_interval=2)
        evaluation.fit(model, Batches(6), Batches(6, count=2))
        assert plugin.history == []
        return model.losses, [*model.state_dict().values()], model.eval_losses

    plain, with_eval = run(), run(eval_policy={"default": "fp32", "net.0": "bf16"})
    assert same(plain[:2], with_eval[:2])
    assert not same(plain[2], with_eval[2])


def test_eval_policy_cannot_store_weights_otherwise():
    with pytest.raises(MixPrecError) as caught:
        fit(Task(mlp()), PerLayerPrecision("fp32", eval_policy={"default": "fp32", "net.0": "p=fp64,c=fp64"}))
    assert "param can only be chosen before training" in one_line(caught)


# A border that nobody enters


class Bypassing(Evaluable):
    """Calls a method of a submodule instead of the submodule."""

    def __init__(self):
        super().__init__(nn.Linear(6, 2))
        self.v = Vae()

    def forward(self, x):
        return self.net(self.v.encode(x))


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 6)

    def encode(self, x):
        return self.encoder(x)

    def forward(self, x):
        return self.decoder(self.encode(x))


def test_a_border_that_is_bypassed_is_an_error_after_the_first_step():
    model = Bypassing()
    before = snapshot(model)
    counted = Call("on_train_batch_end", lambda run, model: None)
    run = trainer(PerLayerPrecision({"default": "bf16", "v": "fp32"}), callbacks=[counted])
    with pytest.raises(MixPrecError, match=r"v\.\*") as caught:
        run.fit(model, Batches(6), Batches(6))
    one_line(caught)
    assert counted.calls == 0
    assert snapshot(model) == before


def test_the_way_out_that_the_error_names_works():
    model = Bypassing()
    trainer(PerLayerPrecision({"default": "bf16", "v.*": "fp32"})).fit(model, Batches(6), Batches(6))
    assert len(model.losses) == len(model.eval_losses) == 4


def test_a_bypassed_border_is_an_error_in_validation_too():
    with pytest.raises(MixPrecError, match=r"v\.\*"):
        trainer(PerLayerPrecision({"default": "bf16", "v": "fp32"})).validate(Bypassing(), Batches(6), verbose=False)


# What others read before, during and after a run


def test_everything_can_be_read_before_and_after_a_run():
    plugin = ours("fp16")
    assert (plugin.history, plugin.skipped_steps, plugin.scaler.get_scale()) == ([], 0, 1)
    json.dumps(plugin.scaler.state_dict())
    model = Task(mlp())
    run = fit(model, plugin)
    assert run.scaler is plugin.scaler
    assert run.precision == "16-mixed"
    assert plugin.skipped_steps == 0
    assert not plugin.step_was_skipped(run.optimizers[0])
    assert json.loads(json.dumps(plugin.scaler.state_dict()))["scale"] == 1024


@pytest.mark.parametrize(
    ("policy", "name"), [("fp64", "64-true"), ("fp32", "32-true"), ("bf16", "bf16-mixed"), ("fp16", "16-mixed")]
)
def test_lightning_is_told_the_default_format_by_its_own_name(policy, name):
    assert trainer(PerLayerPrecision(policy)).precision == name


def test_probes_see_what_they_should_without_a_plugin():
    model = Task(probes())
    fit(model, stock("bf16"))
    assert all(isinstance(probe, Probe) and probe.computed == {BF16} for probe in model.net)
