"""Models with a planted overflow, whose culprit is known by construction, and short runs that are watched.

A spike multiplies by 2**20 and a calm divides by it. Spike first, the value between them is beyond fp16: an overflow in
forward. Calm first, the *gradient* between them is beyond fp16: an overflow in backward. In fp32 both cancel exactly.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from known_results import Batches, trainer_of
from lightnings import Logger, Precision, pl
from torch import Tensor, nn

from lightning_mixprec import OverflowMonitor, PerLayerPrecision

FACTOR = 2.0**20
STARVED = 2.0**-30
"""A loss weight whose gradients survive a loss scale of 65536 and vanish at every scale that tames a spike."""


class Spike(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * FACTOR


class Calm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 / FACTOR)


class Planted(nn.Module):
    """The identity; ``spike`` inside it overflows in the given direction, or nowhere if there is none."""

    def __init__(self, direction: str | None) -> None:
        super().__init__()
        self.direction = direction
        self.spike, self.calm = Spike(), Calm()

    def forward(self, x: Tensor) -> Tensor:
        if self.direction == "forward":
            return self.calm(self.spike(x))
        return self.spike(self.calm(x)) if self.direction == "backward" else x


def mlp(direction: str | None) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), Planted(direction), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


class ResidualBlock(nn.Module):
    def __init__(self, direction: str | None) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True)
        self.planted = Planted(direction)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.planted(self.norm(self.conv(x))))


class ResNet(nn.Module):
    def __init__(self, direction: str | None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(ResidualBlock(None), ResidualBlock(direction), ResidualBlock(None))
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.stem(x.reshape(-1, 1, 2, 4)))
        return self.head(h.flatten(2).mean(-1))


class AttentionBlock(nn.Module):
    """A block whose attention is written into its forward: what overflows there is the block's own operation."""

    def __init__(self, direction: str | None) -> None:
        super().__init__()
        self.direction = direction
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).chunk(3, -1)
        if self.direction == "forward":
            query, key = query * 2**10, key * 2**10
        if self.direction == "backward":
            value = value * (1 / FACTOR) * FACTOR
        length = x.shape[1]
        is_later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = (query @ key.transpose(-2, -1)).masked_fill(is_later, float("-inf"))
        return x + self.out(scores.softmax(-1) @ value)


class Transformer(nn.Module):
    def __init__(self, direction: str | None) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 8)
        self.blocks = nn.ModuleList([AttentionBlock(None), AttentionBlock(direction), AttentionBlock(None)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.reshape(-1, 4, 2))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Shared(nn.Module):
    """A layer that is called twice; only the second call overflows."""

    def __init__(self, direction: str | None) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.shared = Gain(FACTOR if direction is not None else 1.0)
        self.direction = direction

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.direction == "forward":
            return self.head(self.shared(self.shared(h * FACTOR**-1)) * FACTOR**-1)
        if self.direction == "backward":
            return self.head(self.shared(self.shared(h * FACTOR**-1) * FACTOR**-1))
        return self.head(self.shared(self.shared(h)))


class Gain(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(gain))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain.to(torch.float32).item()


CULPRITS: dict[str, tuple[Callable[[str | None], nn.Module], str]] = {
    "mlp": (mlp, "net.2.spike"),
    "resnet": (ResNet, "net.blocks.1.planted.spike"),
    "transformer": (Transformer, "net.blocks.1"),
    "shared": (Shared, "net.shared"),
}


class Watched(pl.LightningModule):
    """A network beside a head whose task weighs next to nothing, so that no small loss scale serves both."""

    def __init__(self, net: nn.Module, weight: float = STARVED, optimizer: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.net, self.other, self.weight = net, nn.Linear(8, 4), weight
        self.optimizer = optimizer or (lambda params: torch.optim.SGD(params, lr=1e-3))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).float().square().mean() + self.weight * self.other(batch).float().sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def batches(count: int = 1, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(size, 8, generator=generator) for _ in range(count)]


def watch(
    model: pl.LightningModule,
    plugin: Precision | None = None,
    values: Sequence[Any] | None = None,
    monitor: OverflowMonitor | None = None,
    **options: Any,
) -> "Watch":
    """Fits under a monitor, and keeps what the monitor warned of; any other warning is an error."""
    monitor = monitor or OverflowMonitor()
    options = {**options, "callbacks": [monitor, *options.get("callbacks", [])]}
    trainer = trainer_of(plugin or PerLayerPrecision("fp16"), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=r"step \d+|the batch could not be saved")
        trainer.fit(model, Batches(values if values is not None else batches()))
    return Watch(monitor, trainer, [str(each.message) for each in caught])


class Watch(NamedTuple):
    """A run that was watched."""

    monitor: OverflowMonitor
    trainer: pl.Trainer
    warned: list[str]

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.monitor.events

    @property
    def skipped_steps(self) -> int:
        return self.monitor.skipped_steps


class Memory(Logger):
    """Keeps what it is told; its experiment is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.experiment: list[Any] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))
