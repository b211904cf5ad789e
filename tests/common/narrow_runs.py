"""Runs whose first layer stores its weights in 16 bits, in one process or several on the same batches."""

import lightning.pytorch as pl
import torch

from lightning_mixprec import PerLayerPrecision
from lightning_mixprec.optim import AdamW

CASES = [("bf16", "exact", "fp32"), ("bf16", "stochastic", "bf16"), ("fp16", "kahan", "bf16")]


class Net(pl.LightningModule):
    """Two layers, of which the first one is stored in 16 bits."""

    def __init__(self, weights, states):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
        self.words = {"weights": weights, "states": states}

    def training_step(self, batch, batch_idx):
        return self.second(torch.relu(self.first(batch))).square().mean()

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=1e-2, **self.words)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(12, 4, generator=torch.Generator().manual_seed(2)), batch_size=3)


def trained(case, **where):
    """The weights after a run, in fp32, with all their bits."""
    param, *words = case
    torch.manual_seed(0)
    module = Net(*words)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=PerLayerPrecision({"default": "fp32", "first": f"p={param}"}),
        **where,
    )
    trainer.fit(module)
    return [value.clone() for value in module.state_dict().values()]
