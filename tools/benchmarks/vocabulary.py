"""A new vocabulary in a running detector: to encode its names, and to swap it in.

Encoding --encode names through the 63 templates; the baseline encodes one text at a time (``min_cosine`` between the
two). Swapping in names whose embeddings are cached; the baseline is what a classifier with built-in classes needs, the
detector built anew with its weights (``max_abs_diff`` between the scores of both). The encoder is the built-in world's
text tower with random weights unless --teacher names another. Least times."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import CLASSES, build_detector, min_cosine, random_vocabulary, row, timed
from vild.glyphs.teacher import MODEL_CFG, build_model
from vild.teacher.clip import save_local
from vild.teacher.teacher import Teacher, build_teacher
from vild.vocabulary.cache import TextCache
from vild.vocabulary.prompts import PROMPT_SETS, fill
from vild.vocabulary.vocabulary import Vocabulary

TEMPLATES = PROMPT_SETS["vild"]


def run(args: argparse.Namespace) -> Iterator[dict]:
    yield encoding(load_teacher(args), args)
    detector = build_detector(args.config_file, CLASSES, args.device).eval()
    for names in args.names:
        yield swapping(detector, names, args)


def encoding(teacher: Teacher, args: argparse.Namespace) -> dict:
    words, results = [f"thing {n}" for n in range(args.encode)], {}

    def one_by_one() -> None:
        rows = []
        for word in words:
            texts = torch.cat([teacher.encode_text([text]) for text in fill(TEMPLATES, word)])
            rows.append(F.normalize(texts.mean(0), dim=0))
        results["baseline"] = torch.stack(rows).cpu()

    def batched() -> None:
        results["ours"] = Vocabulary.from_names(teacher, words).embeddings

    seconds, texts = timed([one_by_one, batched], args.repeats), len(words) * len(TEMPLATES)
    measures = {"ours_texts_per_s": texts / seconds[1], "min_cosine": min_cosine(results["baseline"], results["ours"])}
    return row(f"encode {len(words)} names, {texts} texts", "a text at a time", *seconds, **measures)


def swapping(detector: nn.Module, names: int, args: argparse.Namespace) -> dict:
    vocabulary, weights, built = random_vocabulary(names), detector.state_dict(), []
    cache = TextCache({}, None)
    teacher = SimpleNamespace(encode_text=None, fingerprint={}, logit_scale=None, logit_bias=0.0)
    cache.get(vocabulary.names, TEMPLATES, lambda _: vocabulary.embeddings)

    def build() -> None:
        anew = build_detector(args.config_file, names, args.device).eval()
        anew.load_state_dict(weights)
        built[:] = [anew]

    def swap() -> None:
        detector.set_vocabulary(Vocabulary.from_names(teacher, vocabulary.names, cache=cache))

    seconds = timed([build, swap], args.repeats)
    generator = torch.Generator().manual_seed(0)
    regions = F.normalize(torch.randn(64, vocabulary.width, generator=generator), dim=1).to(args.device)
    with torch.inference_mode():
        theirs, ours = (model.roi_heads.classifier(regions).softmax(1) for model in (*built, detector))
    difference = (theirs - ours).abs().max().item()
    return row(f"swap in {names} cached names", "the detector built anew", *seconds, max_abs_diff=difference)


def load_teacher(args: argparse.Namespace) -> Teacher:
    if args.teacher:
        return build_teacher(args.teacher, args.pretrained, args.device)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_local(build_model(), MODEL_CFG, Path(folder))
        return build_teacher(f"local-dir:{folder}", device=args.device)
