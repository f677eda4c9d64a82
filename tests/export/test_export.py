"""An exported detector detects what the detector detects, for any vocabulary; its runner needs no PyTorch."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from tests.conftest import REPOSITORY
from vild.checkpoint.checkpointer import VildCheckpointer
from vild.config import load_config
from vild.export.detector import ALL, ExportedDetector
from vild.export.write import manifest, write_model
from vild.inference.predictor import OpenVocabularyDetector
from vild.modeling import build_model
from vild.modeling.calibration import Calibration
from vild.utils.images import read_image
from vild.vocabulary.vocabulary import Vocabulary

pytestmark = pytest.mark.slow
NO_OPENVINO = pytest.mark.skipif(not find_spec("openvino"), reason="openvino is not installed")
WITH_OPENVINO = pytest.param(40, "openvino", marks=NO_OPENVINO)
BLOCKED = ("torch", "torchvision", "detectron2", "vild", "safetensors", "pycocotools")


def bare_runner(*arguments):
    """Run tools/run_onnx.py, by default with threshold 0, where the ``BLOCKED`` packages cannot be imported."""
    argv = [str(REPOSITORY / "tools" / "run_onnx.py"), "--threshold", "0", *map(str, arguments)]
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({BLOCKED})); sys.argv = {argv};"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1500)


@pytest.fixture(scope="module")
def trained(checkpoint_file) -> OpenVocabularyDetector:
    overrides = ["MODEL.WEIGHTS", str(checkpoint_file)]
    return OpenVocabularyDetector(load_config(str(REPOSITORY / "configs/Glyphs/vild.yaml"), overrides))


@pytest.fixture(scope="module")
def program(trained):
    """The traced detector; the ONNX file and the archive below are both made from it, as tracing takes seconds."""
    return ExportedDetector(trained.model).program()


@pytest.fixture(scope="module")
def model(trained, program, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExportedDetector, "program", lambda _: program)
        write_model(trained, path)
    return path


@pytest.fixture(scope="module")
def images(world, tmp_path_factory) -> list[Path]:
    """Images of several sizes and formats."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    noise = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in [(100, 150), (300, 40), (9, 7)]]
    upright = Image.Exif()
    upright[0x0112] = 6
    Image.fromarray(noise[0]).save(folder / "a.png")
    Image.fromarray(noise[1]).convert("CMYK").save(folder / "b.jpg", exif=upright)
    Image.fromarray(noise[2]).save(folder / "c.png")
    Image.fromarray(noise[0][:, :, 0].astype(np.uint16) * 257).save(folder / "d.png")
    return [*sorted(folder.iterdir()), *sorted((world / "glyphs" / "val").glob("*.jpg"))[:2]]


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options)


def random_vocabulary(detector, names: int) -> Vocabulary:
    rows = torch.randn(names, detector.trained.width, generator=torch.Generator().manual_seed(names))
    rows = torch.nn.functional.normalize(rows, dim=1)
    splits = tuple(("base", "novel")[i % 2] for i in range(names))
    names = tuple(f"name {i}" for i in range(names))
    return Vocabulary(names, rows, splits, fingerprint=detector.trained.fingerprint)


def records(boxes, scores, classes) -> list[dict]:
    return [
        {"box": b, "score": float(s), "name": int(c)} for b, s, c in zip(boxes.tolist(), scores, classes, strict=True)
    ]


def check_same(mine: list[dict], expected: list[dict]) -> None:
    """Each detection has a counterpart, except for the last of the best, and for one whose overlap with a better one
    equals the NMS threshold to the last bit."""
    assert abs(len(mine) - len(expected)) <= 1
    last = min((d["score"] for d in expected), default=0) + 1e-4
    for some, others in ((mine, expected), (expected, mine)):
        alone = 0
        for found in some:
            alike = [
                o
                for o in others
                if o["name"] == found["name"]
                and abs(o["score"] - found["score"]) < 1e-4
                and np.abs(np.subtract(o["box"], found["box"])).max() < 1e-2
            ]
            alone += not alike and found["score"] >= last
            if alike and "mask" in found:
                assert alike[0]["split"] == found["split"]
                a, b = mask_api.decode(alike[0]["mask"]), mask_api.decode(found["mask"])
                assert (a != b).sum() <= 2
        assert alone <= 1


@pytest.mark.parametrize(("names", "runtime"), [*((n, "onnxruntime") for n in (1, 40, 300)), WITH_OPENVINO])
def test_the_runner_finds_what_the_detector_finds(trained, model, images, tmp_path, names, runtime):
    vocabulary = random_vocabulary(trained, names)
    vocabulary.save(tmp_path / "v.safetensors")
    output = tmp_path / "out" / "r.json"
    done = bare_runner("--weights", model, "--vocabulary", tmp_path / "v.safetensors", "--input", *images,
                       "--output", output, "--runtime", runtime)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for record, image in zip(json.loads(output.read_text()), images, strict=True):
        expected = {"file_name": str(image), **trained(image, vocabulary, across_names=1.0, threshold=0).to_dict()}
        assert record.keys() == expected.keys() and record["file_name"] == expected["file_name"]
        assert (record["height"], record["width"]) == (expected["height"], expected["width"])
        check_same(record["detections"], expected["detections"])
    assert len(expected["detections"]) > 20


def test_threshold_top_k_and_context(trained, model, images, tmp_path, monkeypatch):
    asked = Vocabulary(
        ("Sunshine", "a thing nobody drew"), random_vocabulary(trained, 2).embeddings, ("", ""),
        fingerprint=trained.trained.fingerprint,
    )  # fmt: skip
    asked.save(tmp_path / "v.safetensors")
    monkeypatch.setattr(trained._words, "encode", lambda words, *rest: asked.marked_by(trained.trained))
    everything = trained(images[0], list(asked.names), across_names=1.0, threshold=0).to_dict()["detections"]
    scores = np.array([d["score"] for d in everything])[10:-10]  # falling
    gap = (scores[1:] / scores[:-1]).argmin()
    middle = float(np.sqrt(scores[gap] * scores[gap + 1]))  # between two scores, whatever the last bits
    context = model.with_name("context.safetensors")
    assert len(Vocabulary.load(context)) == trained.trained.splits.count("base")
    for flags, expected in [
        ([], everything),
        (["--threshold", middle], [d for d in everything if d["score"] > middle]),
        (["--top-k", 7], everything[:7]),
        *([(["--runtime", "openvino"], everything)] if find_spec("openvino") else []),
    ]:
        done = bare_runner("--weights", model, "--vocabulary", tmp_path / "v.safetensors", "--input", images[0],
                           "--output", tmp_path / "r.json", "--context", context, *flags)  # fmt: skip
        assert done.returncode == 0, done.stderr
        check_same(json.loads((tmp_path / "r.json").read_text())[0]["detections"], expected)
    assert {d["name"]: d["split"] for d in everything} == {"Sunshine": "base", "a thing nobody drew": ""}


def test_permuting_the_text_permutes_the_classes(trained, model, images):
    session, image = session_of(model), read_image(images[0])
    assert [x.name for x in session.get_inputs()] == ["picture", "text"]
    text = random_vocabulary(trained, 50).embeddings.numpy()
    order = np.random.default_rng(0).permutation(50)
    boxes, scores, classes, _ = session.run(None, {"picture": image, "text": text})
    other = session.run(None, {"picture": image, "text": text[order]})
    check_same(records(other[0], other[1], order[other[2]]), records(boxes, scores, classes))
    for shown in (0, 20):
        found = session.run(None, {"picture": image, "text": text, "shown": np.array(shown)})
        assert (found[2] < shown).all() and len(found[3]) == len(found[2]) and (len(found[2]) > 0) == (shown > 0)


def test_the_wrapped_module_is_the_detector(trained, program, images, tmp_path, monkeypatch):
    vocabulary = random_vocabulary(trained, 60)
    wrapped, image = ExportedDetector(trained.model), torch.from_numpy(read_image(images[-1]))
    classes_of_call = trained.model.roi_heads.classifier.class_set([vocabulary])
    inputs = image, vocabulary.embeddings, torch.tensor(ALL)
    x = {"image": image.permute(2, 0, 1), "height": len(image), "width": len(image[0])}
    with torch.inference_mode():
        boxes, scores, classes, _ = wrapped(*inputs)
        expected = trained.model.detect([x], classes_of_call)[0]
    others = expected.pred_boxes.tensor, expected.scores, expected.pred_classes
    check_same(records(boxes, scores, classes), records(*others))
    monkeypatch.setattr(ExportedDetector, "program", lambda _: program)
    write_model(trained, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()(*inputs)
    torch.testing.assert_close(again[0], boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(again[1], scores, rtol=0, atol=1e-5)


def test_the_ensemble_asks_which_names_are_base(vocabulary_file, images, tmp_path):
    """And a detector without masks has no such output. (The exported ensemble with masks is the released one.) Regions
    are proposed and pooled on one level, which makes the smaller graph."""
    keys = ["MODEL.MASK_ON", False, "MODEL.VILD.VOCABULARY", str(vocabulary_file)]
    keys += ["MODEL.RESNETS.OUT_FEATURES", ["res3"], "MODEL.FPN.IN_FEATURES", ["res3"]]
    keys += ["MODEL.RPN.IN_FEATURES", ["p3"], "MODEL.ROI_HEADS.IN_FEATURES", ["p3"]]
    keys += ["MODEL.ANCHOR_GENERATOR.SIZES", [[32]]]
    keys += ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    cfg = load_config(str(REPOSITORY / "configs/Glyphs/ensemble.yaml"), keys)
    torch.manual_seed(0)
    VildCheckpointer(build_model(cfg), str(tmp_path)).save("model")
    detector = OpenVocabularyDetector(cfg)
    write_model(detector, tmp_path / "model.onnx")
    vocabulary = random_vocabulary(detector, 40)
    vocabulary.save(tmp_path / "v.safetensors")
    done = bare_runner("--weights", tmp_path / "model.onnx", "--vocabulary", tmp_path / "v.safetensors",
                       "--input", *images, "--output", tmp_path / "r.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for record, image in zip(json.loads((tmp_path / "r.json").read_text()), images, strict=True):
        check_same(
            record["detections"], detector(image, vocabulary, across_names=1.0, threshold=0).to_dict()["detections"]
        )
    session, text = session_of(tmp_path / "model.onnx"), vocabulary.embeddings.numpy()
    assert [x.name for x in session.get_inputs()] == ["picture", "text", "base"]
    assert [x.name for x in session.get_outputs()] == ["boxes", "scores", "classes"]
    scores = [
        session.run(["scores"], {"picture": read_image(images[0]), "text": text, "base": np.full(40, base)})[0]
        for base in (True, False)
    ]
    assert not np.allclose(*scores)


def test_the_runner_goes_on_after_a_broken_image(trained, model, images, tmp_path):
    random_vocabulary(trained, 4).save(tmp_path / "v.safetensors")
    Image.new("RGB", (3, 3000)).save(tmp_path / "thin.png")
    Image.new("RGB", (40, 2)).save(tmp_path / "flat.png")
    Image.fromarray(np.full((20, 30), 0.5, np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "pointer.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    files = [tmp_path / n for n in ("pointer.jpg", "thin.png", "flat.png", "float.tif")] + images[:1]
    done = bare_runner("--weights", model.parent, "--vocabulary", tmp_path / "v.safetensors", "--input", *files,
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
def test_a_mistake_is_one_line(trained, model, images, tmp_path, monkeypatch, change, message):
    import re

    monkeypatch.chdir(tmp_path)
    vocabulary = random_vocabulary(trained, 4)
    vocabulary.save("good.safetensors")
    Path("cut.safetensors").write_bytes(Path("good.safetensors").read_bytes()[:-4])
    Path("text.txt").write_text("neither a vocabulary nor an image")
    replace(vocabulary, fingerprint={**vocabulary.fingerprint, "weights": "0123"}).save("other.safetensors")
    replace(vocabulary, embeddings=vocabulary.embeddings[:, :7]).save("wide.safetensors")
    arguments = {"--weights": model, "--vocabulary": "good.safetensors", "--input": images[0], "--output": "r.json"}
    arguments |= change
    monkeypatch.setattr(f"{__name__}.BLOCKED", (*BLOCKED, arguments.pop("BLOCK", "torch")))
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


def test_the_tool_writes_graphs(tool, trained, program, checkpoint_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ExportedDetector, "program", lambda _: program)
    monkeypatch.setattr("vild.export.write.to_onnx", lambda traced, _: b"graph" if traced is program else b"")
    trained.save(tmp_path / "folder", teacher=False)
    config = REPOSITORY / "configs/Glyphs/vild.yaml"
    models = ["--config-file", config, "--weights", checkpoint_file], ["--weights", tmp_path / "folder"]
    for n, model in enumerate(models):
        output = tmp_path / f"new {n}" / "model.onnx"
        assert not tool("export.py", *model, "--output", output)
        assert capsys.readouterr().out == f"{output}\n" and output.read_bytes() == b"graph"
        assert json.loads(output.with_suffix(".json").read_text()) == manifest(trained)


def test_a_folder_that_needs_nothing_else(tool, trained, checkpoint_file, teacher_folder, images, tmp_path):
    config, output = REPOSITORY / "configs/Glyphs/vild.yaml", tmp_path / "folder"
    overrides = ["--opts", "MODEL.WEIGHTS", checkpoint_file, "MODEL.VILD.TEACHER.NAME", f"local-dir:{teacher_folder}",
                 "MODEL.VILD.TEACHER.PRETRAINED", ""]  # fmt: skip
    assert not tool("export.py", "--config-file", config, "--output-dir", output, *overrides)
    found = OpenVocabularyDetector.from_pretrained(tmp_path / "folder")(images[0], threshold=0)
    assert torch.equal(found.scores, trained(images[0], threshold=0).scores) and len(found)


def test_calibration_is_in_the_graph(trained, images, tmp_path, monkeypatch):
    """ONNX equals PyTorch, for all names and for some of them in a context."""
    calibration = Calibration((0.8, 0.1, -3.0), (0.5, 0.3, -4.0, -1.0), 0.01, "dev", 100, 50)
    monkeypatch.setattr(trained.model.roi_heads, "calibration", calibration)
    write_model(trained, path := tmp_path / "model.onnx")
    assert json.loads(path.with_suffix(".json").read_text())["calibration"] == calibration.state()
    session = session_of(path)
    for file in images[-2:]:
        image = trained._input(file)["image"].permute(1, 2, 0).numpy()
        for shown in (len(trained.trained), 7):
            inputs = {"picture": image, "text": trained.trained.embeddings.numpy(), "shown": np.array(shown)}
            boxes, scores, classes, *_ = session.run(None, inputs)
            some = trained.with_vocabulary(trained.trained)
            some._offered = replace(some._offered, shown=shown)
            found = some(file, across_names=1.0, threshold=0)
            expected = records(found.pred_boxes.tensor.numpy(), found.scores, found.pred_classes)
            check_same(records(boxes, scores, classes), expected)
            assert (np.diff(scores) <= 0).all() and (classes < shown).all() and len(expected) > 0
