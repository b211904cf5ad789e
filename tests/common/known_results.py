"""Models whose right result is known by hand, and short runs of a Trainer on the CPU.

The gradient of :class:`Line` is the batch itself, whatever the weights are. With batches that are powers of two every
format gives the same bits, so the weights after a run say exactly which batches moved them and by how much.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from lightnings import MixedPrecision, Precision, pl
from torch import Tensor, nn

from lightning_mixprec.plugin.precision import PerLayerPrecision

INF = math.inf
SGD = partial(torch.optim.SGD, lr=1.0)


def stock(precision: str = "16-mixed", device: str = "cpu") -> Precision:
    """Lightning's own plugin. Its Trainer would turn ``precision="16-mixed"`` into bf16 on the CPU."""
    return Precision() if precision == "32-true" else MixedPrecision(precision, device)


def ours(policy: str = "fp16", emulate: Any = False, **options: Any) -> PerLayerPrecision:
    return PerLayerPrecision(policy, emulate=emulate, **options)


def fails_on_stock(
    defect: str, precision: str = "16-mixed", raises: type[Exception] = AssertionError
) -> pytest.MarkDecorator:
    """Runs a test with Lightning's own plugin, where it has to fail because of ``defect``, and with ours."""
    mark = pytest.mark.xfail(strict=True, raises=raises, reason=f"Lightning's {precision}: {defect}")
    policy = {"16-mixed": "fp16", "bf16-mixed": "bf16"}[precision]
    stocks = pytest.param(lambda **_: stock(precision), marks=mark, id="stock")
    return pytest.mark.parametrize("plugin", [stocks, pytest.param(partial(ours, policy), id="ours")])


def holds_on_both(precision: str = "16-mixed") -> pytest.MarkDecorator:
    """Runs a test with Lightning's own plugin, which is right here, and with ours."""
    policy = {"16-mixed": "fp16", "bf16-mixed": "bf16"}[precision]
    stocks = pytest.param(lambda **_: stock(precision), id="stock")
    return pytest.mark.parametrize("plugin", [stocks, pytest.param(partial(ours, policy), id="ours")])


def weights(inputs: int = 2) -> nn.Linear:
    """A layer that starts at zero."""
    layer = nn.Linear(inputs, 1, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def slope(layer: nn.Module, batch: Tensor) -> Tensor:
    """A loss whose gradient with respect to the layer's weights is the mean of the batch.

    It is multiplied by the loss scale in fp16, so at the default scale of 65536 a batch has to stay below 1.
    """
    return layer(batch).float().mean()


class Line(pl.LightningModule):
    """Automatic optimization of one layer by :func:`slope`."""

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer] = SGD,
        schedule: Callable[[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.layer = weights()
        self.optimizer, self.schedule = optimizer, schedule

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = slope(self.layer, batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        return optimizer if self.schedule is None else [[optimizer], [self.schedule(optimizer)]]

    @property
    def travelled(self) -> float:
        """How far the weights went down: the sum of all batches that moved them, at a learning rate of 1."""
        first, second = self.layer.weight.flatten().tolist()
        assert first == second or math.isnan(first)
        return -first


class Manual(pl.LightningModule):
    """Manual optimization of layers ``a`` and ``b`` by a function of the module, the batch and its index."""

    def __init__(
        self,
        body: Callable[["Manual", Any, int], None],
        configure: Callable[["Manual"], Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = weights(), weights()
        self.body, self.configure = body, configure

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.body(self, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        if self.configure is not None:
            return self.configure(self)
        return [SGD(self.a.parameters()), SGD(self.b.parameters())]

    @property
    def travelled(self) -> list[float]:
        return [-self.a.weight[0, 0].item(), -self.b.weight[0, 0].item()]


class Batches:
    """Batches given by their value; a Trainer takes it as a data loader that warns of nothing."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.batches = [self.batch(value) for value in values]

    @classmethod
    def batch(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cls.batch(part) for part in value)
        return torch.full((4, 2), value) if isinstance(value, (int, float)) else value

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Saving(pl.Callback):
    """Writes a checkpoint at the end of the first epoch, or of a batch of it."""

    def __init__(self, path: Any, batch: int | None = None) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.current_epoch == 0 and rest[-1] == self.batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0 and self.batch is None:
            trainer.save_checkpoint(self.path)


def trainer_of(plugin: Precision, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_checkpointing": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="GPU available but not used")
        return pl.Trainer(plugins=[plugin], **(quiet | defaults | options))


def fit(
    model: pl.LightningModule, plugin: Precision, values: Sequence[Any], ckpt_path: str | None = None, **options: Any
) -> pl.Trainer:
    """Fits on batches given by their values and returns the Trainer."""
    trainer = trainer_of(plugin, **options)
    trainer.fit(model, Batches(values), ckpt_path=ckpt_path)
    return trainer
