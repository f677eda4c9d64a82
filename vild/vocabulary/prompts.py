"""Prompt templates and text clean-up, as in the released ViLD code (paper, appendix; arXiv 2104.13921), and prompts
that were learned.

A template holds ``{}`` for the name and ``{article}`` for "a" or "an".
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vild.utils.errors import UserError
from vild.utils.files import write_tensors
from vild.utils.untrusted import open_tensors, parse_json, refused_as

_ADJECTIVES_OF_PHOTO = (
    "good", "bad", "bright", "dark", "low resolution", "cropped", "close-up", "jpeg corrupted", "blurry",
    "pixelated", "black and white",
)  # fmt: skip
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
    """A prompt set whose words were learned (``vild/teacher/prompt_learning.py``): "[v_1] ... [v_L] name.".

    File: one ``.safetensors`` with ``context``; everything else as JSON in its metadata.

    Attributes:
        words: what the context began as; their L tokens hold its places in a prompt.
        context: float32 [L, W], in place of the token embeddings (width W) of the words.
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
        """Of all that an embedding depends on beside teacher and name (8 hex digits)."""
        content = self.words.encode() + self.context.numpy().astype("<f4").tobytes()
        return hashlib.sha256(content).hexdigest()[:8]

    @property
    def templates(self) -> list[str]:
        return [f"{self.words} {{}}."]

    def state(self) -> dict:
        """Plain values, for a vocabulary's metadata; ``from_state`` is its inverse."""
        return {**vars(self), "context": self.context.tolist()}

    @classmethod
    def from_state(cls, state: dict) -> LearnedPrompts:
        """ValueError, or TypeError, for a state of another form."""
        made = cls(**{**state, "context": torch.as_tensor(state["context"])})
        if made.context.ndim != 2 or made.context.dtype != torch.float32 or not made.context.isfinite().all():
            raise ValueError("context is no matrix of finite numbers")
        if not isinstance(made.words, str) or not all(isinstance(v, dict) for v in (made.fingerprint, made.record)):
            raise ValueError("words, fingerprint or record are of another kind")
        return made

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        rest = {k: v for k, v in vars(self).items() if k != "context"}
        write_tensors(path, {"context": self.context}, {"vild_prompts": json.dumps(rest)})

    @classmethod
    def load(cls, path: str | Path) -> LearnedPrompts:
        """UserError for another file."""
        if not Path(path).is_file():
            raise UserError(f"prompt set: {path} does not exist; tools/learn_prompts.py makes one")
        with refused_as(f"prompt set: {path} is not a file of tools/learn_prompts.py"), open_tensors(path) as file:
            rest = parse_json(file.metadata()["vild_prompts"])
            return cls.from_state({**rest, "context": file.get_tensor("context")})


def find_prompts(prompts: str | Path | LearnedPrompts) -> list[str] | LearnedPrompts:
    """A prompt set by its name (its templates) or its file.

    Raises:
        UserError: neither.
    """
    if isinstance(prompts, LearnedPrompts):
        return prompts
    if prompts in PROMPT_SETS:
        return PROMPT_SETS[prompts]
    if str(prompts).endswith(".safetensors"):
        return LearnedPrompts.load(prompts)
    known = ", ".join(PROMPT_SETS)
    raise UserError(f"vocabulary: prompt set '{prompts}' is not one of {known}, nor a .safetensors of learned prompts")


def clean_name(name: str) -> str:
    """ "_" to space, "/" to " or ", lower case, no dot at the end."""
    return name.replace("_", " ").replace("/", " or ").lower().strip().removesuffix(".")


def article(name: str) -> str:
    """ "an" before a, e, i, o, u, else "a"."""
    return "an" if name[:1] in "aeiou" else "a"


def fill(templates: list[str], name: str) -> list[str]:
    """The prompts for one name. "This is " goes before a text that starts with "a" or "the" [released code]."""
    name = clean_name(name)
    texts = [t.replace("{article}", article(name)).replace("{}", name) for t in templates]
    if len(templates) == 1:
        return texts
    return [f"This is {t}" if t.startswith(("a", "the")) else t for t in texts]
