"""tools/finetune.py: a trained detector learns new names from a few images that annotate nothing else."""

import json
from dataclasses import replace

import pytest
import torch

from tests.conftest import REPOSITORY
from vild.audit.leakage import Benchmark
from vild.checkpoint.checkpointer import read_network_record
from vild.config import load_config
from vild.data import datasets
from vild.data.loader import build_train_loader
from vild.data.new_names import unlabelled_classes
from vild.data.provenance import LEAK, data_set_record, judge_network
from vild.engine.finetune import schedule
from vild.engine.trainer import Trainer
from vild.evaluation.evaluator import ground_truth_boxes
from vild.glyphs.drawing import table
from vild.glyphs.world import write_world
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

NEW = "glyphs_new_train"
FEW = ("SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0)


@pytest.fixture(scope="module")
def new_scenes(world):
    """Seven scenes; the new names are every second novel one. Only some of the annotations have masks."""
    write_world(world / "glyphs", seed=0, sets=("new_train",), workers=1, fraction=0.1)
    path = world / datasets.get_entry(NEW).json
    document = json.loads(path.read_text())
    for annotation in document["annotations"][::2]:
        annotation.pop("segmentation", None)
    path.write_text(json.dumps(document))
    return datasets.get_classes(NEW)


@pytest.fixture(scope="module")
def old_file(checkpoint_file, world, tmp_path_factory):
    """A detector that remembers its training."""
    checkpoint = torch.load(checkpoint_file, weights_only=True)
    checkpoint["trained_on"] = {"data_sets": [data_set_record("glyphs_train")], "stores": [], "starts": []}
    torch.save(checkpoint, path := tmp_path_factory.mktemp("old") / "old.pth")
    return path


@pytest.fixture
def finetune(tool, teacher_folder, old_file):
    def run(output, *opts, weights=old_file, name=NEW, flags=()):
        config = REPOSITORY / "configs" / "Glyphs" / "vild_contrast.yaml"
        return tool(
            "finetune.py", "--config-file", config, "--weights", weights, "--dataset", name, "--output-dir", output,
            *flags, "--opts", "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}", *FEW, *opts,
        )  # fmt: skip

    return run


def test_new_names_are_learned_and_nothing_else_moves(finetune, new_scenes, old_file, vocabulary, tmp_path, capsys):
    output = tmp_path / "output"
    assert finetune(output) in (0, None)
    assert "10 that it knows by their words; 2 steps" in capsys.readouterr().out
    old, new = (torch.load(path, weights_only=True) for path in (old_file, output / "model_final.pth"))
    moved = {key for key, value in new["model"].items() if not torch.equal(value, old["model"][key])}
    parameters = {key for key in old["model"] if key.startswith("roi_heads.embedding.")
                  and not key.endswith(("running_mean", "running_var", "num_batches_tracked"))}  # fmt: skip
    assert moved == {*parameters, "roi_heads.classifier.background"} and len(parameters) > 4
    trained = Vocabulary.from_state(new["vocabulary"])
    assert trained.names == vocabulary.names and torch.equal(trained.embeddings, vocabulary.embeddings)
    changed = {n for n, a, b in zip(trained.names, trained.splits, vocabulary.splits, strict=True) if a != b}
    assert changed == {*new_scenes.names} and trained.splits.count("base") == 50
    losses = json.loads((output / "metrics.json").read_text().splitlines()[-1])
    assert {key for key in losses if key.startswith("loss_")} == {f"loss_{x}" for x in
            ("text", "old_student")}  # fmt: skip

    # it opens with the config beside it, and marks words by what it was trained on
    cfg = load_config(output / "config.yaml", ["MODEL.WEIGHTS", str(output / "model_final.pth")])
    detector = OpenVocabularyDetector(cfg)
    assert detector.trained.names == trained.names
    words = detector.with_vocabulary(detector.trained.take([40, 43])).vocabulary
    assert words.names == ("umbrella", "anchor") and words.splits == ("base", "novel")
    detector.save(tmp_path / "folder", teacher=False)
    again = OpenVocabularyDetector.from_pretrained(tmp_path / "folder")
    image = datasets.load_dicts(NEW)[0]["file_name"]
    assert torch.equal(again(image, threshold=0).scores, detector(image, threshold=0).scores)

    # what it has seen is on record: its own past and the new images
    record = read_network_record(str(output / "model_final.pth"))
    assert [d["name"] for d in record["trained_on"]["data_sets"]] == [NEW]
    starts = [start["trained_on"]["data_sets"][0]["name"] for start in record["trained_on"]["starts"]]
    assert starts == ["glyphs_train"]
    known = [g.name for g in table()]
    novel = [n for n, s in zip(vocabulary.names, vocabulary.splits, strict=True) if s == "novel"]
    seen = {*record["trained_on"]["data_sets"][0]["annotations"]}
    assert seen and seen <= {*new_scenes.names}
    verdict, evidence = judge_network(record, novel, known)
    assert verdict == LEAK and min(seen) in evidence
    assert judge_network(record, sorted({*novel} - {*new_scenes.names}), known)[0] == "clean"


def test_a_training_is_resumed_with_its_own_names(finetune, new_scenes, tmp_path, capsys):
    """With others, the names that it has learned would be marked novel again, and scored as such."""
    assert finetune(tmp_path) in (0, None)
    before = (tmp_path / "vocabulary.safetensors").read_bytes()
    capsys.readouterr()
    assert finetune(tmp_path, "SOLVER.MAX_ITER", 3, name="glyphs_train", flags=("--resume",)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "other names or marks than --dataset glyphs_train and --weights give" in line
    assert finetune(tmp_path, "SOLVER.MAX_ITER", 3, "SEED", 5, flags=("--resume",)) == 2
    assert "SEED was" in capsys.readouterr().err
    assert (tmp_path / "vocabulary.safetensors").read_bytes() == before
    assert finetune(tmp_path, "SOLVER.MAX_ITER", 3, flags=("--resume",)) in (0, None)
    assert Vocabulary.load(tmp_path / "model_final.pth").splits.count("base") == 50


def test_annotations_become_classes_of_the_vocabulary(make_cfg, new_scenes, vocabulary, old_file, tmp_path):
    marks = ["base" if n in new_scenes.names else s for n, s in zip(vocabulary.names, vocabulary.splits, strict=True)]
    replace(vocabulary, splits=tuple(marks)).save(tmp_path / "v.safetensors")
    keys = ["MODEL.VILD.VOCABULARY", str(tmp_path / "v.safetensors"), "MODEL.VILD.OLD_STUDENT.WEIGHTS", str(old_file)]
    cfg = make_cfg("vild", "DATASETS.TRAIN", f"('{NEW}',)", "MODEL.VILD.OLD_STUDENT.HEAD_ONLY", True, *keys)
    truth, batches = ground_truth_boxes(NEW), iter(build_train_loader(cfg, None))
    for record in (record for _ in range(4) for record in next(batches)):
        names = [vocabulary.names[k] for k in record["instances"].gt_classes]
        assert sorted(names) == sorted(new_scenes.names[k] for k in truth[record["image_id"]][1])
    heads = Trainer(cfg).model.roi_heads
    unlabelled = {n for n, flag in zip(vocabulary.names, heads.unlabelled.tolist(), strict=True) if flag}
    assert unlabelled == {n for n, s in zip(vocabulary.names, vocabulary.splits, strict=True) if s == "base"}


def test_an_old_student_with_all_classes_annotated_leaves_none_unlabelled(make_cfg, old_file):
    """The text loss is then that of a training without an old student."""
    heads = Trainer(make_cfg("vild", "MODEL.VILD.OLD_STUDENT.WEIGHTS", str(old_file))).model.roi_heads
    assert heads.unlabelled is None


def test_training_sets_that_do_not_fit_the_vocabulary_are_refused(new_scenes, vocabulary, make_cfg, old_file):
    with pytest.raises(UserError, match=f"'{NEW}': its base class 'umbrella' is marked 'novel' in the vocabulary"):
        unlabelled_classes(vocabulary, [NEW])
    with pytest.raises(UserError, match="'umbrella' is not in the vocabulary"):
        unlabelled_classes(vocabulary.take(range(40)), [NEW])
    everything = replace(vocabulary, splits=("base",) * 60)
    with pytest.raises(UserError, match="with an old student they must annotate the same classes"):
        unlabelled_classes(everything, [NEW, "glyphs_train"])
    with pytest.raises(UserError, match="10 classes, the vocabulary 60"):  # without an old student, as ever
        Trainer(make_cfg("text", "DATASETS.TRAIN", f"('{NEW}',)"))


def test_the_schedule_follows_the_number_of_images():
    first, more, few = (schedule(n, b, 0.08) for n, b in ((47, 8), (470, 8), (3, 64)))
    assert first["SOLVER.MAX_ITER"] == 118 and more["SOLVER.MAX_ITER"] == 1175 and few["SOLVER.MAX_ITER"] == 60
    assert few["SOLVER.IMS_PER_BATCH"] == 8 and few["SOLVER.BASE_LR"] == pytest.approx(first["SOLVER.BASE_LR"] / 8)


def test_mistakes_are_one_line(finetune, new_scenes, world, tmp_path, capsys):
    def message(*arguments, **keywords) -> str:
        assert finetune(*arguments, **keywords) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "'glyphs_val' keeps novel annotations" in message(tmp_path / "a", name="glyphs_val")
    assert "vild_v7.pth does not exist" in message(tmp_path / "a", weights=tmp_path / "vild_v7.pth")
    assert "the variant 'image' learns nothing from labels" in message(tmp_path / "a", "MODEL.VILD.VARIANT", "image")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "last_checkpoint").write_text("model_final.pth")
    assert "holds a training already; continue it with --resume" in message(tmp_path / "b")
    entry = datasets.get_entry(NEW)
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"base": ["umbrella"], "novel": []}))
    document = json.loads((world / entry.json).read_text())
    document["annotations"] = [a for a in document["annotations"] if a["category_id"] != 41]
    (tmp_path / "none.json").write_text(json.dumps(document))
    datasets.add_entry("none", replace(entry, json=str(tmp_path / "none.json"), split=str(split)))
    assert "no image has an annotation of a base class" in message(tmp_path / "a", name="none")
    assert not (tmp_path / "a").exists()


def test_the_benchmark_of_the_new_names_is_that_of_the_world(benchmark: Benchmark, new_scenes):
    """The split's names are novel ones of the world, and half of them."""
    assert {*new_scenes.names} < benchmark.novel and len(new_scenes.names) == 10
