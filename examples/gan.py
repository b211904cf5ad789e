"""Train a class-conditional GAN on scikit-learn's digits: two networks, two optimizers, one loss scale.

    python examples/gan.py fit --config examples/configs/gan.yaml

    --trainer.plugins=PerLayerPrecision --trainer.plugins.policy=bf16    the discriminator's logits and losses in bf16
    --trainer.precision=bf16-mixed --trainer.plugins=null              Lightning's own mixed precision, to compare
    --data=CIFAR10 --data.path=/path/to/cifar10 --model.size=32                         other images, of 32x32 pixels

The data are 1797 real images. Samples are scored by a classifier that setup trains on the real training images, in
fp32: how many it recognises as the digit that was asked for, and how far its features of samples are from those of
held-out images (a Frechet distance).
"""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from shared.common import ExampleCLI, run, start
from shared.data import CIFAR10, DataError, Digits, ImageFolder, Images  # noqa: F401  the CLI finds these by name
from shared.small_models import SmallNet, train_briefly
from torch import Tensor, nn
from torch.nn.functional import softplus
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

JUDGE_EPOCHS = 10


class Generator(nn.Module):
    """Noise (n, noise) and labels (n,) to images (n, 3, size, size), by doublings from 4x4 pixels."""

    def __init__(self, num_classes: int, size: int, noise: int, width: int) -> None:
        super().__init__()
        self.classes = nn.Embedding(num_classes, noise)
        self.start = nn.Sequential(nn.Linear(2 * noise, width * 16), nn.Unflatten(1, (width, 4, 4)))
        layers = []
        while size > 4:
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Upsample(scale_factor=2)]
            layers += [nn.Conv2d(width, width, 3, padding=1)]
            size //= 2
        self.blocks = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        self.pixels = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Return an image for each label."""
        return self.pixels(self.blocks(self.start(torch.cat([noise, self.classes(labels)], dim=1))))


class Discriminator(nn.Module):
    """Images (n, 3, size, size) and labels (n,) to logits (n,) that they are real, with a projection of the label.

    Source: arXiv 1802.05637.
    """

    def __init__(self, num_classes: int, size: int, width: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.2)]
        while size > 4:
            layers += [nn.Conv2d(width, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            size //= 2
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 16, 2 * width), nn.LeakyReLU(0.2))
        self.logit = ProjectedLogit(num_classes, 2 * width)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return a logit for each image."""
        return self.logit(self.features(images), labels)


class ProjectedLogit(nn.Module):
    """The discriminator's last layer: how real the features look, and how much like the label."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.real = nn.Linear(width, 1)
        self.classes = nn.Embedding(num_classes, width)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of both as logits (n,)."""
        return self.real(features).squeeze(1) + (self.classes(labels) * features).sum(1)


class FrechetDistance(Metric):
    """``|m - n|^2 + trace(C + D - 2 (C D)^(1/2))`` of the means and covariances of real and sampled features, in fp64.

    The distance of two normal distributions with these moments (arXiv 1706.08500).

    Args:
        features: length of the feature vectors.
    """

    higher_is_better = False
    full_state_update = False

    def __init__(self, features: int) -> None:
        super().__init__()
        for side in ("real", "sampled"):
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.float64), "sum")
            self.add_state(f"{side}_sum", torch.zeros(features, dtype=torch.float64), "sum")
            self.add_state(f"{side}_products", torch.zeros(features, features, dtype=torch.float64), "sum")

    def update(self, real: Tensor, sampled: Tensor) -> None:
        """Take a batch of both, of shape (n, features)."""
        for side, features in (("real", real.double()), ("sampled", sampled.double())):
            getattr(self, f"{side}_count").add_(len(features))
            getattr(self, f"{side}_sum").add_(features.sum(0))
            getattr(self, f"{side}_products").add_(features.mT @ features)

    def compute(self) -> Tensor:
        """Return the distance."""
        (mean, covariance), (other_mean, other_covariance) = self._moments("real"), self._moments("sampled")
        root = _root(covariance)
        cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
        return (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * cross

    def _moments(self, side: str) -> tuple[Tensor, Tensor]:
        count = getattr(self, f"{side}_count")
        mean = getattr(self, f"{side}_sum") / count
        return mean, getattr(self, f"{side}_products") / count - mean.outer(mean)


def _root(matrix: Tensor) -> Tensor:
    """Return the square root of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


class GAN(LightningModule):
    """Both networks, trained in turns on every batch by the non-saturating loss (arXiv 1406.2661).

    Args:
        num_classes: how many labels there are; the CLI asks the data.
        size: side of the images in pixels, a power of two.
        noise: numbers that a sample is drawn from.
        width: channels of both networks.
        learning_rate: of both optimizers.
    """

    FROM_DATA = ("num_classes",)
    EXPECT = "about 95 % of the samples recognised after 30 epochs, half a minute on two CPU cores"
    HEADLINES = {"sample_acc": ("samples recognised", ".1%"), "frechet": ("Frechet distance", ".2f")}

    def __init__(
        self, num_classes: int, size: int = 8, noise: int = 32, width: int = 32, learning_rate: float = 5e-4
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.num_classes, self.size, self.noise, self.learning_rate = num_classes, size, noise, learning_rate
        self.generator = Generator(num_classes, size, noise, width)
        self.discriminator = Discriminator(num_classes, size, width)
        self.judge = SmallNet(num_classes, 16).requires_grad_(False)
        self.sample_acc = MulticlassAccuracy(num_classes, average="micro")
        self.frechet = FrechetDistance(features=128)

    def setup(self, stage: str) -> None:
        """Train the judge on the real training images.

        Raises:
            DataError: the images have another size than the generator's.
        """
        real = self.trainer.datamodule.train_set
        found = tuple(real[0][0].shape)
        if found != (3, self.size, self.size) or self.size < 8 or self.size & (self.size - 1):
            raise DataError(
                f"the images have the shape {found} and samples (3, {self.size}, {self.size}); "
                "both need the same side, a power of two from 8 on: give it as --model.size, or other images by --data"
            )
        if stage == "fit":
            self.judge.requires_grad_()
            train_briefly(self.judge, real, JUDGE_EPOCHS, self.trainer.strategy.root_device).train()

    def sample(self, labels: Tensor) -> Tensor:
        """Return an image for each label."""
        return self.generator(torch.randn(len(labels), self.noise, device=self.device), labels)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Train the discriminator on real images and samples, then the generator on the same samples."""
        images, labels = batch
        for_generator, for_discriminator = self.optimizers()
        samples = self.sample(labels)

        self.toggle_optimizer(for_discriminator)
        real, fake = self.discriminator(images, labels), self.discriminator(samples.detach(), labels)
        judged = softplus(-real).mean() + softplus(fake).mean()
        self.update(for_discriminator, judged)
        self.untoggle_optimizer(for_discriminator)

        self.toggle_optimizer(for_generator)
        fooled = softplus(-self.discriminator(samples, labels)).mean()
        self.update(for_generator, fooled)
        self.untoggle_optimizer(for_generator)
        self.log_dict({"discriminator_loss": judged, "generator_loss": fooled})

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """Take one step, and one of its schedule unless the step was skipped."""
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        schedule = self.lr_schedulers()[self.optimizers().index(optimizer)]
        skipped = getattr(self.trainer.precision_plugin, "step_was_skipped", None)
        if skipped is None or not skipped(optimizer):
            schedule.step()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Let the judge look at a sample for each held-out image's label."""
        images, labels = batch
        samples = self.sample(labels)
        self.sample_acc(self.judge(samples), labels)
        self.frechet.update(self.judge.features(images), self.judge.features(samples))
        self.log("sample_acc", self.sample_acc, prog_bar=True)
        self.log("frechet", self.frechet, prog_bar=True)

    def configure_optimizers(self) -> tuple[list, list]:
        """Return an Adam for each network, whose rates fall to a twentieth."""
        networks = (self.generator, self.discriminator)
        optimizers = [torch.optim.Adam(each.parameters(), self.learning_rate, betas=(0.5, 0.99)) for each in networks]
        steps = int(self.trainer.estimated_stepping_batches)  # batches, unless max_steps counts both optimizers
        steps = max(1, steps // 2 if self.trainer.max_steps > 0 else steps)
        return optimizers, [torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.05, steps) for each in optimizers]


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    return run(GAN, Images, args, subclass_mode_data=True)


if __name__ == "__main__":
    start(main)
