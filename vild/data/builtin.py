"""The built-in data sets, in Detectron2's layout below ``DETECTRON2_DATASETS``, with the file names of OVR-CNN and
Detic."""

from __future__ import annotations

from dataclasses import dataclass

from vild.utils.errors import UserError


@dataclass(frozen=True)
class Entry:
    """Location and reading rules of a data set.

    Attributes:
        json: annotation file, below the root.
        images: image folder, below the root.
        split: a file in ``vild/data/splits`` (without .json) or a path; defines base and novel classes. Categories in
            none of its lists are left out.
        keep: "base" drops annotations of all but the base classes (for training), "all" keeps them.
        protocol: evaluation, "coco" (all classes compete on every image) or "lvis" (federated).
    """

    json: str
    images: str
    split: str
    keep: str = "all"
    protocol: str = "coco"

    def __post_init__(self):
        for key, value in vars(self).items():
            if not isinstance(value, str) or "\0" in value:
                raise UserError(f"data set {str(self.json)[:60]}: {key} is {str(value)[:60]}, not a string")
        for key, values in (("keep", ("base", "all")), ("protocol", ("coco", "lvis"))):
            if getattr(self, key) not in values:
                raise UserError(f"data set {self.json}: {key} is '{getattr(self, key)}', not {' or '.join(values)}")


def _glyphs(json_name: str, images: str, split: str = "lvis", **kwargs) -> Entry:
    return Entry(f"glyphs/annotations/{json_name}.json", f"glyphs/{images}", split, **kwargs)


def _lvis(json_name: str, split: str = "lvis_v1", **kwargs) -> Entry:
    return Entry(f"lvis/{json_name}.json", "coco", split, protocol="lvis", **kwargs)


def _zeroshot(part: str, kind: str, split: str = "coco_48_17", **kwargs) -> Entry:
    return Entry(f"coco/zero-shot/instances_{part}2017_{kind}.json", f"coco/{part}2017", split, **kwargs)


def _everything(json: str, images: str) -> Entry:
    return Entry(json, images, "everything")


BUILTIN = {
    "glyphs_train": _glyphs("coco_train", "train", keep="base"),
    "glyphs_train_all": _everything("glyphs/annotations/coco_train_all.json", "glyphs/train"),
    "glyphs_nonovel_train": _glyphs("coco_nonovel_train", "nonovel_train", keep="base"),
    "glyphs_new_train": _glyphs("coco_new_train_all", "new_train", "glyphs_new", keep="base"),
    "glyphs_heldout_train": _glyphs("coco_train", "train", "glyphs_heldout", keep="base"),
    "glyphs_heldout_dev": _glyphs("coco_dev", "dev", "glyphs_heldout"),
    "glyphs_dev": _glyphs("coco_dev", "dev"),
    "glyphs_val": _glyphs("coco_val", "val"),
    "glyphs_lvis_train": _glyphs("lvis_train", "train", keep="base", protocol="lvis"),
    "glyphs_lvis_val": _glyphs("lvis_val", "val", protocol="lvis"),
    # LVIS; the full training file is for a supervised oracle
    "lvis_v1_train": _lvis("lvis_v1_train", "everything"),
    "lvis_v1_train_norare": _lvis("lvis_v1_train_norare", keep="base"),
    "lvis_v1_val": _lvis("lvis_v1_val"),
    "lvis_v1_minival": _lvis("lvis_v1_minival"),
    # COCO 48/17
    "coco_zeroshot_train": _zeroshot("train", "seen_2", keep="base"),
    "coco_zeroshot_train_oriorder": _zeroshot("train", "seen_2_oriorder", "coco_48_17_80way", keep="base"),
    "coco_generalized_zeroshot_val": _zeroshot("val", "all_2"),
    "coco_generalized_zeroshot_val_oriorder": _zeroshot("val", "all_2_oriorder", "coco_48_17_80way"),
    "coco_zeroshot_val": _zeroshot("val", "unseen_2"),
    "coco_not_zeroshot_val": _zeroshot("val", "seen_2"),
    # full data sets: supervised oracles and transfer
    "coco_2017_train": _everything("coco/annotations/instances_train2017.json", "coco/train2017"),
    "coco_2017_val": _everything("coco/annotations/instances_val2017.json", "coco/val2017"),
    "voc_2007_test": _everything("VOC2007/voc_2007_test.json", "VOC2007/JPEGImages"),
    "objects365_v1_val": _everything("objects365/annotations/objects365_val.json", "objects365/val"),
    "objects365_v2_train": _everything("objects365/annotations/zhiyuan_objv2_train.json", "objects365/train"),
    "objects365_v2_val": _everything("objects365/annotations/zhiyuan_objv2_val.json", "objects365/val"),
}

# Official files that have only some lists of their split
PARTIAL = {
    "coco_zeroshot_train": ("base",),
    "coco_zeroshot_val": ("novel",),
    "coco_not_zeroshot_val": ("base",),
}


def origin(entry: Entry) -> str:
    """How to get a built-in data set's annotation file, for the error message when it is missing."""
    if entry.json.startswith("glyphs/"):
        return "make quickstart leaves it in output/quickstart/datasets; tools/make_glyphs.py makes it"
    for part, tool in (("zero-shot/", "coco"), ("_norare", "lvis"), ("_minival", "lvis"), ("VOC2007/", "voc")):
        if part in entry.json:
            return f"datasets/prepare_{tool}.py makes it"
    return "datasets/README.md says where it comes from"
