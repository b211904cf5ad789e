"""A project as many are that were written for ``pytorch_lightning``; knows nothing of ours but what a user adds."""

import sys

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from lightning_mixprec import (
    AdaptivePrecision,
    FidelityMonitor,
    OverflowMonitor,
    PerLayerPrecision,
    PrecisionReport,
    UnderflowMonitor,
)


class Forecaster(pl.LightningModule):
    def __init__(self, hidden: int = 8, lr: float = 0.01):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.GRU(1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x):
        return self.head(self.encoder(x)[0][:, -1])

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.hparams.lr, total_steps=24)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Waves(pl.LightningDataModule):
    def __init__(self, count: int = 24):
        super().__init__()
        phases = torch.linspace(0, 6, count).unsqueeze(1)
        waves = torch.sin(phases + torch.arange(9) / 2)
        self.windows = torch.utils.data.TensorDataset(waves[:, :8, None], waves[:, 8:])

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.windows, batch_size=4)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.windows, batch_size=12)


def trainer(epochs: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        gradient_clip_val=0.5,
        log_every_n_steps=1,
        logger=CSVLogger("logs"),
        enable_progress_bar=False,
        plugins=PerLayerPrecision({"default": "fp16", "encoder": "fp32"}),
        callbacks=[
            EarlyStopping("val_loss", patience=10),
            LearningRateMonitor(),
            ModelCheckpoint("checkpoints", save_last=True),
            AdaptivePrecision(),
            OverflowMonitor(),
            UnderflowMonitor(every_n_steps=3),
            FidelityMonitor(every_n_steps=3),
            PrecisionReport(),
        ],
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    pl.seed_everything(0)
    first = trainer(2)
    first.fit(Forecaster(), Waves())
    second = trainer(4)
    second.fit(Forecaster(), Waves(), ckpt_path="checkpoints/last.ckpt")
    print(f"trained {first.global_step} steps, resumed to {second.global_step}", file=sys.stdout)
