"""An exported detector detects what the detector detects, for any vocabulary; its runner needs no PyTorch."""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from tests.conftest import REPOSITORY
from tests.export.exported import BLOCKED, bare_runner, check_same, random_vocabulary, records, session_of
from vild.export.detector import ALL, ExportedDetector
from vild.export.write import manifest
from vild.modeling.calibration import Calibration
from vild.utils.images import read_image
from vild.vocabulary.grow import with_examples
from vild.vocabulary.regions import Gap
from vild.vocabulary.vocabulary import Vocabulary

pytestmark = pytest.mark.slow
NO_OPENVINO = pytest.mark.skipif(not find_spec("openvino"), reason="openvino is not installed")
WITH_OPENVINO = pytest.param(40, "openvino", marks=NO_OPENVINO)


@pytest.mark.parametrize(("names", "runtime"), [*((n, "onnxruntime") for n in (1, 40, 300)), WITH_OPENVINO])
def test_the_runner_finds_what_the_detector_finds(trained, onnx_file, images, by_example, tmp_path, names, runtime):
    vocabulary = random_vocabulary(trained, names)
    vocabulary = with_examples(vocabulary, by_example) if names == 40 else vocabulary
    vocabulary.save(tmp_path / "v.safetensors")
    output = tmp_path / "out" / "r.json"
    done = bare_runner("--weights", onnx_file, "--vocabulary", tmp_path / "v.safetensors", "--input", *images,
                       "--output", output, "--runtime", runtime)  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = json.loads(output.read_text())
    count = sum(len(record["detections"]) for record in records)
    assert done.stdout == f"images: {len(images)}, detections: {count}; {output}\n"
    for record, image in zip(records, images, strict=True):
        expected = {"file_name": str(image), **trained(image, vocabulary, threshold=0).to_dict()}
        assert record.keys() == expected.keys() and record["file_name"] == expected["file_name"]
        assert (record["height"], record["width"]) == (expected["height"], expected["width"])
        check_same(record["detections"], expected["detections"])
    every = trained(image, vocabulary, across_names=1.0, threshold=0)
    assert len(expected["detections"]) > 10 and (len(every) > len(expected["detections"]) or names == 1)
    assert len(expected["detections"][0]["alternatives"]) == min(names - 1, 2)


def test_the_runner_says_when_calibrated_scores_are_not_in_their_company(trained, onnx_file, images, tmp_path):
    for suffix in (".onnx", ".json"):
        shutil.copy(onnx_file.with_suffix(suffix), tmp_path / f"m{suffix}")
    settings = json.loads((tmp_path / "m.json").read_text())
    random_vocabulary(trained, 2).save(tmp_path / "v.safetensors")
    arguments = ("--weights", tmp_path / "m.onnx", "--vocabulary", tmp_path / "v.safetensors", "--input", images[0],
                 "--output", tmp_path / "r.json")  # fmt: skip
    context = ("--context", onnx_file.with_name("context.safetensors"))
    fitted = {"alone": [1, 0, 0]}
    for calibration, more, said in ((None, (), False), (fitted, context, False), (fitted, (), True)):
        (tmp_path / "m.json").write_text(json.dumps({**settings, "calibration": calibration}))
        done = bare_runner(*arguments, *more)
        assert done.returncode == 0 and ("calibrated beside the base names of training" in done.stderr) == said


def test_threshold_top_k_and_context(trained, onnx_file, images, tmp_path, monkeypatch):
    asked = Vocabulary(
        ("Sunshine", "a thing nobody drew"), random_vocabulary(trained, 2).embeddings, ("", ""),
        fingerprint=trained.trained.fingerprint,
    )  # fmt: skip
    asked.save(tmp_path / "v.safetensors")
    monkeypatch.setattr(trained._words, "encode", lambda words, *rest: asked.marked_by(trained.trained))
    everything, overlapping = (
        trained(images[0], list(asked.names), across_names=limit, threshold=0).to_dict()["detections"]
        for limit in (None, 1.0)
    )
    assert len(everything) < len(overlapping)
    scores = np.array([d["score"] for d in everything])[10:-10]  # falling
    gap = (scores[1:] / scores[:-1]).argmin()
    middle = float(np.sqrt(scores[gap] * scores[gap + 1]))  # between two scores, whatever the last bits
    context = onnx_file.with_name("context.safetensors")
    assert len(Vocabulary.load(context)) == trained.trained.splits.count("base")
    for flags, expected in [
        ([], everything),
        (["--across-names", 1], overlapping),
        (["--threshold", middle], [d for d in everything if d["score"] > middle]),
        (["--top-k", 7], everything[:7]),
        *([(["--runtime", "openvino"], everything)] if find_spec("openvino") else []),
    ]:
        done = bare_runner("--weights", onnx_file, "--vocabulary", tmp_path / "v.safetensors", "--input", images[0],
                           "--output", tmp_path / "r.json", "--context", context, *flags)  # fmt: skip
        assert done.returncode == 0, done.stderr
        check_same(json.loads((tmp_path / "r.json").read_text())[0]["detections"], expected)
    assert {d["name"]: d["split"] for d in everything} == {"Sunshine": "base", "a thing nobody drew": ""}


def test_an_example_under_a_new_name_does_not_compete_with_its_word(trained, onnx_file, images, tmp_path, monkeypatch):
    """As in the predictor: a region near to a base name, but not one whose name says what it is."""
    names, splits = trained.trained.names, trained.trained.splits
    base, novel = ([i for i, split in enumerate(splits) if split == which] for which in ("base", "novel"))
    asked = Vocabulary(
        ("a word", "mine", names[novel[0]], names[base[4]]), trained.trained.embeddings[base[:4]],
        ("", "", "novel", "base"), fingerprint=trained.trained.fingerprint,
        made_of=("", "1 example region", *["word and 1 example region"] * 2),
    )  # fmt: skip
    asked.save(tmp_path / "v.safetensors")
    width, best = trained.trained.width, []
    for gap in (None, Gap((0.0,) * width, (0.0,) * width, 1.0, 0.99)):
        with monkeypatch.context() as patch:
            patch.setattr(trained._words, "gap", gap)
            chosen = trained.with_vocabulary(asked, context=True)
            calibration = Calibration((1, 0, 0), (1, 0, 0, 0), 0.01, "x", 1, 1, examples=gap)
            patch.setattr(trained.model.roi_heads, "calibration", calibration)
            described = manifest(trained)
        left_out = {names[i] for i in base} - set(chosen._offered.names)
        assert left_out == (set() if gap is None else {names[base[1]]})
        expected = chosen(images[0], threshold=0).to_dict()["detections"]
        (tmp_path / "model.onnx").unlink(missing_ok=True)
        (tmp_path / "model.onnx").symlink_to(onnx_file)
        (tmp_path / "model.json").write_text(json.dumps(described))
        done = bare_runner("--weights", tmp_path / "model.onnx", "--vocabulary", tmp_path / "v.safetensors", "--input",
                           images[0], "--output", tmp_path / "r.json", "--context",
                           onnx_file.with_name("context.safetensors"))  # fmt: skip
        assert done.returncode == 0, done.stderr
        mine = json.loads((tmp_path / "r.json").read_text())[0]["detections"]
        check_same(mine, expected)
        assert (mine[0]["name"], expected[0]["name"]) == ("mine", "mine")
        assert mine[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-4)
        best.append(mine[0]["score"])
    assert best[1] > best[0] + 0.05  # it matters


def test_permuting_the_text_permutes_the_classes(trained, onnx_file, images):
    session, image = session_of(onnx_file), read_image(images[0])
    assert [x.name for x in session.get_inputs()] == ["picture", "text"]
    text = random_vocabulary(trained, 50).embeddings.numpy()
    order = np.random.default_rng(0).permutation(50)
    boxes, scores, classes, *_ = session.run(None, {"picture": image, "text": text})
    other = session.run(None, {"picture": image, "text": text[order]})
    check_same(records(other[0], other[1], order[other[2]]), records(boxes, scores, classes))
    for shown in (0, 20):
        found = session.run(None, {"picture": image, "text": text, "shown": np.array(shown)})
        assert (found[2] < shown).all() and len(found[3]) == len(found[2]) and (len(found[2]) > 0) == (shown > 0)


def test_the_wrapped_module_is_the_detector(trained, onnx_file, images, by_example):
    vocabulary = with_examples(random_vocabulary(trained, 60), by_example)
    wrapped, image = ExportedDetector(trained.model), torch.from_numpy(read_image(images[-1]))
    classes_of_call = trained.model.roi_heads.classifier.class_set([vocabulary])
    inputs = image, vocabulary.embeddings, torch.tensor(ALL)
    x = {"image": image.permute(2, 0, 1), "height": len(image), "width": len(image[0])}
    with torch.inference_mode():
        boxes, scores, classes, *_ = wrapped(*inputs)
        expected = trained.model.detect([x], classes_of_call)[0]
    others = expected.pred_boxes.tensor, expected.scores, expected.pred_classes
    check_same(records(boxes, scores, classes), records(*others))
    again = torch.export.load(onnx_file.with_suffix(".pt2")).module()(*inputs)
    torch.testing.assert_close(again[0], boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(again[1], scores, rtol=0, atol=1e-5)


def test_the_runner_goes_on_after_a_broken_image(trained, onnx_file, images, tmp_path):
    random_vocabulary(trained, 4).save(tmp_path / "v.safetensors")
    Image.new("RGB", (3, 3000)).save(tmp_path / "thin.png")
    Image.new("RGB", (40, 2)).save(tmp_path / "flat.png")
    Image.fromarray(np.full((20, 30), 0.5, np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "pointer.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    files = [tmp_path / n for n in ("pointer.jpg", "thin.png", "flat.png", "float.tif")] + images[:1]
    done = bare_runner("--weights", onnx_file.parent, "--vocabulary", tmp_path / "v.safetensors", "--input", *files,
                       "--output", tmp_path / "r.json")  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    broken = done.stderr.splitlines()
    assert len(found) + len(broken) - 1 == 5 and "it is a Git LFS pointer" in broken[1]
    assert {str(images[0]), str(tmp_path / "float.tif")} <= {r["file_name"] for r in found}
    for line in broken[2:]:
        assert "resized to" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--weights": "none.onnx"}, "none.onnx does not exist"),
        ({"--weights": "vild-r50"}, "vild-r50 does not exist; tools/export.py --weights NAME --output FILE.onnx makes"),
        ({"--weights": "."}, "the folder . holds 0 .onnx files, not one"),
        ({"--vocabulary": "none.safetensors"}, "none.safetensors does not exist"),
        ({"--vocabulary": "text.txt"}, "text.txt is not a vocabulary file"),
        ({"--vocabulary": "cut.safetensors"}, "cut.safetensors is not a vocabulary file"),
        ({"--vocabulary": "other.safetensors"}, "other.safetensors is of teacher .*weights 0123.*but the model is of"),
        ({"--vocabulary": "wide.safetensors"}, "width 7, .*but the model is of .*width 64"),
        ({"--context": "other.safetensors"}, "other.safetensors is of teacher"),
        ({"--input": "text.txt"}, "image text.txt cannot be read"),
        ({"--input": "none.jpg"}, "image none.jpg cannot be read"),
        ({"--runtime": "openvino", "BLOCK": "openvino"}, "openvino cannot be imported .*: pip install openvino"),
    ],
)
def test_a_mistake_is_one_line(trained, onnx_file, images, tmp_path, monkeypatch, change, message):
    import re

    monkeypatch.chdir(tmp_path)
    vocabulary = random_vocabulary(trained, 4)
    vocabulary.save("good.safetensors")
    Path("cut.safetensors").write_bytes(Path("good.safetensors").read_bytes()[:-4])
    Path("text.txt").write_text("neither a vocabulary nor an image")
    replace(vocabulary, fingerprint={**vocabulary.fingerprint, "weights": "0123"}).save("other.safetensors")
    replace(vocabulary, embeddings=vocabulary.embeddings[:, :7]).save("wide.safetensors")
    arguments = {"--weights": onnx_file, "--vocabulary": "good.safetensors", "--input": images[0], "--output": "r.json"}
    arguments |= change
    monkeypatch.setattr("tests.export.exported.BLOCKED", (*BLOCKED, arguments.pop("BLOCK", "torch")))
    done = bare_runner(*(x for pair in arguments.items() for x in pair))
    assert done.returncode == 2 and not Path("r.json").exists()
    assert len(done.stderr.splitlines()) == 1 and re.match(f"error: .*{message}", done.stderr), done.stderr


def test_the_runner_writes_whole_files(tmp_path, monkeypatch):
    spec = spec_from_file_location("run_onnx", REPOSITORY / "tools" / "run_onnx.py")
    run_onnx = module_from_spec(spec)
    spec.loader.exec_module(run_onnx)
    run_onnx.write_whole(tmp_path / "new" / "r.json", "whole")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_onnx.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run_onnx.write_whole(tmp_path / "new" / "r.json", "another")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.json"]
    assert (tmp_path / "new" / "r.json").read_text() == "whole"


def test_run_lengths_are_cocos():
    spec = spec_from_file_location("run_onnx", REPOSITORY / "tools" / "run_onnx.py")
    runner = module_from_spec(spec)
    spec.loader.exec_module(runner)
    rng = np.random.default_rng(0)
    blobs = [np.kron(rng.random((5, 7)) < share, np.ones((31, 17))) > 0 for share in (0, 0.1, 0.5, 1)]
    for mask in [*blobs, rng.random((40, 3)) < 0.5, np.ones((1, 1), bool), np.eye(900, 1000) > 0]:
        assert runner.run_lengths(mask) == mask_api.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


def test_the_tool_writes_graphs(tool, trained, checkpoint_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ExportedDetector, "program", lambda _: "traced")
    monkeypatch.setattr("vild.export.write.to_onnx", lambda traced, _: b"graph" if traced == "traced" else b"")
    trained.save(tmp_path / "folder", teacher=False)
    config = REPOSITORY / "configs/Glyphs/vild.yaml"
    models = ["--config-file", config, "--weights", checkpoint_file], ["--weights", tmp_path / "folder"]
    for n, model in enumerate(models):
        output = tmp_path / f"new {n}" / "model.onnx"
        assert not tool("export.py", *model, "--output", output)
        assert capsys.readouterr().out == f"{output}\n" and output.read_bytes() == b"graph"
        assert json.loads(output.with_suffix(".json").read_text()) == manifest(trained)
