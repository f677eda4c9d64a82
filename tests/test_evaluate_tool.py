"""Evaluation, report and transfer from the command line; a custom data set from its files to metrics."""

import json
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.conftest import REPOSITORY
from tests.data.official import COCO_NAMES, coco_document, write
from tests.evaluation.reference import random_world
from vild.data import datasets
from vild.evaluation.evaluator import evaluate_results
from vild.inference.drawing import GAP

CONFIG = REPOSITORY / "configs" / "Glyphs" / "vild.yaml"


def perfect(document):
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in document["annotations"]
    ]


def metrics(folder):
    return json.loads((folder / "vild_metrics.json").read_text())


def coco_val():
    """Novel (17: cat, 5: airplane), base (1, 3) and other (10, 11) names; images 5 and 6 hold others alone."""
    return coco_document({1: [1, 3, 17], 2: [17], 3: [5, 10], 4: [1], 5: [10], 6: [11, 10]}, "val")


def test_ground_truth_as_results_scores_100(tmp_path, tool, capsys):
    document = coco_val()
    truth, results = write(tmp_path / "gt.json", document), write(tmp_path / "r.json", perfect(document))
    done = tool("evaluate.py", "--protocol", "coco-48-17", "--gt", truth, "--results", results,
                "--output-dir", tmp_path / "o")  # fmt: skip
    assert done == 0
    out = capsys.readouterr().out
    assert "65-way; 48 base (2 with ground truth), 17 novel (2 with ground truth); 4 images" in out
    assert "| AP50_novel | COCO | 100.00 |" in re.sub(" +", " ", out)
    assert all(metrics(tmp_path / "o")[f"gt/bbox/AP50_{g}"] == pytest.approx(100) for g in ("novel", "base", "all"))
    rows = json.loads((tmp_path / "o" / "per_class.json").read_text())["classes"]
    assert len(rows) == 65 and {r["name"] for r in rows if r["boxes"]} == {"person", "car", "cat", "airplane"}


def test_files_in_circulation_give_the_same_numbers(tmp_path, tool, capsys):
    """The official file, the 65-class file in circulation with the same images, and its variant with 80 classes."""
    document = coco_val()
    marked = json.loads((REPOSITORY / "vild/data/splits/coco_48_17.json").read_text())
    names = {*marked["base"], *marked["novel"]}
    kept = [a for a in document["annotations"] if COCO_NAMES[a["category_id"]] in names]
    images = [i for i in document["images"] if i["id"] in {a["image_id"] for a in kept}]
    oriorder = {**document, "images": images, "annotations": kept}
    released = {**oriorder, "categories": [c for c in document["categories"] if c["name"] in names]}
    assert len(images) == 4 and len(released["categories"]) == 65
    rng = np.random.default_rng(0)
    results = [
        {"image_id": int(rng.integers(1, 5)), "category_id": int(rng.choice([1, 3, 5, 10, 17])), "score": rng.random(),
         "bbox": (np.array([4.0, 6.5, 20, 10.25]) + rng.normal(0, 1, 4)).tolist()} for _ in range(200)
    ]  # fmt: skip
    path, found = write(tmp_path / "r.json", results), []
    for name, content in (("official", document), ("released", released), ("oriorder", oriorder)):
        truth = write(tmp_path / f"{name}.json", content)
        split = ["--split", "coco_48_17_80way"] if name == "oriorder" else []
        done = tool("evaluate.py", "--protocol", "coco-48-17", "--gt", truth, "--results", path, *split,
                    "--output-dir", tmp_path / name)  # fmt: skip
        assert done == 0
        assert ("80-way" if split else "65-way") in capsys.readouterr().out
        found.append({k.split("/", 1)[1]: v for k, v in metrics(tmp_path / name).items()})
    assert found[0] == found[1] == found[2] and 0 < found[0]["bbox/AP50_novel"] < 100


@pytest.mark.parametrize("protocol", ["lvis", "split"])
def test_lvis_files_are_scored_by_lvis_rules(protocol, tmp_path, tool, capsys):
    document, results = random_world(0, lvis=True)
    truth, path = write(tmp_path / "gt.json", document), write(tmp_path / "r.json", results)
    split = write(tmp_path / "split.json", {"base": [f"class {c}" for c in range(1, 9)],
                                            "novel": [f"class {c}" for c in range(9, 13)]})  # fmt: skip
    done = tool("evaluate.py", "--protocol", protocol, "--gt", truth, "--results", path, "--iou-type", "bbox", "segm",
                "--output-dir", tmp_path / "o", *(["--split", split] if protocol == "split" else []))  # fmt: skip
    assert done == 0
    found, out = metrics(tmp_path / "o"), re.sub(" +", " ", capsys.readouterr().out)
    assert "| APr | LVIS |" in out and "| APr_fixed | AP-fixed |" in out and "| precision | |" in out
    assert "lvis protocol, 12-way" in out and {"gt/segm/APr", "gt/bbox/AP_fixed"} <= found.keys()
    assert (found["gt/bbox/AP_novel"] == found["gt/bbox/APr"]) == (protocol == "lvis")


def test_the_command_of_the_docs_gives_the_numbers_of_the_report(world, tmp_path, tool, capsys):
    """Which says whose rules they are by: those of LVIS give others from the same results."""
    lines = (REPOSITORY / "tools" / "README.md").read_text().splitlines()
    (command,) = [line.split() for line in lines if line.startswith("tools/evaluate.py")]
    truth, results = command[command.index("--gt") + 1], command[command.index("--results") + 1]
    rng, found = np.random.default_rng(0), []
    for a in datasets.read_annotations("glyphs_val")["annotations"]:
        category = int(rng.integers(1, 61)) if rng.random() < 0.3 else a["category_id"]
        box = (np.array(a["bbox"]) + rng.normal(0, 3, 4)).clip(1).tolist()
        found.append({**a, "bbox": box, "category_id": category, "score": rng.random()})
    path = write(tmp_path / "r.json", found)
    reported = evaluate_results("glyphs_val", path, ("bbox",)).metrics["bbox"]
    given = {truth: world / truth.partition("/datasets/")[2], results: path, "out/scores": tmp_path / "o", "segm": None}
    assert tool("evaluate.py", *(given.get(word, word) for word in command[1:] if given.get(word, word))) == 0
    given = {key.rpartition("/")[2]: value for key, value in metrics(tmp_path / "o").items()}
    assert given == {key: None if np.isnan(value) else value for key, value in reported.items()}
    by_lvis = evaluate_results("glyphs_lvis_val", path, ("bbox",)).metrics["bbox"]
    assert by_lvis["AP50_novel"] != reported["AP50_novel"]


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        (["--protocol", "lvis"], {}, "gt.json is not in LVIS's form"),
        (["--protocol", "split"], {}, "--protocol split needs --split"),
        (["--protocol", "split", "--split", "none.json"], {}, "split 'none.json' is neither"),
        (["--protocol", "coco", "--iou-type", "segm"], {}, "r.json: record 0: segmentation is missing"),
        (["--protocol", "coco"], {"bbox": [1, 2, -3, 4]}, r"gt.json: annotations\[1\] \(id 2\): bbox"),
        (["--protocol", "coco"], {"image_id": 99}, r"gt.json: annotations\[1\] \(id 2\): image_id 99"),
        (["--protocol", "coco"], {"id": 1}, r"gt.json: annotations\[1\] has the same id as annotations\[0\]: 1"),
    ],
)
def test_evaluate_reports_a_mistake_in_one_line(arguments, change, message, tmp_path, tool, capsys):
    document = coco_val()
    path = write(tmp_path / "r.json", perfect(document))
    document["annotations"][1].update(change)
    truth = write(tmp_path / "gt.json", document)
    done = tool("evaluate.py", *arguments, "--gt", truth, "--results", path, "--output-dir", tmp_path / "o")
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert done == 2 and "Traceback" not in err
    assert last.startswith("error: ") and re.search(message, last), last
    assert not (tmp_path / "o").exists()


def test_names_that_a_split_and_the_file_do_not_share_are_reported(tmp_path, tool, capsys):
    document = coco_val()
    names = [c["name"] for c in document["categories"]]
    split = write(tmp_path / "split.json", {"base": names[:3], "novel": [names[3].upper()]})
    paths = [write(tmp_path / "gt.json", document), write(tmp_path / "r.json", perfect(document))]
    arguments = ["--gt", paths[0], "--results", paths[1], "--output-dir", tmp_path / "o", "--split", split]
    assert tool("evaluate.py", "--protocol", "split", *arguments) == 0
    page = capsys.readouterr().out
    assert f"{paths[0]} lacks 1 name of the split ('{names[3].upper()}')" in page
    assert f"left out, as not in the split: {len(names) - 3} names of {paths[0]} ('{names[3]}', ...)" in page


def test_transfer_and_report(world, checkpoint_file, teacher_folder, tmp_path, tool, capsys):
    done = tool(
        "transfer.py", "--config-file", CONFIG, "--num-gpus", 0, "MODEL.WEIGHTS", checkpoint_file,
        "DATASETS.TEST", "('glyphs_lvis_val', 'glyphs_val')", "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}",
        "OUTPUT_DIR", tmp_path / "out", "DATALOADER.NUM_WORKERS", 0,
    )  # fmt: skip
    assert done == 0
    table = (tmp_path / "out" / "transfer.md").read_text()
    assert "| glyphs_lvis_val |" in table and "| glyphs_val " in table
    found = metrics(tmp_path / "out" / "inference")
    assert "glyphs_val/segm/AP50_novel" in found and "glyphs_lvis_val/bbox/APr_fixed" in found
    done = tool("report.py", "--run", tmp_path / "out", "--threshold", 0)
    assert done == 0
    page, web = ((tmp_path / "out" / "report" / f"report.{end}").read_text() for end in ("md", "html"))
    for file in re.findall(r"\]\((class_\d+\.jpg)\)", page):
        assert Image.open(tmp_path / "out" / "report" / file).size[0] == 2 * 400 + GAP and file in web
    assert page.count("class_") > 6 and "umbrella" in page and "umbrella" in web
    done = tool("report.py", "--run", tmp_path)
    assert done == 2 and "evaluate first" in capsys.readouterr().err


def write_lvis_data(folder, part, count, classes=251, seed=0):
    """LVIS form with real marks: coloured boxes, one class a colour, more of the low numbers; the last of them rare."""
    rng = np.random.default_rng(seed)
    (folder / "images" / part).mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(1, count + 1):
        image = Image.new("RGB", (128, 128), "grey")
        present = sorted({min(int(rng.exponential(80)), classes - 1) + 1 for _ in range(3)})
        for place, c in enumerate(present):
            x, y, size = 4 + 40 * place, int(rng.integers(2, 80)), int(rng.integers(20, 36))
            corners = [x, y, x + size, y, x + size, y + size, x, y + size]
            ImageDraw.Draw(image).polygon(corners, fill=(c % 7 * 40, c // 7 % 7 * 40, c // 49 * 40))
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": c, "area": size**2,
                                "bbox": [x, y, size, size], "segmentation": [corners]})  # fmt: skip
        image.save(folder / "images" / part / f"{image_id}.jpg")
        images.append({"id": image_id, "height": 128, "width": 128, "file_name": f"{part}/{image_id}.jpg",
                       "neg_category_ids": [c for c in range(1, 252, 50) if c not in present],
                       "not_exhaustive_category_ids": present[:1]})  # fmt: skip
    categories = [
        {"id": c, "name": f"thing {c}", "synonyms": [f"thing {c}", f"object {c}"],
         "frequency": "f" if c <= 60 else "c" if c <= 160 else "r"} for c in range(1, classes + 1)
    ]  # fmt: skip
    write(folder / f"{part}.json", {"images": images, "annotations": annotations, "categories": categories})


def test_custom_lvis_data_goes_from_files_to_metrics(teacher_folder, tmp_path, monkeypatch, tool, capsys):
    """The commands of the README, with the small model of the built-in world in place of the R50."""
    root, out = tmp_path / "data", tmp_path / "out"
    for part, count in (("train", 8), ("val", 4)):
        write_lvis_data(root / "own", part, count, seed=count)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))

    def run(*command):
        assert tool(*command) == 0
        captured = capsys.readouterr()
        return captured.out + captured.err

    join = ("add_dataset.py", "--images", "own/images", "--split", "lvis")
    output = run(*join, "--name", "own_train", "--json", "own/train.json", "--keep", "base")
    run(*join, "--name", "own_val", "--json", "own/val.json")
    assert "160 base and 91 novel" in output and "lvis" in output
    teacher = ("--teacher", f"local-dir:{teacher_folder}")
    vocabulary, proposals, store = out / "v.safetensors", out / "p.safetensors", out / "store"
    run("build_vocabulary.py", "--vocabulary", "own_train", *teacher, "--prompts", "photo", "--output", vocabulary)
    train = ("--num-gpus", 0, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0,
             "DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)")  # fmt: skip
    network = CONFIG.with_name("proposals.yaml")
    run("train_net.py", "--config-file", network, *train, "OUTPUT_DIR", out / "proposals")
    run("make_proposals.py", "--config-file", network, "--dataset", "own_train", "--output", proposals,
        "--weights", out / "proposals" / "model_final.pth")  # fmt: skip
    run("build_teacher_store.py", "--dataset", "own_train", *teacher, "--proposals", proposals, "--output-dir", store)
    run("train_net.py", "--config-file", CONFIG.with_name("ensemble.yaml"), *train, "OUTPUT_DIR", out / "ensemble",
        "MODEL.VILD.VOCABULARY", vocabulary, "MODEL.VILD.STORE", store, "INPUT.MASK_FORMAT", "polygon")  # fmt: skip
    found = metrics(out / "ensemble" / "inference")
    assert {f"own_val/{kind}/AP{letter}" for kind in ("bbox", "segm") for letter in "rcf"} <= found.keys()
    results = out / "ensemble" / "inference" / "coco_instances_results.json"
    run("evaluate.py", "--protocol", "lvis", "--gt", root / "own" / "val.json", "--results", results,
        "--iou-type", "bbox", "segm", "--output-dir", out / "again")  # fmt: skip
    assert metrics(out / "again") == {k.replace("own_val/", "val/"): v for k, v in found.items()}
