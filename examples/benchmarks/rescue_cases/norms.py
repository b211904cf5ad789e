"""Cases around normalisation, most of them written by hand as research code does."""

from typing import Any

import torch
from torch import Tensor, nn

from .base import FEATURES, Case, Trunk, noisy, teacher


class Regression(Case):
    """A trunk, something in between, a head."""

    def __init__(self, **between: nn.Module) -> None:
        super().__init__()
        self.trunk = Trunk()
        for name, module in between.items():
            self.add_module(name, module)
        self.between, self.head = [*between], nn.Linear(32, 1)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, FEATURES, generator=generator)
        return x, noisy(teacher()(x), 0.3, generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        for name in self.between:
            x = self.get_submodule(name)(x)
        return self.head(x)


def loud(gain: float, width: int = 32) -> nn.Linear:
    """Return a layer with large weights."""
    layer = nn.Linear(width, width)
    with torch.no_grad():
        layer.weight.mul_(gain)
    return layer


class RootMeanSquare(nn.Module):
    """The norm of Llama and T5, without their cast to fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.weight


class SilentNorm(Regression):
    """A norm that turns into zero."""

    title = "mean of squares"
    mechanism = "squares above 65504 make the mean infinite and the normalised output zero, without any NaN"
    source = "pytorch/pytorch#133085, meta-llama/llama#1048"
    culprits = ("norm",)

    def __init__(self) -> None:
        super().__init__(loud=loud(2000), norm=RootMeanSquare())


class Shifted(nn.Module):
    """A small signal on a large offset."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * 0.1 + 500


class Offset(Regression):
    """An offset that the norm removes again, with what it made the signal lose."""

    title = "offset before a norm"
    mechanism = "at 500 neighbouring fp16 numbers are 0.25 apart (bf16: 2), more than the signal's deviation"
    source = "features in their own unit (Kelvin, hectopascal) before a norm; massive activations (arXiv 2402.17762)"
    culprits = ("shifted", "norm")
    format = "fp32"

    def __init__(self) -> None:
        super().__init__(shifted=Shifted(), norm=nn.LayerNorm(32))


class Outlier(Case):
    """One batch a million times too large, early in training."""

    title = "one outlier batch"
    mechanism = "one batch of 1e6 is inf in fp16: the step is skipped, the NaN stays in BatchNorm's running statistics"
    source = "pytorch/pytorch#88474, #90342"
    culprits = ("layers.0", "layers.1")
    must_move = False
    steps = 300

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (FEATURES, 64, 64):
            layers += [nn.Linear(inputs, 64), nn.BatchNorm1d(64), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(64, 1))

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return Regression.batch(generator)

    @classmethod
    def training(cls, generator: torch.Generator, count: int) -> list[Any]:
        batches = cls.batches(generator, count)
        x, target = batches[5]
        batches[5] = (1e6 * x, target)
        return batches

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
