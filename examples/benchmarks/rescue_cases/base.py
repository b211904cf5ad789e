"""What all cases share: a LightningModule that makes its own data, a healthy trunk, and teachers to learn from."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 8


@dataclass(frozen=True)
class Batches:
    """A loader over batches that exist."""

    batches: list[Any]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Case(LightningModule):
    """A model that learns well in fp32, on data of its own.

    A subclass writes ``batch``, ``forward`` and, if need be, ``criterion``. Evaluation runs ``forward`` and
    ``criterion`` in eval mode in the formats of the run, and keeps both; the final loss is the ``quality`` of these
    predictions, computed in fp32 when the run is over. So it tells what was learned and what the model hands out, and a
    loss that is itself wrong in 16 bits cannot make a run look good.

    Attributes:
        title: what the table calls it.
        mechanism: why it fails in fp16, in a line; empty for a healthy control.
        source: where this was met in the wild.
        culprits: the layers one of which has to move, as in ``named_modules()``; "" are the module's own operations.
        format: what a culprit should move to.
        must_move: whether the run can only be saved by a move.
        steps, rate, epsilon: of the training with Adam, whose rate falls linearly to zero.
        optimizer_count: how many step in a training step.
    """

    title = mechanism = source = ""
    culprits: tuple[str, ...] = ()
    format = "bf16"
    must_move = True
    steps, rate, epsilon = 200, 3e-3, 1e-8
    optimizer_count = 1

    def __init__(self) -> None:
        super().__init__()
        self.evaluated: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def batch(generator: torch.Generator) -> tuple[Any, Any]:
        """Return inputs and targets."""
        raise NotImplementedError

    @classmethod
    def batches(cls, generator: torch.Generator, count: int) -> list[Any]:
        """Return batches to evaluate on."""
        return [cls.batch(generator) for _ in range(count)]

    @classmethod
    def training(cls, generator: torch.Generator, count: int) -> list[Any]:
        """Return batches to train on."""
        return cls.batches(generator, count)

    def criterion(self, prediction: Tensor, target: Any) -> Tensor:
        """Return the loss."""
        return F.mse_loss(prediction, target)

    def quality(self, prediction: Tensor, target: Any) -> Tensor:
        """Return what the final loss is measured in; it is called in fp32."""
        return self.criterion(prediction, target)

    def training_step(self, batch: tuple[Any, Any], batch_idx: int) -> Tensor | None:
        return self.criterion(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Any, Any], batch_idx: int) -> None:
        prediction = self(batch[0])
        self.evaluated.append((prediction.float(), self.criterion(prediction, batch[1]).float()))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.rate, eps=self.epsilon)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(falling, steps=self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def falling(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: from all to nothing."""
    return max(0.0, 1 - step / steps)


class Feedforward(nn.Module):
    """A residual block of a transformer without its attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Trunk(nn.Sequential):
    """The healthy part: most of the arithmetic, and nothing wrong with it."""

    def __init__(self, inputs: int = FEATURES, width: int = 32, depth: int = 3) -> None:
        super().__init__(nn.Linear(inputs, width), *(Feedforward(width) for _ in range(depth)), nn.LayerNorm(width))


class CausalAttention(nn.Module):
    """Attention as one writes it, with both matmuls visible; ``scores`` can be overridden."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        is_later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = self.scores(query, key).masked_fill(is_later, float("-inf"))
        return x + self.out(scores.softmax(-1).to(value.dtype) @ value)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the scores before masking."""
        return query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5


class Teacher:
    """A fixed smooth function of standard normal features, the same for every seed: unit variance and zero mean."""

    def __init__(self, inputs: int = FEATURES, outputs: int = 1, seed: int = 11) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inner = torch.randn(inputs, 16, generator=generator) / math.sqrt(inputs)
        self.outer = torch.randn(16, outputs, generator=generator)
        value = self._raw(torch.randn(4096, inputs, generator=generator))
        self.mean, self.deviation = value.mean(0), value.std(0)

    def _raw(self, x: Tensor) -> Tensor:
        return torch.sin(0.8 * x @ self.inner) @ self.outer

    def __call__(self, x: Tensor) -> Tensor:
        return (self._raw(x) - self.mean) / self.deviation


@functools.cache
def teacher(inputs: int = FEATURES, outputs: int = 1, seed: int = 11) -> Teacher:
    """Return the teacher of that shape and seed."""
    return Teacher(inputs, outputs, seed)


def noisy(value: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """Return targets that no model can meet better than to the level: the floor under the final loss."""
    return value + level * torch.randn(value.shape, generator=generator)
