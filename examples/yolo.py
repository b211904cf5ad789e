"""Train a small one-stage detector: one pass of a network says for every cell of a grid what is there, and where.

    python examples/yolo.py fit --config examples/configs/yolo.yaml

The data are synthetic scenes of circles, squares and triangles. Any option can follow, for example

    --trainer.plugins=null --trainer.precision=bf16-mixed      Lightning's own mixed precision, to compare
    --trainer.plugins=PerLayerPrecision --trainer.plugins.policy=fp32                 all in fp32, to compare
    --config examples/configs/coco.yaml --data.path=/path/to/coco            other data, after --config

As in YOLOX there are no anchors: the cell that holds the center of an object answers for it with an objectness, a box
and a class (https://arxiv.org/abs/2107.08430). The network computes in bf16; its numbers become pixels in fp32, since
in bf16 pixels beyond 256 are rounded to even ones, and the losses and overlaps of boxes follow in fp32.
"""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from shared.common import ExampleCLI, one_cycle, run, start
from shared.shapes import COCO, MeanAveragePrecision, Scenes, Shapes, Target  # noqa: F401  by name in the CLI
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torchvision.ops import Conv2dNormActivation, batched_nms, box_iou, complete_box_iou_loss

STRIDE = 8  # side of a cell in pixels


class Residual(nn.Module):
    """Two convolutions whose result is added to what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Conv2dNormActivation(channels, channels // 2, 1, activation_layer=nn.SiLU),
            Conv2dNormActivation(channels // 2, channels, 3, activation_layer=nn.SiLU),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape that came in."""
        return x + self.layers(x)


class Network(nn.Module):
    """Images (n, 3, h, w) to 5 + ``num_classes`` numbers for each cell: (n, h / 8, w / 8, 5 + num_classes).

    They are the logit of objectness, two for the box's center, two for its size, and the logits of the classes.
    Features at 1/16 and 1/32 are added to those at 1/8, so that a cell sees objects that are larger than itself.

    Args:
        num_classes: how many kinds of objects there are.
        channels: at 1/4 of the image's size; twice as many from there on.
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.stem = nn.Sequential(shrink(3, channels // 2), shrink(channels // 2, channels), Residual(channels))
        self.fine = nn.Sequential(shrink(channels, wide), Residual(wide))
        self.middle = nn.Sequential(shrink(wide, wide), Residual(wide))
        self.coarse = nn.Sequential(shrink(wide, wide), Residual(wide))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.head = nn.Sequential(
            Conv2dNormActivation(wide, wide, 3, activation_layer=nn.SiLU), nn.Conv2d(wide, 5 + num_classes, 1)
        )
        nn.init.constant_(self.head[1].bias[:1], -4.0)  # nearly all cells are empty

    def forward(self, images: Tensor) -> Tensor:
        """Return what the network says of each cell."""
        fine = self.fine(self.stem(images))
        middle = self.middle(fine)
        features = fine + self.up(middle + self.up(self.coarse(middle)))
        return self.head(features).permute(0, 2, 3, 1)


def shrink(channels: int, out_channels: int) -> nn.Module:
    """Return a convolution that halves height and width."""
    return Conv2dNormActivation(channels, out_channels, 3, stride=2, activation_layer=nn.SiLU)


class Decode(nn.Module):
    """What the network says of each cell to boxes in pixels.

    The center may lie half a cell outside the cell that answers; width and height are at most 1000 pixels or so.
    """

    def forward(self, cells: Tensor) -> Tensor:
        """Return boxes (n, rows, columns, 4) as x1, y1, x2, y2 of cells (n, rows, columns, 5 or more)."""
        rows, columns = cells.shape[1:3]
        grid = torch.stack(
            torch.meshgrid(
                torch.arange(columns, device=cells.device), torch.arange(rows, device=cells.device), indexing="xy"
            ),
            dim=-1,
        )
        centers = (grid + 2 * cells[..., 1:3].sigmoid() - 0.5) * STRIDE
        halves = cells[..., 3:5].clamp(max=5.0).exp() * STRIDE / 2
        return torch.cat([centers - halves, centers + halves], dim=-1)


class Detector(LightningModule):
    """The network, trained by AdamW and one cycle of the learning rate.

    The loss is the binary cross entropy of the objectness of all cells, and for the cells that hold a center the
    complete IoU loss of the box and the cross entropy of the class, all per object.

    Args:
        num_classes: how many kinds of objects there are; the CLI asks the data.
        channels: width of the network.
        box_weight: weight of the loss of boxes.
        learning_rate: peak of the cycle.
        weight_decay: AdamW's.
    """

    FROM_DATA = ("num_classes",)
    EXPECT = "a box mAP of about 0.7 after 8 epochs, one and a half minutes on two CPU cores"
    HEADLINES = {"val_map": ("box mAP", ".3f")}

    def __init__(
        self,
        num_classes: int,
        channels: int = 32,
        box_weight: float = 2.0,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__()
        self.network = Network(num_classes, channels).to(memory_format=torch.channels_last)
        self.decode = Decode()
        self.box_weight, self.learning_rate, self.weight_decay = box_weight, learning_rate, weight_decay
        self.val_map = MeanAveragePrecision(num_classes)

    def training_step(self, batch: tuple[Tensor, list[Target]], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, targets = batch
        cells = self.network(images)
        losses = detection_losses(cells, self.decode(cells), targets)
        loss = losses["objectness"] + self.box_weight * losses["box"] + losses["class"]
        self.log("train_loss", loss, batch_size=len(images))
        self.log_dict({f"train_{name}": value for name, value in losses.items()}, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, list[Target]], batch_idx: int) -> None:
        """Score boxes."""
        images, targets = batch
        cells = self.network(images)
        for said, boxes, target in zip(cells, self.decode(cells), targets, strict=True):
            found, scores, labels = detections(said, boxes)
            self.val_map.update(scores, labels, box_iou(found, target["boxes"]), target["labels"])
        self.log("val_map", self.val_map, prog_bar=True, batch_size=len(images))

    def configure_optimizers(self) -> dict:
        """Return AdamW and a schedule that moves with every optimizer step."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        return one_cycle(self, optimizer, self.learning_rate)


def detection_losses(cells: Tensor, boxes: Tensor, targets: list[Target]) -> dict[str, Tensor]:
    """Return the losses of objectness, boxes and classes, each per object of the batch.

    Args:
        cells: what the network says (n, rows, columns, 5 + num_classes).
        boxes: the boxes that it means (n, rows, columns, 4).
        targets: one dict per image with ``boxes`` and ``labels``.
    """
    true_boxes = torch.cat([target["boxes"] for target in targets])
    labels = torch.cat([target["labels"] for target in targets]) - 1
    image = torch.cat([torch.full_like(target["labels"], index) for index, target in enumerate(targets)])
    column, row = ((true_boxes[:, :2] + true_boxes[:, 2:]) / (2 * STRIDE)).long().unbind(dim=1)
    here = (image, row.clamp(max=cells.shape[1] - 1), column.clamp(max=cells.shape[2] - 1))
    is_object = torch.zeros_like(cells[..., 0])
    is_object[here] = 1.0
    objects = max(len(labels), 1)
    return {
        "objectness": binary_cross_entropy_with_logits(cells[..., 0], is_object, reduction="sum") / objects,
        "box": complete_box_iou_loss(boxes[here], true_boxes, reduction="sum") / objects,
        "class": cross_entropy(cells[here][:, 5:], labels, reduction="sum") / objects,
    }


def detections(cells: Tensor, boxes: Tensor, most: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (n, 4), scores (n,) and labels (n,) from 1 of an image, by falling score.

    Args:
        cells: what the network says (rows, columns, 5 + num_classes).
        boxes: the boxes that it means (rows, columns, 4).
        most: the best so many cells are looked at; of those that overlap by more than half one stays.
    """
    cells, boxes = cells.flatten(0, 1), boxes.flatten(0, 1)
    likely, kinds = cells[:, 5:].softmax(dim=1).max(dim=1)
    scores, best = (cells[:, 0].sigmoid() * likely).topk(min(most, len(cells)))
    boxes, kinds = boxes[best], kinds[best]
    kept = batched_nms(boxes, scores, kinds, iou_threshold=0.5)
    return boxes[kept], scores[kept], kinds[kept] + 1


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    return run(Detector, Scenes, args, subclass_mode_data=True)


if __name__ == "__main__":
    start(main)
