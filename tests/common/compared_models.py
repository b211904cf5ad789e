"""Small classifiers and their batches, for the tests of what is compared and exported."""

import torch
from lightnings import pl
from torch import nn


def class_batches(count=6, rows=32, features=16, classes=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, features, generator=generator),
            torch.randint(classes, (rows,), generator=generator),
        )
        for _ in range(count)
    ]


class Classifier(pl.LightningModule):
    """Logits by ``forward``; a step returns its loss."""

    def __init__(self, net=None):
        super().__init__()
        norm, drop = nn.BatchNorm1d(24), nn.Dropout(0.5)
        self.net = net or nn.Sequential(nn.Linear(16, 24), norm, nn.ReLU(), drop, nn.Linear(24, 4))
        self.seen = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(batch_idx)
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)
