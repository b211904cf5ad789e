"""Four small models, and data for them, on which a plan's promises are checked.

A CNN, a GPT, a recurrent net and a recommender: each has a task that it can learn from data made here, and is trained
for some steps before anything is measured of it.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional


class Learner(pl.LightningModule):
    """A module with a task of its own; ``batches`` gives data for it."""

    learning_rate = 3e-3

    @staticmethod
    def batches(count: int, seed: int) -> list[Any]:
        """Return batches of the task; the task itself is always the same."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch of inputs and classes."""
        inputs, classes = batch
        return functional.cross_entropy(self(inputs), classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), self.learning_rate)


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act, self.two = nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        return functional.relu(x + self.two(self.act(self.norm(self.one(x)))))


class Cnn(Learner):
    """A residual network on noisy pictures of 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.first = nn.Sequential(Residual(16), Residual(16))
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.GroupNorm(4, 32), nn.GELU())
        self.second = nn.Sequential(Residual(32), Residual(32))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Sequential(*(nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10)))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of [batch, 3, 12, 12] pictures."""
        return self.head(self.pool(self.second(self.down(self.first(self.stem(x))))))

    @staticmethod
    def batches(count: int, seed: int) -> list[Any]:
        """Return pictures of a class's own pattern and noise."""
        patterns = torch.randn(10, 3, 12, 12, generator=torch.Generator().manual_seed(99))
        generator = torch.Generator().manual_seed(seed)
        labels = [torch.randint(10, (16,), generator=generator) for _ in range(count)]
        return [(patterns[each] + 2 * torch.randn(16, 3, 12, 12, generator=generator), each) for each in labels]


class Block(nn.Module):
    """A block of a GPT: causal attention and a multilayer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.between(x))))


class Gpt(Learner):
    """A GPT on sequences in which each word depends on the two before it."""

    def __init__(self, width: int = 48, words: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(24, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """Compute the logits of the next words, [batch, length, words]."""
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy of the next words."""
        return functional.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    @staticmethod
    def batches(count: int, seed: int) -> list[Any]:
        """Return sequences of 25 words."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for _ in range(count):
            words = [torch.randint(64, (8,), generator=generator) for _ in range(2)]
            for _ in range(23):
                noise = torch.randint(8, (8,), generator=generator)
                words.append((3 * words[-1] + words[-2] + noise) % 64)
            made.append(torch.stack(words, 1))
        return made


class Recurrent(Learner):
    """LSTM and GRU layers on sequences whose class is told by their words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.both_ways = nn.LSTM(32, 32, batch_first=True, bidirectional=True)
        self.join, self.norm = nn.Linear(64, 48), nn.LayerNorm(48)
        self.onward, self.drop = nn.LSTM(48, 48, num_layers=2, batch_first=True), nn.Dropout(0.1)
        self.mix, self.last = nn.Linear(48, 48), nn.GRU(48, 32, batch_first=True)
        self.head = nn.Sequential(*(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)))

    def forward(self, words: Tensor) -> Tensor:
        """Compute the logits of [batch, length] words."""
        x, _ = self.both_ways(self.words(words))
        x, _ = self.onward(self.norm(self.join(x)))
        x, _ = self.last(torch.tanh(self.mix(self.drop(x))))
        return self.head(x.mean(1))

    @staticmethod
    def batches(count: int, seed: int) -> list[Any]:
        """Return sequences of 12 words, and the class that most of them are of."""
        generator = torch.Generator().manual_seed(seed)
        words = [torch.randint(50, (16, 12), generator=generator) for _ in range(count)]
        return [(each, functional.one_hot(each % 5, 5).sum(1).argmax(1)) for each in words]


def perceptron(*widths: int) -> nn.Sequential:
    """Return linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for first, second in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Recommender(Learner):
    """Two towers over embedding tables, whose agreement and contents a third network judges."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.users, self.items, self.tags = (
            nn.Embedding(100, width),
            nn.Embedding(200, width),
            nn.EmbeddingBag(40, width),
        )
        self.user_tower = perceptron(width + 8, 64, 48, width)
        self.item_tower = perceptron(2 * width, 64, 48, width)
        self.judge = perceptron(2 * width + 1, 64, 48, 32, 1)

    def forward(self, batch: Any) -> Tensor:
        """Compute the logit that each user likes an item."""
        user, facts, item, tags = batch
        one = self.user_tower(torch.cat([self.users(user), facts], 1))
        other = self.item_tower(torch.cat([self.items(item), self.tags(tags)], 1))
        agreement = (one * other).sum(1, keepdim=True)
        return self.judge(torch.cat([one, other, agreement], 1)).squeeze(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the binary cross-entropy of clicks."""
        inputs, clicks = batch
        return functional.binary_cross_entropy_with_logits(self(inputs), clicks)

    @staticmethod
    def batches(count: int, seed: int) -> list[Any]:
        """Return users with their facts, items with their tags, and clicks by hidden tastes."""
        hidden = torch.Generator().manual_seed(99)
        tastes, merits = torch.randn(100, 6, generator=hidden), torch.randn(200, 6, generator=hidden)
        generator = torch.Generator().manual_seed(seed)
        made = []
        for _ in range(count):
            user, item = (torch.randint(n, (64,), generator=generator) for n in (100, 200))
            facts, tags = torch.randn(64, 8, generator=generator), torch.randint(40, (64, 4), generator=generator)
            odds = (tastes[user] * merits[item]).sum(1) + facts[:, 0]
            clicks = (torch.rand(64, generator=generator) < torch.sigmoid(odds)).float()
            made.append(((user, facts, item, tags), clicks))
        return made


MODELS: dict[str, type[Learner]] = {"cnn": Cnn, "gpt": Gpt, "recurrent": Recurrent, "recommender": Recommender}


def trained(name: str, steps: int, seed: int = 0) -> Learner:
    """Return one of the models after some steps in fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name]()
        optimizer = model.configure_optimizers()
        for place, batch in enumerate(model.batches(steps, seed=seed + 1000)):
            optimizer.zero_grad()
            model.training_step(batch, place).backward()
            optimizer.step()
        optimizer.zero_grad()
    return model
