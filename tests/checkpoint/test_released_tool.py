"""tools/convert_tf_checkpoint.py: what it writes, says and refuses."""

import filecmp
import logging
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest

from tests.checkpoint import released_checkpoint as reference
from tests.checkpoint.bundle_writer import write_bundle
from tests.conftest import REPOSITORY
from vild.checkpoint.checkpointer import read_network_record
from vild.checkpoint.crc32c import masked_crc32c
from vild.checkpoint.released import Released, compare_text, convert, find_prefix, summary
from vild.utils.errors import UserError
from vild.vocabulary.vocabulary import Vocabulary

pytestmark = pytest.mark.slow
spec = spec_from_file_location("convert_tf_checkpoint", REPOSITORY / "tools/convert_tf_checkpoint.py")
convert_tf_checkpoint = module_from_spec(spec)
spec.loader.exec_module(convert_tf_checkpoint)


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert_tf_checkpoint.py", *map(str, arguments)])
    return convert_tf_checkpoint.main()


def write_checkpoint(folder, arrays):
    write_bundle(folder / "model.ckpt-180000", arrays, checksum=masked_crc32c)
    return folder


@pytest.fixture(scope="module")
def checkpoint(released_arrays, tmp_path_factory):
    """The files of a checkpoint after training, with what they hold besides the detector."""
    slots = {f"{name}/Momentum": released_arrays[name] for name in ("fpn/l2/bias", "fpn/p2-bn/gamma")}
    rest = {"global_step": np.int64(180000), "loss_scale": np.float32(1), "rare/counter": np.int64(7)}
    return write_checkpoint(tmp_path_factory.mktemp("ckpt"), {**released_arrays, **slots, **rest})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_tool(checkpoint, tmp_path, monkeypatch, capsys, released_weights, suffix):
    output = tmp_path / f"out/model{suffix}"
    run_tool(monkeypatch, checkpoint, "--output", output)
    said = capsys.readouterr().out
    assert said == f"ensemble, ResNet-50, 1,203 names, for configs/LVIS/released/ensemble_R50.yaml: {output}\n"
    assert Vocabulary.load(output).names == Vocabulary.load(released_weights).names
    assert read_network_record(str(output))["trained_on"] is None
    if suffix == ".safetensors":
        assert output.read_bytes() == released_weights.read_bytes()


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


def test_the_published_text_matrix_is_compared(released_arrays, released_weights, tmp_path, monkeypatch, capsys):
    text, vocabulary = released_arrays[f"{reference.HEAD}/class-predict/kernel"], Vocabulary.load(released_weights)
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
