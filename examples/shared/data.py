"""Data of the examples: what all of it has in common, and images: digits, CIFAR-10, folders laid out like ImageNet."""

from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2


class DataError(ValueError):
    """The data that was asked for is not there."""


def read_listing(folder: Path, name: str, what: str) -> list[tuple[Path, str]]:
    """Return the files of a folder and what its list, lines of ``file<TAB>text``, says of each.

    Args:
        folder: where list and files are.
        name: the list's name.
        what: what the lines say, for errors.
    """
    listing = folder / name
    form = f"lines of 'file<TAB>{what}' in UTF-8"
    if not listing.is_file():
        raise DataError(f"no file {name!r} in {str(folder)!r}; write one with {form}, or give another --data.path")
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{str(listing)!r} is no UTF-8 text ({error.reason}); write {form}") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        file, _, text = line.partition("\t")
        if not (file and text.strip()):
            raise DataError(f"line {number} of {str(listing)!r} is {line!r}; write {form}")
        pairs.append((folder / file, text.strip()))
    if len(pairs) < 2:
        raise DataError(f"{str(listing)!r} lists {len(pairs)} files; list at least two, as {form}")
    return pairs


class TwoSets(LightningDataModule):
    """A training and a validation set, from which the data modules of all examples are made.

    A subclass returns both from ``datasets``, or sets ``train_set`` and ``val_set`` itself; it may have a ``collate``.

    Args:
        batch_size: examples per step and device.
        num_workers: processes that load.
    """

    collate: Callable[[list], object] | None = None
    drops_last = True  # BatchNorm cannot train on a last batch of one example

    def __init__(self, batch_size: int, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers

    def datasets(self) -> tuple[Dataset, Dataset]:
        """Return the training and the validation set."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Build both sets once."""
        if not hasattr(self, "train_set"):
            self.train_set, self.val_set = self.datasets()

    def train_dataloader(self) -> DataLoader:
        """Return shuffled batches."""
        drop_last = self.drops_last and len(self.train_set) >= self.batch_size
        return self._loader(self.train_set, shuffle=True, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader:
        """Return every example of the validation set once."""
        return self._loader(self.val_set)

    def _loader(self, dataset: Dataset, **options: bool) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate,
            **options,
        )


class Images(TwoSets):
    """What the data modules of images have in common: they give sets of (image, label).

    Attributes:
        num_classes: how many labels there are.
        small_images: whether the images are so small (8x8, 32x32) that a network must not shrink them at once.
    """

    num_classes: int
    small_images: bool


class Digits(Images):
    """1797 real handwritten digits, 8x8 pixels, that come with scikit-learn: nothing is downloaded.

    Every fifth image validates; the split is stratified and always the same.

    Args:
        batch_size: images per step and device.
        num_workers: 0, since the images lie in memory and a worker process would only copy them.
    """

    num_classes = 10
    small_images = True

    def __init__(self, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__(batch_size, num_workers)

    def datasets(self) -> tuple[Dataset, Dataset]:
        """Return (3, 8, 8) images with the grey value in each channel, standardised by the training set."""
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1).expand(-1, 3, -1, -1)
        labels = torch.tensor(digits.target, dtype=torch.int64)
        train, val = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
        images = (images - images[train].mean()) / images[train].std()
        return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


class CIFAR10(Images):
    """CIFAR-10 from your disk; its 10,000 test images validate.

    Args:
        path: the folder that holds ``cifar-10-batches-py``.
        batch_size: images per step and device.
        num_workers: processes that load and augment.

    Raises:
        DataError: ``path`` does not hold CIFAR-10.
    """

    num_classes = 10
    small_images = True

    def __init__(self, path: str, batch_size: int = 128, num_workers: int = 2) -> None:
        super().__init__(batch_size, num_workers)
        self.path = Path(path).expanduser()
        if not (self.path / "cifar-10-batches-py").is_dir():
            raise DataError(
                f"no CIFAR-10 in {str(self.path)!r}: it has no folder 'cifar-10-batches-py'; "
                "unpack cifar-10-python.tar.gz there, or give another path as --data.path"
            )

    def datasets(self) -> tuple[Dataset, Dataset]:
        """Return (3, 32, 32) images, shifted and mirrored at random in training."""
        evaluate = [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # of the training images
        ]
        augment = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *evaluate]
        try:
            return (
                datasets.CIFAR10(self.path, train=True, transform=v2.Compose(augment)),
                datasets.CIFAR10(self.path, train=False, transform=v2.Compose(evaluate)),
            )
        except RuntimeError as error:
            raise DataError(
                f"the CIFAR-10 in {str(self.path)!r} is incomplete or damaged; "
                "unpack cifar-10-python.tar.gz there again"
            ) from error


class ImageFolder(Images):
    """Your own images, laid out like ImageNet: ``path/train/<class>/*.jpg`` and ``path/val/<class>/*.jpg``.

    Args:
        path: the folder that holds ``train`` and ``val``.
        batch_size: images per step and device.
        num_workers: processes that load and augment.
        size: side of the square that the network sees, in pixels.

    Raises:
        DataError: a folder is missing, or ``val`` has other classes than ``train``.
    """

    small_images = False

    def __init__(self, path: str, batch_size: int = 256, num_workers: int = 8, size: int = 224) -> None:
        super().__init__(batch_size, num_workers)
        self.path, self.size = Path(path).expanduser(), size
        train, val = (self._classes(part) for part in ("train", "val"))
        if train != val:
            raise DataError(
                f"the class folders of {str(self.path)!r} differ between train and val: "
                f"{', '.join(sorted(train ^ val)[:5])} in one of them only; give both the same ones"
            )
        self.num_classes = len(train)

    def _classes(self, part: str) -> set[str]:
        folder = self.path / part
        found = {entry.name for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else set()
        if not found:
            raise DataError(
                f"no class folders in {str(folder)!r}; lay the images out as {part}/<class>/<image> "
                "or give another path as --data.path"
            )
        return found

    def datasets(self) -> tuple[Dataset, Dataset]:
        """Return (3, size, size) images, cropped and mirrored at random in training."""
        tail = [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # of ImageNet's training images
        ]
        augment = [v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip(), *tail]
        evaluate = [v2.Resize(self.size * 256 // 224), v2.CenterCrop(self.size), *tail]  # 256 -> 224, the usual crop
        try:
            return (
                datasets.ImageFolder(self.path / "train", transform=v2.Compose(augment)),
                datasets.ImageFolder(self.path / "val", transform=v2.Compose(evaluate)),
            )
        except FileNotFoundError as error:  # a class without images
            raise DataError(f"{error}; put images there, or remove the folder") from error
