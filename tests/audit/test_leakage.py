"""The leakage audit of training sets and vocabularies, and its command."""

import json
from dataclasses import replace

import pytest
import torch

from tests.audit.test_pasted_boxes import pasted
from vild.audit.leakage import Benchmark, TrainingSet, judge_training_set, judge_vocabulary
from vild.data import datasets
from vild.data.proposals import save_proposals
from vild.teacher.teacher import build_teacher
from vild.utils.errors import UserError
from vild.vocabulary.prompts import PROMPT_SETS
from vild.vocabulary.vocabulary import Vocabulary, encode_names

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
    with pytest.raises(UserError, match="is a file, not the name of a data set: --split is required"):
        Benchmark.read(str(datasets.root() / "glyphs/annotations/coco_train.json"), "", None)


def test_training_sets(world, benchmark, register):
    def judged(source, split=""):
        return judge_training_set(TrainingSet.read(source, split, benchmark.novel), benchmark)

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
    assert status == 2 and error == "error: weights: /none.pth does not exist\n"
