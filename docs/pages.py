"""The pages of the site that are made from the sources when it is built (a hook of MkDocs, see mkdocs.yml): config keys
from ``vild/config.py``, every tool's ``--help``, the API by mkdocstrings, the notebook, and the pages that lie outside
``docs/``. Nothing of vild's own needs is imported: PyTorch is not there.
"""

import contextlib
import io
import json
import os
import posixpath
import re
import runpy
import sys
from pathlib import Path
from unittest.mock import MagicMock

from latex2mathml.converter import convert
from mkdocs.structure.files import File

REPOSITORY = Path(__file__).parent.parent
OUTSIDE = {  # file of the repository: page of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "datasets/README.md": "datasets.md",
    "tools/README.md": "tools.md",
    "configs/Glyphs/README.md": "objectives.md",
    "configs/LVIS/released/README.md": "released-checked.md",
}
NOTEBOOK = "tutorials/first-detection.ipynb"
PUBLIC = {  # of the API page, what people call and write against
    "Detect": ("inference.predictor.OpenVocabularyDetector", "inference.detections.Detections"),
    "Words": ("vocabulary.vocabulary.Vocabulary", "vocabulary.prompts.LearnedPrompts"),
    "Teacher": ("teacher.teacher.Teacher", "teacher.teacher.build_teacher"),
    "Store and proposals": (
        "store.store.EmbeddingStore", "store.store.StoreWriter", "store.store.StoredRegions", "data.proposals",
    ),
    "Data sets and configs": ("data.datasets", "config"),
    "Objectives": ("modeling.objectives.registry", "modeling.objectives.regions.RegionBatch"),
    "The paper's equations": ("modeling.losses", "modeling.fusion", "modeling.calibration"),
    "Evaluation": (
        "evaluation.evaluator", "evaluation.results", "evaluation.metrics", "evaluation.reliability",
        "evaluation.recall",
    ),
    "Training": ("engine.trainer.Trainer",),
    "Export and labels": ("export.write", "apps.label"),
}  # fmt: skip


def on_files(files, config):
    """Add the pages that no file of ``docs/`` holds."""
    pages = {page: (REPOSITORY / source).read_text() for source, page in OUTSIDE.items()}
    pages["reference/configuration.md"] = config_page((REPOSITORY / "vild/config.py").read_text())
    pages["reference/tools.md"] = tools_page()
    pages["reference/api.md"] = api_page()
    pages[NOTEBOOK.replace(".ipynb", ".md")] = notebook_page(json.loads((REPOSITORY / "docs" / NOTEBOOK).read_text()))
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as they are in the repository become links of the site; equations become MathML."""
    here = page.file.src_uri
    source = next((source for source, uri in OUTSIDE.items() if uri == here), f"docs/{here}")

    def link(match):
        text, target, anchor = match.groups()
        if "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        uri = OUTSIDE.get(path, path.removeprefix("docs/").replace(".ipynb", ".md"))
        if files.get_file_from_path(uri) is None:  # a file of the repository that is no page
            return text
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor or ''})"

    markdown = re.sub(r"\[([^]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)", link, markdown)
    markdown = re.sub(r"^```math\n(.*?)^```", lambda m: convert(m[1], display="block"), markdown, flags=re.M | re.S)
    return re.sub(r"\$`(.+?)`\$", lambda m: convert(m[1]), markdown)


def config_page(source: str) -> str:
    """Every key that ``add_vild_config`` sets, with its default and the comment above it."""
    lines = source[source.index("def add_vild_config") : source.index("def default_config")].splitlines()[3:]
    out, comment = ["# Configuration", "", CONFIG, ""], []
    for line in lines:
        line = line.strip()
        found = re.fullmatch(r"(node|cfg)\.(\S+) = (?:CfgNode\()?(.+?)\)?", line)
        if line.startswith("#"):
            comment.append(line.removeprefix("#").removeprefix(" "))
        elif not line:
            comment = []
        elif found:
            key = ("MODEL.VILD." if found[1] == "node" else "") + found[2]
            out += [f"## `{key}`", "", f"Default: `{found[3]}`", ""]
            if comment:
                out += ["```text", *comment, "```", ""]
            comment = []
    return "\n".join(out)


CONFIG = """Every key that vild adds to Detectron2's, and those of Detectron2 whose default it changes, as
`vild/config.py` has them. Set them in a YAML file or at the end of a command: `KEY VALUE ...`. Detectron2's own keys:
[its reference](https://detectron2.readthedocs.io/en/latest/modules/config.html#yaml-config-references)."""


def tools_page() -> str:
    """What each tool answers to ``--help``."""
    os.environ["COLUMNS"] = "100"
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools")]
    # run_onnx.py stands alone and imports these first
    sys.modules.update({name: MagicMock() for name in ("numpy", "onnxruntime", "PIL") if name not in sys.modules})
    out = ["# Every tool", "", "What each answers to `--help`. [By purpose, with examples](../../tools/README.md).", ""]
    for path in sorted([*(REPOSITORY / "tools").glob("*.py"), *(REPOSITORY / "datasets").glob("*.py")]):
        answer, argv = io.StringIO(), sys.argv
        sys.argv = [str(path), "--help"]
        try:
            with contextlib.redirect_stdout(answer), contextlib.suppress(SystemExit):
                runpy.run_path(str(path), run_name="__main__")
        finally:
            sys.argv = argv
        if "usage:" not in answer.getvalue():
            raise RuntimeError(f"{path} --help answered nothing")
        name = path.relative_to(REPOSITORY).as_posix()
        out += [f"## `{name}`", "", "```text", answer.getvalue().rstrip(), "```", ""]
    return "\n".join(out)


def api_page() -> str:
    """What mkdocstrings is to show."""
    out = ["# Python API", "", API, ""]
    for heading, names in PUBLIC.items():
        out += [f"## {heading}", "", *(line for name in names for line in (f"::: vild.{name}", ""))]
    return "\n".join(out)


API = """`from vild import OpenVocabularyDetector, Vocabulary, EmbeddingStore, Teacher, build_teacher` has what most
programs need; the rest is imported from where it stands here. Boxes are xyxy in absolute float pixels of the original
image, embeddings have unit length, images are BGR for detectors (Detectron2's) and RGB for teachers."""


def notebook_page(notebook: dict) -> str:
    """Its cells, as Markdown; a test runs them (tests/test_commands.py)."""
    out = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        out += [text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```", ""]
    return "\n".join(out)
