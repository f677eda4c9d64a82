#!/usr/bin/env python3
"""Learn a prompt set on the base objects of a data set (CoOp): vectors in place of "a photo of a", the teacher frozen.

    tools/learn_prompts.py --dataset glyphs_train --teacher local-dir:output/quickstart/teacher \\
        --output output/quickstart/prompts.safetensors
    tools/build_vocabulary.py --prompts output/quickstart/prompts.safetensors --vocabulary glyphs_train ...

The regions are the ground-truth boxes of base classes, embedded by the teacher; with --store, the store's regions that
match one. With --background, regions away from every object are pushed to be equally unlike all names (DetPro).
"""

from vild.utils.command_line import add_shared, at_least, make_parser
from vild.utils.errors import UserError, one_line_errors


def regions(teacher, name, store):
    """Embeddings [N, D] of a data set's regions, their labels [N] among the base names, and the base names."""
    import torch

    from vild.data import datasets
    from vild.evaluation.evaluator import ground_truth_boxes
    from vild.report.diagnostics import embed_ground_truth
    from vild.teacher.prompt_learning import LEFT_OUT, match

    classes = datasets.get_classes(name)
    base = [i for i, mark in enumerate(classes.splits) if mark == "base"]
    index = torch.full((len(classes.names),), LEFT_OUT)
    index[base] = torch.arange(len(base))
    truth = {i: (boxes, index[labels]) for i, (boxes, labels) in ground_truth_boxes(name).items()}
    if not any((labels >= 0).any() for _, labels in truth.values()):
        raise UserError(f"data set '{name}': has no object of a base class to learn prompts from")
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
    parser = make_parser(__doc__)
    add_shared(parser, "--dataset", "--teacher", required=True)
    add_shared(parser, "--pretrained")
    parser.add_argument("--store", metavar="STORE", help="store of the same teacher and data set")
    parser.add_argument("--background", type=float, default=0, metavar="W", help="loss weight of background regions")
    parser.add_argument("--words", default="a photo of a", help="initial prompt: one vector for each of its tokens")
    parser.add_argument("--steps", type=at_least(1), default=200, metavar="N", help="training steps")
    add_shared(parser, "--batch-size", default=512, note="regions per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, metavar="R", help="learning rate")
    add_shared(parser, "--seed", "--device")
    add_shared(parser, "--output", required=True)
    args = parser.parse_args()
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output}: the name of a prompt set ends in .safetensors")
    if not 0 < args.learning_rate < float("inf"):
        raise UserError(f"--learning-rate {args.learning_rate}: must be above 0")
    if not 0 <= args.background < float("inf"):
        raise UserError(f"--background {args.background}: must be 0 or more")
    if args.background and not args.store:
        raise UserError("--background needs --store: ground truth has no background regions")

    from vild.config import pick_device
    from vild.store.store import EmbeddingStore
    from vild.teacher.prompt_learning import learn, starting_prompts
    from vild.teacher.teacher import build_teacher

    store = EmbeddingStore(args.store) if args.store else None
    teacher = build_teacher(args.teacher, args.pretrained, pick_device(args.device))
    starting_prompts(teacher, args.words)  # an error of these comes before the long part
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
    print(f"{prompts}; accuracy on base regions: {before} % before, {after} % after: {args.output}")


if __name__ == "__main__":
    main()
