import shutil

import pytest
import torch

from vild.errors import UserError
from vild.teacher.clip import Teacher, check_same_teacher, same_regions, same_teacher, save_local
from vild.teacher.glyph_clip import MODEL_CFG, build_model


def test_embeddings_are_unit_and_carry_no_gradient(teacher):
    images = teacher.encode_image(torch.randn(3, 3, *teacher.size))
    texts = teacher.encode_text(["a sun", "a cow"])
    for embeddings, count in ((images, 3), (texts, 2)):
        assert embeddings.shape == (count, teacher.width) and embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(count))
        assert not embeddings.requires_grad
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())


def test_batched_equals_one_by_one(teacher):
    picture = torch.randint(0, 255, (3, 100, 120), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 30.0, 40.0], [50.5, 20.0, 110.0, 90.0], [20.0, 20.0, 25.0, 80.0]])
    together = teacher.encode_regions(picture, boxes)
    single = torch.cat([teacher.encode_regions(picture, box[None]) for box in boxes])
    torch.testing.assert_close(together, single, atol=1e-5, rtol=1e-4)
    assert teacher.encode_regions(picture, boxes[:0]).shape == (0, teacher.width)


def test_texts_in_batches_equal_texts_at_once(teacher):
    texts = [f"thing number {n}" for n in range(7)]
    torch.testing.assert_close(teacher.encode_text(texts, batch=3), teacher.encode_text(texts))


def test_fingerprint_follows_the_weights_not_the_place(teacher, teacher_folder, tmp_path):
    shutil.copytree(teacher_folder, tmp_path / "copy")
    assert same_teacher(Teacher(f"local-dir:{tmp_path / 'copy'}").fingerprint, teacher.fingerprint)
    torch.manual_seed(1)
    save_local(build_model(), MODEL_CFG, tmp_path / "other")
    other = Teacher(f"local-dir:{tmp_path / 'other'}")
    assert not same_teacher(other.fingerprint, teacher.fingerprint)
    with pytest.raises(UserError, match="here is of teacher .* but there is of teacher"):
        check_same_teacher(teacher.fingerprint, "here", other.fingerprint, "there")


def test_crop_mode_makes_other_regions_in_the_same_space(teacher, teacher_folder):
    padded = Teacher(f"local-dir:{teacher_folder}", crop="pad")
    picture, boxes = torch.randint(0, 255, (3, 90, 120), dtype=torch.uint8), torch.tensor([[5.0, 5.0, 100.0, 40.0]])
    assert (padded.encode_regions(picture, boxes) - teacher.encode_regions(picture, boxes)).abs().max() > 1e-4
    assert teacher.fingerprint["preprocess"]["crop"] == "squash"  # as the stores of old have it
    assert same_teacher(padded.fingerprint, teacher.fingerprint)
    assert not same_regions(padded.fingerprint, teacher.fingerprint)
    with pytest.raises(UserError, match="'stretch'"):
        Teacher(f"local-dir:{teacher_folder}", crop="stretch")


def test_preprocessing_is_the_models_own(teacher):
    assert teacher.size == (48, 48) and teacher.mean == (0.5, 0.5, 0.5)
    assert teacher.fingerprint["preprocess"]["std"] == [0.25, 0.25, 0.25]


def test_random_weights_are_the_same_every_time():
    a, b = (Teacher("RN50-quickgelu", "random") for _ in range(2))
    assert same_teacher(a.fingerprint, b.fingerprint)
    assert a.width == 1024 and a.size == (224, 224)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-3", "openai", "'ViT-B-3'.*no model of this name"),
        ("ViT-B-32", "opnai", "'opnai' is neither a file nor one of its tags"),
        ("ViT-B-32", "", "neither a file nor one of its tags"),
        ("ViT-B-32", "openai", "QuickGELU.*ViT-B-32-quickgelu"),
        ("local-dir:/nowhere", "", "/nowhere/open_clip_config.json does not exist"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(name, pretrained, message):
    with pytest.raises(UserError, match=message) as caught:
        Teacher(name, pretrained)
    assert "\n" not in str(caught.value)


def test_a_file_of_weights(tmp_path):
    random = Teacher("RN50-quickgelu", "random")
    torch.save(random.model.state_dict(), tmp_path / "weights.pt")
    loaded = Teacher("RN50-quickgelu", str(tmp_path / "weights.pt"))
    assert same_teacher(loaded.fingerprint, random.fingerprint)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be loaded"):
        Teacher("RN50-quickgelu", str(tmp_path / "junk.pt"))
