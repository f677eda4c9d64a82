"""The configs keep their word: the released settings, headers whose commands the tools understand."""

import re
import shlex
import subprocess
import sys
from functools import cache, reduce
from itertools import pairwise

import pytest
import torch

from tests.conftest import REPOSITORY
from vild.config import load_config
from vild.engine.sources import is_proposal_network
from vild.engine.trainer import Trainer
from vild.modeling.region_heads import VARIANTS

CONFIGS = REPOSITORY / "configs"
ALL = sorted(str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.yaml") if "ablations" not in p.parts)
CHILDREN = [name for name in ALL if not re.search(r"Base|Affordable", name)]

# tensorflow/tpu, models/official/detection: projects/vild/configs/vild_resnet.yaml and the templates below it
RELEASED = {
    "MODEL.WEIGHTS": "",
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.FPN.OUT_CHANNELS": 256,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8 * 2**level] for level in range(2, 7)],
    "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.CONV_DIMS": [-1, -1],
    "MODEL.RPN.IOU_THRESHOLDS": [0.3, 0.7],
    "MODEL.RPN.IOU_LABELS": [0, -1, 1],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 256,
    "MODEL.RPN.POSITIVE_FRACTION": 0.5,
    "MODEL.RPN.SMOOTH_L1_BETA": pytest.approx(1 / 9),
    "MODEL.RPN.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
    "MODEL.RPN.NMS_THRESH": 0.7,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 0,
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.25,  # 128 foreground RoIs: as many as the released mask head takes
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.5],
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": True,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.5,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 256,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 1024,
    "MODEL.ROI_BOX_HEAD.NORM": "naiveSyncBN_N",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 1,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 1.0,
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 256,
    "MODEL.ROI_MASK_HEAD.NORM": "naiveSyncBN_N",
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 1,
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True,
    "MODEL.VILD.TEMPERATURE": 0.01,
    "MODEL.VILD.DISTILL_PER_IMAGE": 300,
    "MODEL.VILD.ENSEMBLE_WEIGHT": pytest.approx(2 / 3),
    "MODEL.VILD.TEACHER.NAME": "ViT-B-32-quickgelu",
    "INPUT.FORMAT": "BGR",
    "INPUT.RANDOM_FLIP": "horizontal",
    "INPUT.LARGE_SCALE_JITTER.ENABLED": True,
    "INPUT.LARGE_SCALE_JITTER.SIZE": 1024,
    "INPUT.LARGE_SCALE_JITTER.MIN": 0.1,
    "INPUT.LARGE_SCALE_JITTER.MAX": 2.0,
    "INPUT.MIN_SIZE_TEST": 1024,
    "INPUT.MAX_SIZE_TEST": 1024,
    "DATALOADER.SAMPLER_TRAIN": "TrainingSampler",
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.IMS_PER_BATCH": 256,
    "SOLVER.MAX_ITER": 180000,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.NESTEROV": False,
    "SOLVER.CLIP_GRADIENTS.ENABLED": False,
    "TEST.PROPOSALS_PER_IMAGE": 300,
}


def load(name, *overrides):
    return load_config(str(CONFIGS / name), list(overrides))


def value(cfg, key):
    return reduce(getattr, key.split("."), cfg)


@pytest.mark.parametrize("name", ["text", "image", "vild", "ensemble", "vild_R152", "ensemble_R152"])
def test_lvis_follows_the_released_settings(name):
    cfg = load(f"LVIS/{name}.yaml")
    assert {key: value(cfg, key) for key in RELEASED} == RELEASED
    assert sorted(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS[0]) == [0.5, 1.0, 2.0]
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 300
    depth, weight = {"vild_R152": (152, 1.0), "ensemble_R152": (152, 2.0)}.get(name, (50, 0.5))
    assert depth == cfg.MODEL.RESNETS.DEPTH and weight == cfg.MODEL.VILD.DISTILL_WEIGHT


def test_coco_changes_data_and_detections_alone():
    mine, theirs = load("COCO/vild.yaml").clone(), load("LVIS/vild.yaml").clone()
    for key in ("DATASETS", "OUTPUT_DIR", "TEST.DETECTIONS_PER_IMAGE", "MODEL.VILD.VOCABULARY", "MODEL.VILD.STORE"):
        *path, last = key.split(".")
        for cfg in (mine, theirs):
            del reduce(getattr, path, cfg)[last]
    assert mine == theirs


def test_the_child_that_follows_detpro():
    """Its crops, temperature and threshold; all else is its parent's."""
    mine, theirs = (load(f"LVIS/{name}.yaml").clone() for name in ("ensemble_20ep_detpro", "ensemble_20ep"))
    assert mine.MODEL.VILD.TEST_TEMPERATURE == 0.007 and mine.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 1e-4
    (store,) = (words for script, words in commands("LVIS/ensemble_20ep_detpro.yaml") if "build" in script)
    pairs = dict(pairwise(store))
    assert pairs["--crop"] == "center" and pairs["--output-dir"] == mine.MODEL.VILD.STORE != theirs.MODEL.VILD.STORE
    for key in ("MODEL.VILD.TEST_TEMPERATURE", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "MODEL.VILD.STORE", "OUTPUT_DIR"):
        *path, last = key.split(".")
        for cfg in (mine, theirs):
            del reduce(getattr, path, cfg)[last]
    assert mine == theirs


def rates(cfg, iterations):
    """Learning rates at some iterations."""
    model = torch.nn.Linear(1, 1)
    optimizer = Trainer.build_optimizer(cfg, model)
    multiplier = Trainer.build_lr_scheduler(cfg, optimizer)._multiplier
    return [cfg.SOLVER.BASE_LR * multiplier(i / cfg.SOLVER.MAX_ITER) for i in iterations]


def test_the_learning_rate_over_time():
    full = rates(load("LVIS/vild.yaml"), (0, 500, 1000, 161990, 162010, 171010, 175510))
    assert full == pytest.approx([0.0032, 0.1616, 0.32, 0.32, 0.032, 0.0032, 0.00032], rel=1e-6)
    short = rates(load("LVIS/vild_20ep.yaml"), (0, 500, 100160, 100180))
    assert short == pytest.approx([0.00002, 0.02, 0.02, 0.002], rel=1e-6)
    solver = load("LVIS/vild_20ep.yaml").SOLVER
    assert solver.MAX_ITER == 20 * 100170 // 16 and solver.STEPS == (16 * 100170 // 16,)


def test_weight_decay_is_on_weights_alone():
    """The released regular expression takes kernels only: no biases, no BatchNorm."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.SyncBatchNorm(1))
    groups = Trainer.build_optimizer(load("LVIS/vild.yaml"), model).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [4e-5, 0.0, 0.0, 0.0]


def test_a_torchvision_start_gets_torchvision_input():
    """Weights trained on RGB over ImageNet's deviation, stride in the 3x3, whatever the config."""
    for name in CHILDREN:
        cfg = load(name)
        if cfg.MODEL.WEIGHTS and "released/" not in name:
            assert "torchvision" in cfg.MODEL.WEIGHTS or cfg.MODEL.VILD.TIMM_BACKBONE, name
            assert cfg.INPUT.FORMAT == "RGB" and not cfg.MODEL.RESNETS.STRIDE_IN_1X1
            mean, deviation = torch.tensor([cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD]) / 255
            assert mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
            assert deviation.tolist() == pytest.approx([0.229, 0.224, 0.225])


@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_is_what_its_name_and_folder_say(name):
    cfg, stem = load(name), name.split("/")[-1].removesuffix(".yaml")
    kind = "vild" if "students/" in name else stem.split("_")[0]
    assert is_proposal_network(cfg) == (kind == "proposals")
    if kind == "proposals":
        assert not cfg.MODEL.MASK_ON
    else:
        assert kind in VARIANTS and kind == cfg.MODEL.VILD.VARIANT
    train, test = {
        "LVIS": (("lvis_v1_train_norare",), ("lvis_v1_val",)),
        "COCO": (("coco_zeroshot_train",), ("coco_generalized_zeroshot_val",)),
        "Glyphs": (("glyphs_train",), ("glyphs_val",)),
    }[name.split("/")[0]]
    assert train == cfg.DATASETS.TRAIN and test == cfg.DATASETS.TEST


def test_no_two_configs_write_to_one_folder():
    assert len({load(name).OUTPUT_DIR for name in CHILDREN}) == len(CHILDREN)


def header(name):
    """The comment that a config opens with, its continued lines joined."""
    lines = (CONFIGS / name).read_text().splitlines()
    text = "\n".join(line[1:].strip() for line in lines[: [x.startswith("#") for x in lines].index(False)])
    return re.sub(r"\\\n", " ", text)


def commands(name):
    """Every command of a header: the script, its words."""
    for match in re.finditer(r"tools/(\w+\.py)(( +[^\s(][^(\n]*)?)", header(name)):
        if words := shlex.split(match[2]):
            yield match[1], words


@cache
def flags(script):
    done = subprocess.run([sys.executable, REPOSITORY / "tools" / script, "--help"], capture_output=True, text=True)
    return set(re.findall(r"^  .*?(--[\w-]+)", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("name", ALL)
def test_headers_say_paper_expectation_cost_and_command(name):
    if name in CHILDREN:
        for word in ("paper", "Expected: ", "Cost: ", "\nRun"):
            assert word in header(name)
        own = ["--config-file", f"configs/{name}"]
        assert any(s == "train_net.py" and words[:2] == own for s, words in commands(name)), "no command of its own"
    for script, words in commands(name):
        given = [w for w in words if w.startswith("--")]
        assert set(given) <= flags(script), f"tools/{script} has no such flag"
        pairs = {f: words[words.index(f) + 1] for f in given}
        overrides = [w for w in words if re.fullmatch(r"[A-Z][\w.]+", w)]
        options = [words[words.index(w) + i] for w in overrides for i in (0, 1)]
        if "--config-file" in pairs:
            cfg = load_config(str(REPOSITORY / pairs["--config-file"]), options)
        if data := pairs.get("--dataset") or pairs.get("--vocabulary"):
            assert (data,) == load(name).DATASETS.TRAIN
        if script == "make_proposals.py":  # reads what the command before it has written
            assert f"{cfg.OUTPUT_DIR}/model_final.pth" == pairs["--weights"]


@pytest.mark.parametrize("name", [n for n in ALL if re.search(r"(LVIS|COCO)/Base", n)])
def test_the_stages_of_a_base_write_what_its_children_read(name):
    made = {
        script: words[words.index(flag) + 1]
        for script, words in commands(name)
        for flag in ("--output", "--output-dir")
        if flag in words
    }
    asked = load(name).MODEL.VILD
    assert (made["build_vocabulary.py"], made["build_teacher_store.py"]) == (asked.VOCABULARY, asked.STORE)
    store = next(words for script, words in commands(name) if script == "build_teacher_store.py")
    assert store[store.index("--proposals") + 1] == made["make_proposals.py"]
    assert store[store.index("--teacher") + 1] == asked.TEACHER.NAME
