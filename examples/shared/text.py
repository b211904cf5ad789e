"""What the language examples share: text that every Python has on disk, and a small transformer.

The text is the source of Python's own standard library: code, comments and prose, real and written by people. A token
is a byte, so there is no tokenizer.
"""

import ast
import io
import math
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from lightning_mixprec.optim import AdamW

from .common import one_cycle
from .data import DataError, TwoSets

BYTES = 256


def documents(path: str | None, size: int | None = None, pattern: str = "*") -> list[bytes]:
    """Return the text files below a folder, in the order of their names, cut off after ``size`` bytes in all.

    Without a folder it is the modules at the top of Python's standard library, but those whose name begins with "_",
    which differ from machine to machine. Hidden, binary and empty files are left out.

    Raises:
        DataError: there is no such folder, or no such text in it.
    """
    folder = Path(path).expanduser() if path else Path(sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        raise DataError(f"no folder {str(folder)!r}; give one with text files as --data.path")
    found, left = [], math.inf if size is None else size
    for file in sorted(folder.rglob(pattern) if path else folder.glob("[!_]*.py")):
        if left > 0 and file.is_file() and not file.name.startswith("."):
            text = file.read_bytes()[: min(left, file.stat().st_size)]
            if text and b"\0" not in text:
                found.append(text)
                left -= len(text)
    if not found:
        raise DataError(f"no text files ({pattern}) in {str(folder)!r}; give another folder as --data.path")
    return found


class Bytes(TwoSets):
    """What the data modules below have in common: sets of bytes, kept in memory."""

    def __init__(self, path: str | None, batch_size: int) -> None:
        super().__init__(batch_size)
        self.path = path


class Text(Bytes):
    """Windows of bytes, from Python's standard library or from your files; the last tenth of every file validates.

    A batch is a uint8 tensor of shape (batch, context + ahead).

    Args:
        path: a folder with text files, its subfolders included; without it the standard library.
        size: bytes that are read in all; null for everything.
        context: bytes from the start of a window to the start of the next.
        ahead: bytes of the next window that a window ends with: 1 to learn the next byte, 0 to fill in masks.
        batch_size: windows per step and device.

    Raises:
        DataError: there is no text in ``path``, or less than a window of it to validate.
    """

    def __init__(
        self,
        path: str | None = None,
        size: int | None = 1_000_000,
        context: int = 128,
        ahead: int = 1,
        batch_size: int = 32,
    ) -> None:
        super().__init__(path, batch_size)
        self.context, self.ahead = context, ahead
        texts = documents(path, size)
        self.train_text = b"".join(text[: -(len(text) // 10) or None] for text in texts)
        self.val_text = b"".join(text[len(text) - len(text) // 10 :] for text in texts)
        if len(self.val_text) < context + ahead:
            raise DataError(
                f"{sum(map(len, texts))} bytes of text, a tenth of which validates, are too few for windows of "
                f"{context + ahead} bytes; give more as --data.path, or a smaller --data.context"
            )

    def datasets(self) -> tuple[Dataset, Dataset]:
        """Return windows that follow on each other."""
        return self._windows(self.train_text), self._windows(self.val_text)

    def _windows(self, text: bytes) -> Tensor:
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return tokens.unfold(0, self.context + self.ahead, self.context).contiguous()

    @property
    def unigram_bits(self) -> float:
        """Bits per byte of the held-out text for a model that knows only how frequent each byte is."""
        train, val = (
            torch.bincount(torch.frombuffer(bytearray(text), dtype=torch.uint8), minlength=BYTES)
            for text in (self.train_text, self.val_text)
        )
        return float(-(val / val.sum()) @ torch.log2((train + 1) / (train + 1).sum()))


class Snippets(Bytes):
    """Snippets of Python with their kind: 0 code, 1 comment, 2 docstring; the snippets of every fifth file validate.

    Comments come without their "#", docstrings without their quotes, and any white space is one blank: what tells the
    kinds apart is the wording. All kinds are equally frequent. A batch is a uint8 tensor (batch, length) and labels.

    Args:
        path: a folder with Python files, its subfolders included; without it the standard library.
        length: bytes of a snippet.
        per_kind: snippets of each kind, spread evenly over all files, at most.
        batch_size: snippets per step and device.

    Raises:
        DataError: there are no Python files in ``path``, or some kind is missing in them.
    """

    def __init__(self, path: str | None = None, length: int = 64, per_kind: int = 1500, batch_size: int = 32) -> None:
        super().__init__(path, batch_size)
        self.length, self.per_kind = length, per_kind
        self.documents = documents(path, pattern="*.py")

    def datasets(self) -> tuple[Dataset, Dataset]:
        """Return snippets and labels."""
        val = self.documents[::5]
        train = [document for index, document in enumerate(self.documents) if index % 5]
        return self._snippets(train, self.per_kind * 4 // 5), self._snippets(val, self.per_kind // 5)

    def _snippets(self, texts: list[bytes], count: int) -> Dataset:
        pieces: list[list[bytes]] = [[], [], []]
        for text in texts:
            for kind, words in enumerate(kinds(text)):
                joined = " ".join(words.split()).encode()
                pieces[kind] += (
                    joined[i : i + self.length] for i in range(0, len(joined) - self.length + 1, self.length)
                )
        count = min(count, *map(len, pieces))
        if not count:
            raise DataError(
                f"the Python files of {self.path!r} have too little code, comments or docstrings for snippets of "
                f"{self.length} bytes; give another folder as --data.path, or a smaller --data.length"
            )
        chosen = [piece[i * len(piece) // count] for i in range(count) for piece in pieces]
        snippets = torch.frombuffer(bytearray(b"".join(chosen)), dtype=torch.uint8).view(-1, self.length)
        return TensorDataset(snippets, torch.arange(len(pieces)).repeat(count))


def kinds(source: bytes) -> tuple[str, str, str]:
    """Return the code, the comments and the docstrings of a module; nothing of one that this Python cannot read."""
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.tokenize(io.BytesIO(source).readline))
    except (SyntaxError, ValueError):
        return "", "", ""
    lines = ["", *io.TextIOWrapper(io.BytesIO(source), tokens[0].string)]
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    for token in comments:
        lines[token.start[0]] = token.line[: token.start[1]] + "\n"
    documented = list(docstrings(tree))
    for node in documented:
        lines[node.lineno : node.end_lineno + 1] = [""] * (node.end_lineno + 1 - node.lineno)
    words = "\n".join(token.string.lstrip("#") for token in comments)
    return "".join(lines), words, "\n".join(node.value for node in documented)


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Yield the docstrings of a module, its classes and its functions."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            yield node.body[0].value


class Attention(nn.Module):
    """Self-attention of several heads; its own operations are all but the two projections.

    Args:
        width: features of a token, a multiple of ``heads``.
        heads: how many.
        is_causal: whether a token sees only itself and those before it.
    """

    def __init__(self, width: int, heads: int, is_causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise DataError(f"{heads} heads cannot share {width} features; give heads that divide the width")
        self.heads, self.is_causal = heads, is_causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, tokens, width) for the same."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(query, key, value).transpose(1, 2).flatten(2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the weighted values; all shapes are (batch, heads, tokens, width / heads)."""
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)


class Block(nn.Module):
    """A pre-norm transformer block: attention and a feed-forward layer, each on a shortcut."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), attention, nn.LayerNorm(width)
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, tokens, width) for the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.feedforward(self.norm2(x))


class Embedding(nn.Module):
    """Vectors of unit variance for tokens, and sinusoids for their positions (Vaswani et al. 2017)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, width)
        nn.init.normal_(self.table.weight, std=width**-0.5)  # so that it can be the head's weight, too

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (batch, tokens, width) for (batch, tokens)."""
        width = self.table.embedding_dim
        position = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)[:, None]
        channel = torch.arange(0, width, 2, device=tokens.device, dtype=torch.float32)
        angle = position * torch.exp(channel * (-math.log(10_000) / width))
        return self.table(tokens.long()) * width**0.5 + torch.cat([angle.sin(), angle.cos()], -1)


class Transformer(nn.Module):
    """An embedding, blocks and a last norm: (batch, tokens) to (batch, tokens, width)."""

    def __init__(self, tokens: int, width: int, depth: int, heads: int, is_causal: bool) -> None:
        super().__init__()
        self.embedding, self.norm = Embedding(tokens, width), nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(Block(width, Attention(width, heads, is_causal)) for _ in range(depth)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the features of each token."""
        return self.norm(self.blocks(self.embedding(tokens)))


def adamw(
    module: LightningModule, learning_rate: float, weight_decay: float, weights: str | None = None, states: str = "fp32"
) -> dict:
    """Return AdamW, which decays only matrices, and one cycle of the learning rate over the whole training.

    It is torch's, or, if ``weights`` says how 16-bit weights keep their bits, that of ``lightning_mixprec.optim``.
    """
    matrices = [weight for weight in module.parameters() if weight.ndim > 1]
    vectors = [weight for weight in module.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (0.9, 0.95)
    optimizer = (
        torch.optim.AdamW(groups, learning_rate, betas)
        if weights is None
        else AdamW(groups, learning_rate, betas, weights=weights, states=states)
    )
    return one_cycle(module, optimizer, learning_rate, pct_start=0.1, cycle_momentum=False)
