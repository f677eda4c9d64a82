"""Prompt templates and text clean-up, as in the released ViLD code (paper, appendix; arXiv 2104.13921).

A template holds ``{}`` for the name and ``{article}`` for "a" or "an".
"""

from __future__ import annotations

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
