"""Train a small transformer that fp16 cannot train, and let AdaptivePrecision rescue it.

    python examples/adaptive_rescue.py fit --config examples/configs/rescue_fp16.yaml

ends in an error at the 31st step, since all overflow. Two lines of YAML more, given after it, and it learns:

    --config examples/configs/rescue_adaptive.yaml

To compare, add instead

    --trainer.plugins.policy=bf16                                                               or fp32: both learn
    --trainer.plugins=lightning.pytorch.plugins.MixedPrecision --trainer.plugins.precision=16-mixed
        --trainer.plugins.device=cpu                    Lightning's own 16-mixed: no error, and nothing is ever learned

The data is synthetic: pairs of a key and a value, and a question, one of the keys; the answer is its value. Attention
alone can find it.
"""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from shared.common import ExampleCLI, run, start
from shared.data import DataError, TwoSets
from shared.text import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

KEYS, VALUES = 16, 8


class Pairs(TwoSets):
    """Synthetic, always the same: pairs of a key and a value in random order, and the key that is asked for.

    A batch is (pairs, questions, answers): pairs of shape (batch, pairs, 2), the others (batch,), all int64.

    Args:
        pairs: how many pairs there are to look in, at most 16.
        count: training examples; a quarter as many validate.
        batch_size: examples per step and device.
    """

    def __init__(self, pairs: int = 8, count: int = 12_800, batch_size: int = 64) -> None:
        super().__init__(batch_size)
        if not 1 <= pairs <= KEYS:
            raise DataError(f"there are {pairs} pairs to look in; --data.pairs takes 1 to {KEYS}")
        self.pairs, self.count = pairs, count

    def examples(self, count: int, seed: int) -> TensorDataset:
        """Return as many examples."""
        generator = torch.Generator().manual_seed(seed)
        keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, : self.pairs]  # none twice
        values = torch.randint(VALUES, keys.shape, generator=generator)
        asked = torch.randint(self.pairs, (count, 1), generator=generator)
        questions, answers = (each.gather(1, asked)[:, 0] for each in (keys, values))
        return TensorDataset(torch.stack([keys, values], -1), questions, answers)

    def datasets(self) -> tuple[TensorDataset, TensorDataset]:
        """Return the examples that train, and others."""
        return self.examples(self.count, 0), self.examples(self.count // 4, 1)


class GrownAttention(Attention):
    """Attention whose queries and keys have grown, as they do in long trainings.

    Dehghani et al. 2023 (arXiv 2302.05442) saw attention logits grow to 50,000 in a large vision transformer. This
    model begins beyond that: a learned gain, stored in fp32, has made queries and keys ``growth`` times as large as
    usual, and the logits are divided by ``growth`` squared, so in exact arithmetic it is an ordinary model. But the
    products are formed first, and fp16 ends at 65504: there they are infinite, and their softmax is NaN. CogView
    (arXiv 2105.13290) therefore divides first.
    """

    def __init__(self, width: int, heads: int, growth: float) -> None:
        super().__init__(width, heads, is_causal=False)
        self.growth = growth
        self.gain = nn.Parameter(torch.full((heads, 1, 1), growth))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the weighted values; all shapes are (batch, heads, tokens, width / heads)."""
        logits = (self.gain * query) @ (self.gain * key).transpose(-2, -1)
        weights = (logits / (self.growth**2 * query.shape[-1] ** 0.5)).softmax(-1)
        return weights.to(value.dtype) @ value


class Reader(nn.Module):
    """A transformer that reads the pairs and the question and ends with logits of the answer."""

    def __init__(self, width: int, depth: int, heads: int, growth: float) -> None:
        super().__init__()
        self.keys, self.values, self.question = (
            nn.Embedding(KEYS, width),
            nn.Embedding(VALUES, width),
            nn.Embedding(1, width),
        )
        self.blocks = nn.Sequential(*(Block(width, GrownAttention(width, heads, growth)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VALUES)

    def forward(self, pairs: Tensor, questions: Tensor) -> Tensor:
        """Return (batch, values)."""
        known = self.keys(pairs[..., 0]) + self.values(pairs[..., 1])
        asked = self.keys(questions[:, None]) + self.question.weight
        return self.head(self.norm(self.blocks(torch.cat([known, asked], 1))[:, -1]))


class Retrieval(LightningModule):
    """Learns to look a value up.

    Args:
        width: features of a token, a multiple of ``heads``.
        depth: blocks.
        heads: heads of each attention.
        growth: how many times larger than usual queries and keys are; 1 is a healthy model.
        learning_rate: peak of the cycle.
    """

    EXPECT = "an error after some seconds in fp16; with rescue_adaptive.yaml 100 % in half a minute on two CPU cores"
    HEADLINES = {"val_acc": ("validation accuracy", ".2%")}

    def __init__(
        self, width: int = 32, depth: int = 2, heads: int = 1, growth: float = 300.0, learning_rate: float = 3e-3
    ) -> None:
        super().__init__()
        self.model = Reader(width, depth, heads, growth)
        self.learning_rate = learning_rate
        self.val_acc = MulticlassAccuracy(VALUES, average="micro")

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        pairs, questions, answers = batch
        loss = F.cross_entropy(self.model(pairs, questions), answers)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Measure accuracy."""
        pairs, questions, answers = batch
        self.val_acc(self.model(pairs, questions).nan_to_num(), answers)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), self.learning_rate, fused=True)


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    return run(Retrieval, Pairs, args)


if __name__ == "__main__":
    start(main)
