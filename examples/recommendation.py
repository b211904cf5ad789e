"""Train a DLRM-style click model: sparse embedding tables in fp32, MLPs and feature interaction in bf16.

    python examples/recommendation.py fit --config examples/configs/recommendation.yaml

The clicks are synthetic: a hidden model of preferences draws them for rows of 13 counts and 26 categories, most values
of which are rare. Any option can follow, for example

    --data.path=train.txt --data.limit=1000000 --data.table_rows=100000            rows of Criteo's TSV from your disk
    --trainer.plugins=PerLayerPrecision --trainer.plugins.policy=bf16                  the logits in bf16, too
    --trainer.precision=bf16-true --trainer.plugins=null                 weights and tables stored in bf16, to compare
"""

import warnings
import zlib
from array import array
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule
from shared.common import ExampleCLI, run, start
from shared.data import DataError, TwoSets
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import BinaryAUROC

COUNTS, CATEGORIES = 13, 26  # the columns of Criteo's click logs
Rows = tuple[Tensor, Tensor, Tensor]  # counts (n, 13), category numbers (n, 26), clicks (n,)


def click_log(rows: int, seed: int = 0) -> tuple[Rows, Tensor]:
    """Return synthetic rows and the hidden probability of each click, the same for the same seed.

    Category field f has 10 to 3000 values, whose frequency falls as 1 / rank. The log-odds of a click add up the
    counts' and every value's own effect, and the agreement of hidden 4-dimensional vectors in 13 pairs of fields.
    """
    random = np.random.default_rng(seed)
    counts = random.lognormal(1, 1.5, (rows, COUNTS)).astype(np.int64)
    odds = np.log1p(counts) @ random.normal(0, 0.1, COUNTS)
    numbers, vectors = [], []
    for size in np.geomspace(10, 3000, CATEGORIES).astype(int):
        weights = 1 / np.arange(1, size + 1)
        numbers.append(random.choice(size, rows, p=weights / weights.sum()))
        vectors.append(random.normal(0, 0.45, (size, 4))[numbers[-1]])
        odds += random.normal(0, 0.35, size)[numbers[-1]]
    pairs = random.permutation(CATEGORIES).reshape(-1, 2)
    odds += sum((vectors[one] * vectors[other]).sum(1) for one, other in pairs)
    probability = 1 / (1 + np.exp(-(odds - np.quantile(odds, 0.7))))
    clicks = random.random(rows) < probability
    columns = (torch.from_numpy(counts), torch.from_numpy(np.stack(numbers, 1)), torch.from_numpy(clicks))
    return columns, torch.from_numpy(probability)


def read_criteo(path: Path, limit: int) -> Rows:
    """Return at most ``limit`` rows of a TSV file: label, 13 integers, 26 strings; any of the 39 may be empty."""
    if not path.is_file():
        raise DataError(f"no click log {str(path)!r}; give a TSV file like Criteo's train.txt as --data.path")
    labels, counts, numbers = array("b"), array("q"), array("q")  # lists would take five times the memory
    with path.open(encoding="utf-8", errors="replace") as file:
        for place, line in enumerate(islice(file, limit), start=1):
            label, *fields = line.rstrip("\n").split("\t")
            if len(fields) != COUNTS + CATEGORIES or label not in ("0", "1"):
                raise DataError(
                    f"line {place} of {str(path)!r} has {1 + len(fields)} columns and the label {label[:20]!r}; "
                    f"a row is a label of 0 or 1, {COUNTS} integers and {CATEGORIES} strings, separated by tabs"
                )
            try:
                counts.extend(int(field or 0) for field in fields[:COUNTS])
            except (ValueError, OverflowError) as error:
                raise DataError(f"line {place} of {str(path)!r} has a count that is no integer: {error}") from error
            numbers.extend(zlib.crc32(field.encode()) for field in fields[COUNTS:])
            labels.append(label == "1")
    if len(labels) < 10:
        raise DataError(f"{str(path)!r} gave {len(labels)} rows; at least ten are needed, of which the last validates")
    integers, categories = (torch.frombuffer(values, dtype=torch.int64) for values in (counts, numbers))
    clicks = torch.frombuffer(labels, dtype=torch.int8)
    return integers.view(-1, COUNTS), categories.view(-1, CATEGORIES), clicks


class Clicks(TwoSets):
    """Synthetic click logs that the script generates, or Criteo's from your disk; the last tenth of the rows validates.

    Args:
        path: a TSV file of label, 13 integers, 26 categories. Without it 300,000 synthetic rows are drawn.
        limit: rows read from ``path`` at most; they are held in memory, about 0.6 kB each.
        table_rows: rows of each category's embedding table; larger category numbers share rows (the hashing trick).
        batch_size: rows per step and device.
        num_workers: 0, since the rows lie in memory.

    Raises:
        DataError: ``path`` is no such file.
    """

    drops_last = False

    def __init__(
        self,
        path: str | None = None,
        limit: int = 1_000_000,
        table_rows: int = 3000,
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.table_rows = table_rows
        rows = click_log(300_000)[0] if path is None else read_criteo(Path(path).expanduser(), limit)
        counts, numbers, clicks = rows
        # Each field has its part of one table, so that one lookup serves all.
        places = numbers % table_rows + table_rows * torch.arange(CATEGORIES)
        columns = counts.clamp(min=0).float().log1p(), places, clicks.float()
        held_out = len(clicks) // 10
        self.train_set = TensorDataset(*(column[:-held_out] for column in columns))
        self.val_set = TensorDataset(*(column[-held_out:] for column in columns))


class Interaction(nn.Module):
    """The products of every two of a row's vectors."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (batch, n * (n - 1) / 2) of (batch, n, size)."""
        first, second = torch.triu_indices(vectors.shape[1], vectors.shape[1], offset=1, device=vectors.device)
        return (vectors @ vectors.transpose(1, 2))[:, first, second]


class DLRM(nn.Module):
    """Counts through a bottom MLP, categories through a table, their interaction through a top MLP.

    The gradient of the table is sparse: it has the rows that the batch asked for.
    """

    def __init__(self, table_rows: int, size: int, width: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(CATEGORIES * table_rows, size, mode="sum", sparse=True)
        nn.init.normal_(self.table.weight, std=0.05)
        self.bottom = nn.Sequential(nn.Linear(COUNTS, width), nn.ReLU(), nn.Linear(width, size))
        self.interaction = Interaction()
        products = CATEGORIES * (CATEGORIES + 1) // 2
        self.top = nn.Sequential(nn.Linear(size + products, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 1)

    def forward(self, counts: Tensor, places: Tensor) -> Tensor:
        """Return the logit of a click for each row."""
        dense = self.bottom(counts)
        bags = self.table(places.reshape(-1, 1)).unflatten(0, places.shape)  # one category per field: bags of one
        products = self.interaction(torch.cat([dense.unsqueeze(1), bags], 1))
        return self.head(self.top(torch.cat([dense, products], 1))).squeeze(1)


class ClickModel(LightningModule):
    """A ``DLRM`` trained by Adagrad, which takes sparse gradients as well as dense ones: one optimizer does.

    Args:
        table_rows: rows of each category's embedding table; the CLI asks the data.
        size: elements of an embedding.
        width: units of the MLPs' hidden layers.
        learning_rate: Adagrad's.
    """

    FROM_DATA = ("table_rows",)
    EXPECT = "an AUROC of 0.79 after 2 epochs, half a minute on two CPU cores; the data allow 0.886"
    HEADLINES = {"val_auroc": ("area under the ROC", ".4f")}

    def __init__(self, table_rows: int, size: int = 8, width: int = 64, learning_rate: float = 0.03) -> None:
        super().__init__()
        self.model = DLRM(table_rows, size, width)
        self.learning_rate = learning_rate
        self.val_auroc = BinaryAUROC()

    def forward(self, counts: Tensor, places: Tensor) -> Tensor:
        """Return the logit of a click."""
        return self.model(counts, places)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of counts, places in the table, and clicks."""
        counts, places, clicks = batch
        loss = nn.functional.binary_cross_entropy_with_logits(self.model(counts, places), clicks)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Measure the loss and how well the logits sort clicks from the rest."""
        counts, places, clicks = batch
        logits = self.model(counts, places)
        self.val_auroc(logits, clicks.long())
        self.log(
            "val_loss", nn.functional.binary_cross_entropy_with_logits(logits, clicks), prog_bar=True, sync_dist=True
        )
        self.log("val_auroc", self.val_auroc, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adagrad; Adam would need dense gradients, and SparseAdam none."""
        return torch.optim.Adagrad(self.parameters(), self.learning_rate)


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    warnings.filterwarnings("ignore", message="Sparse invariant checks")  # torch's of its own Adagrad
    return run(ClickModel, Clicks, args)


if __name__ == "__main__":
    start(main)
