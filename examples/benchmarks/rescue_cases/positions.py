"""Cases that need more digits than 16 bits have: phases, positions, router logits, distances."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import LENGTH, WIDTH
from .base import FEATURES, Case, Feedforward, Trunk, noisy, teacher


class Fourier(nn.Module):
    """Random Fourier features of points in a square."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("frequencies", 500 * torch.randn(2, 16, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        phase = x @ self.frequencies
        return torch.cat([torch.sin(phase), torch.cos(phase)], -1)


class Phases(Case):
    """A signal of high frequency, learned from points by Fourier features."""

    title = "Fourier features"
    mechanism = "phases in the hundreds are known to 0.25 in fp16 and to 2 in bf16, and the sine of them is noise"
    source = "Fourier features (arXiv 2006.10739), NeRF; EleutherAI/gpt-neox#1003 for the same in positions"
    culprits = ("encoding",)
    format = "fp32"
    steps = 300

    def __init__(self) -> None:
        super().__init__()
        self.encoding, self.trunk, self.head = Fourier(), Trunk(32), nn.Linear(32, 1)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.rand(64, 2, generator=generator)
        features = Fourier()(x)
        weights = torch.randn(32, 1, generator=torch.Generator().manual_seed(6)) / 4
        return x, noisy(features @ weights, 0.2, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(self.encoding(x)))


class Rotary(nn.Module):
    """Cosines and sines of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 10000 ** -(torch.arange(WIDTH // 2) / (WIDTH // 2)))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None] @ self.frequencies[None]
        return angles.cos(), angles.sin()


class RotaryAttention(nn.Module):
    """Attention whose queries and keys are turned by their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            self.qkv.bias[: 2 * WIDTH] = 1

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        query, key = self.turned(query, *turn), self.turned(key, *turn)
        is_later = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=x.device).triu(1)
        scores = (query @ key.transpose(-2, -1) * WIDTH**-0.5).masked_fill(is_later, float("-inf"))
        return x + self.out(scores.softmax(-1).to(value.dtype) @ value)

    @staticmethod
    def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)


class Positions(Case):
    """Excerpts from long documents; the target of a token is a function of the token before it."""

    title = "rotary positions"
    mechanism = "positions from 2,000 to 16,000 are known to 1 to 8 in fp16, so that neighbours fall together"
    source = "EleutherAI/gpt-neox#1003, huggingface/transformers#29285; arXiv 2411.13476 for bf16"
    culprits = ("rotary",)
    format = "fp32"
    steps, rate = 300, 1e-2

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rotary, self.attention = nn.Linear(FEATURES, WIDTH), Rotary(), RotaryAttention()
        self.blocks = nn.Sequential(*(Feedforward(WIDTH) for _ in range(3)), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, 1)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x = torch.randn(16, LENGTH, FEATURES, generator=generator)
        start = torch.randint(2000, 16000 - LENGTH, (16, 1), generator=generator)
        value = F.pad(teacher()(x)[:, :-1], (0, 0, 1, 0))
        return (x, (start + torch.arange(LENGTH)).float()), noisy(value, 0.3, generator)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, positions = inputs
        return self.head(self.blocks(self.attention(self.embed(x), self.rotary(positions))))


class Router(nn.Module):
    """Weights of the experts for a token, from logits that have drifted: softmax does not mind their mean."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, experts) / math.sqrt(width))
        self.bias = nn.Parameter(torch.full((experts,), 6000.0))

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.weight.T, self.bias)).softmax(-1)


class Experts(Case):
    """A soft mixture of experts, routed by the context of a token, on data that is one."""

    title = "router of experts"
    mechanism = "router logits near 6000 are known to 4 in fp16 and to 32 in bf16; experts are mixed wrongly"
    source = "Switch Transformers (arXiv 2101.03961, 2.4) and ST-MoE (arXiv 2202.08906): large logits round badly"
    culprits = ("router",)
    format = "fp32"
    steps, rate = 300, 5e-3
    count = 4

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(FEATURES, 32), Router(FEATURES, self.count)
        self.experts = nn.ModuleList(Feedforward(32) for _ in range(self.count))
        self.head = nn.Linear(32, 1)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, 2, FEATURES, generator=generator)
        weights = torch.randn(FEATURES, Experts.count, generator=torch.Generator().manual_seed(21)) / 3
        gates = (x[:, 1] @ weights).softmax(-1)
        return x, noisy((gates * 2 * teacher(outputs=Experts.count)(x[:, 0])).sum(-1, keepdim=True), 0.2, generator)

    def forward(self, x: Tensor) -> Tensor:
        token, gates = self.embed(x[:, 0]), self.router(x[:, 1])
        outputs = torch.stack([expert(token) for expert in self.experts], -1)
        return self.head(torch.einsum("bie,be->bi", outputs, gates))


class Distances(nn.Module):
    """Squared distances to prototypes, by the binomial formula."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(30 + torch.randn(count, 32))

    def forward(self, x: Tensor) -> Tensor:
        own = torch.einsum("bi,bi->b", x, x)[:, None] + torch.einsum("ki,ki->k", self.prototypes, self.prototypes)
        return own - 2 * x @ self.prototypes.T


class Prototypes(Case):
    """Regression by weights that fall with the distance to prototypes."""

    title = "distances to prototypes"
    mechanism = "|x|^2 + |c|^2 - 2xc of vectors of length 170 cancels: near 29,000 fp16 is 16 apart"
    source = "prototypical networks (arXiv 1703.05175) with distances by matmul, as torch.cdist does it"
    culprits = ("distances",)
    format = "fp32"
    steps = 300

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.linear = Trunk(), nn.Linear(32, 32)
        self.distances, self.values = Distances(16), nn.Parameter(torch.randn(16, 1))
        with torch.no_grad():
            self.linear.bias.fill_(30)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(64, FEATURES, generator=generator)
        return x, noisy(teacher()(x), 0.3, generator)

    def forward(self, x: Tensor) -> Tensor:
        return (-self.distances(self.linear(self.trunk(x))) / 4).softmax(-1) @ self.values
