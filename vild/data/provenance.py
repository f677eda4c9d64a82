"""Records of what a network was trained on, written by the tools and read by the leakage audit.

Three nested records of plain values. They are statements, not proofs: a record has what the tool that wrote it knew.

* training, in a checkpoint under ``trained_on``: {"data_sets": [data set], "stores": [{"proposals": hash,
  "provenance": proposals or None}], "starts": [network]}; lists, because a resumed run may use others, and because the
  old student of incremental training is listed beside the initial weights.
* network: {"file", "sha", "trained_on": training or None}.
* proposals, in their file's metadata and in a store's manifest: {"data_set", "images", "network": network}; in the
  manifest of a merged store {"merged": [proposals or None of each part]}.

Annotations are counted by class *name*, so that the novel ones can be determined later for any split.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from vild.data import datasets
from vild.utils.files import hash_file
from vild.vocabulary.prompts import clean_name

if TYPE_CHECKING:
    from vild.store.store import EmbeddingStore

CLEAN, LEAK, UNKNOWN = "clean", "LEAK", "cannot tell"
# Detectron2's and timm's published classification backbones: trained with labels, without boxes
CLASSIFIER = re.compile(r"detectron2://ImageNetPretrained/|timm://[^/]+$")


def worst(verdicts: Collection[str]) -> str:
    """The worst verdict: LEAK, then "cannot tell", then clean."""
    return next(v for v in (LEAK, UNKNOWN, CLEAN) if v in {*verdicts, CLEAN})


def data_set_record(name: str) -> dict:
    """The record of a data set: hash of its file and number of training annotations by class name."""
    entry, classes = datasets.get_entry(name), datasets.get_classes(name)
    counts = Counter(a["category_id"] for r in datasets.load_dicts(name) for a in r["annotations"])
    return {
        "name": name,
        "file": entry.json,
        "sha": hash_file(datasets.root() / entry.json),
        "split": entry.split,
        "keep": entry.keep,
        "annotations": {classes.names[k]: counts[k] for k in sorted(counts)},
    }


def training_record(names: Collection[str], store: EmbeddingStore | None) -> dict:
    """The record of a training from scratch on data sets and optionally a store. (With a live teacher, the regions are
    the network's own proposals: they add nothing.)"""
    stores = [{"proposals": store.plan.get("proposals"), "provenance": store.provenance}] if store else []
    return {"data_sets": [data_set_record(n) for n in names], "stores": stores, "starts": []}


def network_record(path: str, local_path: str, trained_on: dict | None) -> dict:
    """The record of a weights file; ``path`` may be a URL with a local copy at ``local_path``."""
    return {"file": path if "://" in path else Path(path).name, "sha": hash_file(local_path), "trained_on": trained_on}


def was_trained_on(record: dict, name: str) -> bool:
    """Whether a training record, or that of the weights it started from, has a data set's annotation file."""
    sha = hash_file(datasets.root() / datasets.get_entry(name).json)
    earlier = (start["trained_on"] for start in record["starts"])
    return any(d["sha"] == sha for d in record["data_sets"]) or any(was_trained_on(r, name) for r in earlier if r)


def merge(earlier: dict, later: dict) -> dict:
    """The record of a resumed training: the union of both parts."""
    return {key: earlier[key] + [r for r in later[key] if r not in earlier[key]] for key in earlier}


def judge_network(network: dict, novel: Collection[str], known: Collection[str]) -> tuple[str, str]:
    """Verdict and evidence on a network record.

    Args:
        novel: class names whose annotations it must not have seen.
        known: all class names of the benchmark. Unknown names could be synonyms of novel ones.
    """
    if CLASSIFIER.match(network["file"]):
        return CLEAN, f"{network['file']} is an image classifier"
    if network["trained_on"] is None:
        return UNKNOWN, f"{network['file']} ({network['sha']}) has no record of its training"
    judged = [
        *(_judge_data_set(d, novel, known) for d in network["trained_on"]["data_sets"]),
        *(judge_proposals(s["provenance"], novel, known, "its store's") for s in network["trained_on"]["stores"]),
        *(judge_network(start, novel, known) for start in network["trained_on"]["starts"]),
    ]
    evidence = "; ".join(sentence for _, sentence in judged) or "trained on nothing"
    return worst([verdict for verdict, _ in judged]), f"{network['file']} ({network['sha']}): {evidence}"


def judge_proposals(
    record: dict | None, novel: Collection[str], known: Collection[str], whose: str = "the"
) -> tuple[str, str]:
    """Verdict and evidence on a proposals record (None: the file has none)."""
    if record is None:
        return UNKNOWN, f"{whose} proposals have no record of the network that made them"
    if "merged" in record:
        verdicts, sentences = zip(*(judge_proposals(r, novel, known, whose) for r in record["merged"]), strict=True)
        return worst(verdicts), "; ".join(sentences)
    verdict, sentence = judge_network(record["network"], novel, known)
    return verdict, f"{whose} proposals on '{record['data_set']}' are from {sentence}"


def _judge_data_set(record: dict, novel: Collection[str], known: Collection[str]) -> tuple[str, str]:
    novel, known = {clean_name(n) for n in novel}, {clean_name(n) for n in known}
    counts = {clean_name(name): count for name, count in record["annotations"].items()}
    what = f"'{record['name']}' ({record['file']} {record['sha']}, split {record['split']}, keep {record['keep']})"
    if seen := sorted(counts.keys() & novel):
        return LEAK, f"{sum(counts[n] for n in seen)} annotations of novel names ('{seen[0]}', ...) read from {what}"
    if strange := sorted(counts.keys() - known):
        return UNKNOWN, f"{what} has {len(strange)} names unknown to the benchmark ('{strange[0]}', ...)"
    return CLEAN, f"{sum(counts.values())} annotations of {len(counts)} names, 0 novel, read from {what}"
