"""A small convolutional network for digits, its training, and what the examples on compression share."""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from .common import one_cycle


class SmallNet(nn.Module):
    """Two convolutions with norms, each followed by a pooling, and a head: (n, 3, h, w) to (n, num_classes).

    Args:
        num_classes: how many logits it gives.
        width: channels after the first convolution; the second one doubles them.
    """

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        )
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        return self.head(self.features(images))


class SmallClassifier(LightningModule):
    """A classifier ``model`` trained by Adam with one cycle of the learning rate.

    Args:
        model: the network, images to logits.
        num_classes: how many labels there are.
        learning_rate: peak of the cycle.
    """

    FROM_DATA = ("num_classes",)
    HEADLINES = {"val_acc": ("validation accuracy", ".2%")}

    def __init__(self, model: nn.Module, num_classes: int, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits: what is exported."""
        return self.model(images)

    def criterion(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the training loss of a batch."""
        return nn.functional.cross_entropy(self.model(images), labels)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of images and labels."""
        loss = self.criterion(*batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure the accuracy."""
        images, labels = batch
        self.val_acc(self.model(images), labels)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> dict:
        """Return Adam over what is trained, and a schedule that moves with every optimizer step."""
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = torch.optim.Adam(trained, self.learning_rate)
        return one_cycle(self, optimizer, self.learning_rate)


def train_briefly(network: nn.Module, dataset: Dataset, epochs: int, device: torch.device | str = "cpu") -> nn.Module:
    """Train a network of images to logits in fp32 by Adam, then freeze it and put it into evaluation mode.

    The batches of 64 are always drawn alike, and the caller's random numbers stay as they are.
    """
    network.to(device).train()
    shuffled = torch.Generator().manual_seed(0)
    loader = DataLoader(dataset, batch_size=64, shuffle=True, drop_last=len(dataset) >= 64, generator=shuffled)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images.to(device)), labels.to(device)).backward()
            optimizer.step()
    return network.requires_grad_(False).eval()


class GradualPruning(ModelPruning):
    """ModelPruning of the smallest weights of all convolutions and linear layers, after each of the first epochs.

    Its arguments are plain: those of ModelPruning itself the command line cannot write to config.yaml.

    Args:
        amount: share of the weights that are left to prune after an epoch.
        epochs: how many epochs prune; in those that follow the remaining weights adapt.
    """

    def __init__(self, amount: float = 0.1, epochs: int = 25) -> None:
        self.share, self.epochs = amount, epochs
        super().__init__(
            "l1_unstructured",
            parameter_names=["weight"],
            use_global_unstructured=True,
            use_lottery_ticket_hypothesis=False,
            amount=self.due,
        )

    def due(self, epoch: int) -> float:
        """Return the share to prune after an epoch, counted from 0."""
        return self.share if epoch < self.epochs else 0.0

    def filter_parameters_to_prune(self, parameters_to_prune: Sequence[tuple[nn.Module, str]] = ()) -> list:
        """Leave out norms."""
        return [(layer, name) for layer, name in parameters_to_prune if isinstance(layer, (nn.Conv2d, nn.Linear))]
