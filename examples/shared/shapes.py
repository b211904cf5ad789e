"""Scenes with boxes, labels and masks that the detection examples share, and the score of detections.

``Shapes`` are synthetic and generated; ``COCO`` is read from your disk. A batch is a tensor of images
(n, 3, size, size) in 0 to 1 and a list with one dict per image, as torchvision's detectors take it: ``boxes`` (n, 4)
as x1, y1, x2, y2 in pixels, ``labels`` (n,) from 1, as 0 is the background, and ``masks`` (n, size, size) of 0 and 1.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchvision.datasets import CocoDetection
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional

from .data import DataError, Images

KINDS = ("circle", "square", "triangle")  # labels 1, 2 and 3
Target = dict[str, Tensor]


def draw(kind: int, center: Tensor, radius: float, angle: float, size: int) -> Tensor:
    """Return which pixels (size, size) a shape covers.

    Args:
        kind: index in ``KINDS``.
        center: x and y in pixels.
        radius: of the circle that goes through the shape's corners, in pixels.
        angle: by which the shape is turned, in radians.
        size: side of the image in pixels.
    """
    pixels = torch.arange(size) + 0.5
    x, y = (pixels - center[0])[None, :], (pixels - center[1])[:, None]
    if KINDS[kind] == "circle":
        return x**2 + y**2 < radius**2
    corners = {"square": 4, "triangle": 3}[KINDS[kind]]
    turns = [angle + 2 * math.pi * side / corners for side in range(corners)]
    sides = torch.stack([x * math.cos(turn) + y * math.sin(turn) for turn in turns])
    return (sides < radius * math.cos(math.pi / corners)).all(dim=0)


class GeneratedShapes(Dataset):
    """Circles, squares and triangles of any colour, apart from each other, on a background of one colour, with noise.

    Args:
        length: how many scenes there are.
        size: side of an image in pixels, at least 64.
        seed: scene ``i`` is drawn with the random numbers of ``seed + i``, always the same.
        most: the largest number of shapes in a scene; the smallest is 1.
    """

    def __init__(self, length: int, size: int, seed: int, most: int = 4) -> None:
        self.length, self.size, self.seed, self.most = length, size, seed, most

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        generator = torch.Generator().manual_seed(self.seed + index)
        kinds, masks = self._place(generator)
        background = torch.rand(3, 1, 1, generator=generator)
        image = background.expand(3, self.size, self.size)
        for mask in masks:
            # Modulo 1 the colour is at least a quarter away from the background in every channel.
            color = (background + 0.25 + 0.5 * torch.rand(3, 1, 1, generator=generator)) % 1
            image = torch.where(mask, color, image)
        image = image + 0.1 * torch.randn(image.shape, generator=generator)
        boxes = masks_to_boxes(masks)
        boxes[:, 2:] += 1  # the right and lower edges of the last pixels, not their corners
        return image.clamp(0, 1), {"boxes": boxes, "labels": kinds + 1, "masks": masks.to(torch.uint8)}

    def _place(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the kinds and masks of the shapes that found room among the tries."""
        wanted = int(torch.randint(1, self.most + 1, (), generator=generator))
        placed: list[tuple[int, Tensor, float, float]] = []
        while len(placed) < wanted:
            kind = int(torch.randint(len(KINDS), (), generator=generator))
            share, angle, x, y = torch.rand(4, generator=generator).tolist()
            radius = self.size * (0.08 + 0.12 * share)
            center = radius + torch.tensor([x, y]) * (self.size - 2 * radius)
            if all((center - other).norm() > radius + far for _, other, far, _ in placed):
                placed.append((kind, center, radius, 2 * math.pi * angle))
        masks = [draw(kind, center, radius, angle, self.size) for kind, center, radius, angle in placed]
        return torch.tensor([kind for kind, *_ in placed]), torch.stack(masks)


def collate(scenes: list[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    """Stack the images; the targets stay one by one, as they differ in length."""
    return default_collate([image for image, _ in scenes]), [target for _, target in scenes]


class Scenes(Images):
    """What the data modules below have in common.

    Attributes:
        num_classes: how many kinds of objects there are, the background not counted.
        size: side of the square images in pixels.
    """

    size: int
    collate = staticmethod(collate)


class Shapes(Scenes):
    """Synthetic scenes, drawn when they are asked for and always the same: nothing is downloaded.

    Args:
        batch_size: images per step and device.
        num_workers: processes that draw; 0 draws them in the process that trains.
        size: side of the images in pixels, at least 64.
        train: how many scenes train.
        val: how many other scenes validate.

    Raises:
        DataError: ``size`` is too small.
    """

    num_classes = len(KINDS)

    def __init__(
        self, batch_size: int = 8, num_workers: int = 0, size: int = 128, train: int = 640, val: int = 96
    ) -> None:
        super().__init__(batch_size, num_workers)
        if size < 64 or size % 32:
            raise DataError(f"images of {size} pixels; --data.size takes multiples of 32 from 64 on")
        self.size, self.train, self.val = size, train, val

    def datasets(self) -> tuple[Dataset, Dataset]:
        """Return the scenes that train and others, of other seeds, that validate."""
        return (
            GeneratedShapes(self.train, self.size, seed=1_000_000),
            GeneratedShapes(self.val, self.size, seed=0),
        )


class CocoScenes(Dataset):
    """A part of COCO with square images: the longer side becomes ``size`` pixels, the rest is black.

    Args:
        images: folder of the images.
        annotations: the file instances_*.json.
        size: side of the images in pixels.

    Raises:
        DataError: pycocotools is not installed, a file is missing, or no image has objects.
    """

    def __init__(self, images: Path, annotations: Path, size: int) -> None:
        for path, there in ((annotations, annotations.is_file()), (images, images.is_dir())):
            if not there:
                raise DataError(
                    f"no COCO there: {str(path)!r} does not exist; unpack images and annotations as PATH/train2017/, "
                    "PATH/val2017/ and PATH/annotations/instances_*.json, or give another --data.path"
                )
        try:
            self.scenes = CocoDetection(images, annotations)
        except ImportError as error:
            raise DataError("COCO's annotations are read by pycocotools: pip install pycocotools") from error
        self.size = size
        coco = self.scenes.coco
        self.labels = {category: label for label, category in enumerate(sorted(coco.getCatIds()), start=1)}
        self.scenes.ids = [index for index in self.scenes.ids if any(map(is_object, coco.imgToAnns[index]))]
        if not self.scenes.ids:
            raise DataError(f"no image of {str(annotations)!r} has an object; give another file")

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, annotations = self.scenes[index]
        annotations = list(filter(is_object, annotations))
        width, height = image.size
        scale = self.size / max(width, height)
        inside = [round(height * scale), round(width * scale)]
        pad = [0, 0, self.size - inside[1], self.size - inside[0]]
        image = functional.to_dtype(functional.to_image(functional.resize(image, inside)), torch.float32, scale=True)
        masks = torch.stack([torch.from_numpy(self.scenes.coco.annToMask(a)) for a in annotations])
        masks = nn.functional.interpolate(masks[None].float(), inside, mode="nearest")[0].to(torch.uint8)
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32) * scale
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([self.labels[a["category_id"]] for a in annotations])
        return functional.pad(image, pad), {"boxes": boxes, "labels": labels, "masks": functional.pad(masks, pad)}


def is_object(annotation: dict) -> bool:
    """Say whether COCO means one object, not a crowd, with a box that has an area."""
    return not annotation.get("iscrowd") and min(annotation["bbox"][2:]) > 1


class COCO(Scenes):
    """COCO, or your own images annotated like it, from your disk.

    Args:
        path: folder that holds ``annotations/instances_<part>.json`` and a folder of images per part.
        batch_size: images per step and device.
        num_workers: processes that load.
        size: side of the square that the network sees, in pixels, a multiple of 32.
        train: name of the part that trains.
        val: name of the part that validates.

    Raises:
        DataError: something is missing there, or pycocotools is not installed.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 8,
        num_workers: int = 4,
        size: int = 512,
        train: str = "train2017",
        val: str = "val2017",
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.path, self.size, self.train, self.val = Path(path).expanduser(), size, train, val
        self.validation = self._part(val)
        self.num_classes = len(self.validation.labels)

    def _part(self, name: str) -> CocoScenes:
        return CocoScenes(self.path / name, self.path / "annotations" / f"instances_{name}.json", self.size)

    def datasets(self) -> tuple[Dataset, Dataset]:
        """Return images and targets, not augmented."""
        return self._part(self.train), self.validation


class MeanAveragePrecision(Metric):
    """COCO's mean average precision: over classes and over overlaps from 0.50 to 0.95, from 0 to 1.

    It has no limit on the number of detections, no sizes, no crowds, and takes precision at every recall that occurs
    where COCO takes it at 101: it needs no package beside torchmetrics.

    Args:
        num_classes: how many kinds of objects there are, with labels from 1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("thresholds", torch.arange(10) * 0.05 + 0.5, persistent=False)
        for state in ("scores", "labels", "hits"):
            self.add_state(state, default=[], dist_reduce_fx="cat")
        self.add_state("objects", default=torch.zeros(num_classes), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor, overlaps: Tensor, true_labels: Tensor) -> None:
        """Add an image.

        Args:
            scores: of the detections (n,).
            labels: of the detections (n,).
            overlaps: intersection over union of detections and objects (n, m).
            true_labels: of the objects (m,).
        """
        order = scores.argsort(descending=True)
        overlaps = torch.where(labels[:, None] == true_labels, overlaps.float(), 0)[order]
        self.scores.append(scores[order].float())
        self.labels.append(labels[order])
        self.hits.append(match(overlaps, self.thresholds))
        self.objects += torch.bincount(true_labels - 1, minlength=self.num_classes)

    def compute(self) -> Tensor:
        """Return the mean over the classes that have objects."""
        scores, labels, hits = (dim_zero_cat(state) for state in (self.scores, self.labels, self.hits))
        order = scores.argsort(descending=True)
        labels, hits = labels[order], hits[order]
        of_class = [
            average_precision(hits[labels == label], self.objects[label - 1])
            for label in range(1, self.num_classes + 1)
        ]
        present = self.objects > 0
        return torch.stack(of_class)[present].mean()


def match(overlaps: Tensor, thresholds: Tensor) -> Tensor:
    """Return which detections (n,) hit an object at which threshold (t,), as (n, t).

    Detections come by falling score; each takes the free object that it overlaps most.
    """
    hits = overlaps.new_zeros(len(overlaps), len(thresholds), dtype=torch.bool)
    if overlaps.shape[1] == 0:
        return hits
    free = torch.ones(len(thresholds), overlaps.shape[1], dtype=torch.bool, device=overlaps.device)
    for detection, row in enumerate(overlaps):
        best, which = torch.where(free, row, 0).max(dim=1)
        hits[detection] = best >= thresholds
        free &= ~(nn.functional.one_hot(which, overlaps.shape[1]).bool() & hits[detection][:, None])
    return hits


def average_precision(hits: Tensor, objects: Tensor) -> Tensor:
    """Return the area under precision over recall, mean over thresholds, of hits (n, t) by falling score."""
    found = hits.float().cumsum(dim=0)
    precision = found / torch.arange(1, len(hits) + 1, device=hits.device)[:, None]
    at_least = precision.flip(0).cummax(dim=0).values.flip(0) if len(hits) else precision
    return (at_least * hits).sum(dim=0).div(objects.clamp(min=1)).mean()


def mask_overlaps(masks: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union of two sets of masks (n, h, w) and (m, h, w) as (n, m).

    The sums count pixels: they are exact in fp32, and in 16 bits they are not.
    """
    rows, columns = masks.flatten(1).float(), others.flatten(1).float()
    common = rows @ columns.T
    union = rows.sum(dim=1)[:, None] + columns.sum(dim=1) - common
    return common / union.clamp(min=1)
