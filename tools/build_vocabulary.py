#!/usr/bin/env python3
"""Write a vocabulary file: text embeddings of names, from a teacher or from a .npy matrix.

    tools/build_vocabulary.py --dataset glyphs_train --teacher local-dir:output/quickstart/teacher --output V
    tools/build_vocabulary.py --names "umbrella, chess knight" --teacher ViT-B-32-quickgelu --pretrained openai \\
        --output V.safetensors
    tools/build_vocabulary.py --dataset mine_train --npy clip_text.npy --output V.safetensors \\
        [--teacher ViT-B-32-quickgelu --pretrained openai]    (the teacher that the matrix is from)
"""

import argparse
from pathlib import Path

from vild.data import datasets
from vild.teacher.teacher import build_teacher
from vild.utils.errors import UserError, one_line_errors
from vild.utils.fingerprint import check_same_teacher
from vild.utils.untrusted import read_bytes, refused_as
from vild.vocabulary.prompts import PROMPT_SETS, LearnedPrompts, find_prompts
from vild.vocabulary.vocabulary import Vocabulary


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", help="names, synonyms and base/novel marks of a data set")
    source.add_argument("--names", help='"umbrella, chess knight", or a file with a name a line')
    parser.add_argument("--teacher", help="open_clip model name, or local-dir:FOLDER")
    parser.add_argument("--pretrained", default="", help="open_clip tag or file of weights, or 'random'")
    parser.add_argument("--npy", help="import these embeddings, [C, D] or [D, C], instead of encoding the names")
    parser.add_argument("--prompts", default="vild", help=f"{', '.join(PROMPT_SETS)}, or a file of learn_prompts.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()

    splits = synonyms = None
    if args.dataset:
        classes = datasets.get_classes(args.dataset)
        names, splits, synonyms = classes.names, classes.splits, classes.synonyms
    elif Path(args.names).is_file():
        with refused_as(f"--names {args.names}: is not a text file"):
            names = read_bytes(args.names).decode().splitlines()
    else:
        names = args.names.split(",")
    if not (args.npy or args.teacher):
        raise UserError("give --teacher, or --npy, or both")
    prompts = find_prompts(args.prompts)
    teacher = build_teacher(args.teacher, args.pretrained, args.device) if args.teacher else None
    if args.npy:
        fingerprint = teacher.fingerprint if teacher else None
        vocabulary = Vocabulary.from_npy(args.npy, [n.strip() for n in names if n.strip()], splits, fingerprint)
    else:
        if isinstance(prompts, LearnedPrompts):
            check_same_teacher(prompts.fingerprint, f"prompt set {args.prompts}", teacher.fingerprint, "--teacher")
        vocabulary = Vocabulary.from_names(teacher, names, prompts=args.prompts, splits=splits, synonyms=synonyms)
    vocabulary.save(args.output)
    print(f"{len(vocabulary)} names, width {vocabulary.width}: {args.output}")


if __name__ == "__main__":
    main()
