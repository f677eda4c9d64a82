"""A context is learned, nothing else changes; and it goes wherever a prompt set goes."""

import json
import runpy
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import REPOSITORY
from vild.checkpoint.checkpointer import VildCheckpointer
from vild.data import datasets
from vild.engine.trainer import Trainer
from vild.glyphs.teacher import MODEL_CFG, PREPROCESS_CFG
from vild.inference.predictor import OpenVocabularyDetector
from vild.teacher.clip import hash_weights, save_local
from vild.teacher.prompt_learning import BACKGROUND, LEFT_OUT, context_loss, learn, match, starting_prompts
from vild.teacher.teacher import Teacher, build_teacher
from vild.utils.errors import UserError
from vild.vocabulary.prompts import LearnedPrompts, find_prompts
from vild.vocabulary.vocabulary import Vocabulary

NAMES = ["sun", "cow", "umbrella", "chess knight", "snowman"]


def other_teacher(folder, **text) -> Teacher:
    """A ``CustomTextCLIP`` of the built-in size (the built-in teacher is a ``CLIP``), whose texts lie apart."""
    cfg = {**MODEL_CFG, "custom_text": True, "text_cfg": {**MODEL_CFG["text_cfg"], **text}}
    open_clip.factory._MODEL_CONFIGS["vild-custom-text"] = cfg
    torch.manual_seed(1)
    model = open_clip.create_model("vild-custom-text", force_preprocess_cfg=PREPROCESS_CFG)
    model.text.token_embedding.weight.data.mul_(10)
    save_local(model, cfg, folder)
    return build_teacher(f"local-dir:{folder}")


@pytest.fixture(scope="module")
def custom(tmp_path_factory) -> Teacher:
    return other_teacher(tmp_path_factory.mktemp("custom"))


def shaken(teacher, seed: int) -> LearnedPrompts:
    start = starting_prompts(teacher, "a photo of a")
    start.context.add_(torch.randn(start.context.shape, generator=torch.Generator().manual_seed(seed)))
    return start


@pytest.fixture(scope="module")
def regions(custom):
    """Regions that lie at the names' texts under another context than the first one: only the context can find them."""
    labels = torch.arange(len(NAMES)).repeat(8)
    noise = 0.01 * torch.randn(len(labels), custom.width, generator=torch.Generator().manual_seed(4))
    return F.normalize(encoded(custom, shaken(custom, 3))[labels] + noise, dim=1), labels


def encoded(teacher, prompts, names=NAMES):
    return Vocabulary.from_names(teacher, names, prompts=prompts).embeddings


def test_both_text_towers_are_met(teacher, custom):
    assert {type(t.model).__name__ for t in (teacher, custom)} == {"CLIP", "CustomTextCLIP"}


@pytest.mark.parametrize("tower", ["CLIP", "CustomTextCLIP", "class token at the end"])
def test_in_the_context_of_the_words_it_is_encode_text(teacher, custom, tmp_path, tower):
    if tower == "class token at the end":
        this = other_teacher(tmp_path, embed_cls=True)
    else:
        this = teacher if tower == "CLIP" else custom
    start = starting_prompts(this, "a photo of a")
    assert start.context.shape == (4, 64)
    texts = [f"a photo of a {name}." for name in NAMES]
    assert torch.equal(this.encode_text(texts, prompts=start), this.encode_text(texts))
    other = this.encode_text(texts, prompts=shaken(this, 0))
    assert (other - this.encode_text(texts)).abs().amax(1).min() > 1e-4


def test_only_the_context_learns(custom, regions):
    before = hash_weights(custom.model)
    embeddings, labels = regions
    start = starting_prompts(custom, "a photo of a")
    learned = learn(custom, embeddings, labels, NAMES, steps=25, learning_rate=0.03)
    logits = [embeddings @ encoded(custom, p).T / 0.01 for p in (start, learned)]
    first, last = (context_loss(each, labels).item() for each in logits)
    assert last < 0.5 * first
    was, became = learned.record["accuracy"]
    assert was < 50 and became > 90
    assert became == pytest.approx(100 * (logits[1].argmax(1) == labels).float().mean().item(), abs=0.01)
    assert hash_weights(custom.model) == before and not any(p.requires_grad for p in custom.model.parameters())


def test_background_becomes_equally_unlike_all_names():
    labels = torch.tensor([0, BACKGROUND])
    logits = torch.tensor([[9.0, -9, -9], [3, 3, 3]])
    assert context_loss(logits, labels, 1.0).item() == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-3)
    for uneven in ([3.0, 3, 4], [3, 2, 3]):
        logits[1] = torch.tensor(uneven)
        assert context_loss(logits, labels, 1.0) > torch.tensor(3.0).log() + 0.01
    assert context_loss(logits, labels) < 1e-3


def test_boxes_get_the_label_of_what_they_cover():
    truth, labels = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]), torch.tensor([4, 7])
    boxes = torch.tensor([[0.0, 0, 10, 9], [50, 51, 60, 60], [0, 0, 10, 4], [20, 20, 30, 30]])
    assert match(boxes, truth, labels).tolist() == [4, 7, LEFT_OUT, BACKGROUND]
    assert match(boxes, truth[:0], labels[:0]).tolist() == [BACKGROUND] * 4


def test_other_names_follow_and_stay_unit(custom, regions):
    learned = learn(custom, *regions, NAMES, steps=3)
    novel = ["snowflake", "anchor", "skull"]
    vocabulary = Vocabulary.from_names(custom, novel, prompts=learned, synonyms=[["ice crystal"], [], []])
    torch.testing.assert_close(vocabulary.embeddings.norm(dim=1), torch.ones(3))
    plain = encoded(custom, "photo", novel)
    assert (vocabulary.embeddings - plain).abs().amax(1).min() > 1e-4
    backward = encoded(custom, learned, novel[:0:-1])
    torch.testing.assert_close(backward, vocabulary.embeddings[1:].flip(0))


def test_one_seed_one_file(custom, regions, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        learn(custom, *regions, NAMES, steps=3, batch=8, seed=seed).save(tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c
    loaded = LearnedPrompts.load(tmp_path / "a")
    assert loaded.fingerprint == custom.fingerprint and loaded.record["seed"] == 0


def test_what_a_user_gets_wrong_is_one_line(teacher, custom, regions, vocabulary_file, tmp_path):
    embeddings, labels = regions
    path = tmp_path / "p.safetensors"
    starting_prompts(teacher, "a").save(path)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    wrong = [
        ("no region of a base object", lambda: learn(teacher, embeddings, labels * 0 - 1, NAMES)),
        ("no region of a base object", lambda: learn(teacher, embeddings[:0], labels[:0], NAMES)),
        ("'a a .* tokens, the teacher reads 22", lambda: learn(custom, *regions, NAMES, words="a " * 20)),
        ("'a {} of' is not what", lambda: starting_prompts(teacher, "a {} of")),
        ("is of teacher local-dir:.* but .* is of teacher local-dir:", lambda: encoded(custom, path)),
        ("none.safetensors does not exist", lambda: find_prompts(tmp_path / "none.safetensors")),
        ("junk.safetensors is not a file of", lambda: find_prompts(tmp_path / "junk.safetensors")),
        ("vocabulary.safetensors is not a file of", lambda: find_prompts(vocabulary_file)),
        ("p.safetensors is not a vocabulary", lambda: Vocabulary.load(path)),
        ("'foto' is not one of vild, photo, name", lambda: find_prompts("foto")),
    ]
    for message, mistake in wrong:
        with pytest.raises(UserError, match=message) as caught:
            mistake()
        assert "\n" not in str(caught.value)


def test_a_text_tower_of_another_library_is_refused(teacher_folder):
    teacher = build_teacher(f"local-dir:{teacher_folder}")
    teacher.model.text = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="its text tower, Linear, is not open_clip's own"):
        starting_prompts(teacher, "a")


def test_a_detector_speaks_with_the_prompts_it_was_trained_with(teacher, make_cfg, tmp_path):
    """From file to vocabulary, checkpoint and any words, also where the file is gone; texts are cached by content."""
    learned = shaken(teacher, 0)
    path = tmp_path / "p.safetensors"
    learned.save(path)
    classes = datasets.get_classes("glyphs_train")
    built = Vocabulary.from_names(teacher, classes.names, prompts=path, splits=classes.splits)
    built.save(tmp_path / "v.safetensors")
    path.unlink()
    loaded = Vocabulary.load(tmp_path / "v.safetensors")
    assert torch.equal(loaded.prompts.context, learned.context) and str(loaded.prompts) == str(learned)
    cfg = make_cfg("vild", "MODEL.VILD.VOCABULARY", str(tmp_path / "v.safetensors"))
    VildCheckpointer(Trainer.build_model(cfg), str(tmp_path)).save("model")
    detector = OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(tmp_path / "model.pth")), tmp_path)
    detector.save(tmp_path / "whole")
    whole = OpenVocabularyDetector.from_pretrained(tmp_path / "whole")
    expected = encoded(teacher, learned, ["kite", "anchor"])
    for each in (detector, whole):
        torch.testing.assert_close(each.with_vocabulary(["kite", "anchor"]).vocabulary.embeddings, expected)
    other = detector.with_vocabulary(["kite", "anchor"], prompts=shaken(teacher, 1)).vocabulary.embeddings
    torch.testing.assert_close(other, encoded(teacher, shaken(teacher, 1), ["kite", "anchor"]))
    assert (other - expected).abs().max() > 1e-4


@pytest.fixture
def run(world, teacher_folder, monkeypatch, capsys):
    """A tool's ``main`` in this process: its exit status and what it printed last."""

    def call(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, "--teacher", f"local-dir:{teacher_folder}", *map(str, arguments)])
        try:
            runpy.run_path(str(REPOSITORY / "tools" / name), run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, (printed.err if status == 2 else printed.out).strip().splitlines()[-1]

    return call


def test_command_line(run, store_folder, world, custom, tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    status, line = run("learn_prompts.py", "--dataset", "glyphs_train", "--store", store_folder, "--steps", 2,
                       "--background", 0.1, "--output", path)  # fmt: skip
    assert status == 0 and "accuracy on base regions" in line
    record = LearnedPrompts.load(path).record
    assert record["regions"] > 40 and record["dataset"] == "glyphs_train"
    words = ("--vocabulary", "kite, anchor", "--output", tmp_path / "v.safetensors", "--prompts")
    assert run("build_vocabulary.py", *words, path)[0] == 0
    assert Vocabulary.load(tmp_path / "v.safetensors").prompts.record == record
    audit = ("audit_leakage.py", "--dataset", "glyphs_train", "--vocabulary", tmp_path / "v.safetensors")
    assert run(*audit)[0] == 0
    classes = datasets.get_classes("glyphs_train")
    record["names"].append(classes.names[classes.splits.index("novel")].upper())
    replace(LearnedPrompts.load(path), record=record).save(path)
    assert run("build_vocabulary.py", *words, path)[0] == 0 and run(*audit) == (1, "verdict: LEAK")
    assert run("learn_prompts.py", "--dataset", "glyphs_train", "--steps", 2, "--output", path)[0] == 0
    truth = datasets.load_dicts("glyphs_train")
    assert LearnedPrompts.load(path).record["regions"] == sum(len(r["annotations"]) for r in truth)

    status, line = run("build_vocabulary.py", *words, path, "--teacher", custom.name)
    assert status == 2 and line.startswith(f"error: prompt set {path} is of teacher ") and custom.name in line
    status, line = run("build_vocabulary.py", *words, "foto")
    assert status == 2 and "error: vocabulary: prompt set 'foto' is not one of" in line
    entry = datasets.get_entry("glyphs_train")
    document = json.loads((world / entry.json).read_text())
    (world / "bare.json").write_text(json.dumps({**document, "annotations": []}))
    bare = replace(entry, json="bare.json")
    monkeypatch.setattr(datasets, "_user_entries", lambda: {"bare": bare})
    status, line = run("learn_prompts.py", "--dataset", "bare", "--output", path)
    assert status == 2 and "data set 'bare': has no object of a base class" in line


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--learning-rate", -1, "--learning-rate -1.0: must be above 0"),
        ("--learning-rate", "nan", "--learning-rate nan: must be above 0"),
        ("--background", -1, "--background -1.0: must be 0 or more"),
        ("--background", "inf", "--background inf: must be 0 or more"),
    ],
)
def test_numbers_that_teach_nothing_are_refused(run, store_folder, tmp_path, option, value, message):
    path = tmp_path / "p.safetensors"
    words = ("--dataset", "glyphs_train", "--store", store_folder, "--output", path)
    status, line = run("learn_prompts.py", *words, option, value)
    assert status == 2 and line.startswith(f"error: {message}") and not path.exists()
