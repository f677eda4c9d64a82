"""Safe readers for untrusted files: size limits, no code execution, one-line errors.

The readers of each format (vocabularies, stores, configs ...) build on these and check the content; SECURITY.md says
what is trusted. Only annotations and results, which users name on the command line, may be very large.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import yaml

from vild.utils.errors import UserError

MOST_JSON = 1 << 24  # bytes of JSON in a manifest, a header, a list of words; 20,000 names take about 2 MB
MOST_DATA = 1 << 34  # bytes of annotations and results; Objects365's training file has 6 GB
MOST_YAML = 1 << 18  # bytes
MOST_VALUES = 100_000  # in a YAML file
DEEPEST_BASE = 10  # length of a chain of _BASE_ configs


class WrongFile(ValueError):
    """A file that was saved in place of another; the message says what it is."""


def what_it_is(head: bytes) -> str:
    """What a file is that cannot be read, by its first bytes: "" unless it is one that is often saved in place of
    another."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: run git lfs pull"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "it is a web page (HTML or XML), not the file itself: download it again"
    if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1"):
        return "it is a HEIC image, which is not supported: convert it to JPEG"
    return ""


def refuse_wrong_file(path: str | Path) -> None:
    """WrongFile for a file that was saved in place of another."""
    with open(path, "rb") as file:
        if what := what_it_is(file.read(512)):
            raise WrongFile(what)


@contextmanager
def refused_as(sentence: str) -> Iterator[None]:
    """Turn any exception in the block into a UserError of ``sentence`` and the reason: a broken file can raise
    anything in a parser, MemoryError included."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        reason = str(error) if isinstance(error, WrongFile) else reason
        raise UserError(f"{sentence} ({reason[:300]})") from error


def read_bytes(path: str | Path, most: int = MOST_JSON) -> bytes:
    """Read a regular file; ValueError if it is larger than ``most`` bytes, a device or pipe, which may not end, or was
    saved in place of another (:func:`what_it_is`)."""
    content = read_any_bytes(path, most)
    if what := what_it_is(content[:512]):
        raise WrongFile(what)
    return content


def read_any_bytes(path: str | Path, most: int = MOST_JSON) -> bytes:
    """As :func:`read_bytes`, but whatever the file is: XML, too."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    if path.stat().st_size > most:
        raise ValueError(f"more than {most:,} bytes")
    return path.read_bytes()


def parse_json(text: str | bytes) -> object:
    """Parse JSON; ValueError also if it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that also rejects ``<<``, which copies the content of aliases recursively, and duplicate keys, of
    which YAML would silently drop the first."""

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: duplicate key '{key}'")
            seen.add(key)
        return mapping

    def flatten_mapping(self, node):
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merge keys ('<<') are not supported; write the values out")
        super().flatten_mapping(node)


def count_values(value: object, known: dict[int, int] | None = None) -> int:
    """Number of values in a document with its aliases expanded: ten lines of aliases can exceed any memory. ValueError
    if an alias contains itself."""
    known = {} if known is None else known
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = 0  # while it is being counted
        inside = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(count_values(v, known) for v in inside)
    if not known[id(value)]:
        raise ValueError("an alias contains itself")
    return known[id(value)]


def parse_yaml(text: str) -> object:
    """Parse YAML of plain values; ValueError or yaml.YAMLError for anything else, or more than MOST_YAML characters."""
    if len(text) > MOST_YAML:
        raise ValueError(f"more than {MOST_YAML:,} characters")
    document = yaml.load(text, _PlainLoader)
    if (count := count_values(document)) > MOST_VALUES:
        raise ValueError(f"its aliases expand to {count:.1e} values, more than {MOST_VALUES:,}")
    return document


def read_yaml(path: str | Path, what: str) -> dict:
    """Read a YAML mapping of plain values. ``what``: the kind of file, for messages.

    Raises:
        UserError: unreadable, not a mapping, or a tag that would run code (``!!python``).
    """
    with refused_as(f"{what} {path}: cannot be read"):
        text = read_bytes(path, MOST_YAML).decode()
    with refused_as(f"{what} {path}: not YAML of plain values"):
        document = parse_yaml(text)
    if not isinstance(document, dict):
        raise UserError(f"{what} {path}: contains {type(document).__name__}, not keys and values")
    return document


def check_config(path: str | Path, above: tuple[Path, ...] = ()) -> None:
    """UserError unless a config and its ``_BASE_`` configs are local files of plain YAML.

    (Detectron2 falls back to ``yaml.unsafe_load`` for configs that ``safe_load`` rejects.)
    """
    path = Path(path)
    document = read_yaml(path, "config")
    if len(above) >= DEEPEST_BASE or path.resolve() in above:
        raise UserError(f"config {path}: _BASE_: a cycle, or a chain of more than {DEEPEST_BASE} configs")
    bases = document.get("_BASE_", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base or "://" in base:
            raise UserError(f"config {path}: _BASE_: {base} is not a file name")
        check_config(path.parent / Path(base).expanduser(), (*above, path.resolve()))


@contextmanager
def open_tensors(path: str | Path, framework: str = "pt") -> Iterator:
    """``safetensors.safe_open`` with a limit of MOST_JSON bytes on the header (the library's own, 100 MB, can become
    several GB of Python objects). ValueError for a longer header."""
    from safetensors import safe_open  # loads torch

    refuse_wrong_file(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_JSON:
        raise ValueError(f"a header of {length:,} bytes, more than {MOST_JSON:,}")
    with safe_open(path, framework) as file:
        yield file


class _ArraysOnly(pickle._Unpickler):
    """Unpickles NumPy arrays and numbers only, which is all that Detectron2's model zoo uses.

    Based on the unpickler in Python: the one in C allocates a memo as long as the highest index in a file, so nine
    bytes can ask for 32 GB.
    """

    KNOWN: ClassVar = {
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("collections", "OrderedDict"),
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it would run {module}.{name}")
        return super().find_class(module, name)


def load_arrays(path: str | Path) -> dict:
    """Load a pickled dict of NumPy arrays (Detectron2's model zoo) without running any other code."""
    with open(path, "rb") as file:
        content = _ArraysOnly(file, encoding="latin1").load()
    if not isinstance(content, dict):
        raise ValueError(f"contains {type(content).__name__}, not a dict of weights")
    return content
