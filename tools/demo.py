#!/usr/bin/env python3
"""Find words in pictures: writes the pictures with boxes, masks, names and scores.

    tools/demo.py --config-file configs/Glyphs/vild.yaml --input a.jpg b.jpg \\
        --vocabulary "umbrella, chess knight" --output out/ --opts MODEL.WEIGHTS output/quickstart/vild/model_final.pth
"""

import argparse
import os
from pathlib import Path

from tqdm import tqdm

from vild.data.pictures import read_picture
from vild.engine import load_config
from vild.errors import UserError, one_line_errors
from vild.evaluation.pictures import draw
from vild.predictor import OpenVocabularyDetector
from vild.vocabulary import Vocabulary
from vild.words import read_words


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--input", nargs="+", required=True, help="pictures")
    parser.add_argument("--output", required=True, help="folder for the drawn pictures")
    parser.add_argument(
        "--vocabulary",
        help='words, "umbrella, chess knight", or a file with a word a line (default: as trained)',
    )
    parser.add_argument("--confidence-threshold", type=float, default=0.5)
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="config overrides, KEY VALUE ...")
    args = parser.parse_args()

    detector = OpenVocabularyDetector(load_config(args.config_file, args.opts))
    if args.vocabulary is not None:
        words = read_words(args.vocabulary)
        synonyms = None if isinstance(words, Vocabulary) else words.synonyms
        detector = detector.with_vocabulary(getattr(words, "names", words), synonyms=synonyms)
    stems = [Path(name).stem for name in args.input]
    if len(set(stems)) < len(stems):
        raise UserError("--input: two pictures have the same name; their results would overwrite each other")
    os.makedirs(args.output, exist_ok=True)
    for name, stem in zip(tqdm(args.input, desc="pictures"), stems, strict=True):
        picture = read_picture(name, detector.cfg.INPUT.FORMAT)
        found = detector(picture)
        found = found[found.scores >= args.confidence_threshold]
        target = os.path.join(args.output, f"{stem}.png")
        draw(read_picture(name, "RGB"), found, detector.names).save(target)
        words = ", ".join(f"{detector.names[c]} {s:.2f}" for c, s in zip(found.pred_classes, found.scores, strict=True))
        tqdm.write(f"{target}: {words or 'nothing'}")


if __name__ == "__main__":
    main()
