"""A step is looked into after every hook that prepares it, with what the module's own on_train_batch_start made."""

import copy
import io
import json
import pickle

import pytest
import torch
from known_results import Batches
from lightnings import pl
from plugin_models import Call, ours, same, stock, trainer
from torch import nn
from torch.nn.functional import mse_loss

from lightning_mixprec import AdaptivePrecision, FidelityMonitor, OverflowMonitor, PrecisionReport, UnderflowMonitor
from lightning_mixprec.evidence.comparison import Comparison
from lightning_mixprec.evidence.instruments.sandbox import RandomState
from lightning_mixprec.evidence.step_window import StepWindow

HOOK = "on_train_batch_start"
PLUGINS = {"bf16": lambda: ours("bf16"), "stock bf16-mixed": lambda: stock("bf16-mixed")}


class Distilled(pl.LightningModule):
    """Learns a teacher's answer, with noise; both are made for each batch, which are of different lengths."""

    def __init__(self, ends_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.teacher = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2)), nn.Linear(6, 2)
        self.teacher.requires_grad_(False)
        self.ends_at = ends_at

    def on_train_batch_start(self, batch, batch_idx):
        self.answer, self.noise = self.teacher(batch), torch.randn(batch.shape) / 10
        return -1 if batch_idx == self.ends_at else None

    def training_step(self, batch, batch_idx):
        return mse_loss(self.net(batch + self.noise).float(), self.answer)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def batches(count=5):
    generator = torch.Generator().manual_seed(5)
    return Batches([torch.randn(4 + index % 2, 6, generator=generator) for index in range(count)])


def all_monitors(plugin):
    adaptive = [AdaptivePrecision(every_n_steps=2)] if plugin == "bf16" else []
    return [OverflowMonitor(), UnderflowMonitor(1), FidelityMonitor(1), PrecisionReport(1), *adaptive]


def fit(model, plugin, callbacks=(), **options):
    trainer(plugin, callbacks=list(callbacks), **options).fit(model, batches())
    return model


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_sample_is_the_step_that_follows_with_what_the_hook_made_for_it(plugin, tmp_path):
    alone, watched = fit(Distilled(), PLUGINS[plugin]()), all_monitors(plugin)
    findings, take_in = [], FidelityMonitor._take_in
    watched[2]._take_in = lambda run, found: (findings.append(found), take_in(watched[2], run, found))
    model = fit(Distilled(), PLUGINS[plugin](), watched, default_root_dir=tmp_path)
    assert same(alone.state_dict(), model.state_dict())
    assert [found.problem for found in findings] == [None] * 5
    assert all(found.agreement.loss_gap < 0.02 for found in findings)


def test_the_replayed_loss_is_that_of_the_step(monkeypatch):
    replayed, stepped, run_in = [], [], Comparison.run_in

    def noting(self, *args, **options):
        recorded = run_in(self, *args, **options)
        replayed.append(recorded.replayed.losses[0].item())
        return recorded

    monkeypatch.setattr(Comparison, "run_in", noting)
    note = pl.Callback()
    note.on_before_backward = lambda run, model, loss: stepped.append(loss.item())
    fit(Distilled(), ours("bf16"), [FidelityMonitor(1), note])
    assert replayed == stepped and len(stepped) == 5


def test_random_numbers_are_kept_as_the_step_finds_them(monkeypatch):
    kept, found, add_batch = [], [], StepWindow.add_batch

    def noting(self, batch, batch_idx, random, made):
        kept.append(random)
        add_batch(self, batch, batch_idx, random, made)

    class Noting(Distilled):
        def training_step(self, batch, batch_idx):
            found.append(RandomState(self.device, others=False))
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(StepWindow, "add_batch", noting)
    fit(Noting(), ours("bf16"), [OverflowMonitor()])
    assert len(kept) == len(found) == 5
    assert all(before.is_same(step) for before, step in zip(kept, found, strict=True))


@pytest.mark.parametrize("ends_at", [0, 3])
def test_a_batch_that_the_hook_skips_is_no_step(ends_at, tmp_path):
    fidelity = FidelityMonitor(1)
    alone = fit(Distilled(ends_at), ours("bf16"))
    model = fit(Distilled(ends_at), ours("bf16"), [OverflowMonitor(), fidelity], default_root_dir=tmp_path)
    assert same(alone.state_dict(), model.state_dict())
    assert fidelity.state_dict()["batches_seen"] == ends_at


class Late(Distilled):
    """The second batch's gradients are beyond fp16; they are explained when the hook has prepared the last one."""

    def training_step(self, batch, batch_idx):
        return (self.net(batch + self.noise) - self.answer).mean() * self.factor

    def on_train_batch_start(self, batch, batch_idx):
        self.factor = 1e6 if batch_idx == 1 else 1.0
        super().on_train_batch_start(batch, batch_idx)


@pytest.mark.parametrize("plugin", [lambda: ours("fp16"), lambda: stock("fp16")], ids=["ours", "stock"])
def test_an_earlier_batch_is_explained_with_what_the_hook_made_for_it(plugin, tmp_path):
    monitor = OverflowMonitor()
    fit(Late(), plugin(), [monitor], accumulate_grad_batches=5, default_root_dir=tmp_path)
    assert [(event["batch_idx"], event["verdict"]) for event in monitor.events] == [(1, "scale")]
    rows = [json.loads(line) for line in (tmp_path / "mixprec.jsonl").read_text().splitlines()]
    assert not any("problem" in row for row in rows)


# The module


def hooks_of(model):
    return {name: value for name, value in vars(model).items() if name == HOOK}


def test_nothing_is_left_on_the_module():
    seen = []

    class Looking(Distilled):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append(hooks_of(self))
            return super().on_train_batch_start(batch, batch_idx)

        def training_step(self, batch, batch_idx):
            seen.append(hooks_of(self))
            return super().training_step(batch, batch_idx)

    model = fit(Looking(), ours("bf16"), [FidelityMonitor(1)])
    assert seen and not any(seen) and not hooks_of(model)


@pytest.mark.parametrize("fails_in", ["another callback", "the module"])
def test_nothing_is_left_on_the_module_after_an_exception(fails_in):
    def fail(*_):
        raise RuntimeError("planted")

    class Failing(Distilled):
        on_train_batch_start = fail

    model = Failing() if fails_in == "the module" else Distilled()
    with pytest.raises(RuntimeError, match="planted"):
        fit(model, ours("bf16"), [FidelityMonitor(1), *([Call(HOOK, fail)] if fails_in != "the module" else [])])
    assert not hooks_of(model)


def test_a_hook_of_the_instance_is_called_and_put_back():
    model, called = Distilled(), []

    def hook(batch, batch_idx):
        called.append(batch_idx)
        return Distilled.on_train_batch_start(model, batch, batch_idx)

    model.on_train_batch_start = hook
    fit(model, ours("bf16"), [FidelityMonitor(1), OverflowMonitor()])
    assert called == list(range(5)) and hooks_of(model) == {HOOK: hook}


def test_a_hook_that_somebody_wraps_anew_for_each_batch_samples_once():
    def wrap(run, model, *_):
        inner = model.on_train_batch_start
        model.on_train_batch_start = lambda *args: inner(*args)

    fidelity, model = FidelityMonitor(1), Distilled()
    fit(model, ours("bf16"), [fidelity, Call(HOOK, wrap)])
    assert fidelity.state_dict()["batches_seen"] == 5


def test_a_copy_made_by_another_callback_has_its_own_hook_alone():
    made = []

    def copies(run, model, *_):
        model.trainer = None
        made.extend([copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model)))])
        model.trainer = run

    fidelity = FidelityMonitor(1)
    fit(Distilled(), ours("bf16"), [fidelity, Call(HOOK, copies, at=2)])
    for each in made:
        each.on_train_batch_start(torch.zeros(3, 6), 0)
        assert each.answer.shape == (3, 2) and not hooks_of(each)
    assert fidelity.state_dict()["batches_seen"] == 5
