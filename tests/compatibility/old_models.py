"""Models, batches and callbacks of the runs whose state is kept in ``data``; torch and Lightning alone."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam


class Lessons:
    """Batches in order; a loader that can be resumed within an epoch."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.place = self.given = 0

    def __iter__(self) -> Iterator[Any]:
        place, self.place = self.place, 0
        for number in range(place, len(self.batches)):
            self.given = number + 1
            yield self.batches[number]

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["given"] % len(self.batches)


def constant(*values: float) -> Lessons:
    """Batches for :class:`Line`, each of one value."""
    return Lessons([torch.full((4, 2), value) for value in values])


def random_batches(count: int, size: int = 16, gain: float = 1.0) -> list[Any]:
    """Batches of a smooth function of 6 features."""
    generator = torch.Generator().manual_seed(7)
    teacher = torch.randn(6, 2, generator=generator)
    inputs = [torch.randn(size, 6, generator=generator) for _ in range(count)]
    return [(gain * x, torch.tanh(x @ teacher)) for x in inputs]


class Gate(nn.Linear):
    """A layer with a type of its own, for a rule that names it."""


class Line(pl.LightningModule):
    """Layers side by side whose gradient is the mean of the batch, whatever the weights are.

    With batches, learning rates and momenta that are powers of two every format on every machine gives the same bits.
    ``formats`` notes for each batch in which format each layer computed.
    """

    def __init__(self) -> None:
        super().__init__()
        kinds = {"stem": nn.Linear, "gate": Gate, "head": nn.Linear}
        self.parts = nn.ModuleDict({name: kind(2, 1, bias=False) for name, kind in kinds.items()})
        self.blocks = nn.ModuleList([nn.Linear(2, 1, bias=False) for _ in range(2)])
        for param in self.parameters():
            nn.init.constant_(param, 0.5)
        self.losses: list[float] = []
        self.formats: list[list[str]] = []

    def loss(self, batch: Tensor) -> Tensor:
        outputs = [layer(batch) for layer in (*self.parts.values(), *self.blocks)]
        self.formats.append([str(out.dtype).removeprefix("torch.") for out in outputs])
        return torch.stack([out.float().mean() for out in outputs]).sum()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.25, momentum=0.5)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Judged(Line):
    """Logs a metric that gets worse from the third epoch on."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("metric", abs(2.0 - self.current_epoch), batch_size=4)


class ByHand(Line):
    """Manual optimization: two optimizers that step in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for place, optimizer in enumerate(self.optimizers()):
            loss = self.loss(batch if place else batch / 64)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        return [SGD(self.parts.parameters(), lr=0.25), SGD(self.blocks.parameters(), lr=0.5)]


class Task(pl.LightningModule):
    """Regression with any network."""

    def __init__(self, net: nn.Module, rate: float = 1e-2) -> None:
        super().__init__()
        self.net, self.rate = net, rate
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return Adam(self.parameters(), lr=self.rate)


class Loud(nn.Module):
    """A feed-forward block whose ``down`` gives values of about 1e6, beyond fp16, and a norm that takes them back."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 2)
        nn.init.normal_(self.down.weight, std=3e5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.down(torch.relu(self.up(x)))))


class Encoding(nn.Module):
    """Phases in the thousands, which are off by about one in fp16 and by more in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 1000.0 * torch.randn(6, 16, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x @ self.frequencies)


class Silent(nn.Module):
    """A network that can learn :func:`encoded` from the true encoding alone."""

    def __init__(self, is_solved: bool = False) -> None:
        super().__init__()
        self.encode, self.body, self.head = Encoding(), nn.Linear(16, 16), nn.Linear(16, 2)
        if is_solved:
            for layer in (self.body, self.head):
                nn.init.eye_(layer.weight)
                nn.init.constant_(layer.bias, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.encode(x)))


def encoded(count: int, is_quiet: Any = lambda number: False) -> Lessons:
    """Batches whose targets are the first two numbers of the encoding; of next to nothing where it is quiet."""
    inputs = [x * (1e-3 if is_quiet(number) else 1.0) for number, (x, _) in enumerate(random_batches(count))]
    return Lessons([(x, Encoding()(x)[:, :2]) for x in inputs])


class Times(nn.Module):
    def forward(self, x: Tensor, gain: float) -> Tensor:
        return x * gain


class Spike(nn.Module):
    """A detour over values that are ``gain`` times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.calm = Times(), Times()

    def forward(self, x: Tensor, gain: float) -> Tensor:
        return self.calm(self.rise(x, gain), 1 / gain)


class Eventful(pl.LightningModule):
    """Goes wrong in each way that a monitor has a word for, when its batch says so.

    A batch is features, targets and the gain of a spike. The gradients of ``starved`` are next to nothing, the weights
    of ``still`` too large for their updates.
    The batch with the index ``cannot_widen`` cannot be run in fp32, so nothing can look at it.
    """

    def __init__(self, cannot_widen: int = -1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16))
        self.spike, self.phases, self.head, self.starved = Spike(), Encoding(), nn.Linear(16, 2), nn.Linear(16, 2)
        self.still = nn.Linear(16, 2)
        nn.init.constant_(self.still.weight, 2.0**10)
        self.cannot_widen = cannot_widen
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, gain = batch
        if batch_idx == self.cannot_widen and not torch.is_autocast_enabled("cpu"):
            raise RuntimeError("this step has no kernel for fp32")
        hidden = self.spike(self.body(x), gain)
        loss = F.mse_loss(self.head(hidden + 0.1 * self.phases(x)).float(), y)
        loss = loss + 2.0**-40 * self.starved(hidden).float().mean() + 1e-6 * self.still(hidden).float().mean()
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=1e-2)


def eventful_batches(count: int, gains: dict[int, float], infinite: int = -1) -> Lessons:
    """Batches with a gain of 1 except where ``gains`` says; one of them is not finite itself."""
    batches = [(*batch, gains.get(number, 1.0)) for number, batch in enumerate(random_batches(count))]
    if infinite >= 0:
        batches[infinite][0][0, 0] = float("inf")
    return Lessons(batches)


class Tossed(pl.LightningModule):
    """Overflows in fp16 where dropout lets a large value through."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop, self.head = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2)
        nn.init.constant_(self.net.weight, 2.0**14)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.head(self.drop(self.net(batch[0])) * 2.0**-14).float(), batch[1])

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=2.0**-30)


class Saving(pl.Callback):
    """Writes a checkpoint when a batch ends, in its place among the callbacks, or when an epoch ends."""

    def __init__(self, path: Any, batch: int | None = None, epoch: int = 0) -> None:
        self.path, self.batch, self.epoch = path, batch, epoch

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        if self.batch is not None and (trainer.current_epoch, rest[-1]) == (self.epoch, self.batch):
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.batch is None and trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


class Doing(pl.Callback):
    """Calls functions of the plugin after batches, by their number."""

    def __init__(self, by_batch: dict[int, Any]) -> None:
        self.by_batch = by_batch

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        if rest[-1] in self.by_batch:
            self.by_batch[rest[-1]](trainer.precision_plugin)
