"""Healthy models: fp16 trains them as well as fp32 does, and nothing should move."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import FEATURES, Case, Feedforward, Trunk, noisy, teacher


class Healthy(Case):
    """Regression by a plain network."""

    title = "MLP"
    must_move = False

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(), nn.Linear(32, 1)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, FEATURES, generator=generator)
        return x, noisy(teacher()(x), 0.3, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


class TinyWeight(Healthy):
    """A loss that weighs next to nothing: the loss scale makes up for it."""

    title = "tiny loss weight"
    epsilon = 1e-16

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 1e-4 * super().criterion(prediction, target)


class Block(nn.Module):
    """Two convolutions with norms around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class ResNet(Case):
    """Classification of small images."""

    title = "ResNet"
    must_move = False
    steps = 150

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.blocks, self.head = nn.Sequential(Block(16), Block(16)), nn.Linear(16, 4)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        patterns = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(31))
        label = torch.randint(4, (32,), generator=generator)
        return 0.5 * patterns[label] + torch.randn(32, 3, 8, 8, generator=generator), label

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(self.blocks(x).mean((2, 3)))

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target)


class GPTBlock(nn.Module):
    """Attention and a feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feedforward = Feedforward(width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            each.unflatten(-1, (2, -1)).transpose(1, 2) for each in self.qkv(self.norm(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.feedforward(x + self.out(attended.transpose(1, 2).flatten(2)))


class GPT(Case):
    """A language model on text from a Markov chain."""

    title = "GPT"
    must_move = False
    vocabulary, length = 16, 24

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(self.vocabulary, 32), nn.Embedding(self.length, 32)
        self.blocks, self.norm = nn.Sequential(GPTBlock(32), GPTBlock(32)), nn.LayerNorm(32)
        self.head = nn.Linear(32, self.vocabulary)

    @classmethod
    def batch(cls, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chain = (2 * torch.randn(cls.vocabulary, cls.vocabulary, generator=torch.Generator().manual_seed(41))).softmax(
            -1
        )
        text = [torch.randint(cls.vocabulary, (16,), generator=generator)]
        for _ in range(cls.length):
            text.append(torch.multinomial(chain[text[-1]], 1, generator=generator)[:, 0])
        return torch.stack(text[:-1], 1), torch.stack(text[1:], 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(x)))

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction.flatten(0, 1), target.flatten())


class Contrastive(Case):
    """Pairs of views, told apart by cosines times 100."""

    title = "contrastive"
    must_move = False

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Trunk(), Trunk()

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 1, FEATURES, generator=generator)
        return x + 0.3 * torch.randn(64, 2, FEATURES, generator=generator), torch.arange(64)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.normalize(self.left(x[:, 0]), dim=-1), F.normalize(self.right(x[:, 1]), dim=-1)
        return 100 * left @ right.T

    def criterion(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (F.cross_entropy(prediction, target) + F.cross_entropy(prediction.T, target)) / 2
