"""Prune a small network while it trains, under a format for every layer, on scikit-learn's digits.

    python examples/pruning.py fit --config examples/configs/pruning.yaml

    --trainer.plugins=PerLayerPrecision --trainer.plugins.policy=fp32       the same without 16 bits
    --trainer.precision=bf16-true --trainer.plugins=null                    weights stored in bf16: ranked in bf16, too
    --data=CIFAR10 --data.path=/path/to/cifar10                             other data

The data are 1797 real images. Lightning's ModelPruning zeroes the smallest weights after each of the first epochs; in
the last ones the remaining weights adapt.
"""

from collections.abc import Sequence

import torch
from shared.common import ExampleCLI, run, start
from shared.data import CIFAR10, Digits, ImageFolder, Images  # noqa: F401  the CLI finds these by name
from shared.small_models import SmallClassifier, SmallNet
from torch import Tensor, nn


class PrunedClassifier(SmallClassifier):
    """A small network that logs which share of its weights is zero.

    Args:
        num_classes: how many labels there are; the CLI asks the data.
        width: channels of the first convolution.
        learning_rate: peak of the cycle.
    """

    EXPECT = "about 99 % with nine weights in ten zero after 40 epochs, half a minute on two CPU cores"
    HEADLINES = SmallClassifier.HEADLINES | {"sparsity": ("zero weights", ".1%")}

    def __init__(self, num_classes: int, width: int = 32, learning_rate: float = 5e-3) -> None:
        super().__init__(SmallNet(num_classes, width), num_classes, learning_rate)

    def on_validation_epoch_end(self) -> None:
        """Log the share of the weights of convolutions and linear layers that is zero."""
        self.log("sparsity", sparsity(self.model))


def sparsity(model: nn.Module) -> Tensor:
    """Return the share of zeros in the weights of all layers but norms, as they take part in the forward."""
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return torch.cat([(layer.weight == 0).flatten() for layer in layers]).float().mean()


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    return run(PrunedClassifier, Images, args, subclass_mode_data=True)


if __name__ == "__main__":
    start(main)
