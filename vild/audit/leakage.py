"""Measure whether a training set or a vocabulary leaks novel annotations, by comparison with the full annotations of
the same images and with the teacher.

Images are the same by file name and size, classes by normalised name or synonym. What cannot be compared is never
clean.

(Proposals: ``vild.audit.pasted_boxes``. The other kind of evidence is recorded: ``vild.data.provenance``.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

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
        novel_spellings: normalised names of the novel classes, and those of their synonyms that mean no other class.
        known_spellings: normalised names and synonyms of all categories.
        truth: all annotated boxes, by the training set's ids of the images; None without a full annotation file.
        unmatched: what is missing where an image of the training set is not in ``truth``.
    """

    base: frozenset[str]
    novel: frozenset[str]
    known: frozenset[str]
    novel_spellings: frozenset[str]
    known_spellings: frozenset[str]
    truth: dict[int, ImageTruth] | None
    unmatched: str = ""

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
        known = {c["name"]: c.get("synonyms", []) for c in document["categories"]}
        novel_names, names = {clean_name(n) for n in novel}, {clean_name(n) for n in known}
        of_novel = {clean_name(s) for n in novel for s in known.get(n, ())}
        of_others = {clean_name(s) for n in known if n not in novel for s in known[n]}
        spellings = frozenset(novel_names | (of_novel - of_others - names))
        everything = frozenset(names | of_novel | of_others)
        truth, unmatched = None, ""
        if full:
            images = datasets.read_annotations(training, find_entry(training, split))["images"]
            same, unmatched = match_images(images, document["images"])
            truth = truth_by_image(document, classes)
            if not any(len(boxes.novel) for boxes in truth.values()):
                raise UserError(f"--full {full}: it has no box of a novel class to compare with")
            alike = same and all(mine == theirs for mine, theirs in same.items())
            rest = set(truth) - {i["id"] for i in images} if alike else ()  # of proposals for more images
            truth = {mine: truth[theirs] for mine, theirs in same.items()} | {i: truth[i] for i in rest}
        return cls(base, novel, frozenset(known), spellings, everything, truth, unmatched)

    def is_novel(self, name: str, synonyms: Sequence[str] = ()) -> bool:
        """Whether a category of another file is one of the novel classes: by name, else by synonym."""
        novel = {clean_name(n) for n in self.novel}
        if clean_name(name) in {clean_name(n) for n in self.known} - novel:
            return False
        return clean_name(name) in self.novel_spellings or bool({clean_name(s) for s in synonyms} & novel)


def match_images(images: Sequence[dict], full: Sequence[dict]) -> tuple[dict[int, int], str]:
    """The images of two annotation files that are the same, {id: id in ``full``}, and what is missing for the others.

    They have the same file name, folder and suffix apart, and the same size. (Ids alone do not tell: a re-export counts
    them anew.) Of several, the one with the same id or the same folder.
    """
    by_file: dict[tuple, list[dict]] = {}
    for image in full:
        by_file.setdefault(_file_key(image), []).append(image)
    same, others = {}, []
    for image in images:
        found = by_file.get(_file_key(image), [])
        if len(found) > 1:
            found = [f for f in found if f["id"] == image["id"]] or [f for f in found if _file(f) == _file(image)]
        if len(found) == 1:
            same[image["id"]] = found[0]["id"]
        else:
            others.append(image)
    ids, names = {i["id"] for i in full}, {key[0] for key in by_file}
    with_id, with_name = sum(i["id"] in ids for i in others), sum(_file_key(i)[0] in names for i in others)
    return same, (
        f"{len(others)} of {len(images)} images have no counterpart of the same file name and size among the full "
        f"annotations' {len(full)} ({with_id} share only an id with one, {with_name} only a file name)"
    )


def _file(image: dict) -> str:
    return image.get("coco_url") or image["file_name"]


def _file_key(image: dict) -> tuple[str, int, int]:
    stem = PurePosixPath(_file(image).replace("\\", "/")).stem.lower()
    return re.sub(r"^coco_(train|val|test)\d{4}_", "", stem), image["height"], image["width"]


@dataclass(frozen=True)
class TrainingSet:
    """What a training reads.

    Attributes:
        where: description of the source.
        handed: (class name, box xywh) of each annotation passed to training, by image.
        novel_in_file: (id, class name) of all novel annotations in the file, passed to training or not.
        novel: the file's names of novel classes.
    """

    where: str
    handed: dict[int, list[tuple[str, list[float]]]]
    novel_in_file: list[tuple[int, str]]
    novel: frozenset[str]

    @classmethod
    def read(cls, source: str, split: str, benchmark: Benchmark) -> TrainingSet:
        """A data set as vild's loader reads it, or a file, which counts as read completely."""
        registered = source in datasets.entries()
        entry = find_entry(source, "" if registered else split)
        document = datasets.read_annotations(source, entry)
        names = {c["id"]: c["name"] for c in document["categories"]}
        novel = frozenset(
            c["name"] for c in document["categories"] if benchmark.is_novel(c["name"], c.get("synonyms", ()))
        )
        held = [(a["id"], names[a["category_id"]]) for a in document["annotations"] if names[a["category_id"]] in novel]
        if registered:
            names, records = datasets.get_classes(source).names, datasets.load_dicts(source)
            handed = {r["image_id"]: [(names[a["category_id"]], a["bbox"]) for a in r["annotations"]] for r in records}
            return cls(f"{entry.json} (split {entry.split}, keep {entry.keep})", handed, held, novel)
        handed = {i["id"]: [] for i in document["images"]}
        for a in document["annotations"]:
            handed[a["image_id"]].append((names[a["category_id"]], a["bbox"]))
        return cls(entry.json, handed, held, novel)


def judge_training_set(training: TrainingSet, benchmark: Benchmark) -> tuple[str, str]:
    """Verdict and evidence: do annotations of novel classes, or their boxes under other names, reach training? Clean
    only if every name is known and, with full annotations, the boxes of every image could be compared."""
    novel, truth = training.novel, benchmark.truth
    handed, in_file = training.handed, training.novel_in_file
    evidence = f"{training.where} has {len(in_file)} annotations of novel names"
    through = [name for rows in handed.values() for name, _ in rows if name in novel]
    if in_file:
        evidence += f" (first: id {in_file[0][0]}, '{in_file[0][1]}')"
    for name in sorted(novel - benchmark.novel)[:3]:
        evidence += f" ('{name}' is one by another spelling)"
    evidence += f"; {len(through)} of them reach training, with {sum(map(len, handed.values())) - len(through)} others"
    missing, hidden = [], 0
    met = {name for rows in handed.values() for name, _ in rows}
    if not met:
        missing.append("no annotation reaches training")
    if strange := sorted(n for n in met - novel if clean_name(n) not in benchmark.known_spellings):
        missing.append(f"{len(strange)} of its names are unknown to the benchmark ('{strange[0]}', ...)")
    if truth is not None:
        boxes = {i: xyxy([b for n, b in rows if n not in novel]) for i, rows in handed.items()}
        if any(rows and i not in truth for i, rows in handed.items()):
            missing.append(f"boxes: {benchmark.unmatched}")
        measured = measure_boxes(boxes.items(), truth, edges=True)
        hidden = int((measured.novel.distance <= EXACT).sum())
        empty = [i for i, b in boxes.items() if len(b) == 0]
        only = sum(len(truth[i].novel) > 0 for i in empty if i in truth)
        evidence += (
            f"; {hidden} boxes are of novel objects under other names; {len(empty)} of its {len(handed)} images have "
            f"no base annotation, {only} of them a novel object (DATALOADER.FILTER_EMPTY_ANNOTATIONS drops both)"
        )
    if missing:
        evidence += f"; {UNKNOWN}: {'; '.join(missing)}"
    return (LEAK if through or hidden else UNKNOWN if missing else CLEAN), evidence


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
    for mark, names in (("novel", benchmark.novel_spellings), ("base", {clean_name(n) for n in benchmark.base})):
        rows = zip(vocabulary.names, agree.tolist(), strict=True)
        cosines[mark] = {name: cosine for name, cosine in rows if clean_name(name) in names}
    strange = [n for n in vocabulary.names if clean_name(n) not in benchmark.known_spellings]
    wrong = {mark: [n for n, c in row.items() if c < SAME_TEXT] for mark, row in cosines.items()}
    evidence = f"not the teacher's embeddings of their names (prompts '{best}', cosine < {SAME_TEXT}): " + ", ".join(
        f"{len(wrong[mark])} of {len(row)} {mark}"
        + (f" (lowest {min(row.values()):.3f}, '{min(row, key=row.get)}')" if row else "")
        for mark, row in cosines.items()
    )
    if not wrong["novel"] and strange and not cosines["novel"]:
        return UNKNOWN, f"{evidence}; no name is a novel one, {len(strange)} are unknown ('{strange[0]}', ...)"
    if not wrong["novel"]:
        return CLEAN, evidence
    if len(wrong["base"]) > len(cosines["base"]) / 2 or not cosines["base"]:
        return UNKNOWN, f"{evidence}: made with other or learned prompts"
    return LEAK, evidence
