"""Tiny LightningModules, and the Trainer that the tests of the plugin share."""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightnings import MixedPrecision, pl
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_mixprec import PerLayerPrecision


class Batches:
    """A loader of seeded batches without workers, about which Lightning has no advice to give."""

    def __init__(self, *shape: int, count: int = 4, targets: int = 2, seed: int = 7) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.batches = [
            (torch.randn(4, *shape, generator=generator), torch.randn(4, targets, generator=generator))
            for _ in range(count)
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


PLAIN_SGD = partial(SGD, lr=0.05)


class Task(pl.LightningModule):
    """Regression with any network; keeps the losses it saw."""

    def __init__(self, net: nn.Module, make_optimizer: Callable[..., Optimizer] = PLAIN_SGD) -> None:
        super().__init__()
        self.net = net
        self.make_optimizer = make_optimizer
        self.losses: list[Tensor] = []
        self.eval_losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.losses.append(loss.detach().clone())
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Evaluable(Task):
    """A task that can be validated, tested and predicted with; keeps those losses, too."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.eval_losses.append(loss.detach().clone())

    test_step = validation_step

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])


class Scheduled(Task):
    """The learning rate halves at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TwoOptimizers(Task):
    """Manual optimization: the body and the head have an optimizer each, and step in turn."""

    def __init__(self, net: nn.Module, make_optimizer: Callable[..., Optimizer] = PLAIN_SGD) -> None:
        super().__init__(net, make_optimizer)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        *body, head = self.net.children()
        return [self.make_optimizer(nn.ModuleList(body).parameters()), self.make_optimizer(head.parameters())]


class Probe(nn.Linear):
    """A Linear that notes what comes in, what it computes, and in which format its weight is stored then."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.seen: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.seen.append((x.dtype, out.dtype, self.weight.dtype))
        return out

    @property
    def computed(self) -> set[torch.dtype]:
        """The formats of what it computed."""
        return {seen[1] for seen in self.seen}


def mlp() -> nn.Sequential:
    """LayerNorm and dropout between Linear layers; from 6 features to 2."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    )


def probes() -> nn.Sequential:
    """Three probes in a row: net.0, net.1, net.2."""
    return nn.Sequential(Probe(6, 8), Probe(8, 8), Probe(8, 2))


def trainer(plugin: Any = None, **options: Any) -> pl.Trainer:
    """A Trainer that does nothing but train; one epoch on the CPU unless ``options`` say otherwise."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(plugins=plugin, **{**quiet, **options})


def fit(model: pl.LightningModule, plugin: Any = None, batches: Any = None, **options: Any) -> pl.Trainer:
    """Trains a model that takes 6 features, or takes the given batches."""
    run = trainer(plugin, **options)
    run.fit(model, batches if batches is not None else Batches(6))
    return run


INIT_SCALE = 1024.0
"""A loss scale under which these tasks do not overflow: what follows from an overflow differs from stock on purpose."""


def stock(format: str, device: str = "cpu") -> Any:
    """Lightning's own plugin for a format; as an object, because Trainer(precision="16-mixed") is bf16 on the CPU."""
    if format == "fp16":
        return MixedPrecision("16-mixed", device, torch.amp.GradScaler(device, init_scale=INIT_SCALE))
    return MixedPrecision("bf16-mixed", device) if format == "bf16" else None


def ours(policy: Any, emulate: Any = False, **arguments: Any) -> PerLayerPrecision:
    """This package's plugin with the same loss scale and the same arithmetic; without fp16 it scales nothing."""
    options = {"init_scale": INIT_SCALE} if "fp16" in str(policy) else "auto"
    return PerLayerPrecision(policy, loss_scaling=options, emulate=emulate, **arguments)


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures have bitwise equal tensors, in equal formats, and equal other leaves."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Everything that a plugin could leave behind, and the formats of all that is stored.

    Objects are compared by identity, so that a forward which was replaced and put back as an equal one shows.
    """
    return {
        name: {key: _trace(value) for key, value in vars(module).items() if key not in _NOT_THE_PLUGINS}
        for name, module in model.named_modules()
    }


# What the Trainer sets on a model, and the tests' own notes.
_NOT_THE_PLUGINS = {"_trainer", "_device", "_hparams", "_current_fx_name", "training"}
_NOT_THE_PLUGINS |= {"losses", "eval_losses", "seen", "said", "calls", "stepped"}


def _trace(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value), value.dtype, value.shape
    if isinstance(value, dict):
        return {key: _trace(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_trace(entry) for entry in value]
    if isinstance(value, weakref.ref):
        return _trace(value())
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


class Call(pl.Callback):
    """Calls a function of the Trainer and the model from one hook, on one batch (counted over the hook's calls)."""

    def __init__(self, hook: str, function: Callable[[pl.Trainer, Any], Any], at: int | None = None) -> None:
        self.function = function
        self.at = at
        self.calls = 0
        self.results: list[Any] = []
        setattr(self, hook, self._call)

    def _call(self, run: pl.Trainer, model: Any, *args: Any) -> None:
        if self.at is None or self.calls == self.at:
            self.results.append(self.function(run, model))
        self.calls += 1


MOMENTUM = partial(SGD, lr=0.05, momentum=0.9)


def save(path: str = "run.ckpt") -> Call:
    """Saves a checkpoint at the end of every epoch; that of the last epoch stays."""
    return Call("on_train_epoch_end", lambda run, model: run.save_checkpoint(path))


def task(kind: type[Task] = Task) -> Task:
    """A task with the same first weights every time, and nothing random after that."""
    torch.manual_seed(3)
    net = nn.Sequential(*[nn.Identity() if isinstance(layer, nn.Dropout) else layer for layer in mlp()])
    return kind(net, MOMENTUM)


def moved(plugin: PerLayerPrecision) -> pl.Trainer:
    """Trains an epoch in which net.4 moves to bf16, and saves it."""
    move = Call("on_train_batch_end", lambda run, model: plugin.edit_policy({"net.4": "bf16"}, reason="m"), at=1)
    return fit(task(), plugin, callbacks=[move, save()])


def resume(plugin: Any, path: str = "run.ckpt", model: Any = None, **options: Any) -> tuple[Task, pl.Trainer]:
    """Goes on for one epoch."""
    model = model or task()
    run = trainer(plugin, **{"max_epochs": 2, **options})
    run.fit(model, Batches(6), ckpt_path=path)
    return model, run


def overflowing():
    """Callbacks that make the second step overflow."""
    spoil = Call("on_after_backward", lambda run, model: model.net[0].weight.grad.fill_(float("inf")), at=1)
    return [spoil]


def one_line(caught):
    """The message of an error that a user reads."""
    message = str(caught.value)
    assert "\n" not in message
    assert 20 < len(message) < 600
    return message
