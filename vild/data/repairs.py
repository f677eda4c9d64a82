"""Repairs of what annotation files of other tools write in their own way, where only one meaning is possible. Each is
counted, under the words that the report uses."""

from __future__ import annotations

from collections import Counter, defaultdict

INTEGERS = ("id", "image_id", "category_id", "width", "height", "iscrowd")
LISTS = ("neg_category_ids", "not_exhaustive_category_ids")  # of an image of LVIS


def is_exact(value: float) -> bool:
    """Is a float an integer that it can tell from its neighbours?"""
    return value.is_integer() and abs(value) <= 2**53


def repair(record: dict, repairs: Counter[str]) -> bool:
    """Repair a record in place: numbers written as 1.0, a crowd flag of null, backslashes in the file name. Returns
    whether anything was."""
    before = repairs.total()
    for key in INTEGERS:
        if type(value := record.get(key)) is float and is_exact(value):
            record[key] = int(value)
            repairs["ids, sizes or flags written as 1.0"] += 1
    for key in LISTS:
        if isinstance(values := record.get(key), list) and any(type(v) is float for v in values):
            record[key] = [int(v) if type(v) is float and is_exact(v) else v for v in values]
            repairs["ids, sizes or flags written as 1.0"] += 1
    if "iscrowd" in record and record["iscrowd"] is None:
        record["iscrowd"] = 0
        repairs["iscrowd of null, taken as 0"] += 1
    if isinstance(name := record.get("file_name"), str) and "\\" in name:
        record["file_name"] = name.replace("\\", "/")
        repairs["file names with backslashes"] += 1
    return repairs.total() > before


def drop_unused_namesakes(document: dict, repairs: Counter[str]) -> None:
    """Leave out categories that nothing refers to and that have the name of one that is annotated: Roboflow writes a
    root category under the name of a class. ``document``: its categories have been checked, the rest has not."""
    by_name = defaultdict(list)
    for category in document["categories"]:
        by_name[category["name"]].append(category)
    if len(by_name) == len(document["categories"]):
        return
    records = [r for key in ("annotations", "images") for r in document[key] if isinstance(r, dict)]
    used = {v for r in records if type(v := r.get("category_id")) in (int, float)}
    used |= {v for r in records for k in LISTS if isinstance(r.get(k), list) for v in r[k] if type(v) in (int, float)}
    for name, several in by_name.items():
        unused = [c for c in several if c["id"] not in used]
        if len(unused) == len(several) - 1:
            for category in unused:
                what = f"category '{name}' (id {category['id']}) left out: it has no annotation, another has its name"
                repairs[what] += 1
            document["categories"] = [c for c in document["categories"] if all(c is not u for u in unused)]
