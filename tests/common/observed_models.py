"""Models with everything that a step may leave behind, and the whole trace of a run, to be compared to the last bit."""

import copy
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lightnings import DoublePrecision, HalfPrecision, pl
from plugin_models import Batches, ours, stock, trainer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torchmetrics import CatMetric, MeanMetric

from lightning_mixprec import FidelityMonitor, PerLayerPrecision, UnderflowMonitor

MIXED = {"default": "fp16", "net.0": "bf16", "net.1": "c=fp32,o=input"}

PLUGINS: dict[str, Callable[[], Any]] = {
    "fp16": partial(ours, "fp16"),
    "bf16": partial(ours, "bf16"),
    "fp32": partial(ours, "fp32"),
    "mixed": partial(ours, MIXED),
    "mixed with fp64": partial(ours, {"default": "fp32", "net.0": "p=fp64,c=fp64", "net.1": "bf16"}),
    "another policy for evaluation": partial(ours, "fp16", eval_policy="fp32"),
    "static loss scale": partial(PerLayerPrecision, "fp16", loss_scaling=1000),
    "stock 16-mixed": partial(stock, "fp16"),
    "stock bf16-mixed": partial(stock, "bf16"),
    "stock bf16-true": partial(HalfPrecision, "bf16-true"),
    "stock 32-true": lambda: None,
    "stock 64-true": DoublePrecision,
}


def monitors(**options: Any) -> list[pl.Callback]:
    """Those that replay steps, on every step."""
    return [UnderflowMonitor(1, **options), FidelityMonitor(1)]


class Meter:
    """A user's own running mean."""

    def __init__(self) -> None:
        self.total, self.count, self.seen = 0.0, 0, []

    def update(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1
        self.seen.append(value)

    def __eq__(self, other: Any) -> bool:
        return vars(self) == vars(other)


@dataclass
class Annealing:
    """A weight of the loss that grows with every use."""

    weight: float = 0.0

    def __call__(self) -> float:
        self.weight += 0.1
        return self.weight


ADAM = partial(torch.optim.Adam, lr=0.01)


class Busy(pl.LightningModule):
    """Regression that keeps count of everything, in everything that Python has, and computes with some of it."""

    def __init__(self, net: nn.Module, optimizer: Callable[..., Any] = ADAM) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer
        self.steps, self.values, self.recent, self.tally = 0, [], deque(maxlen=2), Counter()
        self.nested: dict[str, Any] = {"lists": [[0]], "set": {0}, "pair": ([0], [0])}
        self.meter, self.annealing = Meter(), Annealing()
        self.mean, self.all = MeanMetric(), CatMetric()
        self.tensor, self.tensors, self.array = torch.zeros(2), [torch.zeros(2)], np.zeros(2)
        self.generators = [torch.Generator().manual_seed(1), random.Random(1), np.random.default_rng(1)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        x.mul_(1 + 0.1 * torch.rand(()))  # the batch is this step's own
        loss = nn.functional.mse_loss(self.net(x), y) * (1 + 0.01 * self.chances() + 0.01 * self.annealing())
        self.count(loss.detach().float())
        self.log("loss", loss)
        self.log("running", self.mean, on_step=True, on_epoch=True)
        self.log("all", self.all.compute().mean())
        return loss

    def chances(self) -> float:
        first, second, third = self.generators
        own = torch.rand((), generator=first).item() + second.random() + third.random()
        return own + random.random() + np.random.rand() + torch.rand(()).item()

    def count(self, loss: Tensor) -> None:
        value = loss.item()
        self.steps += 1
        self.values.append(value)
        self.recent.append(value)
        self.tally[self.steps % 2] += 1
        self.nested["lists"][0].append(value)
        self.nested["set"].add(self.steps)
        self.nested["pair"][0].append(value)
        self.meter.update(value)
        self.mean.update(loss)
        self.all.update(loss)
        self.tensor += loss
        self.tensors[0].add_(loss)
        self.array += value
        self.made_by_the_step = value

    def configure_optimizers(self) -> Any:
        return self.optimizer([param for param in self.parameters() if param.requires_grad])


NOTES = ("steps", "values", "recent", "tally", "nested", "tensor", "tensors", "made_by_the_step", "noted")


class Trace(pl.Callback):
    """Notes what every step logged and which gradients it stepped with."""

    def __init__(self) -> None:
        self.logged: list[Any] = []
        self.gradients: list[Any] = []
        self.rates: list[Any] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients.append(gradients(module))

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        metrics = trainer.callback_metrics
        self.logged.append({key: value.clone() for key, value in metrics.items() if not key.startswith("mixprec/")})
        self.rates.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if param.grad is None else param.grad.clone().to_dense() for param in module.parameters()]


def trace(
    make: Callable[[], pl.LightningModule], plugin: Any, callbacks: Any = (), batches: Any = None, **options: Any
) -> dict[str, Any]:
    """Trains on four batches, or on those given; everything that came out of it."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3)
    module, notes = make(), Trace()
    run = trainer(plugin, callbacks=[*callbacks, notes], **options)
    run.fit(module, batches or Batches(6))
    return {
        "weights": module.state_dict(),
        "order of weights": [*module.state_dict()],
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "grads": gradients(module),
        "logged": notes.logged,
        "stepped with": notes.gradients,
        "learning rates": notes.rates,
        "scale": run.precision_plugin.scaler.state_dict() if getattr(run.precision_plugin, "scaler", None) else None,
        "attributes": {name: copy.copy(getattr(module, name)) for name in NOTES if hasattr(module, name)},
        "meter": vars(module.meter) if hasattr(module, "meter") else None,
        "array": module.array.tolist() if hasattr(module, "array") else None,
        "generators": [torch.get_rng_state(), random.random(), np.random.rand()],
        "own generators": module.chances() if hasattr(module, "generators") else None,
    }


# Networks from 6 features to 2; the batch has 4 rows.


class Tail(nn.Module):
    """Applies a function to what a module computes."""

    def __init__(self, module: nn.Module, function: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.module(x))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([x, x.flip(-1)], 1)
        return self.attention(x, x, x)[0].mean(1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 6), nn.Linear(6, 6)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(x.argmax(-1))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.Tanh())
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, self.first(x), use_reentrant=self.use_reentrant)


def headed(body: nn.Module) -> nn.Sequential:
    return nn.Sequential(body, nn.Linear(6, 2))


def plain() -> nn.Sequential:
    first = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3)]
    return nn.Sequential(*first, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def partly_frozen() -> nn.Sequential:
    net = plain()
    net[0].requires_grad_(False)
    net[1].unused = nn.Linear(3, 3)
    return net


def shared() -> nn.Sequential:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(6, 2))


def sequence(layer: nn.Module) -> nn.Module:
    return headed(Tail(layer, lambda result: result[0][:, -1]))


class Stacked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, x.flip(-1)], 1)


NETS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm, dropout, in-place ReLU": plain,
    "spectral_norm": lambda: headed(spectral_norm(nn.Linear(6, 6))),
    "parametrized spectral_norm": lambda: headed(parametrizations.spectral_norm(nn.Linear(6, 6))),
    "weight_norm": lambda: headed(weight_norm(nn.Linear(6, 6))),
    "parametrized weight_norm": lambda: headed(parametrizations.weight_norm(nn.Linear(6, 6))),
    "LSTM": lambda: nn.Sequential(Stacked(), *sequence(nn.LSTM(6, 6, 2, batch_first=True, dropout=0.2))),
    "GRU": lambda: nn.Sequential(Stacked(), *sequence(nn.GRU(6, 6, batch_first=True))),
    "attention": lambda: headed(Attending()),
    "transformer": lambda: headed(
        Tail(nn.Sequential(Stacked(), nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)), lambda x: x.mean(1))
    ),
    "tied weights": lambda: headed(Tied()),
    "a shared layer": shared,
    "checkpointing, reentrant": lambda: headed(Checkpointed(True)),
    "checkpointing": lambda: headed(Checkpointed(False)),
    "frozen and unused weights": partly_frozen,
}


# Training steps that reach for their weights in other ways than by calling the network.


class Averaging(Busy):
    """Keeps an average of its weights, registered or hidden in a list, and updates it inside the step."""

    def __init__(self, is_hidden: bool) -> None:
        super().__init__(plain())
        target = copy.deepcopy(self.net).requires_grad_(False)
        self.hidden = [target] if is_hidden else []
        if not is_hidden:
            self.target = target
        self.pairs = list(zip(target.parameters(), self.net.parameters(), strict=True))
        self.followers = list(target.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].clone()
        loss = super().training_step(batch, batch_idx)
        target = self.hidden[0] if self.hidden else self.target
        with torch.no_grad():
            for mine, theirs in zip(self.followers, self.net.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
        self.noted = [[param.clone() for param in target.parameters()], target.state_dict()]
        return loss + nn.functional.mse_loss(self.net(x), target(x))


class Penalized(Busy):
    """Adds the size of weights that it holds in a list and in a tuple, and lets hooks on the weights do things."""

    def __init__(self, steps_in_backward: bool = False) -> None:
        super().__init__(plain(), partial(torch.optim.SGD, lr=0.01, momentum=0.9))
        self.penalized = [param for param in self.net.parameters() if param.dim() > 1]
        self.others = tuple(param for param in self.net.parameters() if param.dim() == 1)
        self.fired = {"hook": 0, "step": 0}
        self.net[0].weight.register_hook(self.doubled)
        if steps_in_backward:
            self.net[4].weight.register_post_accumulate_grad_hook(self.step)

    def doubled(self, gradient: Tensor) -> Tensor:
        self.fired["hook"] += 1
        return 2 * gradient

    def step(self, param: Tensor) -> None:
        self.fired["step"] += 1
        with torch.no_grad():
            param -= 1e-6 * param.grad
        param.grad = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.noted = dict(self.fired)
        return loss + 0.01 * sum(param.pow(2).sum() for param in (*self.penalized, *self.others))


class Adversarial(Busy):
    """Manual optimization with two optimizers and everything that goes with it."""

    def __init__(self) -> None:
        super().__init__(plain())
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(second)
        gap = (self.critic(self.net(batch[0]).detach().float()) - self.critic(batch[1])).float().mean()
        self.stepped(second, gap)
        self.untoggle_optimizer(second)
        for param in self.critic.parameters():
            param.data.clamp_(-0.1, 0.1)
        self.toggle_optimizer(first)
        loss = super().training_step(batch, batch_idx)
        self.stepped(first, loss - self.critic(self.net(batch[0])).float().mean())
        self.untoggle_optimizer(first)
        for schedule in self.lr_schedulers():
            schedule.step()
        self.log_dict({"gap": gap, "critic": sum(param.abs().sum() for param in self.critic.parameters())})

    def stepped(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()

    def configure_optimizers(self) -> Any:
        made = [ADAM(self.net.parameters()), torch.optim.RMSprop(self.critic.parameters(), lr=0.01)]
        return made, [torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5) for each in made]


class Bare(pl.LightningModule):
    """A training_step that takes no index and returns a dict, or now and then nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = plain(), [0]

    def training_step(self, batch: Any) -> Any:
        self.calls[0] += 1
        if self.calls[0] == 2:
            return None
        return {"loss": nn.functional.mse_loss(self.net(batch[0]), batch[1]), "more": 1}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SparselyTrained(Busy):
    """An embedding with sparse gradients, which have an optimizer of their own."""

    def __init__(self) -> None:
        super().__init__(headed(Embedded()), partial(torch.optim.SGD, lr=0.1))


MODULES: dict[str, Callable[[], pl.LightningModule]] = {
    "an averaged copy of the weights": partial(Averaging, False),
    "a hidden averaged copy of the weights": partial(Averaging, True),
    "held weights and hooks on weights": Penalized,
    "an optimizer step in backward": partial(Penalized, steps_in_backward=True),
    "two optimizers by hand": Adversarial,
    "a step without index": Bare,
    "sparse gradients": SparselyTrained,
}
