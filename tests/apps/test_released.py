"""A converted checkpoint in the demo, in labels and on the page, and without network."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from vild.apps.web import read_photo, search
from vild.inference.text_encoder import TextEncoder
from vild.utils.errors import NotAvailable

pytestmark = pytest.mark.slow
WORDS = ["aerosol can", "umbrella"]  # two of LVIS's names


def test_without_network_its_own_names_are_found_and_a_new_word_is_one_line(released_detector, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    own = released_detector.with_vocabulary(list(released_detector.names)).vocabulary
    assert len(own) == 1203 and torch.allclose(own.embeddings, released_detector.trained.embeddings, atol=1e-6)
    assert released_detector.for_display().with_vocabulary(WORDS).names == tuple(WORDS)
    with pytest.raises(NotAvailable) as caught:
        released_detector.with_vocabulary(["umbrella", "violin case of an aunt"])
    line = str(caught.value)
    assert line.startswith("vocabulary: 'violin case of an aunt' must be encoded: teacher 'ViT-B-32-quickgelu':")
    assert line.endswith("""open_clip.create_model('ViT-B-32-quickgelu', 'openai')\"""") and "\n" not in line


def test_demo_and_page_show_what_the_notebook_does_and_labels_are_all(
    released_weights, released_detector, tmp_path, tool, monkeypatch, capsys
):
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photos/a.png")
    config = ["--config-file", "LVIS/released/ensemble_R50.yaml", "--weights", released_weights]
    small = ["--opts", "MODEL.VILD.VOCABULARY", released_weights, "INPUT.MAX_SIZE_TEST", 128,
             "MODEL.RPN.POST_NMS_TOPK_TEST", 150, "MODEL.RPN.NMS_THRESH", 0.9]  # fmt: skip
    words, seen, served = ["--vocabulary", ", ".join(WORDS), "--threshold", 0], [], []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    row = torch.nn.functional.normalize(torch.randn(1, 512, generator=torch.Generator().manual_seed(1)), dim=1)
    monkeypatch.setattr(TextEncoder, "encode_text", lambda _, texts, *__: row.expand(len(texts), -1))  # "background"
    heads, rpn = type(released_detector.model.roi_heads), type(released_detector.model.proposal_generator)
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
