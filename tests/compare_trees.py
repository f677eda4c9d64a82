#!/usr/bin/env python3
"""Show that a refactor changes no number: run the method in two checkouts and compare the results to the last bit.

    tests/compare_trees.py ../vild-before . --output-dir output/compare

In each checkout, with one seed and one thread, on a small built-in world: teacher, vocabulary, proposals, store, the
proposal network, every variant of the detector, and tools/evaluate.py on a results file. Compared are all logged
losses, all metrics, and the bytes of store, proposals and vocabulary. A checkout that has finished is not run again.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from vild.utils.command_line import make_parser

VARIANTS = ("text", "image", "vild", "ensemble")
TIMES = ("time", "data_time", "eta_seconds", "rank_data_time")  # logged, but differ from run to run
TEACHER, VOCABULARY, STORE, PROPOSALS = "local-dir:teacher", "vocabulary.safetensors", "store", "proposals.safetensors"


class Checkout:
    """Runs the tools of one checkout in an output folder. Flags that versions spell differently are looked up."""

    def __init__(self, tree: Path, folder: Path):
        self.tree, self.folder = tree.resolve(), folder.resolve()
        self.environment = {
            **os.environ, "PYTHONPATH": str(self.tree), "DETECTRON2_DATASETS": "datasets", "VILD_CACHE": "cache",
            "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GIT_DIR": "/nowhere",  # files record the commit
        }  # fmt: skip

    def run(self, tool: str, *arguments: object, output_dir: str = "") -> None:
        """``output_dir``: passed as --output-dir, or as --output where the tool does not know the former."""
        if output_dir:
            flag = "--output-dir" if '"--output-dir"' in (self.tree / "tools" / tool).read_text() else "--output"
            arguments += (flag, output_dir)
        command = [sys.executable, str(self.tree / "tools" / tool), *map(str, arguments)]
        print(self.tree.name, tool, *arguments[:2], flush=True)
        done = subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")

    def train(self, name: str, iterations: int, *overrides: object) -> None:
        self.run(
            "train_net.py", "--config-file", self.tree / f"configs/Glyphs/{name}.yaml", "--num-gpus", 0,
            "OUTPUT_DIR", name, "SOLVER.MAX_ITER", iterations, "MODEL.VILD.VOCABULARY", VOCABULARY,
            "MODEL.VILD.STORE", STORE, "MODEL.VILD.TEACHER.NAME", TEACHER,
            "MODEL.VILD.TEMPERATURE", 0.01, *overrides,  # the default has changed
        )  # fmt: skip

    def run_method(self, iterations: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run("make_glyphs.py", "--seed", 0, "--fraction", 0.05, "--sets", "train", "dev", "val")
        self.run("train_glyph_teacher.py", "--seed", 0, "--steps", 20, output_dir="teacher")
        words = (
            "--vocabulary" if '"--vocabulary"' in (self.tree / "tools/build_vocabulary.py").read_text() else "--dataset"
        )
        self.run("build_vocabulary.py", words, "glyphs_train", "--teacher", TEACHER, "--output", VOCABULARY)
        self.train("proposals", iterations)
        weights = ["MODEL.WEIGHTS", "proposals/model_final.pth"]
        opts = [] if '"opts"' in (self.tree / "tools/make_proposals.py").read_text() else ["--opts"]
        self.run(
            "make_proposals.py", "--config-file", self.tree / "configs/Glyphs/proposals.yaml",
            "--dataset", "glyphs_train", "--output", PROPOSALS, *opts, *weights,
        )  # fmt: skip
        store = ("--dataset", "glyphs_train", "--proposals", PROPOSALS, "--teacher", TEACHER)
        self.run("build_teacher_store.py", *store, output_dir=STORE)
        for name in VARIANTS:
            self.train(name, iterations, *weights)
        self.run(
            "evaluate.py", "--protocol", "lvis", "--gt", "datasets/glyphs/annotations/lvis_val.json",
            "--results", "vild/inference/coco_instances_results.json", "--iou-type", "bbox", "segm",
            output_dir="evaluated",
        )  # fmt: skip
        (self.folder / "finished").touch()


def read_findings(folder: Path) -> dict[str, str]:
    """What has to be equal, as JSON texts (in which NaN equals NaN)."""
    found: dict[str, object] = {}
    for name in ("proposals", *VARIANTS):
        for record in map(json.loads, (folder / name / "metrics.json").read_text().splitlines()):
            found |= {
                f"{name}/{record['iteration']}/{k}": v for k, v in record.items() if k not in (*TIMES, "iteration")
            }
        metrics = folder / name / "inference/vild_metrics.json"
        if metrics.exists():
            found |= {f"{name}/metrics/{k}": v for k, v in json.loads(metrics.read_text()).items()}
    found["evaluated/per_class"] = json.loads((folder / "evaluated/per_class.json").read_text())
    found |= {f"evaluated/{k}": v for k, v in json.loads((folder / "evaluated/vild_metrics.json").read_text()).items()}
    # Weights record the commit that trained them; proposals and store record hashes of the files they were made from
    own = {
        hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]: name
        for name in ("proposals/model_final.pth", PROPOSALS)
    }
    for path in [*sorted((folder / STORE).glob("*")), folder / PROPOSALS, folder / VOCABULARY]:
        content = path.read_bytes()
        for short, name in own.items():
            content = content.replace(short.encode(), name.encode())
        found[f"bytes of {path.relative_to(folder)}"] = hashlib.sha256(content).hexdigest()
    return {key: json.dumps(value, sort_keys=True) for key, value in found.items()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("trees", nargs=2, type=Path, metavar="CHECKOUT", help="before and after the change")
    parser.add_argument("--iterations", type=int, default=60, help="of each training (60)")
    parser.add_argument("--output-dir", type=Path, default=Path("output/compare"), help="(output/compare)")
    args = parser.parse_args()
    found = []
    for tree, name in zip(args.trees, "ab", strict=True):
        checkout = Checkout(tree, args.output_dir / name)
        if not (checkout.folder / "finished").exists():
            checkout.run_method(args.iterations)
        found.append(read_findings(checkout.folder))
    a, b = found
    differing = sorted(key for key in a.keys() & b.keys() if a[key] != b[key])
    for key in differing[:20]:
        print(f"{key}: " + " and ".join(side[key][:100] for side in found))
    if alone := sorted(a.keys() ^ b.keys()):
        print(f"only one of the checkouts has {len(alone)}: {', '.join(alone[:5])} ...")
    print(f"{len(a.keys() & b.keys())} findings compared, {len(differing)} differ")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
