"""Measure whether a training set or a vocabulary leaks novel annotations, by comparison with the full annotations of
the same images and with the teacher.

(Proposals: ``vild.audit.pasted_boxes``. The other kind of evidence is recorded: ``vild.data.provenance``.)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from vild.audit.pasted_boxes import EXACT, ImageTruth, measure_boxes, truth_by_image, xyxy
from vild.data import datasets
from vild.data.provenance import CLEAN, LEAK, UNKNOWN
from vild.utils.errors import UserError
from vild.vocabulary.prompts import clean_name
from vild.vocabulary.vocabulary import Vocabulary

SAME_TEXT = 0.99  # cosine; the same text gives 1 up to the teacher's numerical precision


def find_entry(source: str, split: str = "") -> datasets.Entry:
    """The entry of a data set or annotation file. ``split`` replaces the data set's own; a file requires one."""
    if source in datasets.entries() or not Path(source).is_file():
        entry = datasets.get_entry(source)
        return replace(entry, split=split) if split else entry
    if not split:
        raise UserError(f"{source} is a file, not the name of a data set: --split is required")
    return datasets.Entry(str(Path(source).resolve()), "", split)


@dataclass(frozen=True)
class Benchmark:
    """What a training must not have seen.

    Attributes:
        base, novel: class names.
        known: names of all categories, including those that are neither.
        truth: all annotated boxes by image; None without a full annotation file.
    """

    base: frozenset[str]
    novel: frozenset[str]
    known: frozenset[str]
    truth: dict[int, ImageTruth] | None

    @classmethod
    def read(cls, training: str, split: str, full: str | None) -> Benchmark:
        """Read data sets or annotation files. ``split`` defines base and novel ("": that of ``training``)."""
        source = full or training
        entry = find_entry(source, split or find_entry(training).split)
        classes = datasets.get_classes(source, entry)
        if "novel" not in classes.splits:
            raise UserError(f"split '{entry.split}' marks no class of {source} as novel: --split is required")
        document = datasets.read_annotations(source, entry)
        base, novel = (
            frozenset(n for n, s in zip(classes.names, classes.splits, strict=True) if s == mark)
            for mark in ("base", "novel")
        )
        truth = truth_by_image(document, classes) if full else None
        return cls(base, novel, frozenset(c["name"] for c in document["categories"]), truth)


@dataclass(frozen=True)
class TrainingSet:
    """What a training reads.

    Attributes:
        where: description of the source.
        handed: (class name, box xywh) of each annotation passed to training, by image.
        novel_in_file: (id, class name) of all novel annotations in the file, passed to training or not.
    """

    where: str
    handed: dict[int, list[tuple[str, list[float]]]]
    novel_in_file: list[tuple[int, str]]

    @classmethod
    def read(cls, source: str, split: str, novel: Collection[str]) -> TrainingSet:
        """A data set as vild's loader reads it, or a file, which counts as read completely."""
        registered = source in datasets.entries()
        entry = find_entry(source, "" if registered else split)
        document = datasets.read_annotations(source, entry)
        names = {c["id"]: c["name"] for c in document["categories"]}
        held = [(a["id"], names[a["category_id"]]) for a in document["annotations"] if names[a["category_id"]] in novel]
        if registered:
            names, records = datasets.get_classes(source).names, datasets.load_dicts(source)
            handed = {r["image_id"]: [(names[a["category_id"]], a["bbox"]) for a in r["annotations"]] for r in records}
            return cls(f"{entry.json} (split {entry.split}, keep {entry.keep})", handed, held)
        handed = {i["id"]: [] for i in document["images"]}
        for a in document["annotations"]:
            handed[a["image_id"]].append((names[a["category_id"]], a["bbox"]))
        return cls(entry.json, handed, held)


def judge_training_set(training: TrainingSet, benchmark: Benchmark) -> tuple[str, str]:
    """Verdict and evidence: do annotations of novel classes, or their boxes under other names, reach training?"""
    novel, truth = benchmark.novel, benchmark.truth
    handed, in_file = training.handed, training.novel_in_file
    evidence = f"{training.where} has {len(in_file)} annotations of novel names"
    through = [name for rows in handed.values() for name, _ in rows if name in novel]
    if in_file:
        evidence += f" (first: id {in_file[0][0]}, '{in_file[0][1]}')"
    evidence += f"; {len(through)} of them reach training, with {sum(map(len, handed.values())) - len(through)} others"
    hidden = 0
    if truth is not None:
        boxes = {i: xyxy([b for n, b in rows if n not in novel]) for i, rows in handed.items()}
        measured = measure_boxes(boxes.items(), truth, edges=True)
        hidden = int((measured.novel.distance <= EXACT).sum())
        empty = [i for i, b in boxes.items() if len(b) == 0]
        only = sum(len(truth[i].novel) > 0 for i in empty if i in truth)
        evidence += (
            f"; {hidden} boxes are of novel objects under other names; {len(empty)} of its {len(handed)} images have "
            f"no base annotation, {only} of them a novel object (DATALOADER.FILTER_EMPTY_ANNOTATIONS drops both)"
        )
    return (LEAK if through or hidden else CLEAN), evidence


def judge_vocabulary(vocabulary: Vocabulary, expected: dict[str, Tensor], benchmark: Benchmark) -> tuple[str, str]:
    """Verdict and evidence on a vocabulary: are its novel embeddings the teacher's embeddings of those names?

    A vocabulary may have novel names, but not embeddings learned from images of novel classes. If the base embeddings
    differ from the teacher's, too, other or learned prompts were used and the verdict is unknown.

    Args:
        expected: the teacher's embeddings [C, D] of the vocabulary's names, by prompt set.
    """
    best, agree = max(
        ((p, (vocabulary.embeddings * e).sum(1)) for p, e in expected.items()), key=lambda pair: float(pair[1].median())
    )
    cosines = {}
    for mark, names in (("novel", benchmark.novel), ("base", benchmark.base)):
        names = {clean_name(n) for n in names}
        rows = zip(vocabulary.names, agree.tolist(), strict=True)
        cosines[mark] = {name: cosine for name, cosine in rows if clean_name(name) in names}
    wrong = {mark: [n for n, c in row.items() if c < SAME_TEXT] for mark, row in cosines.items()}
    evidence = f"not the teacher's embeddings of their names (prompts '{best}', cosine < {SAME_TEXT}): " + ", ".join(
        f"{len(wrong[mark])} of {len(row)} {mark}"
        + (f" (lowest {min(row.values()):.3f}, '{min(row, key=row.get)}')" if row else "")
        for mark, row in cosines.items()
    )
    if not wrong["novel"]:
        return CLEAN, evidence
    if len(wrong["base"]) > len(cosines["base"]) / 2 or not cosines["base"]:
        return UNKNOWN, f"{evidence}: made with other or learned prompts"
    return LEAK, evidence
