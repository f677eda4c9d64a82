"""The findings of the leakage audit: has an artefact seen novel annotations, and what is the evidence?

Each ``audit_*`` yields (kind of evidence, verdict, evidence). Evidence is "measured" against the full annotations or
the teacher, or "recorded" by the tool that made the file.
"""

from __future__ import annotations

from vild.audit.leakage import Benchmark, TrainingSet, judge_training_set, judge_vocabulary
from vild.audit.pasted_boxes import judge_boxes, measure_boxes
from vild.checkpoint.checkpointer import read_network_record
from vild.checkpoint.pretrained import weights_file
from vild.data.proposals import load_proposals, read_labels, read_provenance
from vild.data.provenance import CLEAN, LEAK, UNKNOWN, judge_network, judge_proposals
from vild.store.store import EmbeddingStore
from vild.teacher.teacher import build_teacher
from vild.utils.files import hash_file
from vild.utils.fingerprint import check_same_teacher, describe
from vild.utils.untrusted import refused_as
from vild.vocabulary.encode import encode_names
from vild.vocabulary.prompts import PROMPT_SETS, LearnedPrompts, clean_name, find_prompts
from vild.vocabulary.vocabulary import Vocabulary


def recorded_by(what, path):
    """A record is what a file says: it can be anything."""
    return refused_as(f"{what} {path}: its record of training is not one of vild's")


def audit_boxes(found, benchmark):
    if benchmark.truth is None:
        return UNKNOWN, "nothing to measure against: give --full"
    return judge_boxes(measure_boxes(found, benchmark.truth))


def audit_proposals(path, benchmark):
    yield "measured", *audit_boxes(((i, boxes) for i, (boxes, _) in load_proposals(path).items()), benchmark)
    labels = read_labels(path)
    if len(labels) > 1:  # a single label carries no information
        yield "measured", UNKNOWN, f"carries {len(labels)} class labels (vild reads none) of unknown origin"
    with recorded_by("proposals", path):
        judged = judge_proposals(read_provenance(path), benchmark.novel_spellings, benchmark.known_spellings)
    yield "recorded", *judged


def audit_store(folder, proposals, benchmark):
    store = EmbeddingStore(folder)
    yield "measured", *audit_boxes(store.boxes(), benchmark)
    record, made_from = store.provenance, store.plan.get("proposals")
    if record is None and proposals and hash_file(proposals) == made_from:
        record = read_provenance(proposals)  # the store is older than its records, or the record was lost
    with recorded_by("store", folder):
        verdict, evidence = judge_proposals(record, benchmark.novel_spellings, benchmark.known_spellings)
    yield "recorded", verdict, f"made from proposals {made_from}: {evidence}"


def audit_vocabulary(path, teacher, benchmark):
    vocabulary = Vocabulary.load(weights_file(path))
    own = vocabulary.prompts
    if isinstance(own, LearnedPrompts):
        with recorded_by("vocabulary", path):
            known = own.record.get("names")
            met = sorted({clean_name(n) for n in known or ()} & benchmark.novel_spellings)
        verdict = UNKNOWN if known is None else LEAK if met else CLEAN
        yield "recorded", verdict, f"its prompts ({own}) were learned on {len(known or ())} names, novel: {met[:5]}"
    origin = f"prompts '{own}' of teacher {describe(vocabulary.fingerprint)}"
    if teacher is None:
        yield "recorded", UNKNOWN, f"claims {origin}; give --teacher to measure it"
        return
    if vocabulary.fingerprint:
        check_same_teacher(vocabulary.fingerprint, f"vocabulary {path}", teacher.fingerprint, "--teacher")
    sets = {str(own): find_prompts(own)} if own in PROMPT_SETS or isinstance(own, LearnedPrompts) else PROMPT_SETS
    words = vocabulary.names, vocabulary.synonyms or ((),) * len(vocabulary)
    expected = {name: encode_names(teacher.encode_text, *words, prompts).cpu() for name, prompts in sets.items()}
    yield "measured", *judge_vocabulary(vocabulary, expected, benchmark)


def findings(args):
    """(artefact, kind of evidence, verdict, evidence) of everything that was asked for."""
    benchmark = Benchmark.read(args.dataset, args.split, args.full)
    training = TrainingSet.read(args.dataset, args.split, benchmark)
    yield f"training set {args.dataset}", "measured", *judge_training_set(training, benchmark)
    if args.proposals:
        yield from ((f"proposals {args.proposals}", *f) for f in audit_proposals(args.proposals, benchmark))
    if args.store:
        yield from ((f"store {args.store}", *f) for f in audit_store(args.store, args.proposals, benchmark))
    if args.weights:
        record = read_network_record(weights_file(args.weights))
        with recorded_by("weights", args.weights):
            judged = judge_network(record, benchmark.novel_spellings, benchmark.known_spellings)
        yield f"weights {args.weights}", "recorded", *judged
    if args.vocabulary:
        teacher = build_teacher(args.teacher, args.pretrained) if args.teacher else None
        rows = audit_vocabulary(args.vocabulary, teacher, benchmark)
        yield from ((f"vocabulary {args.vocabulary}", *f) for f in rows)
