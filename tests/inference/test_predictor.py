"""Words in, boxes out: any kind of image, any words, from any thread, and no weight ever changes."""

import copy
import sys
import threading
import time

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from PIL import Image

from vild.inference.detections import warn_of
from vild.inference.predictor import OpenVocabularyDetector
from vild.inference.thresholds import parse_thresholds
from vild.inference.words import parse_words, read_words
from vild.modeling.calibration import Calibration
from vild.modeling.familiarity import Familiarity
from vild.teacher.clip import hash_weights
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary
from vild.vocabulary.words import Words


def random_vocabulary(names: int, width: int, seed: int = 0) -> Vocabulary:
    rows = torch.randn(names, width, generator=torch.Generator().manual_seed(seed))
    splits = tuple(("base", "novel")[i % 2] for i in range(names))
    return Vocabulary(
        tuple(f"name {seed} {i}" for i in range(names)), torch.nn.functional.normalize(rows, dim=1), splits
    )


def same(a, b) -> bool:
    """To the noise of floating point: the same detections, but for one that just made it or did not."""
    if abs(len(a) - len(b)) > 1:
        return False
    return unmatched(a, b) <= 1 and unmatched(b, a) <= 1


def unmatched(a, b) -> int:
    """How many of ``a`` have no counterpart in ``b``."""
    boxes, scores = (a.pred_boxes.tensor[:, None] - b.pred_boxes.tensor).abs().amax(2), a.scores[:, None] - b.scores
    labels = torch.tensor([[x == y for y in b.labels] for x in a.labels]).view(len(a), len(b))
    alike = labels & (boxes < 1e-2) & (scores.abs() < 1e-5)
    for i, j in alike.nonzero().tolist():
        if (a.pred_masks[i] != b.pred_masks[j]).sum() > 4:
            alike[i, j] = False
    return int((~alike.any(1)).sum())


def test_any_words(detector, vocabulary, image):
    found = detector(image, threshold=0)
    assert len(found) > 10 and detector.names == vocabulary.names == found.names and found.image_size == (100, 150)
    others = detector.with_vocabulary(["umbrella", "a thing nobody drew"])
    found = others(image, threshold=0)
    assert others.names == ("umbrella", "a thing nobody drew") and others.vocabulary.splits == ("novel", "")
    assert set(found.pred_classes.tolist()) <= {0, 1} and len(found) > 30  # the context takes no places
    assert len(others._offered.text) == 2 + vocabulary.splits.count("base") and others._offered.shown == 2
    marked = detector.with_vocabulary(["Sunshine", "chess_rook"])  # a synonym and another spelling of base names
    assert marked.vocabulary.splits == ("base", "base")
    assert len(marked._offered.text) == vocabulary.splits.count("base")
    assert detector.names == vocabulary.names and same(detector(image, threshold=0), detector(image, threshold=0))
    assert same(detector(image, ["umbrella", "a thing nobody drew"], threshold=0), found)


def test_a_text_is_read_as_words_and_not_by_letters(detector, tmp_path):
    """As --vocabulary and --negatives are."""
    (tmp_path / "words.txt").write_bytes(b"\xef\xbb\xbfcat | kitty, dog\n")
    words = Words(("cat", "dog"), (("kitty",), ()))
    expected = detector.with_vocabulary(words, negatives=["flag"])
    for words in ("cat | kitty, dog", "cat|kitty; dog", ["cat | kitty", "dog"], tmp_path / "words.txt",
                  str(tmp_path / "words.txt"), {0: "cat | kitty", 1: "dog"}):  # fmt: skip
        made = detector.with_vocabulary(words, negatives="flag")
        assert made.names == ("cat", "dog") and made.vocabulary.synonyms == (("kitty",), ())
        assert torch.equal(made._offered.text, expected._offered.text)
    made = detector.with_vocabulary(words, negatives="flag, Flag")
    assert torch.equal(made._offered.text, expected._offered.text)
    assert detector(Image.new("RGB", (60, 40)), "cat, dog").names == ("cat", "dog")
    for words, reason in (("words.json", "words.json does not exist"), ("Cat, cat", "duplicate class name 'cat'")):
        with pytest.raises(UserError, match=reason):
            detector.with_vocabulary(words)
    with pytest.raises(UserError, match="'kite' has 2: must be a number between 0 and 1"):
        detector.with_vocabulary(["kite"], thresholds={"kite": 2})
    with pytest.raises(UserError, match="threshold 40: must be a number between 0 and 1"):
        detector(Image.new("RGB", (60, 40)), threshold=40)


def test_wrong_words_are_one_line(detector):
    for words, reason in [
        ([], "empty"),
        (["", " "], "empty"),
        (["kite", "kite"], "duplicate class name"),
        (["x" * 10_000], "10,000 characters"),
    ]:
        with pytest.raises(UserError, match=reason) as caught:
            detector.with_vocabulary(words)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    with pytest.raises(UserError, match="embedding width"):
        detector.with_vocabulary(random_vocabulary(3, 7))
    with pytest.raises(UserError, match="also asked for"):
        detector.with_vocabulary(["kite"], negatives=["Kite"])
    with pytest.raises(UserError, match="'kit' is not in"):
        detector.with_vocabulary(["kite"], thresholds={"kit": 0.2})


def test_every_kind_of_image(detector, image, tmp_path):
    image.save(tmp_path / "a.png")
    expected, rgb = detector(image, threshold=0), np.array(image)
    bgr, tensor = cv2.imread(str(tmp_path / "a.png")), torch.from_numpy(rgb).permute(2, 0, 1)
    for kind in (str(tmp_path / "a.png"), tmp_path / "a.png", Image.open(tmp_path / "a.png"), tensor):
        assert same(detector(kind, threshold=0), expected)
    for array, channels in ((rgb, "RGB"), (bgr, "BGR"), (tensor.flip(0), "BGR")):
        assert same(detector(array, threshold=0, channels=channels), expected)
    assert not same(detector(rgb, threshold=0, channels="BGR"), expected)
    for side in ((3000, 3), (3, 3000), (40, 2), (1, 1)):
        assert detector(np.zeros((*side, 3), np.uint8), channels="RGB").image_size == side
    for wrong in (rgb[:, :, 0], rgb.astype(float), tensor.float(), tensor[:2], rgb[:0], 3):
        with pytest.raises(UserError, match="image"):
            detector(wrong, channels="RGB")
    with pytest.raises(UserError, match="does not tell RGB from BGR: give channels='RGB'"):
        detector(rgb)
    with pytest.raises(UserError, match="channels 'rgb': must be 'RGB' or 'BGR'"):
        detector(rgb, channels="rgb")


def test_a_batch_equals_one_by_one(detector):
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in [(100, 150), (90, 60), (100, 150)]]
    together = detector(images, threshold=0, channels="RGB")
    for found, image in zip(together, images, strict=True):
        alone = detector(image, threshold=0, channels="RGB")
        assert len(found) > 10 and found.image_size == image.shape[:2] and same(found, alone)
    assert detector([]) == []


def test_permuting_the_words_permutes_the_result(detector, image):
    words = random_vocabulary(50, detector.trained.width)
    order = np.random.default_rng(0).permutation(50).tolist()
    a = detector(image, words, threshold=0)
    b = detector(image, words.take(order), threshold=0)
    assert len(a) > 10 and same(a, b)
    assert sorted(set(a.pred_classes.tolist())) == sorted({order[c] for c in b.pred_classes.tolist()})


def test_swapping_is_quick_and_equals_a_fresh_start(detector, make_cfg, checkpoint_file, image):
    words = [f"thing {n}" for n in range(1203)]
    before = hash_weights(detector.model)
    first = detector.with_vocabulary(words, prompts="name")
    detector.with_vocabulary(["kite"], prompts="name")
    detector._text._teacher = None  # whatever comes now needs no encoder
    again = detector.with_vocabulary(words, prompts="name")
    assert detector._text._teacher is None
    assert torch.equal(first._offered.text, again._offered.text)
    fresh = OpenVocabularyDetector(make_cfg("vild", "MODEL.WEIGHTS", str(checkpoint_file)))
    fresh = fresh.with_vocabulary(words, prompts="name")
    assert fresh._text._teacher is None and same(again(image, threshold=0), fresh(image, threshold=0))
    assert hash_weights(detector.model) == before


def test_threads_with_vocabularies_of_their_own(detector, image):
    vocabularies = [random_vocabulary(20 + 7 * n, detector.trained.width, n) for n in range(8)]
    expected = [detector(image, v, threshold=0) for v in vocabularies]
    failures: list[object] = []

    def work(n: int) -> None:
        try:
            for _ in range(3):
                if not same(detector.with_vocabulary(vocabularies[n])(image, threshold=0), expected[n]):
                    failures.append(n)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert not failures


def test_negatives_take_the_score_and_are_not_reported(detector, image):
    words, negative = ["umbrella", "kite"], ["anchor stone"]
    with_negative = detector.with_vocabulary(words, negatives=negative, context=False, prompts="name")
    three = detector.with_vocabulary([*words, *negative], context=False, prompts="name")
    a, b = with_negative(image, threshold=0), three(image, threshold=0)
    assert set(a.labels) <= set(words)
    b = b[b.pred_classes < 2]
    torch.testing.assert_close(a.scores[:5], b.scores[:5], rtol=1e-4, atol=1e-6)


def test_twenty_thousand_words(detector, image):
    found = detector(image, random_vocabulary(20_000, detector.trained.width), threshold=0)
    assert len(found) > 0 and found.pred_classes.max() > 1000


def test_results_in_other_forms(detector, image, monkeypatch):
    supervision = pytest.importorskip("supervision")
    found = detector(image, threshold=0.0)[:5]
    document = found.to_dict()
    assert [d["name"] for d in document["detections"]] == found.labels and document["height"] == 100
    assert document["detections"][0]["mask"]["size"] == [100, 150]
    other = found.to_supervision()
    assert isinstance(other, supervision.Detections) and len(other) == len(found) == 5
    assert other.data["class_name"].tolist() == found.labels and other.mask.shape == (5, 100, 150)
    assert len(found[:0].to_supervision()) == 0 and found[:0].to_dict()["detections"] == []
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        found.to_supervision()


def test_one_folder_holds_everything(detector, image, tmp_path, monkeypatch):
    own = copy.copy(detector)
    own.cfg = detector.cfg.clone()
    own.cfg.defrost()
    keys = own.cfg.MODEL.VILD
    keys.STORE, keys.TEST_VOCABULARY, keys.TEACHER.PRETRAINED = (str(tmp_path / name) for name in "svp")
    own.save(tmp_path / "folder")
    config = (tmp_path / "folder" / "config.yaml").read_text()
    assert "DEVICE: cuda\n" in config and str(tmp_path.parent) not in config  # wherever it was saved
    loaded = OpenVocabularyDetector.from_pretrained(tmp_path / "folder", device="cpu")
    assert same(loaded(image, threshold=0), detector(image, threshold=0))
    assert loaded.vocabulary.splits == detector.vocabulary.splits
    monkeypatch.setenv("VILD_CACHE", str(tmp_path / "cache"))  # so that the folder's own teacher is asked
    again = OpenVocabularyDetector.from_pretrained(tmp_path / "folder")
    assert same(again(image, ["violin"], threshold=0), detector(image, ["violin"], threshold=0))
    with pytest.raises(UserError, match="nothing"):
        OpenVocabularyDetector.from_pretrained(tmp_path / "nothing")
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        OpenVocabularyDetector.from_pretrained(tmp_path / "folder")


def test_words_from_a_command_line(world, vocabulary_file, tmp_path):
    assert read_words("umbrella, chess knight | horse") == parse_words(["umbrella", "chess knight | horse"])
    assert read_words("x" * 150 + ", " + "y" * 150).names == ("x" * 150, "y" * 150)  # too long for a file's name
    (tmp_path / "words.txt").write_text("# things\numbrella | parasol\n\nkite\n")
    words = read_words(str(tmp_path / "words.txt"))
    assert words.names == ("umbrella", "kite") and words.synonyms == (("parasol",), ())
    assert len(read_words("glyphs_train").names) == 60
    assert len(read_words(str(vocabulary_file))) == 60
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):
        read_words(str(tmp_path / "nowhere.txt"))
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="not a text file"):
        read_words(str(tmp_path / "latin.txt"))
    with pytest.raises(UserError, match="empty"):
        read_words(" , ")
    assert parse_thresholds(["kite=0.3"], words.names) == {"kite": 0.3}
    for wrong in ("kite", "kite=high", "kit=0.3"):
        with pytest.raises(UserError, match="threshold"):
            parse_thresholds([wrong], words.names)


def test_an_image_unlike_the_known_ones_is_said_to_be(detector, image):
    """By the statistics of its features; one among several sizes keeps its own."""
    other = Image.new("RGB", (64, 64))
    rows = detector.model.detect_and_compare([detector.model_input(image)], detector._offered)[1]
    images = Familiarity(tuple(rows[0].tolist()), (0.1,) * rows.shape[1], 1.0)
    before = detector(image)
    assert before.distance is None and detector.world.startswith("This detector and its teacher know the 60")
    detector.model.roi_heads.calibration = Calibration((1, 0, 0), (1, 0, 0, 0), 0.01, "x", 1, 1, images)
    known, unlike = detector([image, other])
    assert known.distance < 0.1 and not warn_of(known)
    assert unlike.distance > 1 and "unlike" in warn_of(unlike) and unlike[:0].distance == unlike.distance
    assert unlike.to_dict()["distance"] == unlike.distance and "distance" not in before.to_dict()


def test_proposals_are_selected_only_where_an_objectness_is_asked_for(detector, image, monkeypatch):
    """Selecting by a mask waits for the GPU."""
    propose = detector.model.proposal_generator.forward

    def without_objectness(*inputs):
        found, losses = propose(*inputs)
        return [Instances(p.image_size, proposal_boxes=p.proposal_boxes) for p in found], losses

    expected = detector(image, threshold=0)
    monkeypatch.setattr(detector.model.proposal_generator, "forward", without_objectness)
    assert len(expected) and torch.equal(detector(image, threshold=0).scores, expected.scores)
