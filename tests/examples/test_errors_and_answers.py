"""The guide's answers to errors: stock Lightning fails with the words that users search for, and we do what it says."""

import contextlib
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from plugin_models import Scheduled, Task, fit, mlp, ours, stock
from torch import nn

from lightning_mixprec import MixPrecError, OverflowMonitor, PerLayerPrecision

QUESTIONS = (Path(__file__).parents[2] / "examples" / "guides" / "errors_and_answers.md").read_text()


class TwoNetworks(Task):
    """The second optimizer's network is not used."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False
        self.other = nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [self.make_optimizer(self.net.parameters()), self.make_optimizer(self.other.parameters())]


class Unscaled(Task):
    """Unscales by hand, and once more."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            self.trainer.precision_plugin.scaler.unscale_(optimizer)


class Fused(Task):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, fused=True)


class Lbfgs(Task):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Masked(Task):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        out = self.net(batch[0])
        return nn.functional.mse_loss(out.masked_fill(out > 100, -1e9), batch[1])


class Bursting(Scheduled):
    """Its first step overflows."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1e9 if batch_idx == 0 else 1)


class Overflowing(Task):
    """All its steps overflow, at any loss scale."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * 1e30


FIXED = {
    "No inf checks were recorded for this optimizer.": (TwoNetworks, {}),
    "Attempting to unscale FP16 gradients.": (lambda: Task(mlp().half()), {}),
    "unscale_() has already been called on this optimizer since the last update().": (lambda: Unscaled(mlp()), {}),
    "does not allow for gradient clipping because it performs unscaling of gradients internally": (
        lambda: Fused(mlp()),
        {"gradient_clip_val": 1.0},
    ),
}


@pytest.mark.filterwarnings("ignore:.*store their weights in 16 bits")
@pytest.mark.parametrize("words", FIXED)
def test_stock_fails_with_these_words_and_we_train(words):
    assert f"`{words}`" in QUESTIONS
    make, options = FIXED[words]
    with pytest.raises(Exception, match=re.escape(words)):
        fit(make(), stock("fp16"), **options)
    model = make()
    before = [param.detach().clone() for param in model.net.parameters()]
    fit(model, ours("fp16"), **options)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.net.parameters(), strict=True))


def test_weights_in_fp16_are_warned_of():
    with pytest.warns(UserWarning, match="updates smaller than the weights' last bit are lost"):
        fit(Task(mlp().half()), ours("fp16"))


def test_a_skipped_first_step_moves_no_schedule():
    words = "Detected call of `lr_scheduler.step()` before `optimizer.step()`"
    assert words in QUESTIONS
    with pytest.warns(UserWarning, match=re.escape(words)):
        fit(Bursting(mlp()), stock("fp16"))
    run = fit(Bursting(mlp()), ours("fp16"))  # warnings are errors here
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 3 == run.global_step


def test_lbfgs():
    words = "AMP and the LBFGS optimizer are not compatible."
    assert words in QUESTIONS
    with pytest.raises(Exception, match=re.escape(words)):
        fit(Lbfgs(mlp()), stock("fp16"))
    with pytest.raises(MixPrecError, match="LBFGS"):
        fit(Lbfgs(mlp()), ours("fp16"))
    fit(Lbfgs(mlp()), ours("bf16"))


def test_a_constant_that_fp16_cannot_hold():
    words = "value cannot be converted to type c10::Half without overflow"
    assert words in QUESTIONS
    for plugin in (stock("fp16"), ours("fp16")):
        with pytest.raises(RuntimeError, match=r"value cannot be converted to type (c10|at)::Half without overflow"):
            fit(Masked(mlp()), plugin)
    fit(Masked(mlp()), ours({"default": "fp16", "net.6": "fp32"}))


class CastByHand(Task):
    """A layer is given bf16 outside autocast; or the policy is left to cast."""

    by_hand = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].bfloat16() if self.by_hand else batch[0]
        with torch.autocast("cpu", enabled=False) if self.by_hand else contextlib.nullcontext():
            return nn.functional.mse_loss(self.net(x).float(), batch[1])


def test_a_product_of_two_formats():
    words = "mat1 and mat2 must have the same dtype"
    assert f"`{words}`" in QUESTIONS
    model = CastByHand(nn.Sequential(nn.Linear(6, 2)))
    with pytest.raises(RuntimeError, match=words):
        fit(model, stock("bf16"))
    model.by_hand = False
    fit(model, ours("bf16"))


def test_precision_and_plugins():
    words = "Received both `precision=16-mixed` and `plugins="
    assert words in QUESTIONS
    with pytest.raises(ValueError, match=re.escape(words)):
        pl.Trainer(precision="16-mixed", plugins=PerLayerPrecision("fp16"))
    assert {format: PerLayerPrecision(format).precision for format in ("fp16", "bf16", "fp32")} == {
        "fp16": "16-mixed",
        "bf16": "bf16-mixed",
        "fp32": "32-true",
    }


class Squaring(Task):
    """Its loss is NaN in fp16 alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        large = self.net(batch[0]) * 1e4
        return ((large * large).mean() / (large.detach() * large.detach()).mean() - 1).square()


@pytest.mark.filterwarnings("ignore:step .*overflows in fp16")
def test_a_loss_that_is_nan():
    assert "`loss is nan with 16-mixed`" in QUESTIONS
    plugin, monitor = stock("fp16"), OverflowMonitor()
    model = Squaring(nn.Sequential(nn.Linear(6, 2)))
    fit(model, plugin, callbacks=[monitor])
    assert {event["verdict"] for event in monitor.events} == {"precision"}
    assert {event["fits"] for event in monitor.events} == {"bf16"}
    mended = OverflowMonitor()
    rules = {"default": "fp16", "rules": [{"layers": "", "compute": "bf16", "recurse": False}]}
    fit(Squaring(nn.Sequential(nn.Linear(6, 2))), ours(rules), callbacks=[mended])
    assert mended.events == []


def test_every_question_is_tested_here():
    source = Path(__file__).read_text()
    questions = re.findall(r"^## ``? ?(.+?) ?``?$", QUESTIONS, re.MULTILINE)
    assert len(questions) == 11
    assert [question for question in questions if question not in source] == []


def test_a_scale_at_its_minimum():
    assert "`Current loss scale already at minimum`" in QUESTIONS
    run = fit(Overflowing(mlp()), stock("fp16"), max_epochs=45)
    assert run.global_step == 180  # success, it says
    assert run.precision_plugin.scaler.get_scale() < 1e-44
    with pytest.raises(MixPrecError, match=r"loss scale is at its minimum .*layers with non-finite gradients: net\.0"):
        fit(Overflowing(mlp()), PerLayerPrecision("fp16"), max_epochs=45)
