"""Weights in 16 bits that stand still: told where updates are lost, silent where nothing is."""

import json
from pathlib import Path

import pytest
import torch
from plugin_models import Task, fit, ours
from torch import nn

from lightning_mixprec import UnderflowMonitor, optim

STORED = {"default": "fp32", "net.0": "p=bf16"}
STOCK = torch.optim.AdamW
LOSES = "ignore:.*store their weights in 16 bits"


class Scaled(Task):
    """Weights of 1 that a gradient of 1 moves by the learning rate, and small ones beside them that always move."""

    def __init__(self, make, lr=2e-4, after=None, **options):
        net = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 1, bias=False))
        super().__init__(net, lambda params: make(params, lr=lr, **options))
        nn.init.ones_(net[0].weight)
        nn.init.constant_(net[1].weight, 1e-3)
        self.after = after

    def training_step(self, batch, batch_idx):
        ones = torch.ones(1, 4, dtype=self.net[0].weight.dtype if self.trainer.precision == "bf16-true" else None)
        return self.net(ones).sum()

    def on_train_batch_end(self, *_):
        if self.after is not None:
            self.after(self)


def ran(task, plugin=None, steps=4, **options):
    """The run's rows of weights that stood still."""
    fit(task, plugin, callbacks=[UnderflowMonitor(1)], max_steps=steps, max_epochs=-1, **options)
    rows = [json.loads(line) for line in Path("mixprec.jsonl").read_text().splitlines()]
    return {row["layer"]: row["still_rate"] for row in rows if "still_rate" in row}


@pytest.mark.filterwarnings(LOSES)
@pytest.mark.parametrize("where", ["bf16-true", "a rule"])
def test_weights_that_torchs_adamw_cannot_move_are_told_of(where):
    options = {"plugin": ours(STORED)} if where == "a rule" else {"precision": "bf16-true"}
    with pytest.warns(UserWarning, match=r"100% of the weights of layer 'net\.0' have not moved for 3 sampled") as told:
        rates = ran(Scaled(STOCK), **options)
    (message,) = [str(each.message) for each in told if "have not moved" in str(each.message)]
    assert "store it in fp32, or train it with lightning_mixprec.optim.AdamW" in message
    assert rates["net.0"] == 1.0
    assert rates.get("net.1", 0.0) == 0.0


def freeze(task):
    task.net[0].weight.requires_grad_(False)


def prune(task):
    """Puts weights back to 1 after each step, as masks do: the optimizer did move them."""
    with torch.no_grad():
        task.net[0].weight.fill_(1.0)


class NoGradient(Scaled):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * 0.0


QUIET = {
    "exact": lambda: Scaled(optim.AdamW),
    "kahan": lambda: Scaled(optim.AdamW, weights="kahan"),
    "stochastic": lambda: Scaled(optim.AdamW, weights="stochastic"),
    "a rate of 0": lambda: Scaled(STOCK, lr=0.0),
    "a rate of 0 on the device": lambda: Scaled(STOCK, lr=torch.tensor(0.0), foreach=False),
    "frozen": lambda: Scaled(STOCK, after=freeze),
    "pruned": lambda: Scaled(STOCK, lr=0.1, after=prune),
    "converged": lambda: NoGradient(STOCK, weight_decay=0.0),
}


@pytest.mark.filterwarnings(LOSES, "error:.*have not moved")
@pytest.mark.parametrize("case", QUIET)
def test_what_stands_still_for_another_reason_is_not_told_of(case):
    assert ran(QUIET[case](), ours(STORED)).get("net.0", 0.0) == 0.0


@pytest.mark.filterwarnings("error:.*have not moved")
def test_exact_storage_without_the_plugin_moves_from_its_first_step():
    assert ran(Scaled(optim.AdamW), precision="bf16-true") == {"net.0": 0.0, "net.1": 0.0}


@pytest.mark.filterwarnings(LOSES)
def test_three_samples_in_a_row_and_not_less():
    assert ran(Scaled(STOCK), ours(STORED), steps=2) == {}
