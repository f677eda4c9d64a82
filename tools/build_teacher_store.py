#!/usr/bin/env python3
"""Write the teacher's embeddings of a data set's proposals: the store that training distils from.

    tools/build_teacher_store.py --dataset glyphs_train --proposals output/quickstart/proposals_train.safetensors \\
        --teacher local-dir:output/quickstart/teacher --output out/store

A run that was killed goes on after its last whole shard. --num-gpus 8 shares the shards among eight processes (without
a GPU: processes on the CPU); torchrun and SLURM's srun start the same command without it. The records are the same.
"""

import argparse
from contextlib import nullcontext

import torch
from detectron2.utils import comm
from tqdm import tqdm

from vild.data import datasets
from vild.data.proposals import load_proposals, read_provenance, select_proposals
from vild.data.unreadable import CHOICES
from vild.engine.launch import add_launch_arguments, launch
from vild.store.estimate import describe_work
from vild.store.shards import DTYPES
from vild.store.store import StoreWriter
from vild.teacher.clip import PRECISIONS
from vild.teacher.crops import MODES, SCALES
from vild.teacher.region_pass import Encoder, encode_images, load_images, write_shards
from vild.teacher.teacher import build_teacher
from vild.utils.errors import UserError, one_line_errors
from vild.utils.files import hash_file
from vild.utils.lock import only_writer


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a registered data set")
    parser.add_argument("--proposals", required=True, help=".safetensors or COCO-results JSON")
    parser.add_argument("--teacher", required=True, help="open_clip model name, or local-dir:FOLDER")
    parser.add_argument("--pretrained", default="", help="open_clip tag or file of weights, or 'random'")
    parser.add_argument(
        "--crop", choices=MODES, default="squash",
        help="squash: aspect ratio lost, as in the paper; center: CLIP's own, the ends of long boxes cut off; "
        "pad: kept whole, with bars of the mean colour",
    )  # fmt: skip
    parser.add_argument("--max-per-image", type=int, default=300, help="best proposals of an image (paper: 300)")
    parser.add_argument("--nms", type=float, metavar="IOU", help="first drop boxes that overlap a better one more")
    parser.add_argument("--min-size", type=float, metavar="PIXELS", help="first drop boxes with a shorter side")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16", help="int8 takes half the space")
    parser.add_argument("--shard-images", type=int, default=200)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the teacher's image tower")
    parser.add_argument("--compile", action="store_true", help="compile it (pays over millions of crops on a GPU)")
    parser.add_argument("--batch-size", type=int, default=2048 if gpu else 128, help="crops; halved when memory ends")
    parser.add_argument("--num-workers", type=int, default=8 if gpu else 1, help="processes that decode images")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument(
        "--unreadable", choices=CHOICES, default="refuse",
        help="an image that cannot be read ends the run, or is left without regions (the manifest lists them)",
    )  # fmt: skip
    parser.add_argument("--output", required=True)
    add_launch_arguments(parser)
    args = parser.parse_args()
    for key, least in (("max_per_image", 1), ("shard_images", 1), ("batch_size", 1), ("num_workers", 0)):
        if getattr(args, key) < least:
            parser.error(f"--{key.replace('_', '-')} {getattr(args, key)}: at least {least}")
    return args


@one_line_errors
def main(args):
    with only_writer(args.output, folder=True) if comm.is_main_process() else nullcontext():
        build(args)


def build(args):
    files = {r["image_id"]: r["file_name"] for r in datasets.load_dicts(args.dataset)}
    proposals = load_proposals(args.proposals)
    if strangers := sorted(set(proposals) - set(files)):
        raise UserError(f"proposals {args.proposals}: image_id {strangers[0]} is not in data set '{args.dataset}'")
    proposals, dropped = select_proposals(proposals, args.max_per_image, args.min_size, args.nms)
    teacher = build_teacher(args.teacher, args.pretrained, args.device, args.crop, args.precision, args.compile)
    plan = {
        "pictures": datasets.images_hash(args.dataset),
        "fingerprint": teacher.fingerprint,
        "scales": list(SCALES),
        "proposals": hash_file(args.proposals),
        "max_per_image": args.max_per_image,
        "precision": None if args.precision == "fp32" else args.precision,
        "nms": args.nms,
        "min_size": args.min_size,
        "dropped": dropped or None,
    }
    datasets.forget()
    origin = read_provenance(args.proposals)
    rest = (sorted(files), args.shard_images, origin, args.dtype)
    if comm.is_main_process():
        StoreWriter(args.output, plan, *rest)
    comm.synchronize()  # the manifest is there, and of this plan
    writer = StoreWriter(args.output, plan, *rest)

    nothing = torch.zeros(0, 4), torch.zeros(0)
    regions = {i: proposals.get(i, nothing) for i in files}
    encoder = Encoder(teacher, args.batch_size)
    gpu, skip = teacher.device.type == "cuda", args.unreadable == "skip"
    counts = {i: len(boxes) for i, (boxes, _) in regions.items()}

    def compute(ids):
        return list(encode_images(encoder, load_images(files, ids, 0, gpu, skip), [regions[i][0] for i in ids]))

    missing = list(writer.missing())
    comm.synchronize()  # nobody writes before all have seen what is missing
    if comm.is_main_process() and not writer.complete:
        to_do = [i for _, ids in missing for i in ids]
        world = comm.get_world_size()
        work = describe_work(counts, teacher.width, args.dtype, compute, to_do)
        print(work + (f", for {world} processes together" if world > 1 else ""), flush=True)
    shards = missing[comm.get_rank() :: comm.get_world_size()]
    ids = [i for _, some in shards for i in some]
    images = load_images(files, ids, args.num_workers, gpu, skip)
    with tqdm(total=len(ids), desc="store", unit="image", disable=not (comm.is_main_process() and ids)) as progress:
        for count in write_shards(writer, shards, encoder, images, regions):
            progress.update(count)
    comm.synchronize()
    if comm.is_main_process():
        manifest = writer.finish(counts)
        state = "store already complete, checksums correct, nothing written: " if writer.complete else ""
        print(f"{state}{manifest['regions']} regions of {len(files)} images: {args.output}")
        if lost := manifest.get("unreadable"):
            shown = ", ".join(map(str, lost[:10])) + (", ..." if len(lost) > 10 else "")
            print(f"WARNING: {len(lost)} images CANNOT BE READ and have no regions: image_id {shown}")


if __name__ == "__main__":
    launch(main, parse())
