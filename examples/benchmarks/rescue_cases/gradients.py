"""Cases in which the forward pass is sound and gradients fall below what fp16 can represent."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import FEATURES, Case, Trunk, falling, noisy, teacher


def parts(name: str) -> list[str]:
    """Return the names of a small network and of its layers."""
    return [name, *(f"{name}.{index}" for index in range(5))]


def tower() -> nn.Sequential:
    """Return a small network of its own."""
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1))


class TwoTasks(Case):
    """Three networks under one loss, whose terms weigh 1e6, 1 and 1e-6."""

    title = "two loss weights"
    mechanism = "no loss scale serves gradients that differ by 1e12: the large ones pin it, the small ones vanish"
    source = "multi-task losses in their own units (arXiv 1705.07115)"
    culprits = ("", *parts("heavy"), *parts("light"))
    epsilon = 1e-20

    def __init__(self) -> None:
        super().__init__()
        self.heavy, self.light = tower(), tower()
        self.trunk, self.head = Trunk(), nn.Linear(32, 1)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, FEATURES, generator=generator)
        return x, noisy(teacher(outputs=3)(x), 0.3, generator)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.heavy(x), self.light(x), self.head(self.trunk(x))], -1)

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        heavy, light, plain = (F.mse_loss(prediction[:, i], target[:, i]) for i in range(3))
        return 1e6 * heavy + 1e-6 * light + plain

    def quality(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target)


class Unrolled(nn.Module):
    """A step that is taken again and again, and halves the gradient each time."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.norm, self.up, self.down = steps, nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = x / 2 + x.detach() / 2
            x = x + self.down(torch.tanh(self.up(self.norm(x)))) / self.steps
        return x


class Recurrence(Case):
    """A latent state that is encoded once and unrolled 40 times."""

    title = "unrolled recurrence"
    mechanism = "the gradient is halved at each of 40 steps and vanishes in fp16 before it reaches the encoder"
    source = "MuZero (arXiv 1911.08265) halves the gradient at each unrolled step of its dynamics"
    culprits = ("", "encoder", "unrolled", "unrolled.up", "unrolled.down", "unrolled.norm")
    epsilon = 1e-20

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.unrolled = nn.Linear(FEATURES, 32), Unrolled(40)
        self.trunk, self.head = Trunk(32), nn.Linear(32, 1)
        nn.init.zeros_(self.encoder.weight)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, FEATURES, generator=generator)
        return x, noisy(teacher()(x), 0.3, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(self.unrolled(self.encoder(x))))


class Pooling(nn.Module):
    """The mean over a bag of words, whose gradient is shrunk."""

    def forward(self, words: Tensor) -> Tensor:
        weights = torch.full((len(words), 1, words.shape[1]), 1 / words.shape[1], device=words.device)
        mean = (weights @ words)[:, 0]
        return 0.1 * mean + 0.9 * mean.detach()


class Words(Case):
    """A network on features beside a bag of words, whose embedding has sparse gradients."""

    title = "sparse embedding"
    mechanism = "the gradient of one word among 256, in a loss that weighs 1e-8, is below 2^-25 at a scale of 65536"
    source = "CogView (arXiv 2105.13290) and GLM-130B (arXiv 2210.02414) shrink the embedding's gradient to a tenth"
    culprits = ("pooling", "embedding")
    must_move = False
    rate, steps = 0.05, 300
    vocabulary, length = 64, 256

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.pooling = nn.Embedding(self.vocabulary, 32, sparse=True), Pooling()
        self.mixed, self.trunk, self.head = nn.Linear(32, 32), Trunk(), nn.Linear(32, 1)
        nn.init.zeros_(self.embedding.weight)

    @classmethod
    def batch(cls, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x = torch.randn(64, FEATURES, generator=generator)
        topics = torch.randn(64, cls.vocabulary, generator=generator).softmax(-1)
        words = torch.multinomial(topics, cls.length, True, generator=generator)
        worth = torch.randn(cls.vocabulary, generator=torch.Generator().manual_seed(7))
        value = worth[words].mean(-1, keepdim=True)
        return (x, words), noisy(teacher()(x) + 6 * value, 0.3, generator)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, words = inputs
        return self.head(self.trunk(x) + self.mixed(self.pooling(self.embedding(words))))

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 1e-8 * F.mse_loss(prediction, target)

    def quality(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.parameters(), lr=self.rate, eps=1e-20)


class Adversarial(Case):
    """Two networks against each other, one of which sees through the other from the start.

    Both rates fall to zero and the discriminator's is small, so that the game ends where it ends in each format: with a
    discriminator that learns fast, bf16 and fp32 differ from each other as two seeds do.
    """

    title = "saturated discriminator"
    mechanism = "a discriminator that is sure leaves the generator a gradient of e^-30, which vanishes in fp16"
    source = "the gradient of the saturating loss (arXiv 1406.2661) under a trained discriminator: arXiv 1701.04862"
    optimizer_count = 2
    steps = 400
    culprits = ("", *parts("generator"), *parts("discriminator"))

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 192), nn.GELU(), nn.Linear(192, 192), nn.GELU(), nn.Linear(192, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1))
        with torch.no_grad():
            self.generator[-1].weight.mul_(0.1)
            self.generator[-1].bias.mul_(0.1)
        self.convince()

    def convince(self) -> None:
        """Train the discriminator alone, until it is sure of every sample."""
        optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=3e-3)
        for _ in range(100):
            noise, real = torch.randn(128, 8), 4 + torch.randn(128, 8)
            samples = torch.cat([real, self(noise).detach()])
            judged = self.discriminator(samples + 2 * torch.randn_like(samples))
            truth = torch.cat([torch.ones(128, 1), torch.zeros(128, 1)])
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(judged, truth).backward()
            optimizer.step()
        with torch.no_grad():
            factor = 35 / -self.discriminator(self(noise)).mean()
            self.discriminator[-1].weight.mul_(factor)
            self.discriminator[-1].bias.mul_(factor)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        noise, real = torch.randn(2, 128, 8, generator=generator)
        return noise, 4 + real

    def forward(self, noise: Tensor) -> Tensor:
        return 6 * torch.tanh(self.generator(noise))

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.discriminator(prediction).mean()

    def quality(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction.mean(0), target.mean(0)) + F.mse_loss(prediction.std(0), target.std(0))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        noise, real = batch
        generator, discriminator = self.optimizers()
        fake = self(noise)
        judged = self.discriminator(torch.cat([real, fake.detach()]))
        truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(fake), 1)]).to(judged.device)
        self.stepped(discriminator, F.binary_cross_entropy_with_logits(judged, truth))
        judged = self.discriminator(fake)
        self.stepped(generator, -F.binary_cross_entropy_with_logits(judged, torch.zeros_like(judged)))
        for schedule in self.lr_schedulers():
            schedule.step()

    def stepped(self, optimizer: Any, loss: Tensor) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.Adam(self.generator.parameters(), lr=5e-4, eps=1e-20, betas=(0.5, 0.99)),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-3, eps=1e-20, betas=(0.5, 0.99)),
        ]
        share = partial(falling, steps=self.steps)
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
