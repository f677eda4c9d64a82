"""Open-vocabulary object detection by distillation (ViLD, arXiv 2104.13921), on Detectron2.

    from vild import OpenVocabularyDetector

    detector = OpenVocabularyDetector.from_pretrained("vild-r50-ensemble")  # or a folder, or "hf-hub:OWNER/NAME"
    found = detector("photo.jpg", "umbrella | parasol, chess knight")
    print(found)  # a line for each detection; also found.draw(), found.save("drawn.jpg"), found.to_pandas()

``help(vild.OpenVocabularyDetector)`` says the rest. Beside it there are ``Vocabulary`` (words in a teacher's space),
``Teacher`` and ``build_teacher`` (CLIP, say), and ``EmbeddingStore`` (what a teacher says about regions of images).
"""

import sys
from importlib import import_module

__version__ = "0.1.0"

# Imported on first access: `import vild` itself needs neither torch nor Detectron2
_PUBLIC = {
    "EmbeddingStore": "vild.store.store",
    "OpenVocabularyDetector": "vild.inference.predictor",
    "Teacher": "vild.teacher.teacher",
    "Vocabulary": "vild.vocabulary.vocabulary",
    "build_teacher": "vild.teacher.teacher",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vild' has no attribute '{name}'")
    if not sys.warnoptions:
        from vild.utils.errors import silence_known_warnings

        silence_known_warnings()  # four lines of Detectron2's and PyTorch's before the first detection
    try:
        return getattr(import_module(_PUBLIC[name]), name)
    except ImportError as error:
        from vild.utils.errors import NO_DETECTRON2, is_detectron2_missing

        if is_detectron2_missing(error):
            raise ImportError(NO_DETECTRON2) from None
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
