"""Any kind of teacher: found by its name, and what the base class makes of its two encoders."""

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.copied import blocks_of
from vild.teacher.prompt_learning import starting_prompts
from vild.teacher.teacher import Teacher, build_teacher
from vild.utils.errors import UserError
from vild.utils.fingerprint import check_fingerprint, same_regions, same_teacher
from vild.vocabulary.vocabulary import Vocabulary

exec(blocks_of(REPOSITORY / "CONTRIBUTING.md", "python")[-1])  # the example: a kind of teacher, "hue:7"


def test_a_kind_of_two_methods_serves_regions_and_vocabularies():
    hues, padded = build_teacher("hue:7"), build_teacher("hue:7", crop="pad")
    image, boxes = torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8), torch.tensor([[1.0, 2, 30, 9], [5, 5, 9, 40]])
    found = hues.encode_regions(image, boxes)
    assert found.shape == (2, 7) and torch.allclose(found.norm(dim=1), torch.ones(2))
    assert hues.encode_regions(image, boxes[:0]).shape == (0, 7)
    check_fingerprint(hues.fingerprint, width=7)
    assert same_teacher(hues.fingerprint, padded.fingerprint) and not same_regions(hues.fingerprint, padded.fingerprint)
    assert not same_teacher(hues.fingerprint, build_teacher("hue:8").fingerprint)
    with pytest.raises(UserError, match="teacher hue:x: 'hue:' is followed by the number of hues"):
        build_teacher("hue:x")
    assert Vocabulary.from_names(hues, ["cat", "horse"]).embeddings.shape == (2, 7)


def test_what_it_does_not_implement_is_reported(tmp_path):
    hues = build_teacher("hue:7")
    for cannot, message in [
        (lambda: hues.map_shape, "'hue:7': its image tower gives no feature map"),
        (lambda: hues.save(tmp_path), "'hue:7': cannot be saved"),
        (lambda: starting_prompts(hues, "a photo of"), "'hue:7': it is not a model of open_clip"),
    ]:
        with pytest.raises(UserError, match=message):
            cannot()
    with pytest.raises(TypeError, match="abstract"):
        Teacher("hue:7", "", "cpu", "squash")


@pytest.mark.parametrize("name", ["hugh:7", "os:path", "crops:x", "../os:x", "os.path:x"])
def test_a_name_imports_nothing_but_teachers(name):
    with pytest.raises(UserError, match=f"teacher '{name}': "):
        build_teacher(name)


def test_an_unknown_kind_lists_the_kinds_there_are():
    with pytest.raises(
        UserError, match=r"no kind of teacher 'hugh' \(there are: .*, local-dir:FOLDER, .*, hue:\.\.\.(, .*)?\)"
    ):
        build_teacher("hugh:7")
