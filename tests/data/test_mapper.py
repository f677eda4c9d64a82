"""Box and embedding stay together under every augmentation."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T

from vild.data import datasets
from vild.data.mapper import ResizeShortestEdge, ViLDMapper, transform_regions
from vild.engine.sources import open_store
from vild.store.store import EmbeddingStore
from vild.utils.errors import UserError
from vild.utils.images import read_image

AUGMENTATIONS = {
    "flip": [T.RandomFlip(prob=1.0)],
    "vertical flip": [T.RandomFlip(prob=1.0, horizontal=False, vertical=True)],
    "resize": [T.ResizeShortestEdge((200, 200))],
    "crop": [T.RandomCrop("absolute", (100, 110))],
    "large-scale jitter": [T.ResizeScale(0.7, 2.0, 128, 128), T.FixedSizeCrop((128, 128))],
    "all": [T.RandomCrop("absolute", (110, 110)), T.ResizeScale(0.9, 1.6, 160, 160), T.FixedSizeCrop((150, 150)),
            T.RandomFlip(prob=1.0)],
}  # fmt: skip


def test_a_thin_image_keeps_a_pixel_and_others_are_resized_as_by_detectron2():
    for size in ((40, 2), (2, 40), (3000, 3), (1, 5000), (97, 133), (480, 640)):
        image = np.zeros((*size, 3), np.uint8)
        kinds = (ResizeShortestEdge, T.ResizeShortestEdge)
        mine, theirs = (kind([128, 128], 160).get_transform(image) for kind in kinds)
        assert (mine.new_h, mine.new_w) == (max(theirs.new_h, 1), max(theirs.new_w, 1))
        assert mine.apply_image(image).shape[:2] == (mine.new_h, mine.new_w)


class ColourTeacher:
    """A stand-in for CLIP that, like it, does not mind flips and scale, but minds what is in the crop: the unit
    histogram of hue directions in a crop, so that a misplaced box shows at once."""

    def encode_regions(self, image, boxes):
        rows = []
        for x0, y0, x1, y1 in boxes.round().long().tolist():
            crop = image[:, max(y0, 0) : y1, max(x0, 0) : x1].float().flatten(1)
            centred = crop - crop.mean(0, keepdim=True)
            votes = torch.stack([(w @ centred).relu() for w in self.directions()]).mean(1)
            rows.append(torch.nn.functional.normalize(votes, dim=0))
        return torch.stack(rows)

    @staticmethod
    def directions():
        angles = torch.arange(12) * torch.pi / 6
        first, second = torch.tensor([1.0, -1.0, 0.0]) / 2**0.5, torch.tensor([1.0, 1.0, -2.0]) / 6**0.5
        return torch.cos(angles)[:, None] * first + torch.sin(angles)[:, None] * second


def mosaic():
    """An image of tiles in different hues, no two alike: left is not right, top is not bottom."""
    hues = torch.arange(16).reshape(4, 4) * (2 * torch.pi / 16)
    colour = torch.stack([128 + 110 * torch.cos(hues - shift) for shift in (0.0, 2.094, 4.189)])
    return colour.round().to(torch.uint8).repeat_interleave(32, 1).repeat_interleave(32, 2)


def tiles():
    corners = torch.tensor([[x, y] for y in range(0, 128, 32) for x in range(0, 128, 32)], dtype=torch.float32)
    return torch.cat([corners + 3, corners + 29], 1)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_moved_box_holds_the_same_thing(name):
    teacher, image, boxes = ColourTeacher(), mosaic(), tiles()
    before = teacher.encode_regions(image, boxes)
    count = 0
    for seed in range(8):
        np.random.seed(seed)
        inputs = T.AugInput(image.permute(1, 2, 0).numpy())
        transforms = T.AugmentationList(AUGMENTATIONS[name])(inputs)
        size = inputs.image.shape[:2]
        moved, rows = transform_regions(boxes, transforms, size, min_visible=0.5)
        if len(rows) == 0:
            continue
        count += len(rows)
        augmented = torch.from_numpy(np.ascontiguousarray(inputs.image)).permute(2, 0, 1)
        after = teacher.encode_regions(augmented, moved)
        assert ((after * before[rows]).sum(1) > 0.95).all()
        if "flip" in name:  # the test can fail: boxes that stay where they were hold something else
            wrong = teacher.encode_regions(augmented, boxes[rows])
            assert ((wrong * before[rows]).sum(1) < 0.95).all()
    assert count > 30


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_teacher_sees_the_same_thing_in_a_moved_box(name, teacher):
    """The same with a real open_clip model and the real crops, 1x and 1.5x. Its weights are random, so that all its
    embeddings lie close together: beside the cosine, each must be nearest to its own original among all tiles."""
    image, boxes = mosaic(), tiles()
    before = teacher.encode_regions(image, boxes)
    nearest, count = 0, 0
    for seed in range(4):
        np.random.seed(seed)
        inputs = T.AugInput(image.permute(1, 2, 0).numpy())
        transforms = T.AugmentationList(AUGMENTATIONS[name])(inputs)
        moved, rows = transform_regions(boxes, transforms, inputs.image.shape[:2], min_visible=0.9)
        augmented = torch.from_numpy(np.ascontiguousarray(inputs.image)).permute(2, 0, 1)
        cosine = teacher.encode_regions(augmented, moved) @ before.T
        assert (cosine[torch.arange(len(rows)), rows] > 0.95).all()
        nearest, count = nearest + (cosine.argmax(1) == rows).sum().item(), count + len(rows)
    assert count >= 8 and nearest / count > 0.8


@pytest.mark.parametrize("name", ["flip", "resize", "crop", "large-scale jitter", "all"])
def test_the_mapper_carries_the_stores_rows_along(world, store_folder, name):
    """Every distilled region of the mapper is some region of the store, moved as the image was."""
    store = EmbeddingStore(store_folder)
    mapper = ViLDMapper(
        augmentations=AUGMENTATIONS[name],
        image_format="BGR",
        store=store,
        distill_per_image=6,
        min_visible=0.5,
    )
    for seed, record in enumerate(datasets.load_dicts("glyphs_train")[:6]):
        np.random.seed(seed)
        mapped = mapper(record)
        np.random.seed(seed)
        transforms = T.AugmentationList(AUGMENTATIONS[name])(T.AugInput(read_image(record["file_name"])))
        regions = store[record["image_id"]]
        moved, rows = transform_regions(regions.boxes, transforms, tuple(mapped["image"].shape[1:]), 0.5)
        distill = mapped["distill"]
        assert len(distill) == min(len(rows), 6)
        for box, embedding in zip(distill.proposal_boxes.tensor, distill.embeddings, strict=True):
            hit = (moved - box).abs().sum(1).argmin()
            torch.testing.assert_close(moved[hit], box)
            assert torch.equal(regions.embeddings[rows[hit]], embedding)


def test_annotations_move_with_the_image_too(world):
    mapper = ViLDMapper(
        augmentations=[T.RandomFlip(prob=1.0)],
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format="bitmask",
        store=None,
        distill_per_image=0,
        min_visible=0.5,
    )
    record = next(r for r in datasets.load_dicts("glyphs_train") if r["annotations"])
    mapped = mapper(record)
    x, y, w, h = record["annotations"][0]["bbox"]
    expected = torch.tensor([128 - x - w, y, 128 - x, y + h])
    torch.testing.assert_close(mapped["instances"].gt_boxes.tensor[0], expected)
    mask = mapped["instances"].gt_masks.tensor[0]
    columns = mask.any(0).nonzero()[:, 0]
    assert columns[0] == expected[0] and columns[-1] + 1 == expected[2]
    assert "distill" not in mapped


def test_regions_that_leave_the_image_are_dropped():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [40.0, 40.0, 60.0, 60.0], [45.0, 0.0, 65.0, 10.0]])
    transforms = T.TransformList([T.CropTransform(50, 0, 60, 60)])  # x from 50 on
    moved, rows = transform_regions(boxes, transforms, (60, 60), min_visible=0.5)
    assert rows.tolist() == [1, 2]  # half of the second is left, three quarters of the third
    assert moved.tolist() == [[0, 40, 10, 60], [0, 0, 15, 10]]
    assert transform_regions(boxes, transforms, (60, 60), min_visible=0.7)[1].tolist() == [2]
    assert len(transform_regions(boxes[:0], transforms, (60, 60), 0.5)[0]) == 0


def test_a_config_with_large_scale_jitter(make_cfg):
    cfg = make_cfg("vild", "INPUT.LARGE_SCALE_JITTER.ENABLED", True, "INPUT.LARGE_SCALE_JITTER.SIZE", 96)
    mapper = ViLDMapper.from_config(cfg, open_store(cfg))
    for record in datasets.load_dicts("glyphs_train")[:4]:
        assert mapper(record)["image"].shape == (3, 96, 96)


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    for name in ("broken.jpg", "missing.jpg"):
        with pytest.raises(UserError, match=rf"{name} cannot be read"):
            read_image(str(tmp_path / name))
