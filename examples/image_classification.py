"""Train torchvision's ResNet-18 with a number format for every layer, on a CPU or on a GPU.

    python examples/image_classification.py fit --config examples/configs/image_classification.yaml

Any option of the Trainer, the model or the data can follow, for example --trainer.max_epochs=5, or

    --trainer.precision=bf16-mixed --trainer.plugins=null              Lightning's own mixed precision, to compare
    --trainer.plugins=PerLayerPrecision --trainer.plugins.policy=p.yaml         the same run under your own policy
    --config examples/configs/cifar10.yaml --data.path=/path/to/cifar10                   other data, after --config
"""

from collections.abc import Sequence

import torch
from common import ExampleCLI, run, start
from data import CIFAR10, Digits, ImageFolder, Images  # noqa: F401  the CLI finds these by name
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import resnet18


def small_image_resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 whose first layers keep the size of the image, where torchvision's divide it by four."""
    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class ImageClassifier(LightningModule):
    """ResNet-18 trained by SGD with Nesterov momentum and one cycle of the learning rate.

    Args:
        num_classes: how many labels there are; the CLI asks the data.
        small_images: whether the first layers keep the size of the image; the CLI asks the data.
        learning_rate: peak of the cycle.
        weight_decay: L2 penalty on every parameter.
        label_smoothing: share of each label that is spread over all classes, in training.
    """

    FROM_DATA = ("num_classes", "small_images")
    HEADLINES = {"val_acc": ("validation accuracy", ".2%")}

    def __init__(
        self,
        num_classes: int,
        small_images: bool,
        learning_rate: float = 0.05,
        weight_decay: float = 5e-4,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        model = small_image_resnet18(num_classes) if small_images else resnet18(num_classes=num_classes)
        # 16-bit convolutions are fastest on this layout, on tensor cores as on CPUs.
        self.model = model.to(memory_format=torch.channels_last)
        self.learning_rate, self.weight_decay, self.label_smoothing = learning_rate, weight_decay, label_smoothing
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of images and labels."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss)  # not on the progress bar: that would wait for the GPU after every batch
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure loss and accuracy."""
        images, labels = batch
        logits = self.model(images)
        self.val_acc(logits, labels)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> dict:
        """Return SGD and a schedule that moves with every optimizer step."""
        optimizer = torch.optim.SGD(
            self.parameters(), self.learning_rate, momentum=0.9, weight_decay=self.weight_decay, nesterov=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    return run(ImageClassifier, Images, args, subclass_mode_data=True)


if __name__ == "__main__":
    start(main)
