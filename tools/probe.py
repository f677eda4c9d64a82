#!/usr/bin/env python3
"""Learn a row of the vocabulary for each new name, in seconds on a CPU, from a handful of boxes; no weight of the
detector changes. Or without any box, from the regions of a store that are nearest to the word.

    tools/probe.py --config-file configs/Glyphs/vild_contrast.yaml \\
        --weights output/quickstart/vild_contrast/model_final.pth \\
        --dataset glyphs_new_train --output output/new_names.safetensors
    tools/probe.py --config-file configs/Glyphs/vild_contrast.yaml \\
        --weights output/quickstart/vild_contrast/model_final.pth \\
        --store output/quickstart/store --vocabulary "umbrella, scissors" --output output/new_names.safetensors

The images of the data set must annotate every object of the new names. --output is a vocabulary of the old names and
the new ones (--vocabulary of the other tools) or, as .pth, the detector with it. tools/finetune.py learns more, from
more images.
"""

from vild.utils.command_line import add_model_flags, add_shared, make_parser
from vild.utils.errors import UserError, one_line_errors


@one_line_errors
def main():
    parser = make_parser(__doc__)
    add_shared(parser, "--dataset", note="whose base classes are the new names")
    parser.add_argument("--store", metavar="STORE", help="an embedding store of the same teacher, with --vocabulary")
    add_shared(parser, "--vocabulary", note="with --store: the new names")
    add_shared(parser, "--output", required=True, note="a .safetensors or .pth")
    add_model_flags(parser)
    args = parser.parse_args()
    if args.output.suffix not in (".safetensors", ".pth"):
        raise UserError(f"--output {args.output}: a vocabulary is written as .safetensors, a detector as .pth")
    if bool(args.store) == bool(args.dataset) or bool(args.store) != bool(args.vocabulary):
        raise UserError("give either --dataset, or --store and --vocabulary")

    from vild.checkpoint.pretrained import config_from_flags
    from vild.inference.predictor import OpenVocabularyDetector
    from vild.inference.probe import learn_names, save
    from vild.inference.words import read_words
    from vild.store.store import EmbeddingStore

    store, source = EmbeddingStore(args.store) if args.store else None, args.vocabulary or args.dataset
    words = read_words(source)
    detector = OpenVocabularyDetector(config_from_flags(args))
    for learned in learn_names(detector, words, source, store):
        if learned.positive:
            print(f"'{learned.name}': {learned.positive} of {learned.regions:,} regions; cosine to its word "
                  f"{learned.cosine:.3f}", flush=True)  # fmt: skip
        else:
            print(f"'{learned.name}': no box; it stays its word", flush=True)
    save(args.output, detector, learned.vocabulary, source, store)
    print(args.output)


if __name__ == "__main__":
    main()
