"""Train a small network in bf16 for int8: torch's fake quantization in fp32, on scikit-learn's digits.

    python examples/quantization.py fit --config examples/configs/quantization.yaml

    --trainer.plugins=PerLayerPrecision --trainer.plugins.policy=fp32       the same without bf16
    --model.learn_from=1000                                                 no fake quantization: int8 after training
    --data=CIFAR10 --data.path=/path/to/cifar10                             other data

The data are 1797 real images. The network is trained with rounding to int8 in its forward; at every validation a copy
of it is converted to int8 and judged as well, on the CPU, where torch's int8 kernels are.
"""

import warnings
from collections.abc import Sequence

import torch
from shared.common import ExampleCLI, run, start
from shared.data import CIFAR10, Digits, ImageFolder, Images  # noqa: F401  the CLI finds these by name
from shared.small_models import SmallClassifier, SmallNet
from torch import Tensor, nn
from torch.ao import quantization
from torchmetrics.classification import MulticlassAccuracy

QUIET = (
    "torch.ao.quantization is deprecated",  # torch itself has no other way for eager mode
    r"torch.quantize_per_tensor, torch.quantize_per_channel",  # by what it converts to
)
FUSED = [["features.0", "features.1", "features.2"], ["features.4", "features.5", "features.6"]]


class QuantizedClassifier(SmallClassifier):
    """A small network with fake quantization of weights and activations, and its int8 copy.

    Args:
        num_classes: how many labels there are; the CLI asks the data.
        width: channels of the first convolution.
        bits: of the weights; the int8 copy holds them in 8 bits in any case.
        learn_from: first epoch with fake quantization; until then only the ranges are watched.
        learning_rate: peak of the cycle.
    """

    EXPECT = "about 99 % in int8 after 40 epochs, half a minute on two CPU cores"
    HEADLINES = SmallClassifier.HEADLINES | {
        "int8_acc": ("int8 accuracy", ".2%"),
        "agreement": ("same answer in int8", ".2%"),
    }

    def __init__(
        self, num_classes: int, width: int = 8, bits: int = 8, learn_from: int = 4, learning_rate: float = 1e-2
    ) -> None:
        super().__init__(prepared(num_classes, width, bits), num_classes, learning_rate)
        self.learn_from, self.shape = learn_from, (num_classes, width, bits)
        self.model.apply(quantization.disable_fake_quant)
        self.int8_acc = MulticlassAccuracy(num_classes, average="micro")
        self.agreement = MulticlassAccuracy(num_classes, average="micro")

    def on_train_epoch_start(self) -> None:
        """Switch the rounding on when its epoch has come."""
        rounds = self.current_epoch >= self.learn_from
        self.model.apply(quantization.enable_fake_quant if rounds else quantization.disable_fake_quant)

    def on_validation_epoch_start(self) -> None:
        """Convert a copy, and let the ranges stay as training saw them."""
        self.model.apply(quantization.disable_observer)
        self.int8 = [int8_copy(self.model, *self.shape)]  # in a list, not to be a part of this module

    def on_validation_epoch_end(self) -> None:
        """Watch ranges again."""
        self.model.apply(quantization.enable_observer)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure the accuracy of both and how often they say the same."""
        images, labels = batch
        logits = self.model(images)
        answers = self.int8[0](images.cpu()).to(self.device)
        self.val_acc(logits, labels)
        self.int8_acc(answers, labels)
        self.agreement(answers, logits.argmax(1))
        self.log_dict({name: getattr(self, name) for name in self.HEADLINES}, prog_bar=True)


def prepared(num_classes: int, width: int, bits: int) -> nn.Module:
    """Return a network with norms fused into the convolutions and fake quantization everywhere."""
    network = nn.Sequential(quantization.QuantStub(), SmallNet(num_classes, width), quantization.DeQuantStub())
    limit = 2 ** (bits - 1)
    activation = quantization.FakeQuantize.with_args(
        observer=quantization.MovingAverageMinMaxObserver, quant_min=0, quant_max=127, dtype=torch.quint8
    )  # 7 bits: with 8, sums of products saturate in the kernels of older CPUs
    weight = quantization.FakeQuantize.with_args(
        observer=quantization.MovingAveragePerChannelMinMaxObserver,
        quant_min=-limit,
        quant_max=limit - 1,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    network.qconfig = quantization.QConfig(activation, weight)
    quantization.fuse_modules_qat(network[1], FUSED, inplace=True)
    return quantization.prepare_qat(network, inplace=True)


def int8_copy(model: nn.Module, num_classes: int, width: int, bits: int) -> nn.Module:
    """Return a converted copy on the CPU of a network that ``prepared`` made with the same arguments."""
    copy = prepared(num_classes, width, bits)
    copy.load_state_dict(model.state_dict())
    return quantization.convert(copy.cpu().eval(), inplace=True)


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    return run(QuantizedClassifier, Images, args, subclass_mode_data=True)


if __name__ == "__main__":
    start(main)
