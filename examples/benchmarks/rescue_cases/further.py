"""Cases beyond the listed ones, with mechanisms of their own."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import FEATURES, Case, Trunk, noisy, teacher
from .norms import Regression, loud


class FastVariance(nn.Module):
    """A layer norm in one pass: the mean of squares less the square of the mean."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x * x).mean(-1, keepdim=True) - mean * mean
        return (x - mean) * torch.rsqrt(variance.clamp(min=0) + 1e-5)


class Cancellation(Regression):
    """A variance that is the small difference of two large numbers."""

    title = "one-pass variance"
    mechanism = "E[x^2] - E[x]^2 cancels: at a mean of 30 both are 900 and fp16 knows them to 0.5, bf16 to 4"
    source = "use_fast_variance of flax.linen.LayerNorm, whose documentation calls it less stable numerically"
    culprits = ("norm",)
    format = "fp32"

    def __init__(self) -> None:
        super().__init__(linear=nn.Linear(32, 32), norm=FastVariance())
        with torch.no_grad():
            self.linear.bias.fill_(30)


class Quiet(nn.Module):
    """Features in a unit that makes them tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * 2e-5


class Unit(nn.Module):
    """Division by the length and an epsilon."""

    def forward(self, x: Tensor) -> Tensor:
        length = torch.sqrt(torch.einsum("bi,bi->b", x, x))[:, None]
        return x / (length + 1e-8)


class ShortVectors(Regression):
    """Vectors so short that their length is zero."""

    title = "length of short vectors"
    mechanism = "the square of a vector of length 1e-4 underflows, the epsilon of 1e-8 with it, and x / 0 is left"
    source = "x / (x.norm() + 1e-8), the usual hand-written cosine similarity"
    culprits = ("unit",)
    steps = 300

    def __init__(self) -> None:
        super().__init__(quiet=Quiet(), unit=Unit())


class Decorrelated(Regression):
    """Regression whose features are kept uncorrelated by a second term of the loss."""

    title = "covariance"
    mechanism = "the products of features add up to more than 65504 before they are divided by the size of the batch"
    source = "the covariance term of VICReg (arXiv 2105.04906), Gram matrices of style losses (arXiv 1508.06576)"
    culprits = ("",)

    def __init__(self) -> None:
        super().__init__(loud=loud(300))

    def forward(self, x: Tensor) -> Tensor:
        x = self.loud(self.trunk(x))
        return torch.cat([self.head(F.layer_norm(x, x.shape[-1:])), x], -1)

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        features = prediction[:, 1:]
        products = torch.einsum("bi,bj->ij", features, features) / len(features)
        others = products * (1 - torch.eye(len(products), device=products.device))
        return (
            F.mse_loss(prediction[:, :1], target)
            + 0.1 * (others * others / products.diagonal().outer(products.diagonal())).mean()
        )

    def quality(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction[:, :1], target)


class Clock(nn.Module):
    """Features of the time of day in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 32)
        with torch.no_grad():
            self.linear.bias.mul_(86400)

    def forward(self, seconds: Tensor) -> Tensor:
        return F.gelu(self.linear(seconds) / 21600)


class TimeOfDay(Case):
    """Features beside a time stamp in seconds."""

    title = "time stamps"
    mechanism = "a day has 86,400 seconds, and what is above 65504 is inf as soon as a layer takes it in"
    source = "time stamps and counters as they come, before anybody scales them"
    culprits = ("clock.linear", "clock")

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.clock, self.head = Trunk(FEATURES + 32), Clock(), nn.Linear(32, 1)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x = torch.randn(64, FEATURES, generator=generator)
        seconds = 86400 * torch.rand(64, 1, generator=generator)
        value = teacher()(x) + torch.sin(2 * torch.pi * seconds / 86400)
        return (x, seconds), noisy(value, 0.3, generator)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, seconds = inputs
        return self.head(self.trunk(torch.cat([x, self.clock(seconds)], -1)))


class Sum(nn.Module):
    """The sum over the members of a set."""

    def forward(self, members: Tensor) -> Tensor:
        return (torch.ones(len(members), 1, members.shape[1], device=members.device) @ members)[:, 0]


class Sets(Case):
    """Regression on sets of 512 members."""

    title = "sum over a set"
    mechanism = "the sum over 512 members exceeds 65504 before the norm that follows"
    source = "Deep Sets (arXiv 1703.06114) and sum aggregation in graph networks (arXiv 1810.00826)"
    culprits = ("sum",)

    def __init__(self) -> None:
        super().__init__()
        self.member, self.sum, self.norm = nn.Linear(FEATURES, 32), Sum(), nn.LayerNorm(32)
        self.trunk, self.head = Trunk(32), nn.Linear(32, 1)
        with torch.no_grad():
            self.member.weight.mul_(1500)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 1, FEATURES, generator=generator)
        return x + torch.randn(32, 512, FEATURES, generator=generator), noisy(teacher()(x[:, 0]), 0.3, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(self.norm(self.sum(F.relu(self.member(x))))))
