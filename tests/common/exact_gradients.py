"""Runs whose gradients are their batches' alone, and exact in 16 bits: a run on fp32 weights has the same ones.

So what Lightning and torch's optimizers make of fp32 weights, without anything of ours, is what weights in 16 bits that
lose nothing have to become, bit for bit.
"""

from types import SimpleNamespace

import torch
from lightnings import pl
from torch import nn

from lightning_mixprec import PerLayerPrecision, optim

EPOCH = 4
"""Batches in an epoch."""

STOCK = SimpleNamespace(AdamW=torch.optim.AdamW, SGD=torch.optim.SGD)
OURS = SimpleNamespace(AdamW=optim.AdamW, SGD=optim.SGD)


def batches(count=EPOCH, seed=3, spoiled=()):
    """Batches of quarters and whole numbers; those whose numbers are in ``spoiled`` are infinite."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        inputs = torch.randint(-8, 9, (3, 4), generator=generator) / 4
        factors = torch.randint(-1, 3, (3, 8), generator=generator).float()
        found.append((inputs * torch.inf if number in spoiled else inputs, factors))
    return found


class Loader:
    """Batches, about which Lightning has no advice to give."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)

    def __len__(self):
        return len(self.data)


def adamw(where, module):
    """One optimizer of everything that is to be trained."""
    return where.AdamW([param for param in module.parameters() if param.requires_grad], lr=1e-2)


class Summed(pl.LightningModule):
    """Two layers and a loss that is linear in their weights.

    Args:
        configure: Given ``STOCK`` or ``OURS``, and the module, what ``configure_optimizers`` returns.
        data: The batches of an epoch.
    """

    STORED = "first"  # the layer that is stored in 16 bits

    def __init__(self, where, configure=adamw, data=None):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(4, 8)
        self.where, self.configure, self.data = where, configure, data or batches()
        self.seen = set()

    def training_step(self, batch, batch_idx):
        self.seen.add(self.first._parameters.get("weight", self.first.bias).dtype)
        inputs, factors = batch
        return ((self.first(inputs) + self.second(inputs)) * factors).sum()

    def configure_optimizers(self):
        return self.configure(self.where, self)

    def train_dataloader(self):
        return Loader(self.data)


def ran(stored=None, module=Summed, configure=adamw, data=None, callbacks=list, ckpt_path=None, plugin=None, **options):
    """A run on fp32 weights with Lightning and torch alone, or with ours whose first layer is stored in 16 bits.

    Args:
        stored: The format of the first layer's weights; None for stock.
        module: The class of the module.
        configure: See :class:`Summed`.
        data: See :class:`Summed`.
        callbacks: Makes the callbacks.
        ckpt_path: What to go on from.
        plugin: Options of the plugin.
        options: The Trainer's.
    """
    torch.manual_seed(0)
    run = module(STOCK if stored is None else OURS, configure, data)
    plugins = PerLayerPrecision({"default": "fp32", module.STORED: f"p={stored}"}, **(plugin or {})) if stored else None
    torch.manual_seed(1)
    trainer = pl.Trainer(
        **{"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False} | options,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=plugins,
        callbacks=callbacks(),
    )
    trainer.fit(run, ckpt_path=ckpt_path)
    dtypes = {None: torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert run.seen == {dtypes[stored]}
    return trainer, run


def outcome(trainer, module):
    """The weights, and what optimizers keep of them apart from the bits of weights, by name."""
    found = {name: value.clone() for name, value in module.state_dict().items()}
    for number, optimizer in enumerate(trainer.optimizers):
        for param_name, param in module.named_parameters():
            state = optimizer.state.get(param, {})
            keys = ("step", "exp_avg", "exp_avg_sq") if "exp_avg" in state else ("momentum_buffer",)  # SGD counts here
            for key in keys:
                if (value := state.get(key)) is not None:
                    found[f"{number} {param_name} {key}"] = value.clone()
    return found
