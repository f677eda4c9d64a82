"""Files of strangers, read within bounds: nothing in them is run, and what cannot be is told in one line.

Readers of a kind of file (vocabularies, stores, configs ...) call these and check what they got; SECURITY.md says what
is trusted. Only records a user asked for by their number (annotations, proposals) may be as long as they are.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import yaml
from safetensors import safe_open

from vild.utils.errors import UserError

MOST_JSON = 1 << 24  # bytes of JSON in a manifest, a header, a list of words; 20,000 names take some 2 MB
MOST_DATA = 1 << 34  # of annotations and results; Objects365's training file has 6 GB
MOST_YAML = 1 << 18
MOST_VALUES = 100_000  # of a YAML file
DEEPEST_BASE = 10  # configs that stand on one another


@contextmanager
def refused_as(sentence: str) -> Iterator[None]:
    """Whatever fails in the block is told as ``sentence`` and the reason: a broken file can fail anywhere in a parser,
    with any exception, or ask for more memory than there is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        raise UserError(f"{sentence} ({reason[:300]})") from error


def read_bytes(path: str | Path, most: int = MOST_JSON) -> bytes:
    """A regular file's bytes; ValueError for more than ``most``, or for a device or pipe, which might not end."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    if path.stat().st_size > most:
        raise ValueError(f"more than {most:,} bytes")
    return path.read_bytes()


def parse_json(text: str | bytes) -> object:
    """JSON; ValueError also where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


class _PlainLoader(yaml.SafeLoader):
    """Plain values. No ``<<``, which copies what an alias stands for, and copies the copies; and no key twice, of which
    the first would be lost without a word."""

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key '{key}' stands there twice")
            seen.add(key)
        return mapping

    def flatten_mapping(self, node):
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("'<<' is not read; write the values out")
        super().flatten_mapping(node)


def count_values(value: object, known: dict[int, int] | None = None) -> int:
    """How many values a document stands for, written out: ten lines of aliases can be more than a memory holds.
    ValueError for one that is inside itself."""
    known = {} if known is None else known
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = 0  # until it is counted
        inside = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(count_values(v, known) for v in inside)
    if not known[id(value)]:
        raise ValueError("an alias inside of what it stands for")
    return known[id(value)]


def read_yaml(path: str | Path, what: str) -> dict:
    """A YAML mapping of plain values.

    Raises:
        UserError: it cannot be read, is no mapping, or holds a tag that would run code (``!!python``).
    """
    with refused_as(f"{what} {path}: cannot be read"):
        text = read_bytes(path, MOST_YAML).decode()
    with refused_as(f"{what} {path}: not YAML of plain values"):
        document = yaml.load(text, _PlainLoader)
        if (count := count_values(document)) > MOST_VALUES:
            raise ValueError(f"its aliases stand for {count:.1e} values, more than {MOST_VALUES:,}")
    if not isinstance(document, dict):
        raise UserError(f"{what} {path}: holds {type(document).__name__}, not keys and values")
    return document


def check_config(path: str | Path, above: tuple[Path, ...] = ()) -> None:
    """UserError unless a config and those of ``_BASE_`` below it are YAML of plain values, here on this machine.

    Detectron2 reads a config by ``yaml.unsafe_load`` where ``safe_load`` refuses it.
    """
    path = Path(path)
    document = read_yaml(path, "config")
    if len(above) >= DEEPEST_BASE or path.resolve() in above:
        raise UserError(f"config {path}: _BASE_: more than {DEEPEST_BASE} configs stand on one another, or in a ring")
    bases = document.get("_BASE_", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base or "://" in base:
            raise UserError(f"config {path}: _BASE_: {base} is not a file's name")
        check_config(path.parent / Path(base).expanduser(), (*above, path.resolve()))


@contextmanager
def open_tensors(path: str | Path, framework: str = "pt") -> Iterator:
    """``safetensors.safe_open`` of a file whose header is at most MOST_JSON long (the library allows 100 MB, which is
    some GB of Python objects). ValueError for a longer one."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MOST_JSON:
        raise ValueError(f"a header of {length:,} bytes, more than {MOST_JSON:,}")
    with safe_open(path, framework) as file:
        yield file


class _ArraysOnly(pickle._Unpickler):
    """Knows what NumPy's arrays and numbers are made of, which is all that Detectron2's model zoo holds.

    Python's own unpickler, not the faster one in C, which makes a memo as long as the highest number in a file: nine
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
    """A pickle of a dict of NumPy arrays, as Detectron2's model zoo has them; nothing else of it is run."""
    with open(path, "rb") as file:
        content = _ArraysOnly(file, encoding="latin1").load()
    if not isinstance(content, dict):
        raise ValueError(f"holds {type(content).__name__}, not weights by name")
    return content
