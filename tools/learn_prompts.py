#!/usr/bin/env python3
"""Learn a prompt set on the base objects of a data set: vectors in place of "a photo of a", the teacher as it was.

    tools/learn_prompts.py --dataset glyphs_train --teacher local-dir:output/quickstart/teacher \\
        --output output/quickstart/prompts.safetensors
    tools/build_vocabulary.py --prompts output/quickstart/prompts.safetensors --dataset glyphs_train ...

The regions are the ground-truth boxes of base names, which the teacher embeds; with --store those of a store that match
one. With --background too, those away from all are pushed to be equally unlike all names (DetPro).
"""

import argparse

import torch

from vild.data import datasets
from vild.evaluation.evaluator import ground_truth_boxes
from vild.report.diagnostics import embed_ground_truth
from vild.store.store import EmbeddingStore
from vild.teacher.prompt_learning import LEFT_OUT, learn, match, starting_prompts
from vild.teacher.teacher import build_teacher
from vild.utils.errors import UserError, one_line_errors


def regions(teacher, name, store):
    """Embeddings [N, D], labels [N] among the base names, and these names."""
    classes = datasets.get_classes(name)
    base = [i for i, mark in enumerate(classes.splits) if mark == "base"]
    index = torch.full((len(classes.names),), LEFT_OUT)
    index[base] = torch.arange(len(base))
    truth = {i: (boxes, index[labels]) for i, (boxes, labels) in ground_truth_boxes(name).items()}
    if not any((labels >= 0).any() for _, labels in truth.values()):
        raise UserError(f"data set '{name}': it has no object of a base name to learn prompts from")
    rows = []
    if store is None:
        embedded = embed_ground_truth(teacher, name)
        rows = [(embedded[i], labels) for i, (_, labels) in truth.items()]
    else:
        store.check_teacher(teacher.fingerprint, "--teacher")
        for i, (boxes, labels) in truth.items():
            found, known = store[i], labels >= 0
            rows.append((found.embeddings, match(found.boxes, boxes[known], labels[known])))
    embeddings, labels = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return embeddings[labels != LEFT_OUT], labels[labels != LEFT_OUT], [classes.names[i] for i in base]


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a registered data set with base names")
    parser.add_argument("--teacher", required=True, help="open_clip model name, or local-dir:FOLDER")
    parser.add_argument("--pretrained", default="", help="open_clip tag or file of weights, or 'random'")
    parser.add_argument("--store", help="of the same teacher and data set")
    parser.add_argument(
        "--background", type=float, default=0, help="weight in the loss of regions away from base objects"
    )
    parser.add_argument("--words", default="a photo of a", help="where it starts: a vector for each of their tokens")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=512, help="regions a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    if not args.output.endswith(".safetensors"):
        raise UserError(f"--output {args.output}: a prompt set's file ends in .safetensors")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: a step needs a region at least")
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: nothing is learned in fewer than one")
    if not 0 < args.learning_rate < float("inf"):
        raise UserError(f"--learning-rate {args.learning_rate} is no number above 0")
    if not 0 <= args.background < float("inf"):
        raise UserError(f"--background {args.background} is no weight: a number from 0 on")
    store = EmbeddingStore(args.store) if args.store else None
    if args.background and not args.store:
        raise UserError("--background needs --store: ground truth has no regions of background")
    teacher = build_teacher(args.teacher, args.pretrained, args.device)
    starting_prompts(teacher, args.words)  # what cannot be learned shall not wait for the regions
    prompts = learn(
        teacher,
        *regions(teacher, args.dataset, store),
        words=args.words,
        steps=args.steps,
        batch=args.batch_size,
        learning_rate=args.learning_rate,
        background=args.background,
        seed=args.seed,
    )
    prompts.record.update(dataset=args.dataset, store=args.store)
    prompts.save(args.output)
    before, after = prompts.record["accuracy"]
    print(f"{prompts}; base regions named right: {before} % before, {after} % after: {args.output}")


if __name__ == "__main__":
    main()
