#!/usr/bin/env python3
"""Write a vocabulary file: text embeddings of class names, from a teacher or from a .npy matrix.

    tools/build_vocabulary.py --vocabulary glyphs_train --teacher local-dir:output/quickstart/teacher \\
        --output V.safetensors
    tools/build_vocabulary.py --vocabulary "umbrella, chess knight" --teacher ViT-B-32-quickgelu --pretrained openai \\
        --output V.safetensors
    tools/build_vocabulary.py --vocabulary mine_train --npy clip_text.npy --output V.safetensors \\
        [--teacher ViT-B-32-quickgelu --pretrained openai]    # the teacher that the matrix was made with

The name of a data set brings its synonyms and base/novel marks.
"""

from vild.utils.command_line import add_shared, make_parser
from vild.utils.errors import UserError, count_of, one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--vocabulary", required=True)
    add_shared(parser, "--teacher", "--pretrained", "--prompts", "--device")
    parser.add_argument("--npy", metavar="FILE", help="use these embeddings, [C, D] or [D, C], instead of encoding")
    add_shared(parser, "--output", required=True)
    args = parser.parse_args()
    if not (args.npy or args.teacher):
        raise UserError("give --teacher, or --npy, or both")

    from vild.config import pick_device
    from vild.inference.words import read_words
    from vild.teacher.teacher import build_teacher
    from vild.utils.fingerprint import check_same_teacher
    from vild.vocabulary.prompts import LearnedPrompts, find_prompts
    from vild.vocabulary.vocabulary import Vocabulary

    words = read_words(args.vocabulary)
    if isinstance(words, Vocabulary):
        raise UserError(f"--vocabulary {args.vocabulary}: is a vocabulary file already; give words or a data set")
    prompts = find_prompts(args.prompts)
    device, teacher = pick_device(args.device), None
    if args.teacher:
        print(f"teacher {args.teacher} on {device}, in fp32", flush=True)
        teacher = build_teacher(args.teacher, args.pretrained, device)
    if args.npy:
        fingerprint = teacher.fingerprint if teacher else None
        vocabulary = Vocabulary.from_npy(args.npy, words, fingerprint=fingerprint)
    else:
        if isinstance(prompts, LearnedPrompts):
            check_same_teacher(prompts.fingerprint, f"prompt set {args.prompts}", teacher.fingerprint, "--teacher")
        vocabulary = Vocabulary.from_names(teacher, words, prompts=args.prompts)
    vocabulary.save(args.output)
    print(f"{count_of(len(vocabulary), 'name')}, width {vocabulary.width}: {args.output}")


if __name__ == "__main__":
    main()
