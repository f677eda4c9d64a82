#!/usr/bin/env python3
"""Install Detectron2 for the Python that runs this script.

Detectron2 has no release on the package index. In this order (``--source auto``):

1. keep a Detectron2 that can be imported already;
2. ``official``: build the official source at a pinned commit (needs git, a compiler, the network);
3. ``index``: take the wheel `sal-detectron2` from the package index (upstream's Python files of 2024 under
   another name), check its hash, drop its compiled ``_C`` (built for another Python) and install the rest.
   This needs no compiler, but lacks rotated boxes, deformable convolution and the fast COCO evaluator.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OFFICIAL_URL = "https://github.com/facebookresearch/detectron2.git"
OFFICIAL_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"  # June 2026
INDEX_NAME, INDEX_VERSION = "sal-detectron2", "0.7.2"
INDEX_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def installed() -> str | None:
    """The folder of the Detectron2 that a fresh process imports, or None."""
    code = "import detectron2.modeling, detectron2; print(detectron2.__path__[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else None


def run(command: list[str], what: str, timeout: float) -> None:
    """Run a command; RuntimeError with its last line if it fails or outlasts ``timeout`` seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except FileNotFoundError as error:
        raise RuntimeError(f"{what}: {error.filename} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{what}: not finished after {timeout:.0f} s") from error
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise RuntimeError(f"{what}: {lines[-1] if lines else f'exit status {done.returncode}'}")


def install_official() -> None:
    """Build the official source at the pinned commit."""
    run(["git", "ls-remote", "--exit-code", OFFICIAL_URL, "HEAD"], "the official source is out of reach", 60)
    command = [*PIP, "install", "--no-build-isolation", f"git+{OFFICIAL_URL}@{OFFICIAL_COMMIT}"]
    run(command, "the official source does not build", 3600)


def pure_python_wheel(wheel: Path, folder: Path) -> Path:
    """Rewrite the index's wheel without its compiled files and tagged for any Python; returns the new file."""
    target = folder / f"{INDEX_NAME.replace('-', '_')}-{INDEX_VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith(".so"):
                continue
            if item.filename.endswith(".dist-info/WHEEL"):
                data = re.sub(rb"Tag: .*", b"Tag: py3-none-any", data)
            elif item.filename.endswith(".dist-info/RECORD"):  # hashes are optional in it: list the names
                names = [line.split(b",")[0] for line in data.splitlines() if b".so," not in line]
                data = b"".join(name + b",,\n" for name in names)
            new.writestr(item.filename, data)
    return target


def install_from_index() -> None:
    """Fetch the index's wheel, check its hash, install its pure-Python part."""
    with tempfile.TemporaryDirectory() as folder:
        options = "--no-deps --only-binary=:all: --python-version 3.10 --implementation cp --abi none --platform any"
        command = [*PIP, "download", *options.split(), "--dest", folder, f"{INDEX_NAME}=={INDEX_VERSION}"]
        run(command, "the package index does not serve Detectron2", 600)
        (wheel,) = Path(folder).glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != INDEX_SHA256:
            raise RuntimeError(f"{wheel.name}: sha256 is {digest}, expected {INDEX_SHA256}")
        command = [*PIP, "install", "--no-deps", str(pure_python_wheel(wheel, Path(folder)))]
        run(command, "pip does not install the rewritten wheel", 600)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message} (see --help)\n")
    parser.add_argument("--source", choices=["auto", "official", "index"], default="auto")
    source = parser.parse_args().source

    if source == "auto" and (where := installed()):
        print(f"detectron2: kept the one that imports, at {where}")
        return 0
    methods = {"official": install_official, "index": install_from_index}
    reasons = []
    for name in ["official", "index"] if source == "auto" else [source]:
        try:
            methods[name]()
        except RuntimeError as error:
            reasons.append(f"{name}: {error}")
            continue
        if where := installed():
            because = f" ({'; '.join(reasons)})" if reasons else ""
            print(f"detectron2: installed from the {name} source, at {where}{because}")
            return 0
        reasons.append(f"{name}: installed, but does not import")
    print(f"detectron2: not installed. {'; '.join(reasons)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
