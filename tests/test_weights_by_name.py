"""Every tool that takes weights takes the name of a detector: here a repository of a hub on this machine."""

import re
import shutil
from pathlib import Path

import pytest

from tests.checkpoint.hub import hub
from tests.conftest import REPOSITORY
from vild.checkpoint.checkpointer import VildCheckpointer
from vild.checkpoint.pretrained import config_of_launch, weights_file
from vild.config import load_config
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.command_line import training_parser
from vild.utils.errors import UserError

pytestmark = pytest.mark.slow
NAME = "hf-hub:me/kites"
EVALUATION = ["--num-gpus", 0, "MODEL.WEIGHTS", NAME, "DATASETS.TEST", "('glyphs_val',)", "DATALOADER.NUM_WORKERS", 0,
              "OUTPUT_DIR"]  # fmt: skip
SERVERS = ("label_studio.py", "web_demo.py")  # which are given a folder of images
# what each is given before the path of its output
TOOLS = {
    "absent_words.py": ["--weights", NAME, "--dataset", "glyphs_val", "--output"],
    "audit_leakage.py": ["--weights", NAME, "--vocabulary", NAME, "--dataset", "glyphs_train", "--output"],
    "by_example.py": ["--weights", NAME, "--dataset", "glyphs_val", "--examples-from", "glyphs_dev", "--output"],
    "calibrate.py": ["--weights", NAME, "--dataset", "glyphs_dev", "--output"],
    "demo.py": ["--weights", NAME, "--input", "photos/a.jpg", "--output"],
    "diagnostics.py": ["--weights", NAME, "--dataset", "glyphs_val", "--output"],
    "export.py": ["--weights", NAME, "--output-dir"],
    "finetune.py": ["--weights", NAME, "--dataset", "glyphs_train", "--output-dir"],
    "gradient_shares.py": ["--weights", NAME, "--output"],
    "label.py": ["--weights", NAME, "--input", "photos", "--output"],
    "label_studio.py": ["--weights", NAME, "--input"],
    "make_proposals.py": ["--weights", NAME, "--dataset", "glyphs_val", "--num-gpus", 0, "--output"],
    "probe.py": ["--weights", NAME, "--dataset", "glyphs_train", "--output"],
    "train_net.py": ["--eval-only", *EVALUATION],
    "transfer.py": EVALUATION,
    "web_demo.py": ["--weights", NAME, "--examples"],
}


@pytest.fixture
def named(checkpoint_file, world, tmp_path, monkeypatch):
    """The hub, the folder that it serves, and an image to look at; the data sets are the tiny world's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cfg = load_config("Glyphs/vild.yaml", ["MODEL.WEIGHTS", str(checkpoint_file)])
    OpenVocabularyDetector(cfg).save(tmp_path / "folder", teacher=False)
    files = {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    (tmp_path / "photos").mkdir()
    shutil.copy(min((world / "glyphs" / "val").glob("*.jpg")), tmp_path / "photos" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    with hub("me/kites", files) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield tmp_path


def test_each_tool(named, tool, monkeypatch, capsys):
    """As far as to the weights, which it is about to load."""
    loaded = []

    def load(self, path, *_, **__):
        loaded.append(path)
        raise UserError("that will do")

    monkeypatch.setattr(VildCheckpointer, "load", load)
    for name, arguments in TOOLS.items():
        status = tool(name, *arguments, named / "photos" if name in SERVERS else named / f"{name}.pth")
        line = capsys.readouterr().err.splitlines()[-1]
        assert status == 3 if name == "audit_leakage.py" else (status, line) == (2, "error: that will do"), name
    assert len(loaded) == len(TOOLS) - 1 and {*loaded} == {weights_file(NAME)}  # the audit reads the file by itself
    assert (named / "folder/model.safetensors").read_bytes() == Path(loaded[0]).read_bytes()


def test_no_tool_is_forgotten():
    takes = re.compile(r'add_model_flags\(|add_detector_flags\(|"--weights"|training_parser\(')
    tools = {p.name for p in (REPOSITORY / "tools").glob("*.py") if takes.search(p.read_text())}
    assert tools - {"run_onnx.py"} == TOOLS.keys()  # which runs without vild


def test_a_training_starts_from_a_name_with_its_own_config(named, checkpoint_file):
    def config(*given, evaluates=False):
        return config_of_launch(training_parser("").parse_args([str(x) for x in given]), evaluates)

    keys = ["MODEL.WEIGHTS", "MODEL.VILD.VOCABULARY", "MODEL.VILD.OLD_STUDENT.WEIGHTS"]
    cfg = config("--config-file", "Glyphs/vild.yaml", *(x for key in keys for x in (key, NAME)))
    (weights,) = {cfg.MODEL.WEIGHTS, cfg.MODEL.VILD.VOCABULARY, cfg.MODEL.VILD.OLD_STUDENT.WEIGHTS}
    assert (named / "folder/model.safetensors").read_bytes() == Path(weights).read_bytes()
    assert cfg.MODEL.VILD.OBJECTIVES == [{"NAME": "l1"}]  # a folder's config has none
    cfg = config("--config-file", "Glyphs/vild.yaml", keys[0], named / "folder", keys[1], checkpoint_file)
    assert str(named / "folder/model.safetensors") == cfg.MODEL.WEIGHTS
    assert str(checkpoint_file) == cfg.MODEL.VILD.VOCABULARY
    for url in ("timm://resnet18.a1_in1k", "detectron2://ImageNetPretrained/MSRA/R-50.pkl", "https://a.b/c.pth", ""):
        assert url == config("--config-file", "Glyphs/vild.yaml", keys[0], url).MODEL.WEIGHTS

    evaluation = config(keys[0], NAME, "INPUT.MIN_SIZE_TEST", 99, evaluates=True)
    assert evaluation.INPUT.MIN_SIZE_TEST == 99 and weights == evaluation.MODEL.WEIGHTS
    assert evaluation.OUTPUT_DIR == "./output"  # not the place on another machine where it was trained
    for given, line in (
        ([keys[0], NAME], "--config-file: give a config file"),
        ([keys[0], checkpoint_file], "a file of weights has no config; give it, too"),
        ([keys[0], "vild-r51"], "weights: vild-r51 does not exist; did you mean 'vild-r50'"),
        ([], "give --config-file, or MODEL.WEIGHTS with the name or folder of a detector"),
    ):
        with pytest.raises(UserError, match=line):
            config(*given, evaluates=line[0] != "-")
