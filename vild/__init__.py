"""vild: open-vocabulary object detection by distillation (ViLD, arXiv 2104.13921), on Detectron2."""

__version__ = "0.1.0"
