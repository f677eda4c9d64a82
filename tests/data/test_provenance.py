"""What the tools record of a network's training travels with its weights, its proposals and their store."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.audit.test_pasted_boxes import noisy, pasted, with_clutter
from tests.conftest import REPOSITORY, store_plan
from vild.audit.findings import audit_proposals
from vild.audit.pasted_boxes import judge_boxes, measure_boxes
from vild.checkpoint.checkpointer import VildCheckpointer, read_network_record
from vild.data.proposals import load_proposals, read_provenance, save_proposals
from vild.data.provenance import judge_network, judge_proposals, merge, network_record, training_record
from vild.engine.trainer import Trainer
from vild.store.store import EmbeddingStore, StoredRegions, StoreWriter
from vild.teacher.teacher import Teacher
from vild.utils.errors import UserError


def test_records_of_networks(world, benchmark, tmp_path):
    """From scratch, from a backbone of image labels, from unknown weights, from a network that saw everything."""
    file = tmp_path / "w.pth"
    file.write_bytes(b"weights")

    def judged(record, path=None, of_start=None):
        trained_on = {**record, "starts": [network_record(path, file, of_start)] if path else []}
        return judge_network(network_record("net.pth", file, trained_on), benchmark.novel, benchmark.known)

    clean, oracle = (training_record((n,), None) for n in ("glyphs_train", "glyphs_train_all"))
    verdict, evidence = judged(clean)
    assert verdict == "clean" and "annotations of 40 names, 0 novel, read from 'glyphs_train'" in evidence
    assert judged(clean, path="detectron2://ImageNetPretrained/MSRA/R-50.pkl")[0] == "clean"
    assert judged(clean, path="timm://resnet18.a1_in1k")[0] == "clean"
    assert judged(clean, path="timm://resnet18/mine.pth")[0] == "cannot tell"
    verdict, evidence = judged(clean, path="/somewhere/else.pth")
    assert verdict == "cannot tell" and "else.pth" in evidence and "no record of its training" in evidence
    verdict, evidence = judged(oracle)
    assert verdict == "LEAK" and "annotations of novel names" in evidence and "coco_train_all.json" in evidence
    assert judged(clean, path="oracle.pth", of_start=oracle)[0] == "LEAK"
    strange = {**clean["data_sets"][0], "annotations": {"sunshade": 3}}
    assert judged({**clean, "data_sets": [strange]})[0] == "cannot tell"  # another word for a novel name?
    assert judged(merge(clean, oracle))[0] == "LEAK"
    assert merge(clean, clean) == clean


def test_the_checkpoint_carries_the_record_from_start_to_resume(make_cfg, benchmark, tmp_path):
    settings = ("DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1)
    first = Trainer(make_cfg("proposals", *settings, "OUTPUT_DIR", str(tmp_path / "a")))
    first.checkpointer.save("model_final")
    path = str(tmp_path / "a" / "model_final.pth")
    network = read_network_record(path)
    assert judge_network(network, benchmark.novel, benchmark.known)[0] == "clean"
    assert network["trained_on"] == training_record(("glyphs_train",), None)

    cfg = make_cfg("vild", *settings, "MODEL.WEIGHTS", path, "OUTPUT_DIR", str(tmp_path / "b"))
    second = Trainer(cfg)
    second.resume_or_load(resume=False)
    second.checkpointer.save("model_0000000", iteration=0)
    saved = read_network_record(str(tmp_path / "b" / "model_0000000.pth"))
    assert saved["trained_on"]["starts"] == [network]
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.checkpointer.trained_on == saved["trained_on"]
    # the tiny store's proposals have no record, which the network's own clean sets do not make good
    verdict, evidence = judge_network(saved, benchmark.novel, benchmark.known)
    assert verdict == "cannot tell" and "its store's proposals have no record" in evidence

    state = torch.load(tmp_path / "b" / "model_0000000.pth", weights_only=True)
    del state["trained_on"]  # a checkpoint of an earlier version, resumed: the part before is unknown
    torch.save(state, tmp_path / "b" / "model_0000000.pth")
    old = Trainer(cfg)
    old.resume_or_load(resume=True)
    (start,) = old.checkpointer.trained_on["starts"]
    assert start["file"] == "model_0000000.pth" and start["trained_on"] is None
    assert VildCheckpointer(Trainer.build_model(cfg)).load_recorded(path) == network


def test_with_a_live_teacher_the_network_s_own_record_is_all_there_is(make_cfg, benchmark, tmp_path):
    """No store is read, also where the config names one, and the proposals are the network's own."""
    settings = ("DATASETS.TEST", "()", "MODEL.VILD.DISTILL_FROM", "teacher")
    cfg = make_cfg("vild", *settings, "OUTPUT_DIR", str(tmp_path))
    Trainer(cfg).checkpointer.save("clean")
    network = read_network_record(str(tmp_path / "clean.pth"))
    assert network["trained_on"] == training_record(("glyphs_train",), None)
    assert judge_network(network, benchmark.novel, benchmark.known)[0] == "clean"
    state = torch.load(tmp_path / "clean.pth", weights_only=True)
    state["trained_on"] = training_record(("glyphs_train_all",), None)  # an RPN that learnt from novel boxes
    torch.save(state, tmp_path / "start.pth")
    second = Trainer(make_cfg("vild", *settings, "MODEL.WEIGHTS", str(tmp_path / "start.pth")))
    second.resume_or_load(resume=False)
    record = second.checkpointer.trained_on
    assert judge_network({**network, "trained_on": record}, benchmark.novel, benchmark.known)[0] == "LEAK"


def as_file(path, found, provenance=None):
    save_proposals(path, {i: (b, torch.linspace(1, 0.1, len(b))) for i, b in found.items()}, provenance)
    return path


def write_store(folder, teacher, file):
    proposals = load_proposals(file)
    plan = store_plan(teacher, file)
    writer = StoreWriter(folder, plan, sorted(proposals), 16, read_provenance(file))
    for index, _ in writer.missing():
        rows = {i: torch.ones(len(boxes), teacher.width) for i, (boxes, _) in proposals.items()}
        writer.write_shard(index, lambda i, rows=rows: StoredRegions(proposals[i][0], rows[i], proposals[i][1]))
    writer.finish()
    return EmbeddingStore(folder)


def test_a_store_has_seen_what_its_proposals_have(world, benchmark, teacher, tmp_path):
    origins = []
    for name, found, verdict in (
        ("glyphs_train", with_clutter(noisy(benchmark.truth, 1.5)), "clean"),
        ("glyphs_train_all", pasted(benchmark.truth, 10), "LEAK"),
    ):
        (tmp_path / "w.pth").write_bytes(name.encode())
        network = network_record("w.pth", tmp_path / "w.pth", training_record((name,), None))
        origin = {"data_set": "glyphs_train", "pictures": "", "network": network}
        store = write_store(tmp_path / name, teacher, as_file(tmp_path / f"{name}.safetensors", found, origin))
        assert store.provenance == origin
        assert judge_proposals(store.provenance, benchmark.novel, benchmark.known)[0] == verdict
        assert judge_boxes(measure_boxes(store.boxes(), benchmark.truth))[0] == verdict
        for image_id, boxes in store.boxes():
            assert torch.equal(boxes, store[image_id].boxes)
        origins.append(origin)
    for parts, verdict in ((origins[:1] * 2, "clean"), (origins, "LEAK"), ([origins[0], None], "cannot tell")):
        assert judge_proposals({"merged": parts}, benchmark.novel, benchmark.known)[0] == verdict


def test_a_store_begun_without_a_record_goes_on_with_one(tmp_path, teacher):
    folder, plan = tmp_path / "store", {"fingerprint": teacher.fingerprint, "proposals": "p"}
    StoreWriter(folder, plan, [1])
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["provenance"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    writer = StoreWriter(folder, plan, [1], provenance={"data_set": "d"})
    writer.write_shard(0, lambda i: StoredRegions(torch.zeros(0, 4), torch.zeros(0, 64), torch.zeros(0)))
    writer.finish()
    assert EmbeddingStore(folder).provenance == {"data_set": "d"}


@pytest.mark.parametrize(("dataset", "status"), [("glyphs_train", 0), ("glyphs_train_all", 1)])
def test_the_chain_of_the_tools(tool, make_cfg, teacher_folder, tmp_path, monkeypatch, capsys, dataset, status):
    """Network, proposals, store, each by its tool: clean if the network read base names only, else a leak that
    only the records can show (the boxes are its own)."""
    monkeypatch.setattr(Teacher, "encode_regions", lambda self, image, boxes: torch.ones(len(boxes), self.width))
    settings = ("DATASETS.TRAIN", (dataset,), "OUTPUT_DIR", str(tmp_path))
    Trainer(make_cfg("proposals", *settings)).checkpointer.save("model_final")
    weights, proposals, store = (tmp_path / n for n in ("model_final.pth", "p.safetensors", "store"))
    config, data = REPOSITORY / "configs/Glyphs/proposals.yaml", ("--dataset", "glyphs_train")
    overrides = ("--weights", weights, "--opts", "DATALOADER.NUM_WORKERS", 0)
    assert tool("make_proposals.py", "--config-file", config, *data, "--output", proposals, *overrides) == 0
    source = ("--proposals", proposals, "--max-per-image", 2, "--teacher", f"local-dir:{teacher_folder}")
    build = ("build_teacher_store.py", *data, *source, "--num-workers", 0, "--output-dir", store)
    assert tool(*build) == 0
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in store.iterdir()}
    capsys.readouterr()
    assert tool(*build) == 0  # a second time, nothing is written
    assert "\nstore already complete, checksums correct, nothing written: " in capsys.readouterr().out
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in store.iterdir()} == before
    output = tmp_path / "audit.json"
    files = ("--proposals", proposals, "--store", store, "--weights", weights, "--output", output)
    assert tool("audit_leakage.py", *data, "--full", "glyphs_train_all", *files) == status
    found = json.loads(output.read_text())["findings"]
    assert all(f["verdict"] == "clean" for f in found if f["how"] == "measured")
    recorded = [f["verdict"] for f in found if f["how"] == "recorded"]
    assert recorded == [("clean", "LEAK")[status]] * 3


@pytest.mark.parametrize(
    "record",
    [
        {"merged": [3]},
        {"network": {"file": 3}},
        {"network": {"file": "a", "sha": "", "trained_on": {"data_sets": [3], "stores": [], "starts": []}}},
    ],
)
def test_a_record_of_another_form_is_one_line(tmp_path, record):
    path = tmp_path / "p.safetensors"
    save_proposals(path, {1: (torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1))}, record)
    nothing = SimpleNamespace(truth=None, novel_spellings={"sun"}, known_spellings={"sun"})
    with pytest.raises(UserError, match=r"^proposals .*p\.safetensors: its record of training is not one of vild's"):
        list(audit_proposals(path, nothing))
