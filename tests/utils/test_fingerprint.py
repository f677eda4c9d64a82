"""A teacher by its fingerprint, and by the name under which a config looks for it."""

import pytest

from vild.utils.fingerprint import is_named

CLIP = {"name": "ViT-B-32-quickgelu", "pretrained": "openai"}


@pytest.mark.parametrize(
    ("fingerprint", "name", "pretrained", "may_be"),
    [
        (CLIP, "ViT-B-32-quickgelu", "openai", True),
        (CLIP, "RN50", "openai", False),
        (CLIP, "ViT-B-32-quickgelu", "laion400m_e32", False),
        (CLIP, "local-dir:detector/teacher", "", True),  # a saved detector's own copy
        ({"name": "local-dir:a", "pretrained": ""}, "local-dir:moved/a", "", True),
        ({"name": "local-dir:a", "pretrained": ""}, "ViT-B-32-quickgelu", "openai", False),
        ({}, "ViT-B-32-quickgelu", "openai", True),  # imported
    ],
)
def test_a_config_may_name_a_vocabularys_teacher(fingerprint, name, pretrained, may_be):
    assert is_named(fingerprint, name, pretrained) == may_be
