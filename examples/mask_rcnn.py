"""Train torchvision's Mask R-CNN, from scratch and small, to find, name and cut out objects.

    python examples/mask_rcnn.py fit --config examples/configs/mask_rcnn.yaml

The data are synthetic scenes of circles, squares and triangles. Any option can follow, for example

    --trainer.plugins=null --trainer.precision=bf16-mixed      Lightning's own mixed precision, to compare
    --trainer.plugins=PerLayerPrecision --trainer.plugins.policy=fp32                 all in fp32, to compare
    --config examples/configs/coco.yaml --data.path=/path/to/coco            other data, after --config

Boxes need more bits than features: torchvision gives anchors, proposals and the true boxes the format of the features,
and bf16 has no odd number above 256. At 128 pixels that costs nothing, at 512 it moves every second anchor; sums of a
mask's pixels beyond 65504 overflow fp16. README.md has the numbers, tests/examples/test_detection.py checks them.
"""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from shared.common import ExampleCLI, one_cycle, run, start
from shared.shapes import COCO, MeanAveragePrecision, Scenes, Shapes, Target, mask_overlaps  # noqa: F401  by name in the CLI
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import box_iou


def small_mask_rcnn(num_classes: int, size: int, channels: int) -> MaskRCNN:
    """Mask R-CNN on a ResNet of three blocks, with features at 1/8, 1/16 and 1/32 of the image.

    Args:
        num_classes: kinds of objects, the background not counted.
        size: side of the images in pixels.
        channels: of the feature maps; torchvision's own model has 256.
    """
    resnet = ResNet(BasicBlock, [1, 1, 1, 1])
    backbone = BackboneWithFPN(resnet, {"layer2": "0", "layer3": "1"}, [128, 256], channels)
    sizes = tuple((round(size * share),) for share in (0.15, 0.25, 0.4))
    return MaskRCNN(
        backbone,
        min_size=size,
        max_size=size,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_test=50,
        rpn_batch_size_per_image=64,
        box_head=TwoMLPHead(channels * 7 * 7, 4 * channels),
        box_predictor=FastRCNNPredictor(4 * channels, num_classes + 1),
        box_batch_size_per_image=16,
        box_detections_per_img=20,
        mask_head=MaskRCNNHeads(channels, (channels, channels), dilation=1),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes + 1),
    )


class Detector(LightningModule):
    """Mask R-CNN trained on the sum of its five losses by AdamW and one cycle of the learning rate.

    Args:
        num_classes: how many kinds of objects there are; the CLI asks the data.
        size: side of the images in pixels; the CLI asks the data.
        channels: of the feature maps, four times as many in the box head.
        learning_rate: peak of the cycle.
        weight_decay: AdamW's.
    """

    FROM_DATA = ("num_classes", "size")
    EXPECT = "a mask mAP of about 0.6 after 4 epochs, one and a half minutes on two CPU cores"
    HEADLINES = {
        "val_mask_map": ("mask mAP", ".3f"),
        "val_box_map": ("box mAP", ".3f"),
    }

    def __init__(
        self,
        num_classes: int,
        size: int,
        channels: int = 64,
        learning_rate: float = 2e-3,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        self.model = small_mask_rcnn(num_classes, size, channels)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.val_box_map = MeanAveragePrecision(num_classes)
        self.val_mask_map = MeanAveragePrecision(num_classes)

    def training_step(self, batch: tuple[Tensor, list[Target]], batch_idx: int) -> Tensor:
        """Return the sum of the losses: objectness and boxes of the proposals; classes, boxes and masks of the RoIs."""
        images, targets = batch
        losses = self.model(list(images), targets)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train_loss", loss, batch_size=len(images))
        self.log_dict({f"train_{name}": value for name, value in losses.items()}, batch_size=len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, list[Target]], batch_idx: int) -> None:
        """Score boxes and masks."""
        images, targets = batch
        for found, target in zip(self.model(list(images)), targets, strict=True):
            rank, labels = found["scores"], target["labels"]
            self.val_box_map.update(rank, found["labels"], box_iou(found["boxes"], target["boxes"]), labels)
            overlaps = mask_overlaps(found["masks"][:, 0] > 0.5, target["masks"])
            self.val_mask_map.update(rank, found["labels"], overlaps, labels)
        metrics = {"val_box_map": self.val_box_map, "val_mask_map": self.val_mask_map}
        self.log_dict(metrics, prog_bar=True, batch_size=len(images))

    def configure_optimizers(self) -> dict:
        """Return AdamW and a schedule that moves with every optimizer step."""
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        return one_cycle(self, optimizer, self.learning_rate)


def main(args: Sequence[str] | None = None) -> ExampleCLI:
    """Run what the command line, or ``args``, asks for."""
    return run(Detector, Scenes, args, subclass_mode_data=True)


if __name__ == "__main__":
    start(main)
