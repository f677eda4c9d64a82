#!/usr/bin/env python3
"""What an embedding store holds; whether it is whole; repair, merge and coverage.

tools/inspect_store.py output/store                             # teacher, sizes, regions an image
tools/inspect_store.py output/store --verify                    # reads every byte; exit status 1 if one is broken
tools/inspect_store.py output/store --repair                    # removes what is broken: build again, only that
tools/inspect_store.py output/store --coverage lvis_v1_train    # which images of a data set are missing
tools/inspect_store.py --merge output/a output/b --output output/ab
"""

import argparse
import sys
from pathlib import Path

from vild.data import datasets
from vild.store import maintenance
from vild.store.manifest import read_manifest
from vild.store.merge import merge
from vild.utils.errors import UserError, one_line_errors
from vild.utils.lock import only_writer


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", type=Path)
    parser.add_argument("--verify", action="store_true", help="checksums, unit length, boxes, of every shard")
    parser.add_argument("--repair", action="store_true", help="remove broken shards and mark the store unfinished")
    parser.add_argument("--coverage", metavar="DATASET", help="a registered data set")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="STORE", help="stores of one teacher")
    parser.add_argument("--output", type=Path, help="the merged store")
    args = parser.parse_args()
    if bool(args.store) == bool(args.merge) or bool(args.merge) != bool(args.output):
        raise UserError("give one STORE to look at, or --merge STORE STORE ... --output STORE")
    if args.merge:
        if len(args.merge) < 2:
            raise UserError("--merge takes two stores or more")
        with only_writer(args.output):
            merge(args.merge, args.output)
        print(maintenance.summarise(args.output))
        return
    if args.repair:
        read_manifest(args.store)  # a mistyped name makes no folder
        with only_writer(args.store, folder=True):
            lines = maintenance.repair(args.store)
        print("\n".join(lines) or f"store {args.store}: nothing is broken")
        if lines:
            print("removed; run the tools/build_teacher_store.py command of this store again: it computes only these")
        return
    broken = 0
    if args.verify:
        for _, line in maintenance.verify(args.store):
            print(line)
            broken += 1
        if broken:
            sys.exit(1)
    print(maintenance.summarise(args.store))
    if args.verify:
        print("verified: every shard is whole")
    if args.coverage:
        ids = [record["image_id"] for record in datasets.load_dicts(args.coverage)]
        missing, empty = maintenance.coverage(args.store, ids)
        print(f"'{args.coverage}': {len(ids):,} images, {len(missing):,} missing, {empty:,} without a region")
        if missing:
            print("missing: " + ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else ""))


if __name__ == "__main__":
    main()
