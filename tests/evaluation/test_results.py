"""Results files: read record by record, refused in one line, written whole."""

import json
import re

import pytest

from vild.evaluation.results import ResultsWriter, iterate_records, read_results
from vild.utils.errors import UserError


def test_records_come_one_by_one_whatever_the_chunks(tmp_path, monkeypatch):
    records = [{"a": n, "text": "],[ {" * (n % 7)} for n in range(200)]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(records, indent=1))
    for chunk in (7, 64, 1 << 20):
        monkeypatch.setattr("vild.evaluation.results._CHUNK", chunk)
        assert list(iterate_records(path)) == records
    path.write_text(" [ ] ")
    assert list(iterate_records(path)) == []


MALFORMED = {
    "not a list": ('"image_id"', "is not a JSON list"),
    "annotations": ('{"images": [], "annotations": []}', "record 0: image_id is missing"),
    "cut off": ('[{"image_id": 3, "category_id": 1, "bbox": [1, 2', "record 0: not JSON, or truncated"),
    "cut off between": ('[{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1},', "after record 0"),
    "a number": ("[7]", "record 0"),
    "no score": ('[{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4]}]', "record 0: score is missing"),
    "no box": ('[{"image_id": 3, "category_id": 1, "score": 1}]', "record 0: bbox is missing"),
    "three numbers": (
        '[{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3], "score": 1}]',
        "record 0: bbox is [1, 2, 3]; it must be",
    ),
    "text": (
        '[{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, "4"], "score": 1}]',
        'record 0: bbox is [1, 2, 3, "4"]; it must be four numbers',
    ),
    "null box": ('[{"image_id": 3, "category_id": 1, "bbox": null, "score": 1}]', "bbox is null; it must be four"),
    "box of one number": ('[{"image_id": 3, "category_id": 1, "bbox": 4.5, "score": 1}]', "bbox is 4.5; it must be"),
    "text score": (
        '[{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4], "score": "0.9"}]',
        'record 0: score is "0.9"; it must be a number',
    ),
    "true score": ('[{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4], "score": true}]', "score is true; it"),
    "text id": (
        '[{"image_id": "3", "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]',
        'image_id is "3"; it must be an integer',
    ),
    "true id": ('[{"image_id": 3, "category_id": true, "bbox": [1, 2, 3, 4], "score": 1}]', "category_id is true"),
    "half an id": ('[{"image_id": 3.5, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', "image_id is 3.5; it"),
    "unknown image": ('[{"image_id": 9, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', "image_id 9 is"),
    "a list as id": ('[{"image_id": [], "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', "record 0"),
    "unknown class": ('[{"image_id": 3, "category_id": 77, "bbox": [1, 2, 3, 4], "score": 1}]', "category_id 77 is"),
    "NaN": ('[{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, NaN], "score": 1}]', "not finite"),
    "score of 400 digits": (
        '[{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1%s}]' % ("0" * 400),
        "bbox is [1, 2, 3, 4], score is 1000",
    ),
    "negative": ('[{"image_id": 3, "category_id": 1, "bbox": [1, 2, -3, 4], "score": 1}]', "bbox [1.0, 2.0, -3"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_results_file_is_reported_in_one_line(name, tmp_path):
    text, message = MALFORMED[name]
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_results(path, {3: (10, 10)}, {1}, masks=False)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_masks_must_fit_their_image(tmp_path):
    path = tmp_path / "r.json"
    record = {"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}
    path.write_text(json.dumps([record | {"segmentation": {"size": [9, 10], "counts": "0"}}]))
    with pytest.raises(UserError, match="record 0: segmentation's size"):
        read_results(path, {3: (10, 10)}, {1}, masks=True)
    path.write_text(json.dumps([record]))
    with pytest.raises(UserError, match="record 0: segmentation is missing; it must be RLE"):
        read_results(path, {3: (10, 10)}, {1}, masks=True)
    for mask in ([[1, 1, 9, 1, 9, 9]], {"size": [10, 10]}, {"counts": "0"}, "mask.png", 4.5, None):
        path.write_text(json.dumps([record | {"segmentation": mask}]))
        with pytest.raises(
            UserError, match=rf"record 0: segmentation is {re.escape(json.dumps(mask))}; it must be RLE"
        ):
            read_results(path, {3: (10, 10)}, {1}, masks=True)
    good = json.dumps(record | {"segmentation": {"size": [10, 10], "counts": "T3"}})  # a run of 100
    for counts in ([50], [50, 51], [101, -1], [50.0, 50], 100, "o", "S3", "T31", "", "€", "\ud800"):
        mask = {"segmentation": {"size": [10, 10], "counts": counts}}
        for bad in (record | mask, {key: record[key] for key in ("image_id", "category_id", "score")} | mask):
            path.write_text((good + "\n") * 300 + json.dumps(bad))
            with pytest.raises(UserError, match="record 300: segmentation's counts .* do not decode to a mask of"):
                read_results(path, {3: (10, 10)}, {1}, masks=True)
    path.write_text((good + "\n") * 300)
    assert len(read_results(path, {3: (10, 10)}, {1}, masks=True)) == 300


def test_the_writer_gives_back_what_went_in(tmp_path):
    writer = ResultsWriter(str(tmp_path))
    records = [{"image_id": n, "score": n / 3} for n in range(50)]
    writer.add(records[:20])
    writer.add([])
    writer.add(records[20:])
    writer.finish(tmp_path / "r.json")
    assert list(iterate_records(tmp_path / "r.json")) == records == json.loads((tmp_path / "r.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    empty = ResultsWriter()
    empty.finish(tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text()) == []


GOOD = {"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize("chunk", [5, 64, 1 << 24])
def test_a_second_list_is_refused_with_its_place(chunk, tmp_path, monkeypatch):
    """As `cat` makes of two ranks' files."""
    monkeypatch.setattr("vild.evaluation.results._CHUNK", chunk)
    path = tmp_path / "r.json"
    for between in ("", "\n", " \r\n\n", "\n" * 40):
        text = json.dumps([GOOD] * 3, indent=1) + between + json.dumps([GOOD] * 2)
        path.write_bytes(text.encode())
        with pytest.raises(UserError, match="a second list begins on line") as caught:
            read_results(path, {3: (10, 10)}, {1}, masks=False)
        line, character = map(
            int, re.search(r"line (\d+), at character (\d+) .* list of 3 records", str(caught.value)).groups()
        )
        assert text[character - 1] == "[" and text[: character - 1].count("\n") == line - 1 and character > 2
    for rest, shown in (("}", '"}"'), ("null", '"null"'), ("\0\0", '"\\\\u0000')):
        path.write_text(json.dumps([GOOD]) + rest)
        with pytest.raises(UserError, match=rf"something else \({shown}.* begins on line 1, at character "):
            read_results(path, {3: (10, 10)}, {1}, masks=False)
    path.write_text(json.dumps([GOOD]) + " \n\n\t")
    assert len(read_results(path, {3: (10, 10)}, {1}, masks=False)) == 1


@pytest.mark.parametrize("chunk", [5, 64, 1 << 24])
def test_a_record_a_line_is_read_as_a_list_is(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("vild.evaluation.results._CHUNK", chunk)
    records = [GOOD | {"score": n / 7, "note": "]} {[" * (n % 3)} for n in range(7)]
    path = tmp_path / "r.jsonl"
    for end in ("\n", "\r\n", ""):
        path.write_text(end.join(map(json.dumps, records)) + end, newline="")
        assert list(iterate_records(path)) == records
    path.write_text("".join(json.dumps(r) + "\n" for r in records)[:-20])
    with pytest.raises(UserError, match="record 6: not JSON, or truncated"):
        list(iterate_records(path))
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps([GOOD]))
    with pytest.raises(UserError, match=r"record 1: \[.* is not an object"):
        read_results(path, {3: (10, 10)}, {1}, masks=False)


def test_what_other_writers_make_of_a_file_is_read(tmp_path):
    """A byte order mark, ids written as 3.0."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps([GOOD | {"image_id": 3.0, "category_id": 1.0}]), encoding="utf-8-sig")
    found = read_results(path, {3: (10, 10)}, {1}, masks=False)
    assert found.image_ids.tolist() == [3] and found.category_ids.tolist() == [1]


def test_boxes_that_are_hardly_xywh_in_pixels_are_reported(tmp_path, caplog):
    path = tmp_path / "r.json"

    def said(*boxes):
        caplog.clear()
        path.write_text(json.dumps([GOOD | {"bbox": box} for box in boxes]))
        assert len(read_results(path, {3: (60, 80)}, {1}, masks=False)) == len(boxes)
        return "".join(r.getMessage() for r in caplog.records)

    right = [[5, 8, 28, 36], [40, 8, 28, 36], [52, 30, 28, 30.5]]
    assert said(*right) == said([70, 50, 30, 30], *right) == said() == ""
    corners = said(*([x, y, x + w, y + h] for x, y, w, h in right))
    assert f"{path}: 2 of 3 boxes reach more than a pixel beyond" in corners and "look like corners" in corners
    relative = said(*([x / 80, y / 60, w / 80, h / 60] for x, y, w, h in right))
    assert "all boxes are at most a pixel wide and high" in relative and "look like relative coordinates" in relative
