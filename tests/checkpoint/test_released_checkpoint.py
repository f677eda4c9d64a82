"""A checkpoint with the released names and shapes becomes a detector that computes what NumPy computes from the same
variables, and that can be evaluated, trained, saved and exported."""

import filecmp
import json
import logging
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn
from torchvision.ops import box_iou

from tests.checkpoint import released_checkpoint as reference
from tests.checkpoint.bundle_writer import write_bundle
from tests.conftest import REPOSITORY
from tests.data.official import lvis_document
from tests.modeling.test_lvis_models import images
from tests.modeling.test_released import agrees
from vild.apps.web import read_photo, search
from vild.checkpoint.checkpointer import VildCheckpointer, read_network_record, save_weights
from vild.checkpoint.crc32c import masked_crc32c
from vild.checkpoint.released import Released, compare_text, convert, find_prefix, summary, with_teacher
from vild.checkpoint.tensorflow import Variables, convert_variables, lvis_vocabulary, resnet
from vild.config import load_config
from vild.data import datasets
from vild.engine.trainer import Trainer
from vild.export.write import write_model
from vild.inference.predictor import OpenVocabularyDetector
from vild.inference.text_encoder import TextEncoder
from vild.modeling import build_backbone, build_model
from vild.modeling.released.rcnn import ReleasedRCNN
from vild.utils.errors import NotAvailable, UserError
from vild.utils.weight_files import load_weights
from vild.vocabulary.vocabulary import Vocabulary

pytestmark = pytest.mark.slow
spec = spec_from_file_location("convert_tf_checkpoint", REPOSITORY / "tools/convert_tf_checkpoint.py")
convert_tf_checkpoint = module_from_spec(spec)
spec.loader.exec_module(convert_tf_checkpoint)


@pytest.fixture(scope="module")
def arrays():
    return reference.variables("ensemble")


@pytest.fixture(scope="module")
def weights(arrays, tmp_path_factory):
    found = Released(*convert_variables(arrays, "CKPT"))
    assert (found.variant, found.depth, found.left_out) == ("ensemble", 50, ())
    path = tmp_path_factory.mktemp("released") / "ensemble.safetensors"
    found.write(path)
    return path


@pytest.fixture(scope="module")
def cfg(weights):
    """A canvas of 128 pixels, 20 proposals and 20 detections instead of 1024, 1,000 and 300."""
    files = ["MODEL.WEIGHTS", str(weights), "MODEL.VILD.VOCABULARY", str(weights), "MODEL.DEVICE", "cpu"]
    small = ["INPUT.MAX_SIZE_TEST", 128, "MODEL.RPN.POST_NMS_TOPK_TEST", 20, "TEST.DETECTIONS_PER_IMAGE", 20]
    small += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8]
    return load_config(str(REPOSITORY / "configs/LVIS/released/ensemble_R50.yaml"), [*files, *small])


@pytest.fixture(scope="module")
def detector(cfg):
    return OpenVocabularyDetector(cfg)


@pytest.fixture(scope="module")
def thin_cfg(cfg, weights, tmp_path_factory):
    """The same detector with narrower layers and other weights."""
    cfg = cfg.clone()
    cfg.defrost()
    thin = {"RESNETS.STEM_OUT_CHANNELS": 8, "RESNETS.WIDTH_PER_GROUP": 8, "RESNETS.RES2_OUT_CHANNELS": 16}
    thin |= {"FPN.OUT_CHANNELS": 16, "ROI_BOX_HEAD.CONV_DIM": 16, "ROI_BOX_HEAD.FC_DIM": 32}
    thin |= {"ROI_MASK_HEAD.CONV_DIM": 16, "WEIGHTS": str(tmp_path_factory.mktemp("thin") / "model.safetensors")}
    cfg.merge_from_list([x for key, value in thin.items() for x in (f"MODEL.{key}", value)])
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        if "anchor_deltas" in name or "bbox_pred" in name or "mask_head.predictor" in name:
            nn.init.normal_(parameter, std=0.5)  # instead of the small values at the start of a training
    save_weights(cfg.MODEL.WEIGHTS, model)
    return cfg


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)


def random(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def channels_first(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


# the converter


def test_every_weight_of_the_detector_is_in_the_checkpoint(weights, cfg):
    model = build_model(cfg)
    state = load_weights(weights)["model"]
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("depth", [50, 152])
def test_every_weight_of_either_resnet_has_its_place(depth):
    shapes = {name: shape for name, shape in reference.shapes("vild", depth).items() if name.startswith("resnet")}
    variables = Variables({n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}, "CKPT")
    state = {f"bottom_up.{key}": value.shape for key, value in resnet(variables, depth).items()}
    assert variables.left_out() == ()
    cfg = load_config(str(REPOSITORY / f"configs/LVIS/released/vild_R{depth}.yaml"))
    with torch.device("meta"):
        model = build_backbone(cfg, ShapeSpec(channels=3))
    theirs = {k: v.shape for k, v in model.state_dict().items() if "bottom_up" in k and "num_batches" not in k}
    assert state == theirs


def test_variant_vocabulary_and_what_training_leaves(arrays):
    plain = {name: arrays[name] for name in reference.shapes("vild", 50)}
    plain |= {"global_step": np.int64(180000), "fpn/l2/kernel/Momentum": np.zeros(3, np.float32)}
    state, vocabulary, variant, _, left_out = convert_variables(plain, "CKPT")
    assert left_out == ("fpn/l2/kernel/Momentum", "global_step")
    assert variant == "vild" and not any("image_embedding" in key for key in state)
    assert len(vocabulary) == 1203 and vocabulary.names[:2] == ("aerosol_can", "air_conditioner")
    assert vocabulary.splits.count("base") == 866 and vocabulary.splits.count("novel") == 337
    text = arrays[f"{reference.HEAD}/class-predict/kernel"]
    assert agrees(vocabulary.embeddings.T, text / np.linalg.norm(text, axis=0), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fpn/p6/bias": None}, "CKPT: the variable 'fpn/p6/bias' is missing"),
        ({"fpn/p5-bn/gamma_sim_clr": np.zeros(256)}, "'fpn/p5-bn/gamma' and 'fpn/p5-bn/gamma_sim_clr' differ only in"),
        ({"fpn/l2/bias": np.zeros(255)}, "CKPT: the variable 'fpn/l2/bias' has the shape [255], not [256]"),
        ({f"{reference.HEAD}/class-predict/kernel": np.zeros((512, 80))}, "[512, 80], not [512, 1203]"),
        ({f"{reference.HEAD}/distill_fc7/bias": None}, f"variable '{reference.HEAD}/distill_fc7/bias' is missing"),
        (
            {"resnet152/conv2d/kernel": np.zeros(3)},
            "CKPT: the variables belong to resnet50, resnet152, not to resnet50 or",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(arrays, change, message):
    changed = {name: array for name, array in {**arrays, **change}.items() if array is not None}
    with pytest.raises(UserError) as error:
        convert_variables(changed, "CKPT")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_of_something_else():
    with pytest.raises(UserError, match="the variables belong to none, not to resnet50 or resnet152"):
        convert_variables({"dense/kernel": np.zeros((3, 4))}, "CKPT")


def test_the_teacher_must_recognise_the_names(arrays, teacher):
    vocabulary = lvis_vocabulary(Variables(arrays, "CKPT"))
    with pytest.raises(UserError, match=f"embedding width is {teacher.width}, not 512"):
        with_teacher(vocabulary, teacher)
    rows = dict(zip(vocabulary.names, vocabulary.embeddings, strict=True))

    class OtherTeacher:
        logit_scale, logit_bias = 100.0, 0.0
        fingerprint = {"name": "other", "pretrained": "", "width": 512, "weights": "0"}  # noqa: RUF012

        def encode_text(self, texts):
            return torch.ones(len(texts), 512)

    with pytest.raises(UserError, match="only . of 16 names"):
        with_teacher(vocabulary, OtherTeacher())

    class OwnTeacher(OtherTeacher):
        def encode_text(self, texts):
            spelled = {name.replace("_", " "): row for name, row in rows.items()}
            found = [max((n for n in spelled if n in text), key=len, default="anklet") for text in texts]
            return torch.stack([spelled[n] for n in found])

    assert with_teacher(vocabulary, OwnTeacher()).fingerprint == OtherTeacher.fingerprint


# the heads, from the variables on


def test_the_rpn_normalises_each_level_by_itself(arrays, detector):
    head = detector.model.proposal_generator.rpn_head
    maps = [random(1, 4, 5, 256) * (level - 3) for level in range(2, 7)]
    expected = [reference.rpn_head(arrays, x[0], level) for level, x in enumerate(maps, 2)]

    def found():
        with torch.no_grad():
            scores, codes = head([channels_first(x) for x in maps])
        codes = [x[0].unflatten(0, (3, 4))[:, [1, 0, 3, 2]].flatten(0, 1) for x in codes]
        return [(s[0].permute(1, 2, 0), c.permute(1, 2, 0)) for s, c in zip(scores, codes, strict=True)]

    def right():
        pairs = zip(found(), expected, strict=True)
        return all(agrees(m, t, 1e-3) for mine, theirs in pairs for m, t in zip(mine, theirs, strict=True))

    assert right()
    norms = [module for module in head.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 10
    for norm in norms:
        norm.eps = 1e-5  # PyTorch's
    assert not right()
    for norm in norms:
        norm.eps = 1e-4
    head.norms = nn.ModuleList(reversed(head.norms))
    assert not right()
    head.norms = nn.ModuleList(reversed(head.norms))
    assert right()


def test_every_norm_has_the_released_eps(detector):
    norms = [m for m in detector.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 53 + 5 + 10 + 8 + 4 and {m.eps for m in norms} == {1e-4}


def test_the_box_head(arrays, detector):
    heads, x = detector.model.roi_heads, random(3, 7, 7, 256)
    with torch.no_grad():
        (main, distilled), deltas = heads._embed(channels_first(x))
        logits = [heads.classifier(e) for e in (main, distilled)]
    for n in range(3):
        embedding, code = reference.box_head(arrays, x[n])
        other, _ = reference.box_head(arrays, x[n], distill=True)
        assert agrees(main[n], embedding, 1e-3) and agrees(distilled[n], other, 1e-3)
        assert agrees(deltas[n][[1, 0, 3, 2]], code, 1e-3)
        background_first = reference.logits(arrays, embedding)
        assert agrees(logits[0][n], np.roll(background_first, -1), 1e-3)
        assert agrees(logits[1][n][:-1], reference.logits(arrays, other, background=False), 1e-3)


def test_the_mask_head(arrays, detector):
    x = random(2, 14, 14, 256)
    with torch.no_grad():
        found = detector.model.roi_heads.mask_head.layers(channels_first(x)).sigmoid()[:, 0]
    for n in range(2):
        assert agrees(found[n], reference.mask_head(arrays, x[n]), 1e-3)


# the detector


def test_the_converted_detector_detects(detector, image):
    found = detector(image, threshold=0, across_names=1.0, channels="BGR")
    assert len(found) == 20 and len(detector.names) == 1203 and found.pred_masks.any() and found.scores.isfinite().all()


def test_any_image_any_words(thin_cfg, image, tmp_path):
    detector = OpenVocabularyDetector(thin_cfg)
    found = detector(image, threshold=0, across_names=1.0, channels="BGR")
    assert found.image_size == (90, 150) and len(found) == 20 and found.pred_masks.shape == (20, 90, 150)
    assert detector.names[0] == "aerosol_can" and found.pred_masks.any()
    rows = torch.nn.functional.normalize(torch.randn(4, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    four = Vocabulary(("a", "b", "c", "d"), rows, ("base", "novel", "novel", "base"))
    others = detector.with_vocabulary(four)(image, threshold=0, channels="BGR")
    assert set(others.labels) <= {*"abcd"} and len(others)
    detector.save(tmp_path / "folder", teacher=False)
    again = OpenVocabularyDetector.from_pretrained(tmp_path / "folder", device="cpu")(
        image, threshold=0, across_names=1.0, channels="BGR"
    )
    assert torch.equal(again.pred_boxes.tensor, found.pred_boxes.tensor) and torch.equal(again.scores, found.scores)
    sizes = [image, image[:40, :60], image]
    together = detector(sizes, threshold=0, across_names=1.0, channels="BGR")
    assert [len(x) for x in together] == [20] * 3 and torch.allclose(together[2].scores, found.scores, atol=1e-5)


WORDS = ["aerosol can", "umbrella"]  # two of LVIS's names


def test_without_network_its_own_names_are_found_and_a_new_word_is_one_line(detector, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    own = detector.with_vocabulary(list(detector.names)).vocabulary
    assert len(own) == 1203 and torch.allclose(own.embeddings, detector.trained.embeddings, atol=1e-6)
    assert detector.for_display().with_vocabulary(WORDS).names == tuple(WORDS)
    with pytest.raises(NotAvailable) as caught:
        detector.with_vocabulary(["umbrella", "violin case of an aunt"])
    line = str(caught.value)
    assert line.startswith("vocabulary: 'violin case of an aunt' must be encoded: teacher 'ViT-B-32-quickgelu':")
    assert line.endswith("""open_clip.create_model('ViT-B-32-quickgelu', 'openai')\"""") and "\n" not in line


def test_demo_and_page_show_what_the_notebook_does_and_labels_are_all(weights, detector, tmp_path, tool, monkeypatch,
                                                                      capsys):  # fmt: skip
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photos/a.png")
    config = ["--config-file", "LVIS/released/ensemble_R50.yaml", "--weights", weights]
    small = ["--opts", "MODEL.VILD.VOCABULARY", weights, "INPUT.MAX_SIZE_TEST", 128, "MODEL.RPN.POST_NMS_TOPK_TEST",
             150, "MODEL.RPN.NMS_THRESH", 0.9]  # fmt: skip
    words, seen, served = ["--vocabulary", ", ".join(WORDS), "--threshold", 0], [], []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    row = torch.nn.functional.normalize(torch.randn(1, 512, generator=torch.Generator().manual_seed(1)), dim=1)
    monkeypatch.setattr(TextEncoder, "encode_text", lambda _, texts, *__: row.expand(len(texts), -1))  # "background"
    heads, rpn = type(detector.model.roi_heads), type(detector.model.proposal_generator)
    detect, propose = heads.detect, rpn.forward

    def proposed(*inputs):
        found, losses = propose(*inputs)
        found[0].objectness_logits = torch.linspace(4, -1, len(found[0]))  # random weights are sure of every box
        return found, losses

    def spy(self, features, proposals, classes):
        seen.append((proposals[0].objectness_logits.sigmoid().min().item(), classes.text.shape[0]))
        return detect(self, features, proposals, classes)

    monkeypatch.setattr(rpn, "forward", proposed)
    monkeypatch.setattr(heads, "detect", spy)
    monkeypatch.setattr("vild.apps.web_page.serve", lambda shown, *_: served.append(shown))
    photo = tmp_path / "photos/a.png"
    assert tool("demo.py", "--input", photo, "--output", tmp_path / "a.png", *words, *config, *small) == 0
    assert tool("label.py", "--input", photo.parent, "--output", tmp_path / "l.json", *words, *config, *small) == 0
    assert tool("web_demo.py", *config, *small) == 0
    line = capsys.readouterr().err
    assert "ViT-B-32-quickgelu" in line and "Until then only its own 1,203 names are found" in line

    drawn = json.loads((tmp_path / "a.json").read_text())["detections"]
    page = search(served[0], read_photo(photo), ", ".join(WORDS)).found
    labels = json.loads((tmp_path / "l.json").read_text())["annotations"]
    assert [d["name"] for d in drawn] == page.labels and len(page) > 2
    assert np.allclose([d["box"] for d in drawn], page.pred_boxes.tensor, atol=1e-3)
    (demo_least, demo_words), (label_least, label_words), (page_least, page_words) = seen
    assert label_least < 0.9 <= min(demo_least, page_least)
    assert demo_words == page_words == label_words + 1  # "background"
    assert {*page.labels} <= {*WORDS}
    boxes = page.pred_boxes.tensor
    assert box_iou(boxes, boxes).fill_diagonal_(0).max() <= 0.6 and page.pred_boxes.area().min() >= 220
    assert len(page) <= 25 < len(labels)


def test_boxes_go_from_the_canvas_to_the_image():
    boxes = torch.tensor([[0.0, 0, 127, 127], [12.8, 6.4, 12.8, 64]])
    found = Instances((128, 128), pred_boxes=Boxes(boxes), scores=torch.ones(2))
    inputs = [{"image": torch.zeros(3, 50, 100), "height": 200, "width": 400}]
    result = ReleasedRCNN._postprocess([found], inputs, [(128, 128)])[0]["instances"]
    assert result.image_size == (200, 400)
    expected = [[0, 0, 396.875, 396.875], [40, 20, 40, 200]]  # the image took 64 rows of the canvas
    assert torch.allclose(result.pred_boxes.tensor, torch.tensor(expected))


def test_it_can_be_evaluated_on_lvis(thin_cfg, image, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "lvis").mkdir()
    (tmp_path / "lvis/lvis_v1_val.json").write_text(json.dumps(lvis_document({1: [3, 800]}, "val")))
    (tmp_path / "coco/val2017").mkdir(parents=True)
    Image.fromarray(image[:60, :80]).save(tmp_path / "coco/val2017/000000000001.jpg")
    datasets.register_all()
    cfg = thin_cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.DATALOADER.NUM_WORKERS = 0
    model = Trainer.build_model(cfg)
    VildCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    Trainer.test(cfg, model)
    metrics = json.loads((tmp_path / "output/inference/vild_metrics.json").read_text())
    assert "lvis_v1_val/segm/AP" in metrics


def test_it_can_be_trained_on(thin_cfg):
    model = build_model(thin_cfg).train()
    VildCheckpointer(model).load(thin_cfg.MODEL.WEIGHTS)
    inputs = images()
    with EventStorage():
        losses = model(inputs)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_text", "loss_l1", "loss_box_reg", "loss_mask"}
    assert all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# the tool


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert_tf_checkpoint.py", *map(str, arguments)])
    return convert_tf_checkpoint.main()


def write_checkpoint(folder, arrays):
    write_bundle(folder / "model.ckpt-180000", arrays, checksum=masked_crc32c)
    return folder


@pytest.fixture(scope="module")
def checkpoint(arrays, tmp_path_factory):
    """The files of a checkpoint after training, with what they hold besides the detector."""
    slots = {f"{name}/Momentum": arrays[name] for name in ("fpn/l2/bias", "fpn/p2-bn/gamma")}
    rest = {"global_step": np.int64(180000), "loss_scale": np.float32(1), "rare/counter": np.int64(7)}
    return write_checkpoint(tmp_path_factory.mktemp("ckpt"), {**arrays, **slots, **rest})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_tool(checkpoint, tmp_path, monkeypatch, capsys, weights, suffix):
    output = tmp_path / f"out/model{suffix}"
    run_tool(monkeypatch, checkpoint, "--output", output)
    said = capsys.readouterr().out
    assert said == f"ensemble, ResNet-50, 1,203 names, for configs/LVIS/released/ensemble_R50.yaml: {output}\n"
    assert Vocabulary.load(output).names == Vocabulary.load(weights).names
    assert read_network_record(str(output))["trained_on"] is None
    if suffix == ".safetensors":
        assert output.read_bytes() == weights.read_bytes()


def test_mistakes_of_the_tool_are_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    def error_of(*arguments):
        with pytest.raises(SystemExit) as stop:
            run_tool(monkeypatch, *arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err

    index = checkpoint / "model.ckpt-180000.index"
    assert "must end in .safetensors or .pth" in error_of(checkpoint, "--output", tmp_path / "x.onnx")
    assert "model.ckpt-8.index is not there" in error_of(checkpoint / "model.ckpt-8", "--output", tmp_path / "x.pth")
    assert "the folder holds 0 checkpoints" in error_of(tmp_path, "--output", tmp_path / "x.pth")
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.index", "b.index"):
        os.link(index, two / name)
    assert "holds 2 checkpoints" in error_of(two, "--output", tmp_path / "x.pth")
    assert "a.data-00000-of-00001: the variable" in error_of(two / "a", "--output", tmp_path / "x.pth")
    (two / "c.index").write_bytes(b"nothing of the kind")
    assert "not the index of a TensorFlow checkpoint" in error_of(two / "c", "--output", tmp_path / "x.pth")
    np.save(tmp_path / "few.npy", np.ones((3, 4), np.float32))
    options = ["--text-matrix", tmp_path / "few.npy", "--output", tmp_path / "x.pth"]
    assert "few.npy: shape [3, 4] does not fit 1203 names" in error_of(checkpoint, *options)
    assert not (tmp_path / "x.pth").exists()


@pytest.fixture
def converted(checkpoint, monkeypatch):
    """convert() of the checkpoint without its weights, which take seconds."""
    left_out = ("fpn/l2/bias/Momentum", "fpn/p2-bn/gamma/Momentum", "global_step", "loss_scale", "rare/counter")
    found = ({}, None, "ensemble", 50, left_out)
    monkeypatch.setattr("vild.checkpoint.released.convert_variables", lambda arrays, where: found)
    return lambda *arguments, **options: convert(checkpoint, *arguments, **options)


def test_what_is_left_out_is_named_or_refused(converted, checkpoint, caplog):
    converted()
    named = "left out, no part of the detector: Momentum of 2 variables, loss_scale, rare/counter"
    assert [record.getMessage() for record in caplog.records] == [f"{checkpoint}: {named}"]
    assert caplog.records[0].levelno == logging.WARNING
    with pytest.raises(UserError, match="the variable 'loss_scale' and 1 more has no place in this detector"):
        converted(strict=True)
    assert summary(["global_step"]) == "" and summary([f"v{n:02}" for n in range(23)]).endswith("v19, 3 more")


def test_the_config_that_is_expected_must_be_the_one_found(converted):
    assert converted("LVIS/released/ensemble_R50.yaml").config == "LVIS/released/ensemble_R50.yaml"
    with pytest.raises(UserError, match="belongs to LVIS/released/ensemble_R50.yaml, not to LVIS/released/vild_R50.y"):
        converted("LVIS/released/vild_R50.yaml")


def test_the_prefix_of_a_checkpoint(checkpoint, tmp_path):
    prefix = checkpoint / "model.ckpt-180000"
    assert find_prefix(checkpoint) == find_prefix(prefix) == find_prefix(f"{prefix}.index") == prefix
    (tmp_path / "saved/variables").mkdir(parents=True)  # as in a SavedModel
    os.link(f"{prefix}.index", tmp_path / "saved/variables/variables.index")
    assert find_prefix(tmp_path / "saved") == tmp_path / "saved/variables/variables"


def test_resnet_152s_names_with_sim_clr_give_the_same_file(tmp_path, caplog):
    arrays = reference.variables("vild", 152)
    write_checkpoint(tmp_path / "plain", arrays)
    converted = convert(tmp_path / "plain", "LVIS/released/vild_R152.yaml", strict=True)
    converted.write(tmp_path / "plain.safetensors")
    del converted
    marked = {name.replace("batch_normalization", "batch_normalization_sim_clr"): a for name, a in arrays.items()}
    assert len(set(marked) - set(arrays)) == 4 * (155 + 6 + 5)
    write_checkpoint(tmp_path / "marked", marked)
    convert(tmp_path / "marked", "LVIS/released/vild_R152.yaml", strict=True).write(tmp_path / "marked.safetensors")
    assert filecmp.cmp(tmp_path / "plain.safetensors", tmp_path / "marked.safetensors", shallow=False)
    assert not caplog.records


def test_the_published_text_matrix_is_compared(arrays, weights, tmp_path, monkeypatch, capsys):
    text, vocabulary = arrays[f"{reference.HEAD}/class-predict/kernel"], Vocabulary.load(weights)
    np.save(tmp_path / "published.npy", text / np.linalg.norm(text, axis=0))
    same, sentence = compare_text(vocabulary, tmp_path / "published.npy")
    start, _, apart = sentence.rpartition(" ")
    assert same and start == f"the text embeddings are those of {tmp_path / 'published.npy'}, to"
    assert float(apart) < 1e-6
    np.save(tmp_path / "other.npy", np.roll(text, 1, axis=1))
    monkeypatch.setattr("vild.checkpoint.released.convert", lambda *_, **__: Released({}, vocabulary, "vild", 50))
    run_tool(monkeypatch, "CKPT", "--text-matrix", tmp_path / "published.npy", "--output", tmp_path / "out.pth")
    assert capsys.readouterr().out.startswith(f"CKPT: {start}")
    options = ["--text-matrix", tmp_path / "other.npy", "--output", tmp_path / "out.safetensors"]
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, "CKPT", "--strict", *options)
    other = f"CKPT: the text embeddings are not those of {tmp_path / 'other.npy'}: mean cosine "
    said = capsys.readouterr().err
    assert said.startswith(f"error: {other}") and "and 0 of 1,203 names are closest to themselves" in said
    assert not (tmp_path / "out.safetensors").exists()
    run_tool(monkeypatch, "CKPT", *options)
    assert capsys.readouterr().err.startswith(f"warning: {other}") and (tmp_path / "out.safetensors").exists()
    np.save(tmp_path / "few.npy", np.zeros((3, 1203), np.float32))
    with pytest.raises(UserError, match="the embeddings' width is 3, the checkpoint's 512"):
        compare_text(vocabulary, tmp_path / "few.npy")


def test_it_can_be_exported(thin_cfg, image, tmp_path):
    """The graph resizes the image itself; its results differ in the last bits only."""
    onnxruntime, detector = pytest.importorskip("onnxruntime"), OpenVocabularyDetector(thin_cfg)
    body = detector.model.backbone.bottom_up
    body.stages = [stage[:1] for stage in body.stages]  # blocks that are alike only make the export slower
    write_model(detector, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    vocabulary = detector.trained
    for array in (image, image[:, :40], image[:9, :7]):
        feed = {"picture": array, "text": vocabulary.embeddings.numpy(), "base": vocabulary.mask("base").numpy()}
        boxes, scores, classes, masks = session.run(None, feed)
        found = detector(array, threshold=0, across_names=1.0, channels=thin_cfg.INPUT.FORMAT)
        near = (torch.from_numpy(boxes)[:, None] - found.pred_boxes.tensor).abs().amax(2) < 1e-2
        near &= torch.from_numpy(classes)[:, None] == found.pred_classes
        near &= (torch.from_numpy(scores)[:, None] - found.scores).abs() < 1e-4
        assert len(boxes) == len(found) and (~near.any(0)).sum() <= 1 and masks.shape[1:] == (28, 28)
