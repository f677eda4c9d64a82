#!/usr/bin/env python3
"""Write the teacher's embeddings of a data set's proposals: the store that training distils from.

A run that was killed goes on after its last whole shard.

    tools/build_teacher_store.py --dataset glyphs_train --proposals output/quickstart/proposals.safetensors \\
        --teacher local-dir:output/quickstart/teacher --output output/quickstart/store
"""

import argparse

import torch
from tqdm import tqdm

from vild.data import datasets
from vild.data.mapper import read_picture
from vild.errors import UserError, one_line_errors
from vild.teacher.clip import Teacher
from vild.teacher.crops import SCALES
from vild.teacher.proposals import hash_file, load_proposals
from vild.teacher.store import Regions, StoreWriter


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a registered data set")
    parser.add_argument("--proposals", required=True, help=".safetensors or COCO-results JSON")
    parser.add_argument("--teacher", required=True, help="open_clip model name, or local-dir:FOLDER")
    parser.add_argument("--pretrained", default="", help="open_clip tag or file of weights, or 'random'")
    parser.add_argument("--max-per-image", type=int, default=300, help="best proposals of a picture (paper: 300)")
    parser.add_argument("--shard-pictures", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()

    files = {r["image_id"]: r["file_name"] for r in datasets.load_dicts(args.dataset)}
    proposals = load_proposals(args.proposals)
    if strangers := sorted(set(proposals) - set(files)):
        raise UserError(f"proposals {args.proposals}: image_id {strangers[0]} is not in data set '{args.dataset}'")
    teacher = Teacher(args.teacher, args.pretrained, args.device)
    plan = {
        "pictures": datasets.pictures_hash(args.dataset),
        "fingerprint": teacher.fingerprint,
        "scales": list(SCALES),
        "proposals": hash_file(args.proposals),
        "max_per_image": args.max_per_image,
    }
    writer = StoreWriter(args.output, plan, sorted(files), args.shard_pictures)

    nothing = torch.zeros(0, 4), torch.zeros(0)
    missing = list(writer.missing())
    with tqdm(total=sum(len(ids) for _, ids in missing), desc="store", unit="picture") as progress:

        def regions(image_id: int) -> Regions:
            boxes, scores = proposals.get(image_id, nothing)
            best = scores.argsort(descending=True, stable=True)[: args.max_per_image]
            boxes, scores = boxes[best], scores[best]
            picture = torch.from_numpy(read_picture(files[image_id], "RGB").copy()).permute(2, 0, 1)
            embeddings = teacher.encode_regions(picture.to(args.device), boxes.to(args.device))
            progress.update()
            return Regions(boxes, embeddings.cpu(), scores)

        for index, _ in missing:
            writer.write_shard(index, regions)
    manifest = writer.finish()
    print(f"{manifest['regions']} regions of {len(files)} pictures: {args.output}")


if __name__ == "__main__":
    main()
