"""Four small models whose steps cost differently: convolutions, attention, recurrence, embeddings with products."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F


class Costed(pl.LightningModule):
    """A model that is trained on inputs and labels; made with the same weights each time."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    @classmethod
    def made(cls):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return cls()


class Convolutions(Costed):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
            *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.GroupNorm(4, 32), nn.GELU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
            *(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10)),
        )

    def forward(self, x):
        return self.net(x)

    @staticmethod
    def batch():
        generator = torch.Generator().manual_seed(1)
        return torch.randn(8, 3, 12, 12, generator=generator), torch.randint(10, (8,), generator=generator)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.qkv(self.before(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(self.act(self.up(self.between(x))))


class Gpt(Costed):
    def __init__(self, width=32, words=64, blocks=2):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(24, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, x):
        y = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    @staticmethod
    def batch():
        return torch.randint(64, (8, 25), generator=torch.Generator().manual_seed(1))


class Recurrent(Costed):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True, bidirectional=True)
        self.norm, self.hidden, self.head = nn.LayerNorm(48), nn.Linear(48, 32), nn.Linear(32, 5)

    def forward(self, x):
        y, _ = self.lstm(self.words(x))
        return self.head(torch.relu(self.hidden(self.norm(y[:, -1]))))

    @staticmethod
    def batch():
        generator = torch.Generator().manual_seed(1)
        return torch.randint(50, (16, 10), generator=generator), torch.randint(5, (16,), generator=generator)


class Recommender(Costed):
    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(500, 24), nn.EmbeddingBag(1000, 24)
        self.dense = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 24))
        self.top = nn.Sequential(nn.Linear(51, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, batch):
        user, items, numbers = batch
        parts = torch.stack([self.users(user), self.items(items), self.dense(numbers)], 1)
        products = torch.bmm(parts, parts.transpose(1, 2))[:, [0, 0, 1], [1, 2, 2]]
        return self.top(torch.cat([products, parts[:, 0], parts[:, 2]], 1)).squeeze(1)

    def training_step(self, batch, batch_idx):
        inputs, clicked = batch
        return F.binary_cross_entropy_with_logits(self(inputs), clicked)

    @staticmethod
    def batch():
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(500, (64,), generator=generator), torch.randint(1000, (64, 4), generator=generator)
        return (*ids, torch.randn(64, 8, generator=generator)), torch.rand(64, generator=generator).round()


MODELS = {"cnn": Convolutions, "gpt": Gpt, "lstm": Recurrent, "recommender": Recommender}
