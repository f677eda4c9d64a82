"""Words of a detector whose file does not name its text encoder, as those converted from TensorFlow: its own names need
none, new ones need the right one."""

from dataclasses import replace

import pytest
import torch

from vild.checkpoint.checkpointer import write_weights
from vild.inference.predictor import OpenVocabularyDetector
from vild.utils.errors import NotAvailable, UserError
from vild.vocabulary.vocabulary import Vocabulary


@pytest.fixture
def imported(detector, make_cfg, tmp_path, monkeypatch):
    """The detector with another vocabulary, and a teacher by name."""
    monkeypatch.setenv("VILD_CACHE", str(tmp_path / "cache"))

    def make(vocabulary, name, pretrained=""):
        path = tmp_path / "imported.safetensors"
        write_weights(path, detector.model.state_dict(), vocabulary, "vild")
        teacher = ["MODEL.VILD.TEACHER.NAME", name, "MODEL.VILD.TEACHER.PRETRAINED", pretrained]
        return OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(path), *teacher))

    return make


def test_without_network_its_own_names_and_cached_words(detector, imported, teacher, teacher_folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    anonymous = replace(detector.trained, prompts="import", fingerprint={})
    clip = "ViT-B-32-quickgelu", "openai"
    own = imported(anonymous, *clip).with_vocabulary(["Sun", "umbrella"])
    rows = [detector.trained.names.index(name) for name in ("sun", "umbrella")]
    assert torch.allclose(own.vocabulary.embeddings, detector.trained.embeddings[rows], atol=1e-6)
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(NotAvailable) as caught:
        imported(anonymous, *clip).with_vocabulary(["umbrella", "violin", "oboe"])
    line = str(caught.value)
    assert line.startswith("vocabulary: 'violin' and 1 more must be encoded: teacher 'ViT-B-32-quickgelu': its weights")
    assert line.endswith("""python -c "import open_clip; open_clip.create_model('ViT-B-32-quickgelu', 'openai')\"""")
    assert "\n" not in line and not waited  # open_clip alone retries for a minute

    named = replace(detector.trained, prompts="import")
    first = imported(named, f"local-dir:{teacher_folder}").with_vocabulary(["violin"], prompts="name")
    again = imported(named, *clip).with_vocabulary(["violin"], prompts="name")  # from the cache on disk
    assert torch.equal(first.vocabulary.embeddings, again.vocabulary.embeddings)


def test_new_words_need_the_encoder_that_made_the_names(detector, imported, teacher, teacher_folder):
    name = f"local-dir:{teacher_folder}"
    made = Vocabulary.from_names(teacher, detector.trained.names, synonyms=detector.trained.synonyms)
    right = replace(made, splits=detector.trained.splits, prompts="import", fingerprint={})
    words = imported(right, name).with_vocabulary(["violin", "sun"], context=False).vocabulary
    expected = Vocabulary.from_names(teacher, ["violin"]).embeddings[0]
    assert torch.allclose(words.embeddings[0], expected, atol=1e-6)
    assert torch.allclose(words.embeddings[1], made.embeddings[made.names.index("sun")], atol=1e-6)
    wrong = replace(detector.trained, prompts="import", fingerprint={})
    with pytest.raises(UserError, match="only 0 of 1 names have similar text embeddings"):
        imported(wrong, name).with_vocabulary(["violin"])
