"""Train a physics-informed network that solves a heat equation in map coordinates, in fp64 where it matters.

    python examples/pinn.py fit --config examples/configs/pinn.yaml

    --data.storage=fp32 --trainer.plugins=PerLayerPrecision --trainer.plugins.policy=fp32                 all in fp32
    --trainer.plugins=PerLayerPrecision --trainer.plugins.policy=double.yaml         all in fp64, see examples/README.md
    --model.optimizer=lbfgs --model.learning_rate=1 --trainer.max_epochs=60       LBFGS, which takes no loss scaling
    --data.path=points.csv                               your own points of the square, lines of easting,northing

The problem is synthetic: steady heat conduction with a known solution on a square of 16 m, whose corner is given as a
survey gives it, in metres of UTM easting and northing. At 5.3 million metres fp32 resolves half a metre.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from shared.common import ExampleCLI, one_cycle, run, start
from shared.data import DataError, TwoSets
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric

CORNER = (691_608.0, 5_334_760.0)  # easting and northing of the square's lower left corner, in metres
SIDE = 16.0  # metres


def temperature(local: Tensor) -> Tensor:
    """Return the exact solution in kelvin at local coordinates (n, 2) in [0, 1]: zero on the border."""
    x, y = local.unbind(-1)
    return torch.sin(torch.pi * x) * torch.sin(2 * torch.pi * y)


def source(local: Tensor) -> Tensor:
    """Return what minus the Laplacian of ``temperature`` is there, per square of the side's length."""
    return 5 * torch.pi**2 * temperature(local)


class Frame(nn.Module):
    """Map coordinates in metres to local ones in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("corner", torch.tensor(CORNER, dtype=torch.float64), persistent=False)

    def forward(self, points: Tensor) -> Tensor:
        """Subtract the corner and divide by the side."""
        return (points - self.corner.to(points.dtype)) / SIDE


class Points(TwoSets):
    """Points of the square in map coordinates: random ones to train on; a grid with its temperatures to validate.

    Args:
        path: a CSV file of your own training points, a line of easting,northing each; None draws them, always alike.
        count: how many points are drawn.
        batch_size: points per step and device.
        storage: format in which points are handed on; in fp32 they are rounded first.

    Raises:
        DataError: the file is not there, is no such table, or has points outside of the square.
    """

    drops_last = False

    def __init__(
        self,
        path: str | None = None,
        count: int = 1024,
        batch_size: int = 256,
        storage: Literal["fp64", "fp32"] = "fp64",
    ) -> None:
        super().__init__(batch_size)
        self.path, self.count = path, count
        self.dtype = {"fp64": torch.float64, "fp32": torch.float32}[storage]

    def datasets(self) -> tuple[TensorDataset, TensorDataset]:
        """Return the points, drawn or read, and a grid with its temperatures."""
        corner = torch.tensor(CORNER, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        drawn = corner + SIDE * torch.rand(self.count, 2, generator=generator, dtype=torch.float64)
        points = drawn if self.path is None else read_points(Path(self.path).expanduser())
        axis = torch.linspace(0, 1, 34, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        held_out = TensorDataset((corner + SIDE * grid).to(self.dtype), temperature(grid))
        return TensorDataset(points.to(self.dtype)), held_out


def read_points(path: Path) -> Tensor:
    """Return the points of a CSV file in fp64, shape (n, 2)."""
    needed = f"give lines of easting,northing within {SIDE:g} m of {CORNER[0]:.0f},{CORNER[1]:.0f}, or no --data.path"
    try:
        points = torch.from_numpy(np.loadtxt(path, delimiter=",", ndmin=2, dtype=np.float64))
    except (OSError, ValueError) as error:
        raise DataError(f"no table of points in {str(path)!r}; {needed}") from error
    local = Frame()(points) if points.shape[1] == 2 else points.new_tensor([-1.0])
    if len(local) == 0 or not ((local >= 0) & (local <= 1)).all():
        raise DataError(f"not all {len(points)} lines of {str(path)!r} are points of the square; {needed}")
    return points


class HeatConduction(LightningModule):
    """A network u(x, y) that is zero on the border by its form, trained on the residual of -laplace u = f.

    The derivatives are taken with respect to local coordinates, which ``frame`` makes of map coordinates.

    Args:
        width: of each of the three hidden layers.
        optimizer: "adam", or "lbfgs", which evaluates the loss up to 20 times a step.
        learning_rate: of Adam the peak of one cycle, of LBFGS the first step's length in its line search.
    """

    EXPECT = "a relative error of about 2e-3 after 300 epochs, half a minute on two CPU cores"
    HEADLINES = {"val_error": ("relative L2 error", ".2e")}

    def __init__(
        self, width: int = 48, optimizer: Literal["adam", "lbfgs"] = "adam", learning_rate: float = 3e-3
    ) -> None:
        super().__init__()
        self.frame = Frame()
        hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.Tanh())]
        self.network = nn.Sequential(nn.Linear(2, width), nn.Tanh(), *hidden, nn.Linear(width, 1))
        self.optimizer, self.learning_rate = optimizer, learning_rate
        self.squared_miss, self.squared_truth = MeanMetric(), MeanMetric()

    def solution(self, local: Tensor) -> Tensor:
        """Return u at local coordinates (n, 2): the network's output times a bump that is zero on the border."""
        return (16 * local * (1 - local)).prod(-1) * self.network(2 * local - 1).squeeze(-1)

    def forward(self, points: Tensor) -> Tensor:
        """Return u at map coordinates (n, 2)."""
        return self.solution(self.frame(points))

    def residual(self, local: Tensor) -> Tensor:
        """Return -laplace u - f at local coordinates (n, 2)."""
        local = local.detach().requires_grad_()
        (slope,) = self.differentiate(self.solution(local).sum(), local)
        curvature = sum(self.differentiate(slope[:, i].sum(), local)[0][:, i] for i in range(2))
        return -curvature - source(local)

    def differentiate(self, of: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        """Return a gradient that can be differentiated again, each layer's in the layer's own format."""
        with torch.autocast(self.device.type, enabled=False):
            return torch.autograd.grad(of, at, create_graph=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared residual of a batch of map coordinates (n, 2)."""
        loss = self.residual(self.frame(batch[0])).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Measure the error against the exact solution at the points as they were before any rounding."""
        points, truth = batch
        self.squared_miss((self.solution(self.frame(points)) - truth).square())
        self.squared_truth(truth.square())

    def on_validation_epoch_end(self) -> None:
        """Log the relative L2 error."""
        self.log(
            "val_error",
            (self.squared_miss.compute() / self.squared_truth.compute()).sqrt(),
            prog_bar=True,
            sync_dist=True,
        )
        self.squared_miss.reset()
        self.squared_truth.reset()

    def configure_optimizers(self) -> dict | torch.optim.Optimizer:
        """Return LBFGS, or Adam and a schedule that moves with every optimizer step."""
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), self.learning_rate, line_search_fn="strong_wolfe")
        optimizer = torch.optim.Adam(self.parameters(), self.learning_rate)
        return one_cycle(self, optimizer, self.learning_rate)


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    return run(HeatConduction, Points, args)


if __name__ == "__main__":
    start(main)
