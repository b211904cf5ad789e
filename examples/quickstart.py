"""A run that fp16 ruins without a sound: see it, mend it, let it mend itself, in about 15 seconds each on a CPU.

    python examples/quickstart.py                                  Lightning's 16-mixed, watched by the monitors
    python examples/quickstart.py --policy policy.yaml             under a policy: a format's name or a YAML file
    python examples/quickstart.py --policy fp16 --adaptive         AdaptivePrecision finds out by itself

The model normalizes its features by a hand-written RMS norm, which squares numbers above 256: infinity in fp16. So the
norm hands on zeros. No step is skipped, no NaN appears, and nothing is learned. The data is synthetic.
"""

import argparse

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mixprec import (
    AdaptivePrecision,
    FidelityMonitor,
    MixPrecError,
    OverflowMonitor,
    PerLayerPrecision,
    PrecisionReport,
    UnderflowMonitor,
)


class RMSNorm(nn.Module):
    """Divides by the root of the mean square, computed as one writes it down."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, features) of mean square 1."""
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


class Regressor(pl.LightningModule):
    """A small network behind the norm."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)]
        self.model = nn.Sequential(nn.Linear(8, 64), RMSNorm(), *blocks, nn.Linear(64, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared error."""
        x, y = batch
        loss = nn.functional.mse_loss(self.model(x).squeeze(-1), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.003)


def loader() -> DataLoader:
    """Return batches of features in the thousands and a target with noise of variance 0.01."""
    pl.seed_everything(0)
    x = torch.randn(4096, 8)
    y = x[:, 0] / x.norm(dim=1) + 0.1 * torch.randn(4096)
    return DataLoader(TensorDataset(1000 * x, y), batch_size=64, shuffle=True)


def stock() -> MixedPrecision:
    """Return what Trainer(precision="16-mixed") makes; on a CPU the Trainer would make bf16-mixed of it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return MixedPrecision("16-mixed", device, torch.amp.GradScaler(device))


def main() -> None:
    """Train once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", help="PerLayerPrecision's; without it Lightning's own 16-mixed")
    parser.add_argument("--adaptive", action="store_true", help="let AdaptivePrecision move layers")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    if options.adaptive and not options.policy:
        parser.error("--adaptive needs --policy: Lightning's own plugin has nothing to move")
    callbacks = [
        OverflowMonitor(),
        UnderflowMonitor(every_n_steps=100),
        FidelityMonitor(every_n_steps=100),
        PrecisionReport(every_n_steps=100),
    ]
    try:
        plugin = PerLayerPrecision(options.policy) if options.policy else stock()
    except MixPrecError as error:
        parser.error(str(error))
    trainer = pl.Trainer(
        plugins=plugin,
        callbacks=[*callbacks, AdaptivePrecision()] if options.adaptive else callbacks,
        max_epochs=options.epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = loader()
    trainer.fit(Regressor(), data)
    print(f"loss {trainer.callback_metrics['train_loss']:.4f}")


if __name__ == "__main__":
    main()
