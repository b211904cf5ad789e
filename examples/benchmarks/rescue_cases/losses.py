"""Cases in which the loss, or what feeds it, leaves the range of fp16."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import FEATURES, Case, Trunk, noisy, teacher

PRICE = 2e5


class Ranking(Case):
    """Pairwise ranking by dot products, with an epsilon that fp16 does not know."""

    title = "log-sigmoid with epsilon"
    mechanism = "1e-8 rounds to zero in fp16, so log(sigmoid(z) + 1e-8) is -inf once sigmoid(z) is 0"
    source = "the loss of Bayesian personalised ranking (arXiv 1205.2618) as recommenders write it"
    culprits = ("",)
    steps, rate = 300, 5e-3

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = Trunk(), Trunk()
        with torch.no_grad():
            self.user[-1].weight.fill_(1.7)
            self.item[-1].weight.fill_(1.7)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(128, 3, FEATURES, generator=generator)
        taste = teacher(outputs=4)(x[:, 0])
        good, bad = (teacher(outputs=4, seed=12)(x[:, i]) for i in (1, 2))
        margin = noisy((taste * (good - bad)).sum(-1), 0.5, generator)
        is_swapped = (margin < 0)[:, None, None]
        return torch.where(is_swapped, x[:, [0, 2, 1]], x), margin

    def forward(self, x: Tensor) -> Tensor:
        user, good, bad = self.user(x[:, 0]), self.item(x[:, 1]), self.item(x[:, 2])
        return torch.einsum("bi,bi->b", user, good) - torch.einsum("bi,bi->b", user, bad)

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        return -torch.log(torch.sigmoid(prediction) + 1e-8).mean()


class Prices(Case):
    """Regression on targets that nobody normalised."""

    title = "targets around 2e5"
    mechanism = "the head predicts prices around 2e5, above 65504"
    source = "house prices and other targets left in their own unit"
    culprits = ("head",)

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Linear(32, 1)
        with torch.no_grad():
            self.head.bias.fill_(PRICE)
            self.head.weight.mul_(PRICE / 4)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, FEATURES, generator=generator)
        return x, PRICE * (1 + 0.25 * noisy(teacher()(x), 0.3, generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = (prediction - target) / PRICE
        return (error * error).mean()


class Likelihood(Case):
    """Regression that predicts its own uncertainty."""

    title = "variance of a likelihood"
    mechanism = "a standard deviation of 1e-4 is fine in fp16, its square underflows, and the error is divided by it"
    source = "heteroscedastic regression (arXiv 1703.04977), on targets with a noise of 1e-4"
    culprits = ("",)
    steps = 300

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Linear(32, 2)
        with torch.no_grad():
            self.head.bias[1] = -6.5

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, FEATURES, generator=generator)
        return x, noisy(1e-4 * teacher()(x), 1e-4, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = 1e-4 * prediction[:, :1] - target
        deviation = torch.sigmoid(prediction[:, 1:])
        variance = deviation * deviation
        return (error * error / (2 * variance) + torch.log(1e4 * deviation)).mean()


class SoftDice(Case):
    """Segmentation of 384 x 384 pixels, decoded from patches of 16 x 16."""

    title = "soft dice"
    mechanism = "the sums over 147,456 pixels exceed 65504, and inf / inf is NaN"
    source = "qubvel-org/segmentation_models.pytorch#463"
    culprits = ("",)

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(depth=1), nn.Linear(32, 256)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(1, 576, FEATURES, generator=generator)
        value = noisy(teacher(outputs=256, seed=13)(x), 0.3, generator)
        return x, (value > -0.5).float().flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x)).flatten(1)

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        mask = torch.sigmoid(prediction)
        shared = torch.einsum("bi,bi->b", mask, target)
        both = torch.einsum("bi,bi->b", mask, mask) + torch.einsum("bi,bi->b", target, target)
        return (1 - 2 * shared / (both + 1)).mean()


SYMBOLS, FRAMES_PER_SYMBOL = 20, 5


class Alignment(Case):
    """Frames aligned to a string as CTC does it, by products of probabilities over 100 frames."""

    title = "forward algorithm"
    mechanism = "the probability of a path over 100 frames, about 1e-30, underflows to zero, whose logarithm is -inf"
    source = "the forward algorithm without logarithms; Rabiner's tutorial on hidden Markov models (1989) scales it"
    culprits = ("",)

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(depth=2), nn.Linear(32, 2)
        stay, advance = torch.eye(SYMBOLS), torch.eye(SYMBOLS).roll(1, 1)
        advance[-1, 0] = 0
        self.register_buffer("transitions", 0.8 * stay + 0.2 * advance)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        text = torch.randint(2, (8, SYMBOLS), generator=generator)
        spoken = text.repeat_interleave(FRAMES_PER_SYMBOL, 1)
        x = torch.randn(*spoken.shape, FEATURES, generator=generator)
        return torch.where((teacher()(x) > 0)[..., 0, None] == spoken.bool()[..., None], x, -x), text

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        probability = prediction.softmax(-1)
        emitted = torch.einsum("btk,bsk->tbs", probability, F.one_hot(target, 2).to(probability.dtype))
        alpha = emitted[0] * (torch.arange(SYMBOLS, device=emitted.device) == 0)
        for frame in emitted[1:]:
            alpha = (alpha @ self.transitions) * frame
        return -torch.log(alpha[:, -1]).mean() / len(emitted)
