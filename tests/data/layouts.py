"""What tests of YOLO's and VOC's layouts share."""

import pytest
from PIL import Image

SIZES = {"a": (80, 60), "b": (200, 100), "deep/c": (50, 40)}  # width, height


def save_image(path, size, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **options)


def things(document):
    """Of each image the file name, and the class and box of its objects."""
    names = {c["id"]: c["name"] for c in document["categories"]}
    return {
        i["file_name"]: [
            (names[a["category_id"]], pytest.approx(a["bbox"], abs=1e-6))
            for a in document["annotations"]
            if a["image_id"] == i["id"]
        ]
        for i in document["images"]
    }


XML = """<annotation><filename>{}</filename><size><width>80</width><height>60</height></size>
<object><name>dog</name><difficult>1</difficult><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>25</ymax>
</bndbox></object>{}</annotation>"""
CAT = "<object><name>cat</name><bndbox><ymin>{}</ymin><xmin>1</xmin><xmax>80</xmax><ymax>60.0</ymax></bndbox></object>"
