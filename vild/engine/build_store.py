"""Build an embedding store: the teacher's embeddings of a data set's proposals, by one process or several."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from detectron2.utils import comm
from tqdm import tqdm

from vild.data import datasets
from vild.data.proposals import load_proposals, read_provenance, select_proposals
from vild.engine.together import share_annotations
from vild.store.estimate import describe_work
from vild.store.manifest import MANIFEST, read_manifest
from vild.store.store import StoreWriter
from vild.teacher.crops import SCALES
from vild.teacher.region_pass import Encoder, encode_images, load_images, to_host, write_shards
from vild.teacher.teacher import build_teacher
from vild.utils.errors import UserError, count_of
from vild.utils.files import hash_file


def begun_precision(folder: Path) -> str | None:
    """The precision of the store in a folder, complete or not; None without one."""
    if not (folder / MANIFEST).exists():
        return None
    precision = read_manifest(folder)["plan"].get("precision") or "fp32"
    return precision if isinstance(precision, str) else None  # a merged store's may be several


def build_store(args: argparse.Namespace) -> None:
    """Build, or continue, the store of ``tools/build_teacher_store.py``'s arguments, as one process of several.

    Raises:
        UserError: proposals of another data set, or a store of another plan at ``args.output_dir``.
    """
    share_annotations([args.dataset])
    files = {r["image_id"]: r["file_name"] for r in datasets.load_dicts(args.dataset)}
    proposals = load_proposals(args.proposals)
    if unknown := sorted(set(proposals) - set(files)):
        raise UserError(f"proposals {args.proposals}: image_id {unknown[0]} is not in data set '{args.dataset}'")
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
        print(f"teacher {args.teacher} on {teacher.device}, in {args.precision}", flush=True)
        StoreWriter(args.output_dir, plan, *rest)
    comm.synchronize()  # the manifest is there, and of this plan
    writer = StoreWriter(args.output_dir, plan, *rest)

    nothing = torch.zeros(0, 4), torch.zeros(0)
    regions = {i: proposals.get(i, nothing) for i in files}
    encoder = Encoder(teacher, args.batch_size)
    skip = args.unreadable == "skip"
    counts = {i: len(boxes) for i, (boxes, _) in regions.items()}

    def compute(ids):
        return to_host(list(encode_images(encoder, load_images(teacher, files, regions, ids, 0, skip))))

    missing = list(writer.missing())
    comm.synchronize()  # nobody writes before all have seen what is missing
    if comm.is_main_process() and not writer.complete:
        to_do = [i for _, ids in missing for i in ids]
        world = comm.get_world_size()
        work = describe_work(counts, teacher.width, args.dtype, compute, to_do)
        print(work + (f", for {world} processes together" if world > 1 else ""), flush=True)
    shards = missing[comm.get_rank() :: comm.get_world_size()]
    ids = [i for _, some in shards for i in some]
    images = load_images(teacher, files, regions, ids, args.num_workers, skip)
    with tqdm(total=len(ids), desc="store", unit="image", disable=not (comm.is_main_process() and ids)) as progress:
        for count in write_shards(writer, shards, encoder, images, regions):
            progress.update(count)
    comm.synchronize()
    if comm.is_main_process():
        manifest = writer.finish(counts)
        state = "store already complete, checksums correct, nothing written: " if writer.complete else ""
        print(f"{state}{count_of(manifest['regions'], 'region')} of {count_of(len(files), 'image')}: {args.output_dir}")
        if lost := manifest.get("unreadable"):
            shown = ", ".join(map(str, lost[:10])) + (", ..." if len(lost) > 10 else "")
            print(f"WARNING: {count_of(len(lost), 'image')} that CANNOT BE READ, without regions: image_id {shown}")
