"""The leakage audit of training sets and vocabularies, and its command."""

import json
from dataclasses import replace

import pytest
import torch

from tests.audit.test_pasted_boxes import pasted
from vild.audit.leakage import Benchmark, TrainingSet, judge_training_set, judge_vocabulary
from vild.audit.pasted_boxes import judge_boxes, measure_boxes
from vild.data import datasets
from vild.data.proposals import save_proposals
from vild.teacher.teacher import build_teacher
from vild.utils.errors import UserError
from vild.vocabulary.encode import encode_names
from vild.vocabulary.prompts import PROMPT_SETS
from vild.vocabulary.vocabulary import Vocabulary

TRAINING = ("--dataset", "glyphs_train", "--full", "glyphs_train_all")


@pytest.fixture
def register(monkeypatch):
    def add(name, json_name, **kwargs):
        entry = datasets.Entry(f"glyphs/annotations/{json_name}.json", "glyphs/train", "lvis", **kwargs)
        monkeypatch.setitem(datasets.BUILTIN, name, entry)

    return add


def test_the_benchmark_knows_what_is_novel(benchmark):
    assert len(benchmark.base) == 40 and len(benchmark.novel) == 20 and len(benchmark.known) == 60
    document = datasets.read_annotations("glyphs_train_all")
    assert sum(len(t.base) + len(t.novel) for t in benchmark.truth.values()) == len(document["annotations"])
    with pytest.raises(UserError, match="split 'everything' marks no class of glyphs_train_all as novel"):
        Benchmark.read("glyphs_train_all", "", None)
    with pytest.raises(UserError, match="--full glyphs_train: it has no box of a novel class to compare with"):
        Benchmark.read("glyphs_train", "", "glyphs_train")
    with pytest.raises(UserError, match="is a file, not the name of a data set: --split is required"):
        Benchmark.read(str(datasets.root() / "glyphs/annotations/coco_train.json"), "", None)


def test_training_sets(world, benchmark, register):
    def judged(source, split=""):
        return judge_training_set(TrainingSet.read(source, split, benchmark), benchmark)

    verdict, evidence = judged("glyphs_train")
    assert verdict == "clean" and "0 of them reach training" in evidence and "0 boxes are of novel" in evidence

    folder = world / "glyphs" / "annotations"
    full, clean = (json.loads((folder / f"{n}.json").read_text()) for n in ("coco_train_all", "coco_train"))
    novel_ids = {c["id"] for c in full["categories"] if c["name"] in benchmark.novel}
    one = next(a for a in full["annotations"] if a["category_id"] in novel_ids)
    one = {**one, "id": 1 + max(a["id"] for a in clean["annotations"])}
    (folder / "one_novel.json").write_text(json.dumps({**clean, "annotations": [*clean["annotations"], one]}))
    register("one_novel", "one_novel", keep="all")
    verdict, evidence = judged("one_novel")
    assert verdict == "LEAK" and f"has 1 annotations of novel names (first: id {one['id']}, " in evidence
    register("one_dropped", "one_novel", keep="base")  # the loader drops it, and the evidence says so
    verdict, evidence = judged("one_dropped")
    assert verdict == "clean" and "has 1 annotations" in evidence and "; 0 of them reach training" in evidence
    assert judged(str(folder / "one_novel.json"), "lvis")[0] == "LEAK"  # a file is read whole

    base_id = next(c["id"] for c in full["categories"] if c["name"] in benchmark.base)
    hidden = {**clean, "annotations": [*clean["annotations"], {**one, "category_id": base_id}]}
    (folder / "hidden.json").write_text(json.dumps(hidden))
    register("hidden", "hidden", keep="base")
    verdict, evidence = judged("hidden")
    assert verdict == "LEAK" and "1 boxes are of novel objects under other names" in evidence


@pytest.fixture
def files(world, tmp_path):
    """A full file and its base annotations, each changed by a function: verdict and evidence on the second."""
    box = {"iscrowd": 0, "area": 1008}
    images = [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 60} for i in (1, 2)]
    annotations = [{"id": 10 * i + c, "image_id": i, "category_id": c, "bbox": [20 * c, 8, 18, 36], **box}
                   for i in (1, 2) for c in (1, 2)]  # fmt: skip
    categories = [{"id": 1, "name": "umbrella"}, {"id": 2, "name": "anchor"}]
    whole = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "split.json").write_text(json.dumps({"base": ["umbrella"], "novel": ["anchor"]}))

    def judged(change, change_full=lambda document: None):
        full, mine = json.loads(json.dumps(whole)), json.loads(json.dumps(whole))
        mine["annotations"] = [a for a in mine["annotations"] if a["category_id"] == 1]
        change(mine)
        change_full(full)
        for name, document in (("full", full), ("train", mine)):
            (tmp_path / f"{name}.json").write_text(json.dumps(document))
        split, train = str(tmp_path / "split.json"), str(tmp_path / "train.json")
        benchmark = Benchmark.read(train, split, str(tmp_path / "full.json"))
        return judge_training_set(TrainingSet.read(train, split, benchmark), benchmark), benchmark

    return judged


def exported(document, names="export_{}.png"):
    """Other ids of images, in another order, and other file names."""
    for image in document["images"]:
        image["file_name"], image["id"] = names.format(image["id"]), 503 - image["id"]
    for annotation in document["annotations"]:
        annotation["image_id"] = 503 - annotation["image_id"]


def novel_box(document):
    """The box of a novel object under the name of a base class."""
    document["annotations"].append({**document["annotations"][0], "id": 99, "bbox": [40, 8, 18, 36]})


def test_images_are_the_same_by_file_and_size(files):
    """Whatever their ids: a hidden novel box is found in an export with new ids; nothing is clean by absence."""
    (verdict, _), _ = files(lambda d: None)
    assert verdict == "clean"
    (verdict, _), benchmark = files(lambda d: exported(d, "pictures/{}.jpg"))
    assert verdict == "clean" and set(benchmark.truth) == {501, 502}
    (verdict, evidence), _ = files(lambda d: (novel_box(d), exported(d, "{}.png")))
    assert verdict == "LEAK" and "1 boxes are of novel objects under other names" in evidence
    (verdict, evidence), benchmark = files(exported)
    assert verdict == "cannot tell" and "2 of 2 images have no counterpart of the same file name and size" in evidence
    found = {i: torch.ones(1, 4) for i in (501, 502)}
    verdict, evidence = judge_boxes(measure_boxes(found.items(), benchmark.truth))
    assert verdict == "cannot tell" and "2 of its images are not among those with full annotations" in evidence
    (verdict, evidence), _ = files(lambda d: d["images"][0].update(width=90))
    assert verdict == "cannot tell" and "1 of 2 images have no counterpart" in evidence
    assert "(1 share only an id with one, 1 only a file name)" in evidence
    (verdict, evidence), _ = files(lambda d: d["images"][0].update(file_name="3.png"))  # its id may be another's
    assert verdict == "cannot tell" and "(1 share only an id with one, 0 only a file name)" in evidence
    (verdict, evidence), _ = files(lambda d: d.update(annotations=[]))
    assert verdict == "cannot tell" and "no annotation reaches training" in evidence


@pytest.mark.parametrize(
    ("name", "synonyms", "verdict"),
    [
        ("Anchor", [], "LEAK"),
        ("anchor.", [], "LEAK"),
        ("grapnel", [], "LEAK"),  # a synonym in the full annotations
        ("Haken", ["Anchor"], "LEAK"),  # and in its own
        ("parasol", [], "clean"),  # of a base class
        ("brolly", [], "cannot tell"),  # nobody knows it
        ("hook", [], "clean"),  # is in the benchmark, neither base nor novel
    ],
)
def test_classes_are_the_same_by_normalised_name_or_synonym(files, name, synonyms, verdict):
    def change(document):
        document["categories"][1].update(name=name, synonyms=synonyms)
        document["annotations"].append({**document["annotations"][0], "id": 99, "category_id": 2, "bbox": [1, 1, 7, 7]})

    def change_full(document):
        document["categories"].append({"id": 3, "name": "hook"})
        document["categories"][0]["synonyms"] = ["parasol"]
        document["categories"][1]["synonyms"] = ["grapnel", "hook"]

    (found, evidence), _ = files(change, change_full)
    assert found == verdict, evidence
    assert (f"('{name}' is one by another spelling)" in evidence) == (verdict == "LEAK")
    assert ("unknown to the benchmark ('brolly'" in evidence) == (verdict == "cannot tell")


def test_a_vocabulary_of_unknown_names_is_not_clean(benchmark):
    words = Vocabulary(("Regenschirm",), torch.eye(1, 64), ("",))
    verdict, evidence = judge_vocabulary(words, {"photo": torch.eye(1, 64)}, benchmark)
    assert verdict == "cannot tell" and "no name is a novel one, 1 are unknown ('Regenschirm'" in evidence


def test_vocabularies(benchmark, vocabulary):
    """A text tower that tells names apart (the tiny world's does not): a fixed random vector for every text."""

    def encode_text(texts):
        rows = [torch.randn(64, generator=torch.Generator().manual_seed(sum(t.encode()))) for t in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    names, synonyms = vocabulary.names, ((),) * len(vocabulary)
    expected = {p: encode_names(encode_text, names, synonyms, PROMPT_SETS[p]) for p in ("photo", "name")}

    def judged(embeddings):
        return judge_vocabulary(Vocabulary(names, embeddings, vocabulary.splits), expected, benchmark)

    for right in expected.values():
        assert judged(right.half().float())[0] == "clean"
    for mark, verdict in (("novel", "LEAK"), ("base", "clean")):
        changed = expected["photo"].clone()
        k = vocabulary.splits.index(mark)
        changed[k] = torch.nn.functional.normalize(changed[k] + 0.1 * torch.ones(64), dim=0)
        found, evidence = judged(changed)
        assert found == verdict and f"1 of {vocabulary.splits.count(mark)} {mark} (lowest" in evidence
        assert f"'{names[k]}'" in evidence
    assert judged(vocabulary.embeddings)[0] == "cannot tell"  # nothing agrees: other prompts, or tuned ones


def test_command_line(
    tool, capsys, benchmark, proposals_file, store_folder, vocabulary, vocabulary_file, teacher_folder, tmp_path
):
    def audit(*arguments):
        """Exit status, stdout, stderr."""
        status = tool("audit_leakage.py", *arguments)
        return status, *capsys.readouterr()

    assert audit(*TRAINING)[0] == 0
    status, printed, _ = audit(*TRAINING, "--proposals", proposals_file, "--store", store_folder,
                               "--vocabulary", vocabulary_file, "--output", tmp_path / "audit.json")  # fmt: skip
    assert status == 3 and printed.endswith("verdict: cannot tell\n")
    written = json.loads((tmp_path / "audit.json").read_text())
    found = {(f["artefact"].split()[0], f["how"]): f["verdict"] for f in written["findings"]}
    assert written["verdict"] == "cannot tell" and found == {
        ("training", "measured"): "clean",
        ("proposals", "measured"): "clean",
        ("proposals", "recorded"): "cannot tell",
        ("store", "measured"): "clean",
        ("store", "recorded"): "cannot tell",
        ("vocabulary", "recorded"): "cannot tell",
    }
    leaky = {i: (boxes, torch.ones(len(boxes))) for i, boxes in pasted(benchmark.truth, 3).items()}
    save_proposals(tmp_path / "leaky.safetensors", leaky)
    assert audit(*TRAINING, "--proposals", tmp_path / "leaky.safetensors")[0] == 1

    few = vocabulary.take([vocabulary.splits.index("novel"), *range(2)])
    teacher = build_teacher(f"local-dir:{teacher_folder}")
    own = Vocabulary.from_names(teacher, few.names, prompts="photo", splits=few.splits)
    changed = replace(own, embeddings=own.embeddings * torch.tensor([[-1.0], [1.0], [1.0]]))
    imported = replace(changed, prompts="import", fingerprint={})
    for number, (words, expected) in enumerate(((own, 0), (changed, 1), (imported, 1))):
        words.save(tmp_path / f"{number}.safetensors")
        files = ("--vocabulary", tmp_path / f"{number}.safetensors", "--teacher", f"local-dir:{teacher_folder}")
        assert audit(*TRAINING, *files)[0] == expected

    results = [{"image_id": 1, "category_id": c, "bbox": [40, 40, 20, 20], "score": 0.5} for c in (1, 2)]
    (tmp_path / "labelled.json").write_text(json.dumps(results))
    status, printed, _ = audit(*TRAINING, "--proposals", tmp_path / "labelled.json")
    assert status == 3 and "carries 2 class labels" in " ".join(printed.split())

    status, _, error = audit("--dataset", "glyphs_trian")
    assert status == 2 and error.startswith("error: data set 'glyphs_trian' is not known")
    status, _, error = audit(*TRAINING, "--weights", "/none.pth")
    assert status == 2 and error.startswith("error: weights: /none.pth does not exist, and is not one of ")
