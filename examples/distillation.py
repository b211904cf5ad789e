"""Distil a frozen bf16 teacher into a very small student, each with formats of its own, on scikit-learn's digits.

    python examples/distillation.py fit --config examples/configs/distillation.yaml

    --model.weight=0                                                     the student alone, from the labels
    --trainer.plugins=PerLayerPrecision --trainer.plugins.policy=bf16    the soft targets in bf16, too
    --model.teacher=lightning_logs/version_0/checkpoints/epoch=4-step=110.ckpt   image_classification.py's ResNet-18

The data are 1797 real images. Without a checkpoint the teacher is trained in fp32 first, in a few seconds.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from image_classification import build
from shared.common import ExampleCLI, run, start
from shared.data import CIFAR10, DataError, Digits, ImageFolder, Images  # noqa: F401  the CLI finds these by name
from shared.small_models import SmallClassifier, SmallNet, train_briefly
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, softmax
from torchmetrics.classification import MulticlassAccuracy

TEACHER_EPOCHS = 12


class Distillation(SmallClassifier):
    """A student ``model`` that learns a teacher's softened outputs along with the labels (arXiv 1503.02531).

    Args:
        num_classes: how many labels there are; the CLI asks the data.
        small_images: what a ResNet-18 from a checkpoint was trained on; the CLI asks the data.
        teacher: a checkpoint of image_classification.py with its default ResNet-18; None trains a small network first.
        width: channels of the student's first convolution.
        temperature: by which the logits of both are divided.
        weight: of the soft targets in the loss, from 0 to 1; the labels have the rest.
        learning_rate: peak of the cycle.
    """

    FROM_DATA = ("num_classes", "small_images")
    EXPECT = "a student at about 96 % after 80 epochs, half a minute on two CPU cores"
    HEADLINES = {
        "val_acc": ("student's accuracy", ".2%"),
        "teacher_acc": ("teacher's accuracy", ".2%"),
        "agreement": ("agreement of both", ".2%"),
    }

    def __init__(
        self,
        num_classes: int,
        small_images: bool,
        teacher: str | None = None,
        width: int = 3,
        temperature: float = 4.0,
        weight: float = 0.9,
        learning_rate: float = 1e-2,
    ) -> None:
        super().__init__(SmallNet(num_classes, width), num_classes, learning_rate)
        self.given, self.temperature, self.weight = teacher is not None, temperature, weight
        self.teacher = resnet18_from(teacher, num_classes, small_images) if teacher else SmallNet(num_classes, 32)
        self.teacher.requires_grad_(False).eval()
        self.teacher_acc = MulticlassAccuracy(num_classes, average="micro")
        self.agreement = MulticlassAccuracy(num_classes, average="micro")

    def setup(self, stage: str) -> None:
        """Train the teacher, unless it was given."""
        if stage == "fit" and not self.given:
            train = self.trainer.datamodule.train_set
            train_briefly(self.teacher.requires_grad_(), train, TEACHER_EPOCHS, self.trainer.strategy.root_device)

    def criterion(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted loss of soft targets and labels."""
        with torch.no_grad():
            taught = self.teacher(images)
        logits = self.model(images)
        soft = soft_target_loss(logits, taught, self.temperature)
        return self.weight * soft + (1 - self.weight) * cross_entropy(logits, labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure the accuracy of both and how often they say the same."""
        images, labels = batch
        logits, taught = self.model(images), self.teacher(images)
        for name, said, truth in (
            ("val_acc", logits, labels),
            ("teacher_acc", taught, labels),
            ("agreement", logits, taught.argmax(1)),
        ):
            metric = getattr(self, name)
            metric(said, truth)
            self.log(name, metric, prog_bar=name == "val_acc")


def soft_target_loss(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Return the Kullback-Leibler divergence of the softened outputs, times temperature**2, mean over the batch."""
    target, guess = softmax(taught / temperature, dim=1), log_softmax(logits / temperature, dim=1)
    return temperature**2 * nn.functional.kl_div(guess, target, reduction="batchmean")


def resnet18_from(path: str, num_classes: int, small_images: bool) -> nn.Module:
    """Return the ResNet-18 of a checkpoint that image_classification.py wrote."""
    needed = "give a checkpoint that image_classification.py wrote of its ResNet-18 on these data as --model.teacher"
    if not Path(path).expanduser().is_file():
        raise DataError(f"no file {path!r}; {needed}")
    teacher = build("resnet18", num_classes, small_images)
    try:
        state = torch.load(Path(path).expanduser(), map_location="cpu", weights_only=True)["state_dict"]
        teacher.load_state_dict({n.removeprefix("model."): w for n, w in state.items() if n.startswith("model.")})
    except Exception as error:
        raise DataError(f"{path!r} holds no ResNet-18 for {num_classes} classes; {needed}") from error
    return teacher


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # the teacher, on purpose
    return run(Distillation, Images, args, subclass_mode_data=True)


if __name__ == "__main__":
    start(main)
