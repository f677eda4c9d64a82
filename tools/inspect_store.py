#!/usr/bin/env python3
"""Show, verify, repair and merge embedding stores.

tools/inspect_store.py output/store                             # teacher, sizes, regions per image
tools/inspect_store.py output/store --verify                    # read every byte; exit status 1 if one is broken
tools/inspect_store.py output/store --repair                    # remove broken shards; then build again, only those
tools/inspect_store.py output/store --coverage lvis_v1_train    # which images of a data set are missing
tools/inspect_store.py --merge output/a output/b --output-dir output/ab
"""

import sys
from pathlib import Path

from vild.utils.command_line import add_shared, make_parser
from vild.utils.errors import UserError, count_of, one_line_errors


@one_line_errors
def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("store", nargs="?", type=Path, metavar="STORE", help="a store's folder")
    parser.add_argument("--verify", action="store_true", help="check checksums, unit length and boxes of every shard")
    parser.add_argument("--repair", action="store_true", help="remove broken shards and mark the store unfinished")
    parser.add_argument("--coverage", metavar="DATASET", help="count the images of this data set that are missing")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="STORE", help="merge stores of one teacher")
    add_shared(parser, "--output-dir", note="the merged store")
    args = parser.parse_args()
    if bool(args.store) == bool(args.merge) or bool(args.merge) != bool(args.output_dir):
        raise UserError("give one STORE to look at, or --merge STORE STORE ... --output-dir STORE")
    if args.merge and len(args.merge) < 2:
        raise UserError("--merge takes two stores or more")

    from vild.data import datasets
    from vild.store import maintenance
    from vild.store.manifest import read_manifest
    from vild.store.merge import merge
    from vild.utils.lock import only_writer

    if args.merge:
        with only_writer(args.output_dir):
            merge(args.merge, args.output_dir)
        print(maintenance.summarise(args.output_dir))
        return
    if args.repair:
        read_manifest(args.store)  # a mistyped name must not create a folder
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
        print("verified: every shard is intact")
    if args.coverage:
        ids = [record["image_id"] for record in datasets.load_dicts(args.coverage)]
        missing, empty = maintenance.coverage(args.store, ids)
        print(f"'{args.coverage}': {count_of(len(ids), 'image')}, {len(missing):,} missing, {empty:,} without a region")
        if missing:
            print("missing: " + ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else ""))


if __name__ == "__main__":
    main()
