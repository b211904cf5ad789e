"""Cases inside transformers: what attention, its mask, its norms and its feed-forward layers do out of range."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import FEATURES, Case, CausalAttention, Feedforward, noisy, teacher

WIDTH, LENGTH = 32, 16


class Sequences(Case):
    """Tokens of random features; the target of a token is a smooth function of it and of the token before."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks, self.norm = nn.Linear(FEATURES, WIDTH), nn.ModuleList(blocks), nn.LayerNorm(WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.head = nn.Linear(WIDTH, 1)

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(16, LENGTH, FEATURES, generator=generator)
        value = teacher()(x)
        value = value + F.pad(value[:, :-1], (0, 0, 1, 0))
        return x, noisy(value, 0.5, generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class GatedFeedforward(nn.Module):
    """T5's gated feed-forward layer with weights as large as training made them, between two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.gate, self.up, self.wo = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        with torch.no_grad():
            self.gate.weight.mul_(20)
            self.up.weight.mul_(20)
            self.wo.weight.mul_(1000)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return x + self.after(self.wo(F.gelu(self.gate(h)) * self.up(h)))


class OutputProjection(Sequences):
    """A feed-forward layer whose output projection exceeds 65504."""

    title = "feed-forward projection"
    mechanism = "the output projection of a gated feed-forward layer exceeds 65504"
    source = "T5 in fp16: huggingface/transformers#4586, #9295 (wo is kept in fp32 there)"
    culprits = ("blocks.1.wo",)

    def __init__(self) -> None:
        super().__init__(CausalAttention(WIDTH), GatedFeedforward(), CausalAttention(WIDTH), Feedforward(WIDTH))


class LoudAttention(CausalAttention):
    """Attention whose queries and keys have grown, and which scales their products afterwards."""

    gain = 200

    def __init__(self) -> None:
        super().__init__(WIDTH)
        with torch.no_grad():
            self.qkv.weight[: 2 * WIDTH].mul_(self.gain)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.transpose(-2, -1) * (4 / (self.gain * self.gain * WIDTH**0.5))


class AttentionLogits(Sequences):
    """Products of queries and keys that overflow before they are scaled down."""

    title = "attention logits"
    mechanism = "q k^T exceeds 65504 before the scaling that would have brought it back"
    source = "wenet-e2e/wenet#891; CogView (arXiv 2105.13290) scales q first for this reason"
    culprits = ("blocks.1",)

    def __init__(self) -> None:
        super().__init__(CausalAttention(WIDTH), LoudAttention(), Feedforward(WIDTH), Feedforward(WIDTH))


class MaskedAttention(CausalAttention):
    """Attention with an additive mask, in the dtype of the scores."""

    def forward(self, x: Tensor, is_seen: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        scores = self.scores(query, key)
        scores = scores + (1 - is_seen.to(scores.dtype)) * -1e9
        return x + self.out(scores.softmax(-1).to(value.dtype) @ value)


class AdditiveMask(Sequences):
    """Padded sequences under a mask of -1e9, where a padded query sees no key at all."""

    title = "mask of -1e9"
    mechanism = "-1e9 is -inf in fp16, and the softmax of a row that is masked throughout is NaN"
    source = "NVIDIA/apex#93, huggingface/transformers#17306"
    culprits = ("blocks.0", "blocks.2")

    def __init__(self) -> None:
        super().__init__(MaskedAttention(WIDTH), Feedforward(WIDTH), MaskedAttention(WIDTH), Feedforward(WIDTH))

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        x, target = Sequences.batch(generator)
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (len(x), 1), generator=generator)
        is_real = (torch.arange(LENGTH) < lengths).float()
        return (x, is_real), (target, is_real[..., None])

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, is_real = inputs
        is_seen = (is_real[:, :, None] * is_real[:, None, :]).tril()
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x, is_seen) if isinstance(block, MaskedAttention) else block(x)
        return self.head(self.norm(x))

    def criterion(self, prediction: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        value, is_real = target
        error = (prediction - value) * is_real
        return (error * error).sum() / is_real.sum()
