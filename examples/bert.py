"""Pretrain a small BERT on the source of Python's standard library, then teach it to tell code, comments and docstrings
apart. The text is real and on every machine; a token is a byte.

    python examples/bert.py fit --config examples/configs/bert.yaml
    python examples/bert.py fit --config examples/configs/bert_finetune.yaml --model.encoder=CHECKPOINT

The first command fills in masked bytes and prints the path of its best checkpoint; the second begins with the encoder
of that checkpoint, or from scratch where --model.encoder is left out. Any option can follow, for example

    --data.path=/path/to/folder                    your own text files to pretrain on, or Python files to fine-tune on
    --trainer.plugins=null --trainer.precision=bf16-mixed              Lightning's own mixed precision, to compare
    --trainer.plugins.policy=bf16                                         everything in one format, without rules
"""

import math
import pickle
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from shared.common import ExampleCLI, run, start
from shared.data import DataError
from shared.text import BYTES, Bytes, Snippets, Text, Transformer, adamw  # noqa: F401  the CLI finds the data by name
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

MASK = BYTES  # the token after the last byte
KINDS = 3
NO_ANSWER = -100  # what cross_entropy leaves out


class Encoder(Transformer):
    """A transformer whose tokens meet their neighbours first: bytes say little alone (CANINE, arXiv 2103.06874)."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__(BYTES + 1, width, depth, heads, is_causal=False)
        self.neighbours = nn.Conv1d(width, width, kernel_size=5, padding=2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the features of each token, (batch, tokens, width)."""
        x = self.embedding(tokens)
        return self.norm(self.blocks(x + F.gelu(self.neighbours(x.transpose(1, 2)).transpose(1, 2))))


class Bert(LightningModule):
    """What both tasks share: the encoder, and AdamW with one cycle of the learning rate.

    Args:
        width: features of a token, a multiple of twice ``heads``.
        depth: blocks.
        heads: heads of each attention.
        learning_rate: peak of the cycle.
        weight_decay: of AdamW, on matrices.
    """

    def __init__(self, width: int, depth: int, heads: int, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        self.encoder = Encoder(width, depth, heads)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay

    def configure_optimizers(self) -> dict:
        """Return AdamW and a schedule that moves with every optimizer step."""
        return adamw(self, self.learning_rate, self.weight_decay)


class MaskedLM(Bert):
    """Fills in masked bytes, 15 % at random in training, every seventh in validation; its arguments are ``Bert``'s."""

    EXPECT = "about 70 % of the masked bytes after 2 epochs, a minute on two CPU cores; always a blank is 32 %"
    HEADLINES = {
        "val_acc": ("masked bytes right", ".2%"),
        "val_blank": ("always a blank", ".2%"),
        "val_bits": ("bits per masked byte", ".3f"),
    }

    def __init__(
        self,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(width, depth, heads, learning_rate, weight_decay)
        self.head = nn.Linear(width, BYTES)
        self.val_acc = MulticlassAccuracy(BYTES, average="micro", ignore_index=NO_ANSWER)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of every byte."""
        return self.head(self.encoder(tokens.long()))

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of a batch of windows."""
        seen, answers = mask(tokens, torch.rand(tokens.shape, device=tokens.device) < 0.15)
        loss = F.cross_entropy(self.head(self.encoder(seen)).flatten(0, 1), answers.flatten(), ignore_index=NO_ANSWER)
        self.log("train_loss", loss)  # not on the progress bar: that would wait for the GPU after every batch
        return loss

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        """Measure accuracy and bits per masked byte."""
        is_hidden = (torch.arange(tokens.shape[1], device=tokens.device) % 7 == 3).expand_as(tokens)
        seen, answers = mask(tokens, is_hidden)
        logits, answers = self.head(self.encoder(seen)).flatten(0, 1), answers.flatten()
        self.val_acc(logits, answers)
        self.log("val_acc", self.val_acc, prog_bar=True)
        self.log("val_bits", F.cross_entropy(logits, answers, ignore_index=NO_ANSWER) / math.log(2), sync_dist=True)
        self.log("val_blank", (tokens[is_hidden] == ord(" ")).float().mean(), sync_dist=True)


def mask(tokens: Tensor, is_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens with some hidden, and the answers, which are ``NO_ANSWER`` where nothing is hidden."""
    tokens = tokens.long()
    return tokens.masked_fill(is_hidden, MASK), tokens.masked_fill(~is_hidden, NO_ANSWER)


class Classifier(Bert):
    """Tells code, comments and docstrings apart by the mean of an encoder's features.

    Args:
        encoder: a checkpoint of ``MaskedLM`` of the same width and depth; without it the encoder starts from scratch.
        width: features of a token, a multiple of twice ``heads``.
        depth: blocks.
        heads: heads of each attention.
        learning_rate: peak of the cycle.
        weight_decay: of AdamW, on matrices.

    Raises:
        DataError: ``encoder`` is no such checkpoint.
    """

    EXPECT = "about 75 % after 4 epochs, a minute on two CPU cores; chance is 33 %"
    HEADLINES = {"val_acc": ("validation accuracy", ".2%")}

    def __init__(
        self,
        encoder: str | None = None,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(width, depth, heads, learning_rate, weight_decay)
        if encoder is not None:
            load_encoder(self.encoder, encoder)
        self.head = nn.Linear(width, KINDS)
        self.val_acc = MulticlassAccuracy(KINDS, average="micro")

    def forward(self, snippets: Tensor) -> Tensor:
        """Return (batch, kinds) logits for (batch, length) bytes."""
        return self.head(self.encoder(snippets).mean(1))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of snippets and labels."""
        snippets, labels = batch
        loss = F.cross_entropy(self(snippets), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Measure accuracy."""
        snippets, labels = batch
        self.val_acc(self(snippets), labels)
        self.log("val_acc", self.val_acc, prog_bar=True)


def load_encoder(encoder: nn.Module, path: str) -> None:
    """Load the encoder's weights from a checkpoint of ``MaskedLM``.

    Raises:
        DataError: there is no such file, or it does not hold an encoder of this size.
    """
    advice = "give the best checkpoint that bert.yaml printed as --model.encoder, or leave it out to start from scratch"
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except OSError as error:
        raise DataError(f"no checkpoint {path!r}; {advice}") from error
    except (KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{path!r} is not a checkpoint of Lightning's; {advice}") from error
    prefix = "encoder."
    weights = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    theirs, ours = ({name: tuple(each.shape) for name, each in w.items()} for w in (weights, encoder.state_dict()))
    if wrong := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
        raise DataError(
            f"the checkpoint {path!r} holds another encoder than this model's: {prefix}{wrong[0]} is "
            f"{theirs.get(wrong[0], 'missing')} there and {ours.get(wrong[0], 'missing')} here; give --model.width and "
            "--model.depth the same values in both runs"
        )
    encoder.load_state_dict(weights)


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32 on a GPU; a CPU has none
    return run(Bert, Bytes, args, subclass_mode_model=True, subclass_mode_data=True)


if __name__ == "__main__":
    start(main)
