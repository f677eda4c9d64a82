"""Valid files become broken ones: bytes flipped, cut, inserted; JSON values replaced by what nobody writes."""

from __future__ import annotations

import json
import struct

from hypothesis import strategies as st

from tests.checkpoint.bundle_writer import masked

DEEP, LONG_INT = "@deep@", "@int@"  # what json.dumps cannot write, put into its text afterwards
HOSTILE = [
    None, True, False, 0, -1, 1, 7, 0.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), 2**31, 2**63 - 1, -(2**63),
    1.0, 3.0, 8.0, 80.0, 2**53 + 1, "a\\8.jpg", [[1, 1, 9, 9]],
    2**64, 10**40, LONG_INT, DEEP, "", "a", "1", "base", "\ud800", "a\nb", "\x1b[2J\x07", "\0", "../../etc/passwd",
    "/etc/passwd", "shard-00001.safetensors", "http://127.0.0.1:1/a", "!!python/name:os.system", "x" * 5000, [], [[]],
    {}, {"a": 1}, [0, 0], [1, 2, 3, 4], [None], ["a", "a"], [1e308] * 4, [[0, 1, "2"]], {"size": [4, 4], "counts": "o"},
]  # fmt: skip

IN_PLACE = (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n", b"<!DOCTYPE html><html></html>")


def places(document, found=None) -> list[tuple]:
    """(container, key) of every value inside a JSON document."""
    found = [] if found is None else found
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(items):
        found.append((document, key))
        if isinstance(value, dict | list):
            places(value, found)
    return found


@st.composite
def changed_json(draw, text: str) -> str:
    """A JSON text with up to three values replaced, dropped, doubled or joined by another."""
    document = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        where = places(document)
        if not where:
            break
        container, key = where[draw(st.integers(0, len(where) - 1))]
        what = draw(st.sampled_from(("replace", "replace", "replace", "drop", "double", "add")))
        if what == "replace":
            container[key] = draw(st.sampled_from(HOSTILE))
        elif what == "drop":
            del container[key]
        elif what == "double" and isinstance(container, list):
            container.append(container[key])
        elif isinstance(container, list):
            container.insert(key, draw(st.sampled_from(HOSTILE)))
        else:
            container[draw(st.sampled_from(("id", "file", "", "\ud800")))] = draw(st.sampled_from(HOSTILE))
        document = json.loads(json.dumps(document))  # containers are not shared
    text = json.dumps(document)
    return text.replace(f'"{LONG_INT}"', "9" * 5000).replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000)


@st.composite
def changed_bytes(draw, content: bytes) -> bytes:
    """Up to four places changed."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(made)))
        what = draw(st.sampled_from(("flip", "set", "cut", "drop", "insert", "repeat")))
        if what == "flip" and at < len(made):
            made[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "set":
            put = draw(st.sampled_from((b"\0" * 8, b"\xff" * 8, b"\x7f", b"\xff\xff\xff\x7f", b"9", b"-", b'"', b"\n")))
            made[at : at + len(put)] = put
        elif what == "cut":
            del made[at:]
        elif what == "drop":
            del made[at : at + draw(st.integers(1, 64))]
        elif what == "insert":
            made[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:
            made[at:at] = made[at : at + 64]
    return bytes(made)


@st.composite
def changed_safetensors(draw, content: bytes) -> bytes:
    """The JSON header changed, or the JSON inside its metadata, and the length in front made to fit."""
    length = struct.unpack("<Q", content[:8])[0]
    header, rest = content[8 : 8 + length].decode(), content[8 + length :]
    metadata = json.loads(header).get("__metadata__", {})
    if metadata and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(metadata)))
        document = json.loads(header)
        document["__metadata__"][key] = draw(changed_json(metadata[key]))
        header = json.dumps(document)
    else:
        header = draw(changed_json(header))
    return struct.pack("<Q", len(header.encode())) + header.encode() + rest


@st.composite
def changed_index(draw, content: bytes) -> bytes:
    """The first block of a TensorFlow checkpoint's index changed, or its compression, with a checksum that fits."""
    size = content[-48] - 5  # the footer begins with the place behind that block
    block = draw(changed_bytes(content[:size]))[:size].ljust(size, b"\0")
    block += draw(st.sampled_from((content[size : size + 1],) * 3 + (b"\0", b"\1", b"\2")))
    return block + struct.pack("<I", masked(block)) + content[size + 5 :]


def broken(name: str, content: bytes) -> st.SearchStrategy[bytes]:
    """What may become of a file: its structure changed where it has one, its bytes changed, or anything at all."""
    kinds = [changed_bytes(content), st.binary(max_size=200), st.sampled_from(IN_PLACE)]
    if name.endswith((".json", ".jsonl")):
        kinds.append(st.sampled_from((content * 2, b"\xef\xbb\xbf" + content, content + b"\n" + content)))
    if name.endswith(".json"):
        kinds[:0] = [changed_json(content.decode()).map(lambda t: t.encode("utf-8", "surrogatepass"))] * 2
    elif name.endswith(".safetensors"):
        kinds[:0] = [changed_safetensors(content)] * 2
    elif name.endswith(".index"):
        kinds[:0] = [changed_index(content)] * 4
    return st.one_of(*kinds)
