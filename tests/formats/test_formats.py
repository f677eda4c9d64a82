"""Files written by an earlier version still open, with the values they had (see README.md)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vild.apps.label import PartialLabels
from vild.config import load_config
from vild.data.proposals import load_proposals, read_provenance
from vild.engine.best import read_history
from vild.inference.predictor import OpenVocabularyDetector
from vild.report.run_report import class_tables, read_run
from vild.store.maintenance import summarise, verify
from vild.store.store import EmbeddingStore, StoredRegions, StoreWriter
from vild.utils.errors import UserError
from vild.utils.weight_files import load_weights
from vild.vocabulary.vocabulary import Vocabulary

HERE = Path(__file__).parent
FINGERPRINT = {
    "name": "tiny", "pretrained": "none", "weights": "0123456789abcdef", "width": 64,
    "preprocess": {"size": 32, "crop": "squash"},
}  # fmt: skip
PROVENANCE = {
    "data_set": "glyphs_train", "pictures": "aa",
    "network": {"file": "model_final.pth", "sha": "bb", "trained_on": None},
}  # fmt: skip
BOXES = [[1.5, 2, 30, 40], [0, 0, 9.25, 8]]  # of image 7; image 3 has none, image 12 has one
STORED = {
    "float16": [[-0.0816680, 0.0778227, 0.0593894], [-0.0057417, -0.1168334, -0.0722731]],
    "int8": [[-0.0808142, 0.0786300, 0.0589725], [-0.0047375, -0.1160688, -0.0710626]],
}


def test_total_size():
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()) < 500_000


@pytest.mark.parametrize("dtype", STORED)
def test_store(tmp_path, dtype):
    folder = shutil.copytree(HERE / f"store_{dtype}", tmp_path / "store")
    store = EmbeddingStore(folder)
    assert store.ids_in_file_order() == [7, 3, 12] and not list(verify(folder))
    assert store.fingerprint == FINGERPRINT and store.provenance == PROVENANCE
    assert store.plan["pictures"] == "aa" and store.plan["dtype"] == dtype
    assert store[7].boxes.tolist() == BOXES and store[7].scores.tolist() == [0.75, 0.25] and len(store[3].boxes) == 0
    torch.testing.assert_close(store[7].embeddings[:, :3], torch.tensor(STORED[dtype]), atol=1e-6, rtol=0)
    assert "unreadable  1 image" in summarise(folder)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    plan = {"fingerprint": FINGERPRINT, "proposals": "cc", "max_per_image": 300, "pictures": "aa"}
    writer = StoreWriter(folder, plan, [7, 3, 12], 2, PROVENANCE, dtype)  # today's plan continues it
    assert writer.complete and writer.finish()["unreadable"] == [3]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    whole = store[12]
    (folder / "shard-00001.safetensors").unlink()
    writer = StoreWriter(folder, plan, [7, 3, 12], 2, PROVENANCE, dtype)
    assert not writer.complete and list(writer.missing()) == [(1, [12])]
    writer.write_shard(1, lambda i: StoredRegions(whole.boxes, whole.embeddings, whole.scores))
    writer.finish()
    assert torch.equal(EmbeddingStore(folder)[12].boxes, whole.boxes)


def test_vocabulary():
    vocabulary = Vocabulary.load(HERE / "vocabulary.safetensors")
    assert vocabulary.names == ("cat", "red fox", "sun") and vocabulary.splits == ("base", "novel", "")
    assert vocabulary.synonyms == ((), ("fox",), ()) and vocabulary.prompts == "photo"
    assert vocabulary.fingerprint == FINGERPRINT
    expected = [[-0.1345017, -0.1376700], [-0.0688099, 0.1112048], [-0.1390224, -0.0659270]]
    torch.testing.assert_close(vocabulary.embeddings[:, :2], torch.tensor(expected), atol=1e-6, rtol=0)


def test_proposals():
    proposals = load_proposals(HERE / "proposals.safetensors")
    assert sorted(proposals) == [3, 7, 12] and len(proposals[3][0]) == 0
    assert proposals[7][0].tolist() == BOXES and proposals[7][1].tolist() == [0.75, 0.25]
    assert proposals[12][0].tolist() == [[5, 6, 7, 8]] and proposals[12][1].tolist() == [0.5]
    assert read_provenance(HERE / "proposals.safetensors") == PROVENANCE


def test_checkpoint():
    """Weights by the same names, and the same detections from them and the old config."""
    path = HERE / "run" / "model_0000009.pth"
    content = load_weights(path)
    assert len(content["model"]) == 145 and content["iteration"] == 9
    assert float(sum(v.double().sum() for v in content["model"].values())) == pytest.approx(400.793193)
    assert Vocabulary.load(path).names == ("cat", "red fox", "sun")
    detector = OpenVocabularyDetector(load_config(str(HERE / "run" / "config.yaml"), ["MODEL.WEIGHTS", str(path)]))
    missing = set(content["model"]) ^ set(detector.model.state_dict())
    assert all("classifier" in name or "vocabulary" in name for name in missing), missing
    image = np.arange(128 * 128 * 3, dtype=np.uint32).reshape(128, 128, 3) * 7 % 251
    found = detector(image.astype(np.uint8), threshold=0.0, across_names=1.0, channels="BGR")
    assert len(found) == 89 and set(found.labels[:5]) == {"red fox"}
    expected = torch.tensor([[15.387091, 0.0, 75.313637, 32.188450], [0.066943, 35.974930, 29.717121, 59.014053]])
    torch.testing.assert_close(found.pred_boxes.tensor[:2], expected, atol=0.01, rtol=0)
    torch.testing.assert_close(found.scores[:2], torch.tensor([0.9999962, 0.9999733]), atol=1e-5, rtol=0)


def test_best():
    assert read_history(HERE / "run" / "best.json", "bbox/AP50_novel", 10) == ({4: 1.25, 9: 2.5}, 9)


def test_metrics():
    (metrics,) = read_run(HERE / "run").values()
    assert metrics["bbox/AP50"] == 1.4299875259359365 and metrics["bbox/AP75"] == 0 and metrics["bbox/APl"] is None
    document = json.loads((HERE / "run" / "inference" / "per_class.json").read_text())
    assert class_tables(document["classes"], "segm/AP")


def test_unfinished_labels(tmp_path):
    shutil.copy(HERE / "labels.json.partial", tmp_path)
    with PartialLabels(tmp_path / "labels.json", {"vocabulary": "v", "threshold": 0.25}) as labels:
        assert labels.done == {"a.jpg", "b.jpg"}
        assert labels.finish(["a.jpg", "b.jpg"], ("cat", "red fox"), {}) == (["image b.jpg cannot be read: x"], [])
    assert '"bbox": [1.0, 2.0, 10.0, 10.0]' in (tmp_path / "labels.json").read_text()
    shutil.copy(HERE / "labels.json.partial", tmp_path / "other.json.partial")
    with pytest.raises(UserError, match="another threshold"):
        PartialLabels(tmp_path / "other.json", {"vocabulary": "v", "threshold": 0.5})
