"""Extra teachers: each in its own space, from its own store, and fused by the ensemble's rule at test."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from vild.checkpoint.checkpointer import VildCheckpointer, save_weights
from vild.data import datasets
from vild.data.mapper import ViLDMapper
from vild.engine.sources import open_store, parse_distillation
from vild.modeling import build_model, fusion
from vild.modeling.calibration import Calibration
from vild.modeling.extra_teachers import ExtraTeachers
from vild.modeling.objectives import RegionBatch
from vild.store.multi import REGIONS, SeveralStores
from vild.store.store import EmbeddingStore, StoredRegions, StoreWriter
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

WIDTH = 24


@pytest.fixture(scope="module")
def second(store_folder, vocabulary, tmp_path_factory):
    """A second teacher of another width: its store over the same regions, and its vocabulary."""
    first, folder = EmbeddingStore(store_folder), tmp_path_factory.mktemp("second")
    fingerprint = {"name": "second", "pretrained": "", "weights": "2", "width": WIDTH}
    plan = {"fingerprint": fingerprint, **{k: first.plan[k] for k in REGIONS if k in first.plan}}
    writer = StoreWriter(folder / "store", plan, first.image_ids.tolist(), 16)

    def regions(image_id: int) -> StoredRegions:
        generator = torch.Generator().manual_seed(image_id)
        boxes = first[image_id].boxes
        return StoredRegions(
            boxes, F.normalize(torch.randn(len(boxes), WIDTH, generator=generator), dim=1), torch.ones(len(boxes))
        )

    for index, _ in writer.missing():
        writer.write_shard(index, regions)
    writer.finish()
    rows = F.normalize(torch.randn(len(vocabulary), WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)
    file = folder / "vocabulary.safetensors"
    Vocabulary(vocabulary.names, rows, vocabulary.splits, fingerprint=fingerprint).save(file)
    return {"STORE": str(folder / "store"), "VOCABULARY": str(file)}


def losses_of(cfg, seed=0):
    torch.manual_seed(seed)
    model = build_model(cfg).train()
    mapper = ViLDMapper.from_config(cfg, open_store(cfg))
    inputs = [mapper(r) for r in datasets.load_dicts("glyphs_train")[:2]]
    torch.manual_seed(1)
    with EventStorage():
        return model, inputs, model(inputs)


@pytest.mark.parametrize("variant", ["vild", "image", "ensemble"])
def test_each_teacher_has_its_own_loss(make_cfg, second, variant):
    cfg = make_cfg(
        variant, "MODEL.VILD.TEACHERS", str([second, {**second, "WEIGHT": 0.5}]), "INPUT.RANDOM_FLIP", "none"
    )
    model, inputs, losses = losses_of(cfg)
    assert {k for k in losses if "l1" in k} == {"loss_l1", "loss_l1_1", "loss_l1_2"}
    assert inputs[0]["distill"].embeddings_1.shape[1] == WIDTH
    sum(losses.values()).backward()
    others = model.roi_heads.others
    assert all(p.weight.grad.abs().sum() > 0 for p in others.projections)
    with torch.no_grad():  # the same projection in both places: half the weight, half the loss
        others.projections[1].load_state_dict(others.projections[0].state_dict())
    torch.manual_seed(1)
    with EventStorage():
        again = model(inputs)
    assert again["loss_l1_2"].item() == pytest.approx(again["loss_l1_1"].item() / 2, rel=1e-5)


def test_scores_are_fused_by_the_ensembles_rule(make_cfg, second):
    model = build_model(make_cfg("vild", "MODEL.VILD.TEACHERS", str([second]))).eval()
    heads = model.roi_heads
    pooled = torch.randn(5, 64, 7, 7)
    with torch.inference_mode():
        scores, _ = heads.scores(pooled)
        (own, other), _ = heads._embed(pooled)
        text = heads.classifier(own).softmax(1)[:, :-1]
        image = (other @ heads.others.texts[0].T / heads.classifier.temperature).softmax(1)
        expected = fusion.ensemble_scores(text, image, ~heads.classifier.base, heads.ensemble_weight)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-7)
        model.set_vocabulary(heads.classifier.vocabulary.take([3, 5]))  # other classes: the first teacher alone
        text = heads.classifier(own).softmax(1)[:, :-1]
        torch.testing.assert_close(heads.scores(pooled)[0], text, rtol=1e-4, atol=0)


def test_a_calibration_without_the_extra_teachers_is_not_used_with_them(make_cfg, second, tmp_path, caplog):
    teachers = ("MODEL.VILD.TEACHERS", str([second]))
    model = build_model(make_cfg("vild", *teachers))
    model.roi_heads.calibration = Calibration((1.0, 0.0, 0.0), (0.5, 0.0, 0.0, -1.0), 0.01, "dev", 100, 50)
    save_weights(tmp_path / "m.safetensors", model)
    for overrides, used in ((teachers, False), ((), True)):
        model = build_model(make_cfg("vild", *overrides))
        caplog.clear()
        VildCheckpointer(model, calibrated=True).load(str(tmp_path / "m.safetensors"))
        assert (model.roi_heads.calibration is not None) == used
        assert ("calibrated without its extra teachers" in caplog.text) != used


def test_image_heads_of_several_teachers_are_averaged():
    a, b = torch.randn(4, 8), torch.randn(4, 7)
    mean = (a[:, :-1].log_softmax(1) + b.log_softmax(1)) / 2
    novel = torch.zeros(7, dtype=torch.bool)
    torch.testing.assert_close(fusion.variant_scores("image", [a], novel, 0.5, [b]), mean.exp())


SOFT = ("MODEL.VILD.OBJECTIVES", "[{'NAME': 'soft_targets'}, {'NAME': 'l1'}]")
KEY = "MODEL.VILD.SEVERAL_TEACHERS"


def test_averaged_teachers_change_only_the_soft_targets(make_cfg, second):
    """The student, its weights and its scores are those of one teacher; only the soft targets differ."""
    several = ("MODEL.VILD.TEACHERS", str([second]), f"{KEY}.BY", "average")
    cfgs = [make_cfg("vild", *SOFT, "INPUT.RANDOM_FLIP", "none", *more) for more in ((), several)]
    (plain, _, alone), (model, _, losses) = map(losses_of, cfgs)
    mine, others = plain.state_dict(), model.state_dict()
    assert mine.keys() == others.keys() and all(torch.equal(v, others[k]) for k, v in mine.items())
    assert losses.keys() == alone.keys() and {k for k in losses if not torch.equal(losses[k], alone[k])} == {
        "loss_soft_targets"
    }
    pooled = torch.randn(3, 64, 7, 7)
    with torch.inference_mode():
        assert torch.equal(model.eval().roi_heads.scores(pooled)[0], plain.eval().roi_heads.scores(pooled)[0])


@pytest.mark.parametrize("by", ["projections", "average"])
def test_two_identical_teachers_by_confidence_are_one(make_cfg, store_folder, vocabulary, by):
    cfg = make_cfg("vild", *SOFT, "INPUT.RANDOM_FLIP", "none")
    same = {"STORE": str(store_folder), "VOCABULARY": cfg.MODEL.VILD.VOCABULARY, "WEIGHT": 3}
    cfg2 = make_cfg("vild", *SOFT, "INPUT.RANDOM_FLIP", "none", "MODEL.VILD.TEACHERS", str([same]),
                    f"{KEY}.WEIGHTS", "confidence", f"{KEY}.BY", by)  # fmt: skip
    alone, (model, inputs, _) = losses_of(cfg)[2], losses_of(cfg2)
    heads = model.roi_heads
    for projection in heads.others.projections:
        projection.load_state_dict(heads.embedding.projection.state_dict())
    torch.manual_seed(1)
    with EventStorage():
        losses = model(inputs)
    for name in ("loss_l1", "loss_soft_targets"):
        total = losses[name] + losses.get(f"{name}_1", 0)
        assert total.item() == pytest.approx(alone[name].item(), rel=1e-4)
        if by == "projections":
            assert losses[f"{name}_1"].item() == pytest.approx(3 * losses[name].item(), rel=1e-4)


def test_the_more_confident_teacher_has_the_larger_share(vocabulary):
    """In each region, whichever teacher it is; the shares sum to 1."""
    base = torch.ones(len(vocabulary), dtype=torch.bool)
    others = ExtraTeachers(4, [vocabulary], [1.0], vocabulary.names, 0.01, weighted="confidence")
    certain, uncertain = vocabulary.embeddings[:2], F.normalize(vocabulary.embeddings.mean(0, keepdim=True), dim=1)
    first, second = torch.cat([certain[:1], uncertain]), torch.cat([uncertain, certain[1:]])
    shares = others._shares(RegionBatch(first, first, (2,), {"base": vocabulary.embeddings}), [second],
                            [others.texts[0][base]])  # fmt: skip
    assert shares[0, 0] > 0.5 > shares[0, 1] and torch.allclose(shares.sum(0), torch.ones(2))


def test_mistakes_are_one_line(make_cfg, second, store_folder, vocabulary, tmp_path):
    other = tmp_path / "store"
    writer = StoreWriter(other, {"fingerprint": {}, "proposals": "others"}, [1], 1)
    writer.write_shard(0, lambda i: StoredRegions(torch.zeros(1, 4), torch.ones(1, WIDTH), torch.ones(1)))
    writer.finish()
    swapped = tmp_path / "swapped.safetensors"
    replace(vocabulary, names=vocabulary.names[::-1]).save(swapped)
    for teachers, message in [
        ([{"STORE": second["STORE"]}], "TEACHERS: .* is not"),
        ([{**second, "WEIGHT": "much"}], "WEIGHT much is not a number"),
        ([{**second, "STORE": str(other)}], "from other proposals"),
        ([{**second, "VOCABULARY": str(swapped)}], "of teacher"),
    ]:
        with pytest.raises(UserError, match=message):
            open_store(make_cfg("vild", "MODEL.VILD.TEACHERS", str(teachers)))
    with pytest.raises(UserError, match="read from stores, but DISTILL_FROM is 'mixed'"):
        parse_distillation(make_cfg("vild", "MODEL.VILD.TEACHERS", str([second]), "MODEL.VILD.DISTILL_FROM", "mixed"))
    over = ["MODEL.VILD.OBJECTIVES", "[{'NAME': 'soft_targets', 'OVER': 'background'}]"]
    with pytest.raises(UserError, match="OVER can only be 'base'"):
        build_model(make_cfg("vild", "MODEL.VILD.TEACHERS", str([second]), *over))
    with pytest.raises(UserError, match="a WEIGHT of 0 trains no projection"):
        build_model(make_cfg("vild", "MODEL.VILD.TEACHERS", str([{**second, "WEIGHT": 0}])))
    angles = ("MODEL.VILD.OBJECTIVES", "[{'NAME': 'angles'}]")
    for several, message in [
        ((f"{KEY}.BY", "mean"), "BY: 'mean' is not one of projections, average"),
        ((f"{KEY}.WEIGHTS", "sure"), "WEIGHTS: 'sure' is not one of fixed, confidence"),
        ((f"{KEY}.BY", "average"), "'average' needs soft_targets or hard_targets"),
        ((f"{KEY}.WEIGHTS", "confidence", *angles), "'angles'.* compares pairs"),
        (("MODEL.VILD.OBJECTIVES", "[]"), "do not train the projection"),
        (("MODEL.VILD.OBJECTIVES", "[{'NAME': 'angles'}, {'NAME': 'distances'}]"), "'distances'.* do not train"),
    ]:
        with pytest.raises(UserError, match=message):
            build_model(make_cfg("vild", "MODEL.VILD.TEACHERS", str([second]), *several))
    with pytest.raises(UserError, match="has other class names"):
        build_model(make_cfg("vild", "MODEL.VILD.TEACHERS", str([{**second, "VOCABULARY": str(swapped)}])))


def test_regions_of_all_teachers_move_together(make_cfg, second, store_folder):
    """A crop keeps the same rows of every teacher."""
    cfg = make_cfg("vild", "MODEL.VILD.TEACHERS", str([second]), "INPUT.CROP.ENABLED", True)
    store = open_store(cfg)
    record = datasets.load_dicts("glyphs_train")[0]
    found: Instances = ViLDMapper.from_config(cfg, store)(record)["distill"]
    whole = store[record["image_id"]]
    rows = [(whole.embeddings - e).abs().sum(1).argmin().item() for e in found.embeddings]
    assert isinstance(found.proposal_boxes, Boxes) and len(found) > 0
    assert torch.equal(found.embeddings_1, whole.others[0][rows])


def test_stores_of_other_regions_are_refused(second, store_folder, tmp_path):
    """If they chose other regions among the same proposals, at once; if one could not read an image, when that image is
    requested. Rows would otherwise belong to different regions."""
    first = EmbeddingStore(store_folder)
    image_id = int(first.image_ids[3])

    def regions(of: int) -> StoredRegions:
        boxes = first[of].boxes[: 0 if of == image_id else None]
        return StoredRegions(boxes, F.normalize(torch.ones(len(boxes), WIDTH), dim=1), torch.ones(len(boxes)))

    for name, choice in (("skipped", {}), ("fewer", {"max_per_image": 7})):
        plan = {"fingerprint": {}, **{k: first.plan[k] for k in REGIONS if k in first.plan}, **choice}
        writer = StoreWriter(tmp_path / name, plan, first.image_ids.tolist(), 64)
        for index, _ in writer.missing():
            writer.write_shard(index, regions)
        writer.finish()
    with pytest.raises(UserError, match="fewer: it was built from other proposals"):
        SeveralStores(store_folder, [tmp_path / "fewer"])
    store = SeveralStores(store_folder, [second["STORE"], tmp_path / "skipped"])
    assert len(store[int(first.image_ids[2])].others) == 2
    with pytest.raises(UserError, match=f"skipped: image_id {image_id} has other regions"):
        store[image_id]


def test_a_checkpoint_records_its_extra_teachers(make_cfg, second, vocabulary, tmp_path):
    cfg = make_cfg("vild", "MODEL.VILD.TEACHERS", str([second]))
    VildCheckpointer(build_model(cfg), str(tmp_path)).save("two")
    path = str(tmp_path / "two.pth")
    VildCheckpointer(build_model(cfg)).load(path)
    words = Vocabulary.load(second["VOCABULARY"])
    replace(words, fingerprint={**words.fingerprint, "weights": "3"}).save(other := tmp_path / "other.safetensors")
    another = make_cfg("vild", "MODEL.VILD.TEACHERS", str([{**second, "VOCABULARY": str(other)}]))
    with pytest.raises(UserError, match="an extra teacher is of teacher second .*TEACHERS"):
        VildCheckpointer(build_model(another)).load(path)


@pytest.mark.parametrize(("variant", "fuses"), [("text", False), ("vild", True), ("image", False), ("ensemble", True)])
def test_heads_that_are_fused_need_novel_marks(make_cfg, second, variant, fuses):
    teachers = ("MODEL.VILD.TEACHERS", str([second])) if variant != "text" else ()
    assert build_model(make_cfg(variant, *teachers)).roi_heads.fuses == fuses
    assert build_model(make_cfg(variant)).roi_heads.fuses == (variant == "ensemble")
    averaged = (*SOFT, f"{KEY}.BY", "average") if teachers else ()
    assert build_model(make_cfg(variant, *teachers, *averaged)).roi_heads.fuses == (variant == "ensemble")
