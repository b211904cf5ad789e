"""Runs of one small network that are compiled in every way that users compile, and count what Dynamo compiles."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from plugin_models import Batches, Task, ours, trainer
from selection import slow_but_for
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.layer(self.norm(x)))


class Net(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.stem, self.batch_norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x):
        x = self.batch_norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Regression(Task):
    """Keeps no losses: a list that grows makes Dynamo recompile each step."""

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0]), batch[1])


class Validated(Regression):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))


HOW = ("the LightningModule", "the LightningModule in place", "a submodule", "a submodule in place", "each block")


def compiled(module: pl.LightningModule, how: str | None, **options: Any) -> Any:
    """What is passed to fit."""
    if how == "the LightningModule":
        return torch.compile(module, **options)
    if how == "the LightningModule in place":
        module.compile(**options)
    elif how == "a submodule":
        module.net = torch.compile(module.net, **options)
    elif how == "a submodule in place":
        module.net.compile(**options)
    elif how == "each block":
        for block in module.net.blocks:
            block.compile(**options)
    return module


@dataclass
class Run(pl.Callback):
    """A run: what it trained, what came out of each batch, and how many graphs there were after it."""

    module: Any
    plugin: Any
    counter: CompileCounterWithBackend
    losses: list[Tensor] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    val_losses: list[Tensor] = field(default_factory=list)
    trainer: Any = None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append([param.grad.clone() for param in module.parameters()])

    def on_train_batch_end(self, trainer, module, outputs, *rest):
        self.losses.append(outputs["loss"].detach().clone())
        self.graphs.append(self.counter.frame_count)

    def on_validation_end(self, trainer, module):
        if "val_loss" in trainer.callback_metrics:
            self.val_losses.append(trainer.callback_metrics["val_loss"].clone())

    @property
    def numbers(self):
        """Everything that a compiled run is to have in common with the plain one."""
        return [self.losses, self.gradients, self.val_losses, [*self.module.state_dict().values()]]

    @property
    def compiled_at(self):
        """The batches in which something was compiled, and how many graphs that were."""
        before = [0, *self.graphs]
        return {batch: now - before[batch] for batch, now in enumerate(self.graphs) if now != before[batch]}


def run(
    policy: Any = "bf16",
    how: str | None = None,
    *,
    backend: str | None = "eager",
    options: Any = None,
    callbacks: Any = (),
    batches: Any = None,
    make: Callable[[], nn.Module] = Net,
    validates: bool = False,
    ckpt_path: str | None = None,
    **trainer_options: Any,
) -> Run:
    """Trains, compiled or not, from the same weights every time; on four batches, or on those given.

    Graphs are counted unless ``backend`` is None, for torch.compile's own, which its ``mode`` belongs to.
    """
    torch._dynamo.reset()
    torch.manual_seed(3)
    module = (Validated if validates else Regression)(make())
    plugin = ours(policy) if isinstance(policy, (str, dict)) else policy
    done = Run(module, plugin, CompileCounterWithBackend(backend or "eager"))
    taken = compiled(module, how, **({"backend": done.counter} if backend else {}), **(options or {}))
    done.trainer = trainer(plugin, callbacks=[*callbacks, done], **trainer_options)
    validation = Batches(6, count=1) if validates else None
    done.trainer.fit(taken, batches or Batches(6), validation, ckpt_path=ckpt_path)
    return done


@pytest.fixture(name="run")
def _run():
    return run


@pytest.fixture
def net():
    return Net


@pytest.fixture(params=slow_but_for({"a submodule"}, HOW))
def how(request):
    return request.param


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
