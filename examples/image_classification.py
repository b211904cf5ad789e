"""Train torchvision's ResNet-18, ResNet-50 or Inception v3 with a number format for every layer, on CPU or GPU.

    python examples/image_classification.py fit --config examples/configs/image_classification.yaml

Any option of the Trainer, the model or the data can follow, for example --trainer.max_epochs=5, or

    --trainer.precision=bf16-mixed --trainer.plugins=null              Lightning's own mixed precision, to compare
    --trainer.plugins=PerLayerPrecision --trainer.plugins.policy=p.yaml         the same run under your own policy
    --config examples/configs/cifar10.yaml --data.path=/path/to/cifar10                   other data, after --config
    --config examples/configs/resnet50_imagenet.yaml --data.path=/path/to/imagenet           ResNet-50, after --config
"""

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from shared.common import ExampleCLI, one_cycle, run, start
from shared.data import CIFAR10, DataError, Digits, ImageFolder, Images  # noqa: F401  the CLI finds these by name
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import inception_v3, resnet18, resnet50

Architecture = Literal["resnet18", "resnet50", "inception_v3"]
INCEPTION_SIZE = {True: 299, False: 75}  # smallest side in pixels, with and without the auxiliary head
AUXILIARY_WEIGHT = 0.4  # of the second head's loss, usual for Inception v3


def build(architecture: Architecture, num_classes: int, small_images: bool, auxiliary_head: bool = True) -> nn.Module:
    """Return torchvision's network with random weights.

    For small images the first layers of a ResNet keep the size of the image, where torchvision's divide it by four.

    Raises:
        DataError: Inception cannot take small images.
    """
    if architecture == "inception_v3":
        if small_images:
            raise DataError(
                f"inception_v3 takes images of {INCEPTION_SIZE[auxiliary_head]} pixels a side or more, "
                "and these are 8x8 or 32x32; "
                "give --model.architecture=resnet18 or resnet50, or larger images by --data=ImageFolder"
            )
        return inception_v3(num_classes=num_classes, aux_logits=auxiliary_head, init_weights=True)
    model = {"resnet18": resnet18, "resnet50": resnet50}[architecture](num_classes=num_classes)
    if small_images:
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


class ImageClassifier(LightningModule):
    """A network for images, trained by SGD with Nesterov momentum and one cycle of the learning rate.

    Args:
        num_classes: how many labels there are; the CLI asks the data.
        small_images: whether the first layers keep the size of the image; the CLI asks the data.
        architecture: which network.
        auxiliary_head: whether Inception v3 trains with its second head, which needs images of 299 pixels.
        learning_rate: peak of the cycle.
        weight_decay: L2 penalty on every parameter.
        label_smoothing: share of each label that is spread over all classes, in training.
    """

    FROM_DATA = ("num_classes", "small_images")
    EXPECT = "98 to 99 % validation accuracy after 12 epochs, one to two minutes on two CPU cores"
    HEADLINES = {"val_acc": ("validation accuracy", ".2%")}

    def __init__(
        self,
        num_classes: int,
        small_images: bool,
        architecture: Architecture = "resnet18",
        auxiliary_head: bool = True,
        learning_rate: float = 0.05,
        weight_decay: float = 5e-4,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        model = build(architecture, num_classes, small_images, auxiliary_head)
        # 16-bit convolutions are fastest on this layout, on tensor cores as on CPUs.
        self.model = model.to(memory_format=torch.channels_last)
        self.smallest = INCEPTION_SIZE[auxiliary_head] if architecture == "inception_v3" else 1
        self.learning_rate, self.weight_decay, self.label_smoothing = learning_rate, weight_decay, label_smoothing
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        return self.model(images)

    def setup(self, stage: str) -> None:
        """Check the size of the images.

        Raises:
            DataError: they are too small for Inception.
        """
        size = getattr(self.trainer.datamodule, "size", self.smallest)
        if size < self.smallest:
            raise DataError(
                f"inception_v3 takes images of {self.smallest} pixels a side or more, and these have {size}; "
                f"give --data.size={self.smallest}, or --model.auxiliary_head=false, which takes 75 or more"
            )

    def criterion(self, output: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """Return the cross entropy; of Inception's (logits, auxiliary logits) in training that of both."""
        if isinstance(output, tuple):
            logits, auxiliary = output
            return self.criterion(logits, labels) + AUXILIARY_WEIGHT * self.criterion(auxiliary, labels)
        return nn.functional.cross_entropy(output, labels, label_smoothing=self.label_smoothing)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of images and labels."""
        images, labels = batch
        loss = self.criterion(self.model(images), labels)
        self.log("train_loss", loss)  # not on the progress bar: that would wait for the GPU after every batch
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure loss and accuracy."""
        images, labels = batch
        logits = self.model(images)
        self.val_acc(logits, labels)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), prog_bar=True, sync_dist=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> dict:
        """Return SGD and a schedule that moves with every optimizer step."""
        optimizer = torch.optim.SGD(
            self.parameters(), self.learning_rate, momentum=0.9, weight_decay=self.weight_decay, nesterov=True
        )
        return one_cycle(self, optimizer, self.learning_rate)


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    return run(ImageClassifier, Images, args, subclass_mode_data=True)


if __name__ == "__main__":
    start(main)
