"""Train an image-text model by contrast, as CLIP does: encoders in bf16, similarities and their softmax in fp32.

    python examples/contrastive.py fit --config examples/configs/contrastive.yaml

The images are scikit-learn's real handwritten digits, the texts their names in several wordings ("the digit seven"),
put together by the script. The score is zero-shot: which of ten names, in a wording that training does not have, fits a
held-out image best. Any option can follow, for example

    --data.path=FOLDER                         your images, and captions.txt of "file<TAB>caption"
    --model.scale=100 --trainer.plugins=PerLayerPrecision --trainer.plugins.policy=bf16         logits in bf16 steps
    --trainer.precision=bf16-mixed --trainer.plugins=null         Lightning's own mixed precision, to compare
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from PIL import Image, UnidentifiedImageError
from shared.common import ExampleCLI, one_cycle, run, start
from shared.data import DataError, Digits, TwoSets, read_listing
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

LARGEST_SCALE = 100.0
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDINGS = ["{}", "the digit {}", "a drawing of a {}", "a handwritten {}", "{} written by hand"]
UNSEEN_WORDING = "a picture of the number {}"


def tokens(captions: Sequence[str], length: int) -> Tensor:
    """Return the UTF-8 bytes (captions, length) plus one; 0 fills up, what is longer is cut."""
    rows = torch.zeros(len(captions), length, dtype=torch.int64)
    for row, caption in zip(rows, captions, strict=True):
        codes = list(caption.encode())[:length]
        row[: len(codes)] = torch.tensor(codes, dtype=torch.int64) + 1
    return rows


def numbers(captions: Sequence[str]) -> Tensor:
    """Return for each caption its place among the different ones, sorted."""
    places = {caption: place for place, caption in enumerate(sorted(set(captions)))}
    return torch.tensor([places[caption] for caption in captions])


class DigitPairs(Dataset):
    """Digits with their names, in a wording drawn at random."""

    def __init__(self, digits: Dataset, captions: list[list[Tensor]]) -> None:
        self.digits, self.captions = digits, captions

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return an image, the tokens of a caption, and the digit."""
        image, digit = self.digits[place]
        wordings = self.captions[digit]
        return image, wordings[int(torch.randint(len(wordings), ()))], digit


class FilePairs(Dataset):
    """Images from files with what belongs to each: some tensors."""

    def __init__(self, files: Sequence[Path], size: int, *belongings: Tensor) -> None:
        self.files, self.belongings = files, belongings
        steps = [v2.ToImage(), v2.Resize(size), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose([*steps, v2.Normalize((0.5,) * 3, (0.25,) * 3)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> tuple[Tensor, ...]:
        """Return an image and what belongs to it."""
        with Image.open(self.files[place]) as image:
            return self.transform(image.convert("RGB")), *(each[place] for each in self.belongings)


def read_captions(folder: Path) -> list[tuple[Path, str]]:
    """Return the images and captions that ``captions.txt`` lists."""
    pairs = read_listing(folder, "captions.txt", "caption")
    for image, _ in pairs:
        try:
            Image.open(image).close()
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{str(folder / 'captions.txt')!r} names no readable image: {error}") from error
    return pairs


class ImageTexts(TwoSets):
    """Pairs to train on, and held-out images with the candidate texts to choose from.

    Args:
        path: a folder of images with ``captions.txt``, lines of ``file<TAB>caption``; every tenth line is held out,
            and the candidates are the captions of those. Without it: scikit-learn's digits and their names.
        size: side of the square that images from ``path`` become, in pixels.
        text_length: bytes of a caption that are read.
        batch_size: pairs per step and device.
        num_workers: processes that load; the digits lie in memory and need 0.

    Attributes:
        candidates: the texts that compete for each held-out image.

    Raises:
        DataError: ``path`` holds no pairs.
    """

    drops_last = False

    def __init__(
        self,
        path: str | None = None,
        size: int = 64,
        text_length: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.text_length = text_length
        if path is None:
            captions = [list(tokens([wording.format(name) for wording in WORDINGS], text_length)) for name in NAMES]
            digits, self.val_set = Digits().datasets()
            self.train_set = DigitPairs(digits, captions)
            self.candidates = [UNSEEN_WORDING.format(name) for name in NAMES]
        else:
            self._read(read_captions(Path(path).expanduser()), size)

    def _read(self, pairs: list[tuple[Path, str]], size: int) -> None:
        files, captions = zip(*(pair for place, pair in enumerate(pairs) if place % 10), strict=True)
        self.train_set = FilePairs(files, size, tokens(captions, self.text_length), numbers(captions))
        files, captions = zip(*pairs[::10], strict=True)
        self.val_set = FilePairs(files, size, numbers(captions))
        self.candidates = sorted(set(captions))
        if len(self.candidates) < 2:
            raise DataError(
                f"every tenth line is held out, and these have {len(self.candidates)} caption; "
                "list at least eleven images, with captions that differ"
            )


def image_encoder(width: int, size: int) -> nn.Module:
    """Return three convolutions, means over the quarters of the image and a projection to ``size`` elements."""
    steps: list[nn.Module] = []
    for channels, stride in ((3, 1), (width, 2), (2 * width, 2)):
        out = width if channels == 3 else 2 * channels
        steps += [nn.Conv2d(channels, out, 3, stride, padding=1), nn.GroupNorm(8, out), nn.ReLU()]
    return nn.Sequential(*steps, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, size))


class TextEncoder(nn.Module):
    """Bytes through a Transformer; the mean over the text, projected to ``size`` elements."""

    def __init__(self, length: int, width: int, size: int) -> None:
        super().__init__()
        self.token = nn.Embedding(257, width, padding_idx=0)
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, size)

    def forward(self, texts: Tensor) -> Tensor:
        """Return (batch, size) of tokens (batch, length)."""
        is_filling = texts == 0
        hidden = self.token(texts) + self.place
        for block in self.blocks:
            hidden = block(hidden, src_key_padding_mask=is_filling)
        is_text = (~is_filling).unsqueeze(-1)
        return self.project((self.norm(hidden) * is_text).sum(1) / is_text.sum(1))


class Similarity(nn.Module):
    """The cosines of all images with all texts, times a learned scale of at most 100, as in CLIP."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(min(scale, LARGEST_SCALE))))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the logits (images, texts) of (images, size) and (texts, size)."""
        images, texts = nn.functional.normalize(images, dim=1), nn.functional.normalize(texts, dim=1)
        return self.log_scale.exp() * (images @ texts.T)


class Contrastive(LightningModule):
    """Two encoders, trained so that an image and its text are the most similar in their batch; AdamW, one cycle.

    Args:
        candidates: the texts that compete for each held-out image; the CLI asks the data.
        text_length: bytes of a caption that are read; the CLI asks the data.
        size: elements of what both encoders return.
        width: channels of the image encoder's first layer and half of those of the text encoder.
        scale: the similarity's scale to begin with, 1 / temperature.
        learning_rate: peak of the cycle.
    """

    FROM_DATA = ("candidates", "text_length")
    EXPECT = "97 to 98 % zero-shot accuracy after 20 epochs, a minute on two CPU cores"
    HEADLINES = {"val_acc": ("zero-shot accuracy", ".2%")}

    def __init__(
        self,
        candidates: list[str],
        text_length: int,
        size: int = 64,
        width: int = 32,
        scale: float = 14.0,
        learning_rate: float = 2e-3,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder(width, size)
        self.text_encoder = TextEncoder(text_length, 2 * width, size)
        self.similarity = Similarity(scale)
        self.register_buffer("candidates", tokens(candidates, text_length), persistent=False)
        self.learning_rate = learning_rate
        self.val_acc = MulticlassAccuracy(len(candidates), average="micro")

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the similarity of each image to each text."""
        return self.similarity(self.image_encoder(images), self.text_encoder(texts))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of choosing an image's text and a text's image; all that mean the same are right."""
        images, texts, numbers = batch
        logits = self.similarity(self.image_encoder(images), self.text_encoder(texts))
        same = (numbers.unsqueeze(0) == numbers.unsqueeze(1)).float()
        right = same / same.sum(1, keepdim=True)
        loss = nn.functional.cross_entropy(logits, right) / 2 + nn.functional.cross_entropy(logits.T, right) / 2
        self.log("train_loss", loss)
        self.log("scale", self.similarity.log_scale.detach().exp())
        return loss

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Keep the scale from growing beyond 100, as CLIP does (arXiv 2103.00020)."""
        with torch.no_grad():
            self.similarity.log_scale.clamp_(max=math.log(LARGEST_SCALE))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure how often the most similar candidate is the right one."""
        images, numbers = batch
        logits = self.similarity(self.image_encoder(images), self.text_encoder(self.candidates))
        self.val_acc(logits, numbers)
        self.log("val_loss", nn.functional.cross_entropy(logits, numbers), prog_bar=True, sync_dist=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> dict:
        """Return AdamW and a schedule that moves with every optimizer step."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate)
        return one_cycle(self, optimizer, self.learning_rate)


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    return run(Contrastive, ImageTexts, args)


if __name__ == "__main__":
    start(main)
