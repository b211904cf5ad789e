"""What the benchmarks train: the cases that are compared, and a small task for each."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn

from lightning_mixprec import PerLayerPrecision

UNIFORM_TARGET, MIXED_TARGET = 1.02, 1.10
TINY_LAYERS, TINY_WIDTH = 32, 32


@dataclass(frozen=True)
class Case:
    """One way to train one model: ``kind`` is stock, again (stock once more), uniform, unguarded or mixed."""

    model: str
    fused: bool
    format: str
    kind: str

    def plugin(self, device: str) -> Precision:
        """Return the plugin that this case hands to the Trainer."""
        if self.kind in ("stock", "again"):
            names = {"bf16": "bf16-mixed", "fp16": "16-mixed"}
            return MixedPrecision(names[self.format], device) if self.format in names else Precision()
        policy = mixed_policy(self.model, self.format) if self.kind == "mixed" else self.format
        return PerLayerPrecision(policy, skip_nonfinite=self.kind != "unguarded", emulate=False)

    @property
    def baseline(self) -> "Case":
        """Return the stock case to compare with."""
        return Case(self.model, self.fused, self.format, "stock")

    @property
    def target(self) -> float | None:
        """Return the largest ratio aimed at; a mixed ResNet-18 computes more in fp32, so it has none."""
        if self.kind in ("uniform", "unguarded"):
            return UNIFORM_TARGET
        return MIXED_TARGET if (self.kind, self.model) == ("mixed", "tiny") else None


def mixed_policy(model: str, low: str) -> dict:
    """Every second layer of the tiny model in fp32; ResNet-18 with its ends and norms in fp32, as in the example."""
    if model == "tiny":
        return {
            "default": low,
            "rules": [{"layers": [f"model.{2 * i}" for i in range(0, TINY_LAYERS, 2)], "compute": "fp32"}],
        }
    ends = {"layers": ["model.conv1", "model.fc"], "compute": "fp32"}
    return {"default": low, "rules": [ends, {"types": "BatchNorm2d", "compute": "fp32", "output": "input"}]}


class Task(LightningModule):
    """A model, one batch that it sees at every step, and SGD with momentum."""

    def __init__(self, case: Case, quick: bool, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused = case.fused
        self.saved: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self.last_loss = torch.tensor(float("nan"))
        if case.model == "tiny":
            layers = [m for _ in range(TINY_LAYERS) for m in (nn.Linear(TINY_WIDTH, TINY_WIDTH), nn.ReLU())]
            self.model, inputs = nn.Sequential(*layers), torch.randn(32, TINY_WIDTH)
        else:
            from torchvision.models import resnet18

            batch, side = (2, 32) if quick else (64, 224) if device == "cuda" else (8, 64)
            self.model = resnet18(num_classes=TINY_WIDTH).to(memory_format=torch.channels_last)
            inputs = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
        self.batch = (inputs.to(device), torch.randint(TINY_WIDTH, (len(inputs),)).to(device))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        with self.saved():
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.last_loss = loss.detach()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD: the cheapest optimizer hides the least."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, fused=self.fused or None)


@dataclass(frozen=True)
class Repeated:
    """A loader that costs nothing: the same batch, already on the device, but for those that come ``instead``."""

    batch: tuple[Tensor, Tensor]
    length: int
    instead: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of batches."""
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batch again and again."""
        return iter([self.instead.get(index, self.batch) for index in range(self.length)])
