"""The detection examples: scenes, scores and losses are right, and 16 bits hurt where the lesson says so."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_iou, complete_box_iou, masks_to_boxes

from lightning_mixprec import PrecisionPolicy

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", autouse=True)
def examples() -> Iterator[None]:
    """Put the examples on the path, where a script has its own folder."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def shapes() -> ModuleType:
    return importlib.import_module("shared.shapes")


@pytest.fixture
def yolo() -> ModuleType:
    return importlib.import_module("yolo")


@pytest.fixture
def mask_rcnn() -> ModuleType:
    return importlib.import_module("mask_rcnn")


def policy(name: str) -> PrecisionPolicy:
    config = yaml.safe_load((EXAMPLES / "configs" / f"{name}.yaml").read_text())
    return PrecisionPolicy.from_dict(config["trainer"]["plugins"]["init_args"]["policy"])


# Generated scenes


def test_scenes_are_the_same_every_time_and_differ_from_each_other(shapes: ModuleType) -> None:
    scenes = shapes.GeneratedShapes(3, 64, seed=5)
    image, target = scenes[1]
    again, same = shapes.GeneratedShapes(9, 64, seed=6)[0]
    assert torch.equal(image, again)
    assert all(torch.equal(target[key], same[key]) for key in target)
    assert not torch.equal(image, scenes[2][0])


def test_boxes_enclose_masks_and_labels_have_no_background(shapes: ModuleType) -> None:
    for image, target in (shapes.GeneratedShapes(20, 64, seed=0)[index] for index in range(20)):
        assert image.shape == (3, 64, 64)
        assert 0 <= image.min() <= image.max() <= 1
        assert torch.equal(target["boxes"], masks_to_boxes(target["masks"]) + torch.tensor([0.0, 0, 1, 1]))
        assert target["masks"].sum(dim=0).max() == 1, "shapes are apart"
        assert set(target["labels"].tolist()) <= {1, 2, 3}


def test_shapes_have_the_area_of_their_kind(shapes: ModuleType) -> None:
    center = torch.tensor([64.0, 64.0])
    areas = {kind: int(shapes.draw(i, center, 40.0, 0.3, 128).sum()) for i, kind in enumerate(shapes.KINDS)}
    expected = {"circle": 3.1416 * 1600, "square": 2 * 1600, "triangle": 0.75 * 3**0.5 * 1600}
    assert areas == pytest.approx(expected, rel=0.01)


def test_sizes_that_the_networks_cannot_halve_are_one_line(shapes: ModuleType) -> None:
    with pytest.raises(shapes.DataError, match=r"images of 100 pixels; --data.size takes multiples of 32") as error:
        shapes.Shapes(size=100)
    assert "\n" not in str(error.value)


# COCO, whose reader is another package: a stand-in has the few calls that are made


class FakeCOCO:
    def __init__(self, file: str) -> None:
        content = json.loads(Path(file).read_text())
        self.imgs = {image["id"]: image for image in content["images"]}
        self.categories = content["categories"]
        self.imgToAnns = {index: [a for a in content["annotations"] if a["image_id"] == index] for index in self.imgs}

    def getCatIds(self) -> list[int]:
        return [category["id"] for category in self.categories]

    def loadImgs(self, index: int) -> list[dict]:
        return [self.imgs[index]]

    def getAnnIds(self, index: int) -> list[dict]:
        return self.imgToAnns[index]

    def loadAnns(self, annotations: list[dict]) -> list[dict]:
        return annotations

    def annToMask(self, annotation: dict) -> object:
        image = self.imgs[annotation["image_id"]]
        mask = torch.zeros(image["height"], image["width"], dtype=torch.uint8)
        x, y, width, height = annotation["bbox"]
        mask[y : y + height, x : x + width] = 1
        return mask.numpy()


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "annotations").mkdir()
    objects = [
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [20, 10, 40, 20], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 100, 50], "iscrowd": 1},
    ]
    images = [{"id": index, "file_name": f"{index}.png", "width": 100, "height": 50} for index in (7, 8)]
    content = {"images": images, "annotations": objects, "categories": [{"id": 1}, {"id": 90}]}
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
        for image in images:
            Image.new("RGB", (100, 50), "white").save(tmp_path / part / image["file_name"])
        (tmp_path / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return tmp_path


def test_coco_gives_square_images_with_boxes_and_masks_in_their_pixels(
    shapes: ModuleType, coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pycocotools.coco", SimpleNamespace(COCO=FakeCOCO))
    data = shapes.COCO(str(coco), batch_size=2, num_workers=0, size=64)
    assert data.num_classes == 2
    data.setup("fit")
    ((images, (target,)),) = data.val_dataloader()  # the image without objects is left out, and so is the crowd
    assert images.shape == (1, 3, 64, 64)
    assert target["boxes"].tolist() == [pytest.approx([12.8, 6.4, 38.4, 19.2])]
    assert target["labels"].tolist() == [2]
    found = masks_to_boxes(target["masks"]) + torch.tensor([0.0, 0, 1, 1])
    assert (found - target["boxes"]).abs().max() < 1
    assert images[0, :, :32].min() == 1 and images[0, :, 32:].max() == 0


def test_coco_that_is_not_there_is_one_line(shapes: ModuleType, coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(shapes.DataError, match=r"no COCO there: '/nowhere.*give another --data.path") as error:
        shapes.COCO("/nowhere")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "pycocotools", None)  # import fails, as where it is not installed
    with pytest.raises(shapes.DataError, match="pip install pycocotools"):
        shapes.COCO(str(coco))


# The score


def test_average_precision_by_hand(shapes: ModuleType) -> None:
    score = shapes.MeanAveragePrecision(2)
    # Two objects of label 1. Detections by score: a hit of one, a miss, a hit of the other at overlaps up to 0.70.
    overlaps = torch.tensor([[1.0, 0.0], [0.2, 0.0], [0.0, 0.72]])
    score.update(torch.tensor([0.9, 0.8, 0.7]), torch.ones(3, dtype=torch.int64), overlaps, torch.tensor([1, 1]))
    at_low, at_high = 0.5 * 1 + 0.5 * 2 / 3, 0.5  # five thresholds each; label 2 has no object and does not count
    assert score.compute().item() == pytest.approx((at_low + at_high) / 2)


def test_an_object_is_found_once_and_only_by_its_label(shapes: ModuleType) -> None:
    score = shapes.MeanAveragePrecision(2)
    one = torch.ones(3, 1)
    score.update(torch.tensor([0.7, 0.9, 0.8]), torch.tensor([1, 2, 1]), one, torch.tensor([1]))
    assert score.compute().item() == 1  # what comes after the hit of score 0.8 costs nothing, as in COCO
    score.update(torch.tensor([0.95]), torch.tensor([1]), torch.zeros(1, 0), torch.tensor([], dtype=torch.int64))
    assert score.compute().item() == pytest.approx(0.5)


def test_mask_overlaps_are_those_of_boxes(shapes: ModuleType) -> None:
    boxes = torch.tensor([[2.0, 3, 12, 9], [5, 5, 15, 15], [0, 0, 3, 3]])
    pixels = torch.arange(16)
    masks = torch.stack(
        [((pixels >= x1) & (pixels < x2))[None] & ((pixels >= y1) & (pixels < y2))[:, None] for x1, y1, x2, y2 in boxes]
    )
    torch.testing.assert_close(shapes.mask_overlaps(masks, masks), box_iou(boxes, boxes))


# The one-stage detector


def cells_that_say(boxes: torch.Tensor, rows: int, stride: int = 8) -> torch.Tensor:
    """Return what a network would have to say for its boxes to be these: the inverse of the decoder, by hand."""
    cells = torch.zeros(1, rows, rows, 8)
    cells[..., 0] = -20
    for box in boxes:
        x, y, width, height = *((box[:2] + box[2:]) / 2), *(box[2:] - box[:2])
        column, row = int(x // stride), int(y // stride)
        inside = torch.stack([x / stride - column, y / stride - row])
        cells[0, row, column, 0] = 20
        cells[0, row, column, 1:3] = torch.logit((inside + 0.5) / 2)
        cells[0, row, column, 3:5] = torch.stack([width / stride, height / stride]).log()
        cells[0, row, column, 6] = 20  # the second class, label 2
    return cells


BOXES = torch.tensor([[10.0, 20, 30, 50], [70, 64, 90, 100]])
TARGETS = [{"boxes": BOXES, "labels": torch.tensor([2, 2])}]


def test_boxes_are_decoded_and_perfect_ones_cost_nothing(yolo: ModuleType) -> None:
    cells = cells_that_say(BOXES, rows=16)
    boxes = yolo.Decode()(cells)
    found, scores, labels = yolo.detections(cells[0], boxes[0])
    assert scores[:2].min() > 0.99
    torch.testing.assert_close(found[:2].sort(dim=0).values, BOXES)
    assert labels[:2].tolist() == [2, 2]
    assert sum(yolo.detection_losses(cells, boxes, TARGETS).values()).item() == pytest.approx(0, abs=1e-5)


def test_losses_of_a_network_that_says_nothing(yolo: ModuleType) -> None:
    cells = torch.zeros(1, 16, 16, 8)
    boxes = yolo.Decode()(cells)
    losses = yolo.detection_losses(cells, boxes, TARGETS)
    assert losses["objectness"].item() == pytest.approx(256 * 0.6931 / 2, rel=1e-3)
    assert losses["class"].item() == pytest.approx(1.0986, rel=1e-3)
    said = torch.tensor([[16.0, 32, 24, 40], [80, 80, 88, 88]])  # the middle of the cells, one cell large
    assert losses["box"].item() == pytest.approx(1 - complete_box_iou(said, BOXES).diag().mean().item(), abs=1e-5)


def test_images_without_objects_have_a_loss(yolo: ModuleType) -> None:
    cells = torch.zeros(2, 16, 16, 8, requires_grad=True)
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    losses = yolo.detection_losses(cells, yolo.Decode()(cells), nothing)
    sum(losses.values()).backward()
    assert losses["box"] == losses["class"] == 0
    assert cells.grad.isfinite().all()


# What the rules give, and why


def test_rules_of_mask_rcnn(mask_rcnn: ModuleType) -> None:
    assignment = policy("mask_rcnn").resolve(mask_rcnn.Detector(num_classes=3, size=64, channels=16))
    formats = {name: layer.compute for name, layer in assignment.items()}
    low = ("backbone.body.conv1", "rpn.head.conv.0.0", "roi_heads.box_head.fc6", "roi_heads.mask_predictor.conv5_mask")
    wide = (
        "transform",
        "rpn",
        "rpn.anchor_generator",
        "roi_heads",
        "roi_heads.box_roi_pool",
        "roi_heads.box_predictor",
    )
    assert {formats[f"model.{name}"] for name in low} == {"bf16"}
    assert {formats[f"model.{name}"] for name in wide} | {formats[""]} == {"fp32"}


def test_rules_of_yolo(yolo: ModuleType) -> None:
    assignment = policy("yolo").resolve(yolo.Detector(num_classes=3, channels=16))
    formats = {name: layer.compute for name, layer in assignment.items()}
    assert formats[""] == formats["decode"] == formats["network.head.0.1"] == "fp32"
    assert formats["network"] == formats["network.head.1"] == "bf16"


def test_torchvision_gives_proposals_the_format_of_the_features(mask_rcnn: ModuleType) -> None:
    model = mask_rcnn.small_mask_rcnn(num_classes=3, size=64, channels=16).eval()
    seen = []
    model.rpn.register_forward_hook(lambda module, inputs, result: seen.append(result[0][0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model([torch.rand(3, 64, 64)])
    assert seen == [torch.bfloat16]


def anchors(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Anchors of three shapes, a sixteenth of the image large, at every eighth pixel."""
    generator = AnchorGenerator(((size // 16,),), ((0.5, 1.0, 2.0),))
    images = ImageList(torch.zeros(1, 3, size, size), [(size, size)])
    return generator(images, [torch.zeros(1, 1, size // 8, size // 8, dtype=dtype)])[0].float()


@pytest.mark.parametrize(
    ("size", "moved", "farthest", "worst"), [(128, 0.0, 0, 1.0), (256, 0.02, 1, 0.96), (512, 0.52, 1, 0.88)]
)
def test_lesson_anchors_lose_pixels_in_bf16(size: int, moved: float, farthest: int, worst: float) -> None:
    right, rounded = anchors(size, torch.float32), anchors(size, torch.bfloat16)
    error = (right - rounded).abs()
    assert (error > 0).any(dim=1).float().mean().item() == pytest.approx(moved, abs=0.005)
    assert error.max() == farthest
    assert overlaps_of_pairs(right, rounded).min().item() == pytest.approx(worst, abs=0.005)


def test_lesson_suppression_by_class_goes_wrong_in_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = 400 * torch.rand(200, 2, generator=generator)
    boxes = torch.cat([corners, corners + 20 + 80 * torch.rand(200, 2, generator=generator)], dim=1)
    scores, labels = torch.rand(200, generator=generator), torch.full((200,), 20)
    kept = batched_nms(boxes, scores, labels, 0.5)
    with torch.autocast("cpu", torch.bfloat16):  # boxes of a class are shifted by a multiple of the image's size
        kept_low = batched_nms(boxes.bfloat16(), scores, labels, 0.5)
    assert (len(kept), len(kept_low)) == (180, 150)


def test_lesson_areas_and_mask_sums_overflow_fp16() -> None:
    side = torch.tensor(512.0)
    assert (side * side).item() == 262144
    assert (side.half() * side.half()).isinf()
    assert torch.ones(255, 256).half().sum().item() == 65280
    assert torch.ones(256, 256).half().sum().isinf()


def test_lesson_dice_is_not_a_number_in_fp16() -> None:
    mask, truth = torch.full((512, 512), 0.5), torch.ones(512, 512)

    def dice(format: torch.dtype) -> float:
        said, true = mask.to(format), truth.to(format)
        return (2 * (said * true).sum() / (said.sum() + true.sum())).item()

    assert dice(torch.float32) == pytest.approx(2 / 3)
    assert dice(torch.bfloat16) == pytest.approx(0.668, abs=1e-4)
    assert dice(torch.float16) != dice(torch.float16), "inf / inf"


def test_lesson_bf16_has_no_odd_number_above_256_and_counts_no_single_pixels() -> None:
    assert torch.tensor([257.0, 301, 511]).bfloat16().tolist() == [256, 300, 512]
    assert torch.ones(301, 301).bfloat16().sum().item() == 90624 != 301 * 301


def overlaps_of_pairs(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    pairs = zip(boxes.view(-1, 1, 4), others.view(-1, 1, 4), strict=True)
    return torch.stack([box_iou(*pair)[0, 0] for pair in pairs])


@pytest.mark.parametrize(("size", "error", "overlap"), [(128, 0.13, 0.91), (512, 0.46, 0.71)])
def test_lesson_a_decoder_in_bf16_loses_pixels(yolo: ModuleType, size: int, error: float, overlap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = size // yolo.STRIDE
    said = torch.randn(1, rows, rows, 8, generator=generator).bfloat16()  # the network's numbers, in bf16 either way
    right, rounded = yolo.Decode()(said.float()), yolo.Decode()(said).float()
    assert (right - rounded).abs().mean().item() == pytest.approx(error, abs=0.01)
    assert overlaps_of_pairs(right, rounded).mean().item() == pytest.approx(overlap, abs=0.01)
