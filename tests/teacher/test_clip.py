import errno
import os
import shutil
import sys
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F

from vild.glyphs.teacher import MODEL_CFG, build_model
from vild.teacher.clip import ClipTeacher, save_local
from vild.teacher.crops import normalise
from vild.teacher.teacher import build_teacher
from vild.utils.errors import UserError
from vild.utils.fingerprint import check_same_teacher, same_regions, same_teacher


def test_embeddings_are_unit_and_carry_no_gradient(teacher):
    images = teacher.encode_image(torch.randn(3, 3, *teacher.size))
    texts = teacher.encode_text(["a sun", "a cow"])
    for embeddings, count in ((images, 3), (texts, 2)):
        assert embeddings.shape == (count, teacher.width) and embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(count))
        assert not embeddings.requires_grad
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())


def test_batched_equals_one_by_one(teacher):
    image = torch.randint(0, 255, (3, 100, 120), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 30.0, 40.0], [50.5, 20.0, 110.0, 90.0], [20.0, 20.0, 25.0, 80.0]])
    together = teacher.encode_regions(image, boxes)
    single = torch.cat([teacher.encode_regions(image, box[None]) for box in boxes])
    torch.testing.assert_close(together, single, atol=1e-5, rtol=1e-4)
    assert teacher.encode_regions(image, boxes[:0]).shape == (0, teacher.width)


def test_texts_in_batches_equal_texts_at_once(teacher):
    texts = [f"thing number {n}" for n in range(7)]
    torch.testing.assert_close(teacher.encode_text(texts, batch=3), teacher.encode_text(texts))


def test_fingerprint_follows_the_weights_not_the_place(teacher, teacher_folder, tmp_path):
    shutil.copytree(teacher_folder, tmp_path / "copy")
    assert same_teacher(build_teacher(f"local-dir:{tmp_path / 'copy'}").fingerprint, teacher.fingerprint)
    torch.manual_seed(1)
    save_local(build_model(), MODEL_CFG, tmp_path / "other")
    other = build_teacher(f"local-dir:{tmp_path / 'other'}")
    assert not same_teacher(other.fingerprint, teacher.fingerprint)
    with pytest.raises(UserError, match="here is of teacher .* but there is of teacher"):
        check_same_teacher(teacher.fingerprint, "here", other.fingerprint, "there")


def test_crop_mode_makes_other_regions_in_the_same_space(teacher, teacher_folder):
    padded = build_teacher(f"local-dir:{teacher_folder}", crop="pad")
    image, boxes = torch.randint(0, 255, (3, 90, 120), dtype=torch.uint8), torch.tensor([[5.0, 5.0, 100.0, 40.0]])
    assert (padded.encode_regions(image, boxes) - teacher.encode_regions(image, boxes)).abs().max() > 1e-4
    assert teacher.fingerprint["preprocess"]["crop"] == "squash"  # as the stores of old have it
    assert same_teacher(padded.fingerprint, teacher.fingerprint)
    assert not same_regions(padded.fingerprint, teacher.fingerprint)
    with pytest.raises(UserError, match="'stretch'"):
        build_teacher(f"local-dir:{teacher_folder}", crop="stretch")


def test_preprocessing_is_the_models_own(teacher):
    assert teacher.size == (48, 48) and teacher.mean == (0.5, 0.5, 0.5)
    assert teacher.fingerprint["preprocess"]["std"] == [0.25, 0.25, 0.25]


def test_random_weights_are_the_same_every_time(monkeypatch):
    a, b = (small_teacher(monkeypatch, TOWERS["vit"][0]) for _ in range(2))
    assert same_teacher(a.fingerprint, b.fingerprint)
    assert a.width == 16 and a.size == (64, 64)


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
def test_mistakes_are_one_line(name, pretrained, message):
    with pytest.raises(UserError, match=message) as caught:
        build_teacher(name, pretrained)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [("ViT-B-16-SigLIP", "tokenizer timm/ViT-B-16-SigLIP"), ("xlm-roberta-base-ViT-B-32", "model xlm-")],
)
def test_a_text_tower_of_transformers_without_it_is_one_line(monkeypatch, name, what):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=f"teacher '{name}': its {what}.*pip install transformers") as caught:
        build_teacher(name, "random")
    assert "\n" not in str(caught.value)


def words_of_transformers(folder):
    """A tokenizer of eight words, as open_clip would read it from the hub."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {word: n for n, word in enumerate(("<pad>", "</s>", "<unk>", "a", "photo", "of", "kite", "dog"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return transformers


@pytest.mark.parametrize("kind", ["siglip", "mt5", "xlm-roberta"])
def test_towers_of_transformers_teach_and_are_saved(tmp_path, monkeypatch, kind):
    """SigLIP's (open_clip's own tower with a tokenizer of Hugging Face) and two towers of Hugging Face, tiny."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = tmp_path / "hub"
    transformers = words_of_transformers(hub)
    text = {"context_length": 8, "hf_tokenizer_name": str(hub)}
    if kind == "siglip":
        text |= {"vocab_size": 8, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True, "pool_type": "last"}
    elif kind == "mt5":
        small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        transformers.MT5Config(vocab_size=8, pad_token_id=0, decoder_start_token_id=0, **small).save_pretrained(hub)
    else:
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        small |= {"vocab_size": 8, "max_position_embeddings": 12, "pad_token_id": 0}
        transformers.XLMRobertaConfig(**small).save_pretrained(hub)
    if kind != "siglip":
        text |= {"hf_model_name": str(hub), "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    cfg = {"embed_dim": 16, "custom_text": True, "vision_cfg": TOWERS["vit"][0], "text_cfg": text}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "vild-test-tower", cfg)
    weights = open_clip.create_model("vild-test-tower", pretrained=None, pretrained_hf=False).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    teacher = build_teacher("vild-test-tower", str(tmp_path / "weights.pt"))
    expected = teacher.encode_text(["a photo of a kite", "dog", "kite"])
    assert len(expected.unique(dim=0)) == 3
    teacher.save(tmp_path / "saved")
    if kind == "siglip":  # the config of Hugging Face's towers stays on the hub
        shutil.rmtree(hub)
    saved = build_teacher(f"local-dir:{tmp_path / 'saved'}")
    assert torch.equal(saved.encode_text(["a photo of a kite", "dog", "kite"]), expected)
    assert same_teacher(saved.fingerprint, teacher.fingerprint)


def test_a_saved_teacher_has_the_tokenizer(tmp_path, monkeypatch):
    """open_clip reads one of Hugging Face from the folder; without the package, a stub stands for it."""
    teacher = small_teacher(monkeypatch, TOWERS["vit"][0])
    write = lambda folder: (tmp_path / "saved").mkdir() or (folder / "tokenizer.json").write_text("{}")  # noqa: E731
    monkeypatch.setattr(teacher, "tokenizer", SimpleNamespace(save_pretrained=write))
    teacher.save(tmp_path / "saved")
    assert {"tokenizer.json", "open_clip_config.json"} <= {f.name for f in (tmp_path / "saved").iterdir()}


def test_a_file_of_weights(tmp_path, monkeypatch):
    random = small_teacher(monkeypatch, TOWERS["vit"][0])
    torch.save(random.model.state_dict(), tmp_path / "weights.pt")
    loaded = build_teacher("vild-test-tower", str(tmp_path / "weights.pt"))
    assert same_teacher(loaded.fingerprint, random.fingerprint)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be loaded"):
        build_teacher("vild-test-tower", str(tmp_path / "junk.pt"))


TEXT_CFG = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TOWERS = {
    "vit": ({"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 64}, (32, 4, 4)),
    "coca's vit": ({"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 64,
                    "attentional_pool": True, "attn_pooler_heads": 2}, (32, 4, 4)),
    "resnet": ({"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 64}, (256, 2, 2)),
    "timm vit": ({"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}, (64, 10, 10)),
    "timm resnet": ({"timm_model_name": "test_resnet", "timm_pool": "avg", "image_size": 64}, (96, 2, 2)),
    "timm attention pool": ({"timm_model_name": "test_convnext", "timm_pool": "abs_attn", "timm_proj": "",
                             "image_size": 160}, (64, 5, 5)),
}  # fmt: skip


def small_teacher(monkeypatch, vision_cfg):
    cfg = {"embed_dim": 16, "vision_cfg": vision_cfg, "text_cfg": TEXT_CFG}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "vild-test-tower", cfg)
    return build_teacher("vild-test-tower", "random")


@pytest.mark.parametrize("tower", TOWERS)
def test_maps_come_beside_the_very_same_embeddings(monkeypatch, tower):
    vision_cfg, shape = TOWERS[tower]
    teacher = small_teacher(monkeypatch, vision_cfg)
    image = torch.randint(0, 255, (3, 100, 120), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 30.0, 40.0], [50.5, 20.0, 110.0, 90.0], [20.0, 20.0, 25.0, 80.0]])
    embeddings, maps = teacher.encode_batch_and_maps([image], [boxes])
    assert torch.equal(embeddings, teacher.encode_regions(image, boxes))
    assert teacher.map_shape == shape and maps.shape == (3, *shape) and maps.dtype == torch.float32
    # of each box's own 1x crop
    crop = normalise(teacher.cut([image], [boxes[1:2]])[:, 0], teacher.mean, teacher.std)
    torch.testing.assert_close(maps[1:2], teacher.encode_image_and_maps(crop)[1], atol=1e-4, rtol=1e-4)
    embeddings, maps = teacher.encode_batch_and_maps([image], [boxes[:0]])
    assert embeddings.shape == (0, 16) and maps.shape == (0, *shape)


def test_a_mirrored_image_has_mirrored_maps(teacher, monkeypatch):
    """With a tower that pools 12 x 12 pixels, as a trained one knows left from right."""

    def pool(images, **_):
        maps = F.avg_pool2d(images, 12)
        return {"image_features": maps.mean((2, 3)), "image_intermediates": [maps]}

    monkeypatch.setattr(teacher.model, "forward_intermediates", pool)
    image = torch.randint(0, 255, (3, 100, 120), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 30.0, 40.0], [50.0, 20.0, 110.0, 90.0]])
    mirrored = torch.stack([120 - boxes[:, 2], boxes[:, 1], 120 - boxes[:, 0], boxes[:, 3]], 1)
    _, maps = teacher.encode_batch_and_maps([image], [boxes])
    _, others = teacher.encode_batch_and_maps([image.flip(-1)], [mirrored])
    torch.testing.assert_close(others.flip(-1), maps, atol=0.05, rtol=0)  # crops are rounded to 8 bits
    assert (others - maps).abs().max() > 0.2


def test_a_tower_without_maps_is_an_error_of_one_line(teacher_folder, monkeypatch):
    def refused(message):
        with pytest.raises(UserError, match=message) as caught:
            _ = build_teacher(f"local-dir:{teacher_folder}").map_shape
        assert "\n" not in str(caught.value)

    tower = open_clip.timm_model.TimmModel
    forward = tower.forward_intermediates

    def other_embedding(self, x, **settings):
        found = forward(self, x, **settings)
        return {**found, "image_features": found["image_features"].flip(1)}

    def tokens_only(self, x, **settings):
        found = forward(self, x, **settings)
        return {**found, "image_intermediates": [m.flatten(2) for m in found["image_intermediates"]]}

    for stand_in in (other_embedding, tokens_only):
        monkeypatch.setattr(tower, "forward_intermediates", stand_in)
        refused("no feature map beside its embedding")
    monkeypatch.delattr(tower, "forward_intermediates")
    refused(r"no feature map \(.*has no attribute 'forward_intermediates'")


def test_a_copied_folder_has_whole_files_and_its_config_last(tmp_path, monkeypatch):
    source, folder, copied = tmp_path / "teacher", tmp_path / "export", []
    (source / "words").mkdir(parents=True)
    for name in ("open_clip_config.json", "weights", "words/list"):
        (source / name).write_text(name)
    teacher = SimpleNamespace(name=f"local-dir:{source}")

    def fails_at_the_config(file, target):
        copied.append(file.name)
        if file.name == "open_clip_config.json":
            target.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copyfile(file, target)

    copyfile = shutil.copyfile
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fails_at_the_config)
        with pytest.raises(UserError, match=r"export/open_clip_config\.json cannot be written: No space left"):
            ClipTeacher.save(teacher, folder)
    assert copied == ["weights", "list", "open_clip_config.json"]
    assert sorted(p.name for p in folder.rglob("*")) == ["list", "weights", "words"]
    for place in (folder, source):  # also where it lies already
        ClipTeacher.save(teacher, place)
        assert all((place / name).read_text() == name for name in ("open_clip_config.json", "weights", "words/list"))
        assert len([*place.rglob("*")]) == 4


def test_an_error_that_says_nothing_has_a_name(teacher_folder, monkeypatch):
    def create(*_, **__):
        raise MemoryError

    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.raises(UserError, match="its weights cannot be loaded: MemoryError"):
        build_teacher(f"local-dir:{teacher_folder}")
