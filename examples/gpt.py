"""Train a small GPT on the source of Python's standard library, byte by byte: real text that every machine has.

    python examples/gpt.py fit --config examples/configs/gpt.yaml

Any option of the Trainer, the model or the data can follow, for example

    --data.path=/path/to/folder --data.size=null                               your own text files, all of them
    --trainer.plugins=null --trainer.precision=bf16-mixed              Lightning's own mixed precision, to compare
    --trainer.plugins.policy=bf16                                         everything in one format, without rules

With --config examples/configs/gpt_gpu.yaml instead it is a GPT of the size where 16 bits pay on a GPU.
"""

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from shared.common import ExampleCLI, run, start
from shared.text import BYTES, Text, Transformer, adamw
from torch import Tensor, nn
from torch.nn import functional as F


class Decoder(nn.Module):
    """A transformer and the head on it, which may be the embedding once more."""

    def __init__(self, width: int, depth: int, heads: int, is_tied: bool) -> None:
        super().__init__()
        self.transformer = Transformer(BYTES, width, depth, heads, is_causal=True)
        self.head = nn.Linear(width, BYTES, bias=False)
        if is_tied:
            self.head.weight = self.transformer.embedding.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each next byte."""
        return self.head(self.transformer(tokens))


class GPT(LightningModule):
    """A GPT that predicts the next byte.

    Args:
        unigram_bits: bits per byte of the held-out text by the frequencies of bytes alone; the CLI asks the data.
        width: features of a token, a multiple of twice ``heads``.
        depth: blocks.
        heads: heads of each attention.
        is_tied: whether the head's weight is the embedding.
        learning_rate: peak of the cycle.
        weight_decay: of AdamW, on matrices.
        weights: what keeps the bits of weights that the policy stores in 16 bits: exact, kahan, stochastic or nearest,
            by lightning_mixprec.optim.AdamW; null for torch.optim.AdamW.
        states: what that AdamW stores its moments in: fp32, bf16 or int8.
    """

    FROM_DATA = ("unigram_bits",)
    EXPECT = "about 3 bits per byte after 2 epochs, a minute on two CPU cores; byte frequencies alone give 4.4"
    HEADLINES = {"val_bits": ("bits per byte", ".3f"), "unigram_bits": ("by frequency alone", ".3f")}

    def __init__(
        self,
        unigram_bits: float,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        is_tied: bool = True,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        weights: str | None = None,
        states: str = "fp32",
    ) -> None:
        super().__init__()
        self.model = Decoder(width, depth, heads, is_tied)
        self.unigram_bits, self.learning_rate, self.weight_decay = unigram_bits, learning_rate, weight_decay
        self.weights, self.states = weights, states

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each next byte."""
        return self.model(tokens.long())

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean cross entropy of each byte that has one before it, in nats."""
        tokens = tokens.long()
        return F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of a batch of windows."""
        loss = self.loss(tokens)
        self.log("train_loss", loss)  # not on the progress bar: that would wait for the GPU after every batch
        return loss

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        """Measure bits per byte."""
        self.log("val_bits", self.loss(tokens) / math.log(2), prog_bar=True, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Set what frequencies alone would give beside it."""
        self.log("unigram_bits", self.unigram_bits, sync_dist=True)

    def configure_optimizers(self) -> dict:
        """Return AdamW and a schedule that moves with every optimizer step."""
        return adamw(self, self.learning_rate, self.weight_decay, self.weights, self.states)


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32 on a GPU; a CPU has none
    return run(GPT, Text, args)


if __name__ == "__main__":
    start(main)
