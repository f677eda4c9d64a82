"""Checkpoints that another writer wrote, and TensorFlow's own, are read bit for bit; damaged ones end in one line."""

import os
import struct

import numpy as np
import pytest

from tests.checkpoint import bundle_writer as writer
from vild.checkpoint.sorted_table import read_table
from vild.checkpoint.tensor_bundle import TensorBundle
from vild.utils.errors import UserError

SEED = np.random.default_rng(0)
ARRAYS = {f"resnet50/conv2d_{n}/kernel": SEED.standard_normal((1, 3, 4, n + 1)).astype(np.float32) for n in range(60)}
ARRAYS |= {"global_step": np.int64(180000), "a": np.zeros((0, 4), np.float32), "ä": np.float64(-0.0)}
ARRAYS |= {f"of/{kind}": SEED.integers(0, 99, 7).astype(kind) for kind in writer.TYPES if kind != "bool"}


def same(found, expected) -> bool:
    found, expected = np.asarray(found), np.asarray(expected)
    kind = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return kind and found.tobytes() == expected.tobytes()


# whole checkpoints


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("compress", [False, True])
def test_what_another_writer_wrote(tmp_path, shards, compress):
    writer.write_bundle(tmp_path / "ckpt", ARRAYS, shards=shards, compress=compress, block_size=500)
    bundle = TensorBundle(tmp_path / "ckpt")
    assert set(bundle) == set(ARRAYS) and len(bundle) == len(ARRAYS) and "none" not in bundle
    assert all(same(bundle[name], ARRAYS[name]) for name in ARRAYS)
    assert bundle["of/int8"].flags.writeable


def test_tensorflow_reads_the_same(tmp_path):
    """The other writer's files are checkpoints indeed, compressed ones too."""
    tensorflow = pytest.importorskip("tensorflow")
    for compress in (False, True):
        writer.write_bundle(tmp_path / "ckpt", ARRAYS, shards=2, compress=compress, block_size=500)
        theirs, bundle = tensorflow.train.load_checkpoint(str(tmp_path / "ckpt")), TensorBundle(tmp_path / "ckpt")
        assert set(theirs.get_variable_to_shape_map()) == set(bundle)
        assert all(same(bundle[name], theirs.get_tensor(name)) for name in bundle)


def test_what_tensorflow_wrote(tmp_path):
    tf = pytest.importorskip("tensorflow")

    def write(prefix, names):
        tf.raw_ops.SaveV2(prefix=f"{tmp_path}/{prefix}", tensor_names=names, shape_and_slices=[""] * len(names),
                          tensors=[tf.constant(ARRAYS[name]) for name in names])  # fmt: skip
        return f"{tmp_path}/{prefix}"

    names = list(ARRAYS)
    parts = [write(f"part{n}", names[n::3]) for n in range(3)]
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=parts, destination_prefix=f"{tmp_path}/merged", delete_old_dirs=False
    )
    write("one", names)
    module = tf.Module()
    module.v = tf.Variable(ARRAYS["resnet50/conv2d_9/kernel"])
    tf.saved_model.save(module, f"{tmp_path}/saved")
    for prefix in ("one", "merged", "saved/variables/variables"):
        theirs = tf.train.load_checkpoint(f"{tmp_path}/{prefix}")
        bundle = TensorBundle(tmp_path / prefix)
        assert set(bundle) == set(theirs.get_variable_to_shape_map())
        for name in set(bundle) - {"_CHECKPOINTABLE_OBJECT_GRAPH"}:
            assert same(bundle[name], theirs.get_tensor(name))
    with pytest.raises(UserError, match="its type is string"):
        bundle["_CHECKPOINTABLE_OBJECT_GRAPH"]
    x = tf.constant(np.eye(4, dtype=np.float32))
    parts = {"tensor_names": ["v", "v", "w"], "shape_and_slices": ["4 4 0,2:-", "4 4 2,2:-", ""]}
    tf.raw_ops.SaveV2(prefix=f"{tmp_path}/sliced", **parts, tensors=[x[:2], x[2:], x])
    bundle = TensorBundle(tmp_path / "sliced")
    assert set(bundle) == {"v", "w"} and same(bundle["w"], x)
    with pytest.raises(UserError, match="the variable 'v' cannot be read .*partitioned into slices"):
        bundle["v"]


# damaged and hostile ones


def error_of(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def error_of_index(folder, content: bytes) -> str:
    (folder / "ckpt.index").write_bytes(content)
    message = error_of(lambda: TensorBundle(folder / "ckpt"))
    assert f"{folder / 'ckpt.index'}: not the index of a TensorFlow checkpoint (" in message
    return message


@pytest.mark.parametrize("compress", [False, True])
def test_no_flipped_bit_and_no_cut_changes_what_an_index_says(tmp_path, compress):
    content = writer.index_of({b"": writer.header(1), b"a": writer.entry(1, (2,), 0, 0, 8, 7)}, compress)
    (tmp_path / "ckpt.index").write_bytes(content)
    expected = TensorBundle(tmp_path / "ckpt").entries
    for bit in range(0, 8 * len(content), 7):  # each byte, and each bit of a byte in turn
        broken = bytearray(content)
        broken[bit // 8] ^= 1 << bit % 8
        (tmp_path / "ckpt.index").write_bytes(broken)
        try:
            assert TensorBundle(tmp_path / "ckpt").entries == expected
            assert bit // 8 >= content[-48]  # the footer begins with the place of what nobody reads, behind the entries
        except UserError as error:
            assert len(str(error).splitlines()) == 1
    for length in range(0, len(content), 3):
        error_of_index(tmp_path, content[:length])


def table_of(*entries: tuple[bytes, bytes], **options) -> bytes:
    return writer.table([(entries[-1][0], writer.block(list(entries), **options))])


HEADER, ENTRY = (b"", writer.header(1)), writer.entry(1, (2,), 0, 0, 8, 7)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "magic number"),
        (b"x" * 100, "magic number"),
        (table_of((b"a", ENTRY)), "its header is missing"),
        (table_of((b"", writer.field(1, 0))), "gives no number of shards"),
        (table_of((b"", writer.field(1, 10**9))), "gives no number of shards"),
        (table_of((b"", writer.header(1) + writer.field(2, 1))), "big-endian"),
        (table_of((b"", writer.field(1, 1) + writer.field(3, writer.field(2, 2)))), "a reader of version 2, not 1"),
        (table_of(HEADER, (b"b", ENTRY), (b"a", ENTRY)), "keys are not in order"),
        (table_of(HEADER, (b"a", ENTRY), (b"a", ENTRY)), "keys are not in order"),
        (table_of(HEADER, (b"\xff", ENTRY)), "UnicodeDecodeError"),
        (table_of(HEADER, (b"a", ENTRY[:-1])), "4 bytes are expected where 3 are left"),
        (table_of(HEADER, (b"a", writer.field(6, 7))), "field 6 of a message has wire type 0, not 5"),
        (table_of(HEADER, (b"a", b"\x0b")), "a message has wire type 3"),
        (table_of(HEADER, (b"a", b"\x12\xff\x01")), "255 bytes are expected where 0 are left"),
        (table_of(HEADER, (b"a", writer.entry(1, (1,) * 33, 0, 0, 4, 7))), "a variable has 33 dimensions"),
        (writer.table([], b"\1\0\0\0"), "a block is too short"),
        (writer.table([], b"\xff\xff\xff\xff"), "a block is too short"),
        (writer.table([], b""), "a block is too short"),
        (writer.table([], writer.block([(b"a", b"\xff\x7f\x01")])), "a block lies beyond its end"),
        (writer.table([(b"a", b"\x05\x01\x01ab" + struct.pack("<2I", 0, 1))]), "shares more bytes than the key before"),
        (writer.table([(b"a", b"\x00\x7f\x01ab" + struct.pack("<2I", 0, 1))]), "127 bytes are expected where 2"),
        # 80,000 entries with a key of four bytes and no value
        (table_of(*((struct.pack(">I", n), b"") for n in range(80_000))), "content has more than 4,194,304 bytes"),
        # keys that share all but the last two of 4,000 bytes
        (table_of(*((b"k" * 4000 + struct.pack(">H", n), b"") for n in range(2000)), interval=10**6), "has more than"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_index_that_is_none(tmp_path, content, reason):
    assert reason in error_of_index(tmp_path, content)


def test_an_index_of_unknown_compression(tmp_path):
    content = bytearray(table_of(HEADER))
    end = content[-48] - 5  # of the first block, before its compression and its checksum
    content[end] = 2
    content[end + 1 : end + 5] = struct.pack("<I", writer.masked(content[: end + 1]))
    assert "the block at byte 0 has compression 2, not none or Snappy" in error_of_index(tmp_path, bytes(content))


def test_blocks_that_are_named_again_and_again_are_not_unpacked_again_and_again():
    zeros = writer.block([(b"", bytes(100_000))])
    content = writer.table([(b"", zeros)], compress=True)
    handle = b"\0" + writer.varint(content.index(struct.pack("<I", writer.masked(writer.snap(zeros) + b"\1"))) - 1)
    many = writer.block([(struct.pack(">I", n), handle) for n in range(10_000)])
    content = writer.table([(b"", zeros)], many, compress=True)
    with pytest.raises(ValueError, match="keys are not in order"):
        list(read_table(content))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": 4}, "its 4 bytes cannot be float32 of shape [2]"),
        ({"shape": (2**62, 2**62)}, "its 8 bytes cannot be float32 of shape"),
        ({"shape": (-1,)}, "its 8 bytes cannot be float32 of shape"),
        ({"shape": (0, 2**63), "size": 0}, "Error"),
        ({"offset": 1}, "it ends at byte 9, the file at 8"),
        ({"offset": -1}, "the file at 8"),
        ({"offset": 2**64 - 8}, "the file at 8"),
        ({"shard": 1}, "the checkpoint has 1 shards"),
        ({"shard": -1}, "the checkpoint has 1 shards"),
        ({"checksum": 7}, "its checksum is wrong"),
        ({"kind": 7}, "its type is string"),
        ({"kind": 10}, "its type is bool"),
        ({"kind": 14}, "its type is bfloat16"),
        ({"kind": 99}, "its type is number 99"),
        ({"kind": 0}, "its type is number 0"),
        ({"kind": -1}, "its type is number 18446744073709551615"),
    ],
)
def test_an_entry_that_does_not_fit(tmp_path, changes, reason):
    data = struct.pack("<2f", 1, 2)
    (tmp_path / "ckpt.data-00000-of-00001").write_bytes(data)
    right = {"kind": 1, "shape": (2,), "shard": 0, "offset": 0, "size": 8, "checksum": writer.masked(data)}
    (tmp_path / "ckpt.index").write_bytes(table_of(HEADER, (b"v", writer.entry(**right))))
    assert TensorBundle(tmp_path / "ckpt")["v"].tolist() == [1, 2]
    (tmp_path / "ckpt.index").write_bytes(table_of(HEADER, (b"v", writer.entry(**{**right, **changes}))))
    message = error_of(lambda: TensorBundle(tmp_path / "ckpt")["v"])
    assert "the variable 'v' cannot be read" in message and reason in message


def test_data_that_are_damaged_missing_or_no_file(tmp_path):
    path = tmp_path / "ckpt.data-00000-of-00001"
    writer.write_bundle(tmp_path / "ckpt", {"v": np.arange(3, dtype=np.float32)})
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        assert "its checksum is wrong" in error_of(lambda: TensorBundle(tmp_path / "ckpt")["v"])
    path.write_bytes(data[:-1])
    assert "it ends at byte 12, the file at 11" in error_of(lambda: TensorBundle(tmp_path / "ckpt")["v"])
    path.unlink()
    assert "No such file" in error_of(lambda: TensorBundle(tmp_path / "ckpt")["v"])
    assert "v" in TensorBundle(tmp_path / "ckpt")
    os.mkfifo(path)
    assert "not a regular file" in error_of(lambda: TensorBundle(tmp_path / "ckpt")["v"])


def test_an_index_that_is_missing_or_no_file_or_too_large(tmp_path):
    assert "No such file" in error_of(lambda: TensorBundle(tmp_path / "ckpt"))
    os.mkfifo(tmp_path / "ckpt.index")
    assert "not a regular file" in error_of(lambda: TensorBundle(tmp_path / "ckpt"))
    (tmp_path / "ckpt.index").unlink()
    with open(tmp_path / "ckpt.index", "wb") as file:
        file.truncate(1 << 40)
    assert "more than 4,194,304 bytes" in error_of(lambda: TensorBundle(tmp_path / "ckpt"))
