"""Prompt templates and name normalisation of the released ViLD code (paper, appendix; arXiv 2104.13921), and learned
prompts. A template has ``{}`` for the name and optionally ``{article}`` for "a" or "an"."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from vild.utils.errors import UserError
from vild.utils.files import write_tensors
from vild.utils.untrusted import open_tensors, parse_json, refused_as

_ADJECTIVES_OF_PHOTO = (
    *("good", "bad", "bright", "dark", "low resolution", "cropped"),
    *("close-up", "jpeg corrupted", "blurry", "pixelated", "black and white"),
)
_ADJECTIVES_OF_THING = ("nice", "cool", "weird", "small", "large", "clean", "dirty", "hard to see")
_MATERIALS = ("plastic", "toy", "plushie", "cartoon")


def vild_templates() -> list[str]:
    """The 63 templates of the paper."""
    templates = ["There is {article} {} in the scene.", "There is the {} in the scene."]
    templates += [f"a photo of {which} {{}} in the scene." for which in ("{article}", "the", "one")]
    templates += [f"itap of {which} {{}}." for which in ("{article}", "my", "the")]
    templates += [f"a photo of {which} {{}}." for which in ("{article}", "my", "the", "one", "many")]
    for adjective in _ADJECTIVES_OF_PHOTO:
        templates += [f"a {adjective} photo of {{article}} {{}}.", f"a {adjective} photo of the {{}}."]
    for adjective in _ADJECTIVES_OF_THING:
        templates += [f"a photo of a {adjective} {{}}.", f"a photo of the {adjective} {{}}."]
    for material in _MATERIALS:
        templates += [f"a {material} {{}}.", f"the {material} {{}}."]
    templates += ["an embroidered {}.", "the embroidered {}.", "a painting of the {}.", "a painting of a {}."]
    return templates


PROMPT_SETS = {
    "vild": vild_templates(),
    "photo": ["a photo of {article} {}."],
    "name": ["{}"],
}


@dataclass(frozen=True, eq=False)
class LearnedPrompts:
    """Prompts with learned context vectors, "[v_1] ... [v_L] name." (``vild/teacher/prompt_learning.py``).

    File: a ``.safetensors`` with ``context``; everything else is JSON in its metadata.

    Attributes:
        words: initial context words; their L tokens mark the positions of the context in a prompt.
        context: float32 [L, W], replaces the words' token embeddings (width W).
        fingerprint: of the teacher it was learned for.
        record: what it was learned from.
    """

    words: str
    context: Tensor
    fingerprint: dict
    record: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f"learned, {len(self.context)} vectors, {self.hash}"

    @property
    def hash(self) -> str:
        """8 hex digits of the SHA-256 of words and context."""
        content = self.words.encode() + self.context.numpy().astype("<f4").tobytes()
        return hashlib.sha256(content).hexdigest()[:8]

    @property
    def templates(self) -> list[str]:
        return [f"{self.words} {{}}."]

    def state(self) -> dict:
        """Plain values for a vocabulary's metadata; inverse of ``from_state``."""
        return {**vars(self), "context": self.context.tolist()}

    @classmethod
    def from_state(cls, state: dict) -> LearnedPrompts:
        """Inverse of ``state``; ValueError or TypeError for an invalid state."""
        made = cls(**{**state, "context": torch.as_tensor(state["context"])})
        if made.context.ndim != 2 or made.context.dtype != torch.float32 or not made.context.isfinite().all():
            raise ValueError("context is not a matrix of finite float32 numbers")
        if not isinstance(made.words, str) or not all(isinstance(v, dict) for v in (made.fingerprint, made.record)):
            raise ValueError("words, fingerprint or record have the wrong type")
        return made

    def save(self, path: str | Path) -> None:
        """Write the file atomically."""
        rest = {k: v for k, v in vars(self).items() if k != "context"}
        write_tensors(path, {"context": self.context}, {"vild_prompts": json.dumps(rest)})

    @classmethod
    def load(cls, path: str | Path) -> LearnedPrompts:
        """Read a file; UserError if it is not one of tools/learn_prompts.py."""
        if not Path(path).is_file():
            raise UserError(f"prompt set: {path} does not exist; tools/learn_prompts.py makes one")
        with refused_as(f"prompt set: {path} is not a file of tools/learn_prompts.py"), open_tensors(path) as file:
            rest = parse_json(file.metadata()["vild_prompts"])
            return cls.from_state({**rest, "context": file.get_tensor("context")})


def find_prompts(prompts: str | Path | LearnedPrompts) -> list[str] | LearnedPrompts:
    """The templates of a built-in prompt set, or learned prompts from their file; UserError for anything else."""
    if isinstance(prompts, LearnedPrompts):
        return prompts
    if prompts in PROMPT_SETS:
        return PROMPT_SETS[prompts]
    if str(prompts).endswith(".safetensors"):
        return LearnedPrompts.load(prompts)
    known = ", ".join(PROMPT_SETS)
    raise UserError(f"vocabulary: prompt set '{prompts}' is not one of {known}, nor a .safetensors file")


@lru_cache(maxsize=1 << 16)  # of the same names many times over
def clean_name(name: str) -> str:
    """Normalise a name: "_" to space, "/" to " or ", lower case, no trailing dot."""
    return name.replace("_", " ").replace("/", " or ").lower().strip().removesuffix(".")


def article(name: str) -> str:
    """ "an" before a, e, i, o, u, else "a"."""
    return "an" if name[:1] in "aeiou" else "a"


def fill(templates: list[str], name: str) -> list[str]:
    """The prompts for a name. Texts that start with "a" or "the" are prefixed with "This is " [released code]."""
    name = clean_name(name)
    texts = [t.replace("{article}", article(name)).replace("{}", name) for t in templates]
    if len(templates) == 1:
        return texts
    return [f"This is {t}" if t.startswith(("a", "the")) else t for t in texts]
